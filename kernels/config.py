"""Which tiles a kernel runs with: a pure function of the chip and the problem's sizes.

Nothing is tuned at run time. The compile report (`python -m benchmarks.compile_report`) compiles
every row of the table ahead of time and shows the registers, spills and shared memory it takes;
`tests/kernels/test_compile_report.py` holds the table to that.
"""

from __future__ import annotations

from typing import NamedTuple


class Tiles(NamedTuple):
    """What a kernel is compiled for: head dims, padded to `BLOCK_D` and `BLOCK_DV`, and its tiles.

    `BLOCK_M` queries by `BLOCK_N` slots; `BLOCK_P` slots for a small prefix of its own (0: it has
    its part in the loop); how float32 products are made; warps of a program and stages of its loop;
    registers a thread may have (0: as many as the compiler thinks best for occupancy).
    """

    D: int
    D_V: int
    GROUP: int
    BLOCK_D: int
    BLOCK_DV: int
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_P: int
    PRECISION: str
    WARPS: int
    STAGES: int
    REGISTERS: int


class Chip(NamedTuple):
    """A kind of GPU: its processors, and what a program may use of shared memory, in bytes."""

    processors: int
    shared: int


CHIPS = {
    "sm80": Chip(108, 163 * 1024),  # A100
    "sm86": Chip(84, 99 * 1024),  # RTX 30 and 40, L4, L40; and RTX 50, whose limit is the same
    "sm90": Chip(132, 227 * 1024),  # H100, H200
    "sm100": Chip(148, 227 * 1024),  # B200
    "gfx942": Chip(304, 64 * 1024),  # MI300
    "interpreter": Chip(6, 2**30),
}
WIDTHS = (64, 128, 256)  # of the rows below: the wider of BLOCK_D and BLOCK_DV, at least 64
# (BLOCK_M, BLOCK_N, warps, stages) for each of WIDTHS. All of them compile without a spill on the
# newest Triton, and with no more than a dozen instructions' on the oldest; of those that do, these
# are the largest tiles that leave room for two stages.
# "decode16" is for up to 16 queries, "decode" for more. See benchmarks/results/compile-*.json.
HALF = {
    "sm80": {
        "forward": ((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 8, 2)),
        "dq": ((128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2)),
        "dkv": ((32, 128, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2)),
        "decode": ((64, 64, 8, 3), (64, 64, 8, 2), (32, 32, 8, 2)),
        "decode16": ((16, 64, 4, 3), (16, 64, 4, 2), (16, 64, 8, 2)),
    },
    "sm86": {
        "forward": ((128, 64, 8, 3), (128, 64, 8, 2), (64, 32, 8, 2)),
        "dq": ((128, 64, 8, 2), (128, 32, 8, 2), (32, 32, 4, 2)),
        "dkv": ((32, 128, 8, 2), (64, 64, 8, 2), (16, 32, 8, 2)),
        "decode": ((64, 64, 8, 3), (64, 64, 8, 2), (16, 32, 8, 2)),
        "decode16": ((16, 64, 4, 3), (16, 64, 8, 2), (16, 64, 8, 2)),
    },
    # dk and dv want BLOCK_M = 64 for the tensor cores' sake, but spill with it at 128. At 256 they
    # are launched apart, and 16 fits beside the BLOCK_N = 128 that 8 warps need for wgmma.
    "sm90": {
        "forward": ((128, 64, 8, 3), (128, 64, 8, 3), (128, 16, 8, 2)),
        "dq": ((128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2)),
        "dkv": ((64, 128, 8, 2), (32, 128, 8, 2), (16, 128, 8, 2)),
        "decode": ((64, 64, 4, 3), (64, 64, 8, 3), (64, 32, 8, 2)),
        "decode16": ((16, 64, 4, 2), (16, 64, 4, 3), (16, 64, 8, 2)),
    },
    "sm100": {
        "forward": ((128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
        "dq": ((128, 64, 8, 2), (64, 64, 8, 2), (128, 32, 8, 2)),
        "dkv": ((32, 128, 8, 2), (32, 64, 8, 2), (16, 32, 8, 2)),
        "decode": ((64, 64, 8, 3), (64, 64, 8, 3), (64, 32, 8, 1)),
        "decode16": ((16, 64, 4, 2), (16, 64, 4, 3), (16, 64, 8, 2)),
    },
    # Four warps of 64 threads have 512 registers a thread, eight have 256.
    "gfx942": {
        "forward": ((128, 64, 8, 3), (128, 32, 4, 2), (64, 32, 4, 2)),
        "dq": ((128, 64, 8, 2), (64, 32, 4, 2), (16, 32, 4, 2)),
        "dkv": ((32, 64, 4, 2), (16, 64, 4, 2), (16, 32, 4, 2)),
        "decode": ((64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 1)),
        "decode16": ((16, 64, 4, 2), (16, 64, 4, 2), (16, 32, 4, 2)),
    },
}
# float32: twice the bytes, and products are three tf32 products, whose parts are registers too. At
# 256 only ieee products (no tensor cores) fit, as on AMD at any width.
FULL = {
    target: {
        "forward": ((64, 32, 8, 2), (16, 32, 8, 1), (16, 32, 8, 1)),
        "dq": ((32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
        "dkv": ((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
        "decode": ((32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
        "decode16": ((16, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
    }
    for target in HALF
} | {
    "gfx942": {
        "forward": ((64, 32, 8, 2), (16, 32, 8, 1), (16, 32, 4, 1)),
        "dq": ((32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 4, 1)),
        "dkv": ((32, 32, 4, 1), (16, 16, 8, 1), (16, 16, 4, 1)),
        "decode": ((32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
        "decode16": ((16, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
    }
}
INTERPRETED = (16, 16, 4, 1)  # small: few numbers then cover many tiles


def padded(width: int) -> int:
    """A head dim as the tensor cores take it: a power of two, at least 16."""
    return max(16, 1 << (width - 1).bit_length())


def tiles(
    target: str, direction: str, D: int, D_V: int, group: int, tokens: int, bits: int
) -> Tiles:
    """The tiles of a kernel.

    Args:
        target: a name of `CHIPS`.
        direction: "forward", "dq", "dkv", "decode" or "decode16".
        D: head dim of queries and keys.
        D_V: head dim of values.
        group: query heads for each key head.
        tokens: slots of a bank entry.
        bits: of a number, 16 or 32.
    """
    block_d, block_dv = padded(D), padded(D_V)
    width = WIDTHS.index(max(block_d, block_dv, WIDTHS[0]))
    if target == "interpreter":
        block_m, block_n, warps, stages = INTERPRETED
    else:
        table = HALF if bits == 16 else FULL
        block_m, block_n, warps, stages = table[target][direction][width]
    small = 0 < tokens <= max(16, block_n // 2)
    # There the compiler spills a few registers for an occupancy that is not worth it.
    spills = bits == 32 or (direction == "dkv" and width == 2)
    return Tiles(
        D=D,
        D_V=D_V,
        GROUP=group,
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_P=padded(tokens) if small else 0,
        PRECISION="tf32x3" if bits == 32 and width < 2 and target.startswith("sm") else "ieee",
        WARPS=warps,
        STAGES=stages,
        REGISTERS=255 if spills and target.startswith("sm") else 0,
    )


# Numbers that one accumulator sums, by their bits: as many as leave an error under their rounding.
# Tensor cores add 16 products at a time, and truncate: 2^-23 of the sum each time, at worst.
LONGEST_SUM = {16: 32768, 32: 4096}


def stretch(shape: Tiles, slots: int, bits: int) -> int | None:
    """Tiles of a stretch that one accumulator sums, or None: all of a row's slots are no more."""
    longest = LONGEST_SUM[bits]
    return None if slots <= longest else max(1, longest // shape.BLOCK_N)


WIDEST_PAIR = 256  # of BLOCK_D + BLOCK_DV: wider, the accumulators of dk and dv spill together


class Stretches(NamedTuple):
    """How sums over many queries are cut, so that one accumulator sums one stretch of them.

    A sequence tile's sum runs over `key_chunks` chunks of `key_chunk` queries of each head of the
    group. A stretch is so many chunks of the sum of a prefix tile, or of a sequence tile.
    """

    key_chunks: int
    key_chunk: int
    prefix_units: int
    key_units: int


class Plan(NamedTuple):
    """How dk and dv are cut: programs, parts of each sum, and the queries a part is counted in.

    A prefix tile's sum runs over `chunks` chunks of `chunk` queries of each of its rows and heads.
    Without `stretches` no part is too long for one accumulator.
    """

    prefix_programs: int
    prefix_splits: int
    key_programs: int
    key_splits: int
    chunks: int
    chunk: int
    stretches: Stretches | None


def plan(
    target: str,
    shape: Tiles,
    bank_tiles: int,
    bank_rows: int,
    row_queries: int,
    key_tiles: int,
    bits: int,
) -> Plan:
    """Cut the sums over queries so that no program is much longer than its share of the chip.

    Args:
        target: the chip.
        shape: the tiles of "dkv".
        bank_tiles: prefix tiles, of all heads and bank entries.
        bank_rows: rows that may share a bank entry.
        row_queries: queries of the longest row.
        key_tiles: tiles of the sequence's slots, of all heads and rows.
        bits: of a number, 16 or 32.
    """
    processors, longest = CHIPS[target].processors, LONGEST_SUM[bits]
    wanted = -(-2 * processors // max(1, bank_tiles))
    chunks = max(1, min(-(-wanted // (bank_rows * shape.GROUP)), -(-row_queries // shape.BLOCK_M)))
    chunks = max(chunks, -(-row_queries // longest))
    chunk = _chunk(row_queries, chunks, shape)
    units = chunks * bank_rows * shape.GROUP
    prefix_splits = max(1, min(wanted, units))
    key_splits = max(1, min(processors // max(1, key_tiles), shape.GROUP))
    stretches = None
    most = max(-(-units // prefix_splits) * chunk, -(-shape.GROUP // key_splits) * row_queries)
    if most > longest:
        key_chunks = -(-row_queries // longest)
        key_chunk = _chunk(row_queries, key_chunks, shape)
        stretches = Stretches(
            key_chunks, key_chunk, max(1, longest // chunk), max(1, longest // key_chunk)
        )
    return Plan(
        bank_tiles * prefix_splits,
        prefix_splits,
        key_tiles * key_splits,
        key_splits,
        chunks,
        chunk,
        stretches,
    )


def _chunk(queries: int, chunks: int, shape: Tiles) -> int:
    """Queries of each of so many chunks of whole tiles."""
    return -(-queries // (chunks * shape.BLOCK_M)) * shape.BLOCK_M


class DecodePlan(NamedTuple):
    """Programs of a decode step, and the parts into which each source's slots are split."""

    prefix_programs: int
    prefix_splits: int
    key_programs: int
    key_splits: int


DECODE_QUERIES = 64  # of one row and key head: no more, or most would wait for the same keys
DECODE_KEYS = 128  # under that the second launch costs more than splitting wins
SHORTEST_SPLIT = 256  # slots


def is_decode(queries: int, keys: int) -> bool:
    """Whether so few queries (of one row and key head) meet so many keys that keys are split."""
    return queries <= DECODE_QUERIES and keys >= DECODE_KEYS


def decode_plan(
    target: str,
    shape: Tiles,
    row_heads: int,
    queries: int,
    packed_rows: int,
    prefix_slots: int,
    keys: int,
    bits: int,
) -> DecodePlan:
    """Split both sources into parts of about equal length, enough of them to fill the chip.

    No part is longer than one accumulator should sum.

    Args:
        target: the chip.
        shape: the tiles of "decode".
        row_heads: rows times key heads.
        queries: of one row and key head.
        packed_rows: rows whose queries share a prefix program's tiles.
        prefix_slots: slots of a bank entry; 0 if there is no entry.
        keys: slots of a row's sequence.
        bits: of a number, 16 or 32.
    """
    prefix_tiles = -(-queries * packed_rows // shape.BLOCK_M) * (row_heads // packed_rows)
    key_tiles = -(-queries // shape.BLOCK_M) * row_heads
    slots = prefix_tiles * prefix_slots + key_tiles * keys
    length = max(SHORTEST_SPLIT, slots // (4 * CHIPS[target].processors))
    length = min(length, LONGEST_SUM[bits])
    prefix_splits, key_splits = -(-prefix_slots // length), -(-keys // length)
    return DecodePlan(
        prefix_tiles * prefix_splits, prefix_splits, key_tiles * key_splits, key_splits
    )
