"""Where a row lies, and which tiles its queries and slots see of each other.

Notation: a *slot* is a place in one source of keys, the prefix or the sequence; a *row* is a batch
row, or a segment when packed. Sequence slot `j` is at position `j`; prefix slot `j` of a row whose
entry has `n` tokens is at `start + j - n`. `key_interval` says what a query sees; `visible`, the
mask of an element, and the spans, which choose tiles, both come from it. Everything works on
scalars (for a tile) and on tensors of any broadcastable shapes (for elements).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from prefixattn.kernels.tile import wide

FURTHEST = tl.constexpr(2**30)  # further than any slot or query


class Where(NamedTuple):
    """The tensors that say where rows lie; None where they are not used.

    `own_entry` is 1 if every row has its own bank entry without an index; `offset_stride` is 0 for
    a single `query_offsets`.
    """

    cu_seqlens_q: Any
    cu_seqlens_k: Any
    key_start: Any
    key_length: Any
    query_offsets: Any
    offset_stride: Any
    prefix_index: Any
    prefix_lengths: Any
    own_entry: Any


class Row(NamedTuple):
    """Where a row lies: its number, batch row, first query and key in it, counts, bank entry.

    Its sequence slots in use are `start <= j < stop`, its prefix slots `0 <= j < tokens` of `P`;
    query 0 is at position `offset`, and sees in its window positions from `oldest` on. Both are at
    most `FURTHEST` from 0, so that sums with slots fit in 32 bits; `beyond` is what the offset was
    more than that, in float32.
    """

    number: Any
    batch: Any
    first_query: Any
    queries: Any
    first_key: Any
    start: Any
    stop: Any
    offset: Any
    oldest: Any
    beyond: Any
    tokens: Any
    entry: Any
    P: Any


class Span(NamedTuple):
    """Tiles `first <= t < stop` are seen; of these `full <= t < rest` wholly, without a mask."""

    first: Any
    full: Any
    rest: Any
    stop: Any


class Spans(NamedTuple):
    """A tile of queries' spans of the prefix and of the sequence."""

    prefix: Any
    sequence: Any


@triton.jit
def locate(where, how, row, rows, M, N, P, query_offset):
    """The `Row` of a number, scalar or tensor; one past the last row has no keys and no prefix."""
    inside = row < rows
    nothing = row * 0
    batch, first_query, first_key = row, nothing, nothing
    queries, start, stop = nothing + M, nothing, tl.where(inside, nothing + N, 0)
    if where.cu_seqlens_q is not None:
        batch = nothing
        first_query = tl.load(where.cu_seqlens_q + row).to(tl.int32)
        first_key = tl.load(where.cu_seqlens_k + row).to(tl.int32)
        queries = tl.load(where.cu_seqlens_q + row + 1, mask=inside, other=M).to(tl.int32)
        queries -= first_query
        stop = tl.load(where.cu_seqlens_k + row + 1, mask=inside, other=0).to(tl.int32) - first_key
        stop = tl.maximum(stop, 0)
    if where.query_offsets is not None:
        place = where.query_offsets + row * where.offset_stride
        offset = tl.load(place, mask=inside, other=0)
    elif query_offset is not None:
        offset = nothing + query_offset
    else:
        offset = stop - queries
    if where.key_start is not None:
        start = tl.load(where.key_start + row, mask=inside, other=0).to(tl.int32)
    if where.key_length is not None:
        stop = tl.load(where.key_length + row, mask=inside, other=0).to(tl.int32)
    entry = nothing
    if where.prefix_index is not None:
        entry = tl.load(where.prefix_index + row, mask=inside, other=-1).to(tl.int32)
    elif where.own_entry is not None:
        entry = row
    tokens = tl.where(inside & (entry >= 0), nothing + P, 0)
    if where.prefix_lengths is not None:
        place = where.prefix_lengths + entry
        tokens = tl.load(place, mask=inside & (entry >= 0), other=0).to(tl.int32)
    offset, oldest, beyond = reach(offset, how)
    return Row(
        row, batch, first_query, queries, first_key, start, stop, offset, oldest, beyond, tokens,
        entry, P,
    )  # fmt: skip


@triton.jit
def reach(offset, how):
    """`offset`, `oldest` and `beyond` of a `Row`, for an offset and a window of any size."""
    near = narrow(offset)
    oldest = near
    if how.window is not None:
        # Of the differences of 64-bit numbers only one below -2^63 comes out wrong: as positive.
        difference = wide(offset) - how.window
        difference = tl.where((offset < 0) & (difference >= 0), -FURTHEST, difference)
        oldest = narrow(difference) + 1
    return near, oldest, (wide(offset) - near).to(tl.float32)


@triton.jit
def narrow(number):
    """A number in 32 bits, at most `FURTHEST` from 0: beyond all slots and queries either way."""
    return tl.minimum(tl.maximum(number, -FURTHEST), FURTHEST).to(tl.int32)


@triton.jit
def segment_of(cu_seqlens, tile, rows, BLOCK: tl.constexpr):
    """The packed row that owns a tile, and the tile's number in it.

    Row `s` owns the tiles from `cu_seqlens[s] // BLOCK + s` on: at least as many as it needs, in a
    grid that depends on no tensor's values. Whatever lies behind the last row is row `rows`.
    """
    low, high = tile * 0, tile * 0 + rows
    while low < high:
        middle = (low + high + 1) // 2
        begins = tl.load(cu_seqlens + middle).to(tl.int32) // BLOCK + middle
        low = tl.where(begins <= tile, middle, low)
        high = tl.where(begins <= tile, high, middle - 1)
    return low, tile - (tl.load(cu_seqlens + low).to(tl.int32) // BLOCK + low)


@triton.jit
def tiles_in(size, rows, where, BLOCK: tl.constexpr):
    """Tiles that a batch row's queries or keys have; see `segment_of` when packed."""
    tiles = tl.cdiv(size, BLOCK)
    if where.cu_seqlens_q is not None:
        tiles += rows
    return tiles


@triton.jit
def query_tile(program, where, rows, kv_heads, M, shape: tl.constexpr):
    """Row, head and query tile of a program.

    Heads of a group are neighbours, and so are a head's tiles, which read the same keys; the last
    tiles, which see most under causality, come first.
    """
    query_tiles = tiles_in(M, rows, where, shape.BLOCK_M)
    member, program = program % shape.GROUP, program // shape.GROUP
    tile, program = query_tiles - 1 - program % query_tiles, program // query_tiles
    row, head = program // kv_heads, program % kv_heads * shape.GROUP + member
    if where.cu_seqlens_q is not None:
        row, tile = segment_of(where.cu_seqlens_q, tile, rows, shape.BLOCK_M)
    return row, head, tile


@triton.jit
def used_slots(in_prefix, at):
    """The slots `low <= j < high` of a row's prefix or sequence that are in use."""
    return tl.where(in_prefix, 0, at.start), tl.where(in_prefix, at.tokens, at.stop)


@triton.jit
def shift(in_prefix, at):
    """Position minus slot."""
    return tl.where(in_prefix, at.start - at.tokens, 0)


@triton.jit
def key_interval(query, in_prefix, at, how):
    """The slots `low <= j < high` that a query sees of the prefix or sequence."""
    low, high = used_slots(in_prefix, at)
    if how.causal is not None:
        high = tl.where(in_prefix, high, tl.minimum(high, at.offset + query + 1))
    if how.window is not None:
        oldest = at.oldest + query - shift(in_prefix, at)
        if how.prefix_window is None:
            oldest = tl.where(in_prefix, low, oldest)
        low = tl.maximum(low, oldest)
    return low, high


@triton.jit
def query_interval(slot, in_prefix, at, how):
    """The queries `low <= i < high` that see a used slot: `key_interval` the other way round."""
    position = slot + shift(in_prefix, at)
    low = position * 0
    high = low + at.queries
    if how.causal is not None:
        low = tl.where(in_prefix, low, tl.maximum(low, position - at.offset))
    if how.window is not None:
        last = position - at.oldest + 1
        if how.prefix_window is None:
            last = tl.where(in_prefix, high, last)
        high = tl.minimum(high, last)
    return low, high


@triton.jit
def visible(query, slot, in_prefix, at, how):
    """Which queries see which slots, but for a mask given as a tensor."""
    low, high = key_interval(query, in_prefix, at, how)
    return (slot >= low) & (slot < high)


@triton.jit
def span(low_0, high_0, low_1, high_1, BLOCK: tl.constexpr):
    """The tiles of intervals that rise from `[low_0, high_0)` to `[low_1, high_1)`, lows >= 0."""
    first = low_0 // BLOCK
    stop = tl.maximum(first, tl.cdiv(tl.maximum(high_1, 0), BLOCK))
    full = tl.minimum(tl.maximum(tl.cdiv(low_1, BLOCK), first), stop)
    rest = tl.minimum(tl.maximum(tl.maximum(high_0, 0) // BLOCK, full), stop)
    return Span(first, full, rest, stop)


@triton.jit
def key_spans(first, at, how, shape: tl.constexpr):
    """The `Spans` of a tile of queries; a prefix with a tile of its own has none."""
    last = tl.minimum(first + shape.BLOCK_M, at.queries) - 1
    sequence = key_span(first, last, False, at, how, shape.BLOCK_N)
    prefix = no_span(first)
    if shape.BLOCK_P == 0:
        prefix = key_span(first, last, True, at, how, shape.BLOCK_N)
    return Spans(prefix, sequence)


@triton.jit
def no_span(number):
    """A span without tiles, of tensors like any other."""
    return Span(number * 0, number * 0, number * 0, number * 0)


@triton.jit
def key_span(first, last, in_prefix, at, how, BLOCK: tl.constexpr):
    """Which tiles of the prefix's or sequence's slots the queries from first to last see."""
    low_0, high_0 = key_interval(first, in_prefix, at, how)
    low_1, high_1 = key_interval(last, in_prefix, at, how)
    return span(low_0, high_0, low_1, high_1, BLOCK)


@triton.jit
def query_span(first_slot, last_slot, begin, end, in_prefix, at, how, BLOCK: tl.constexpr):
    """Which tiles of the queries `begin <= i < end` see used slots from first to last."""
    low_0, high_0 = query_interval(first_slot, in_prefix, at, how)
    low_1, high_1 = query_interval(last_slot, in_prefix, at, how)
    low_0, low_1 = tl.maximum(low_0, begin), tl.maximum(low_1, begin)
    high_0, high_1 = tl.minimum(high_0, end), tl.minimum(high_1, end)
    return span(low_0, high_0, low_1, high_1, BLOCK)


@triton.jit
def count(tiles, MASKED: tl.constexpr):
    """How many tiles of a span need a mask, or need none."""
    if MASKED:
        found = tiles.stop - tiles.rest + tiles.full - tiles.first
    else:
        found = tiles.rest - tiles.full
    return found


@triton.jit
def nth(tiles, n, MASKED: tl.constexpr):
    """The `n`-th tile of a span that needs a mask, or needs none."""
    if MASKED:
        head = tiles.full - tiles.first
        tile = tl.where(n < head, tiles.first + n, tiles.rest + n - head)
    else:
        tile = tiles.full + n
    return tile


@triton.jit
def walk(
    step: tl.constexpr,
    set_aside: tl.constexpr,
    state,
    mine,
    prefix,
    sequence,
    spans,
    how,
    long,
    MASKED: tl.constexpr,
    shape: tl.constexpr,
):
    """Take `step` at every tile of both spans that needs a mask, or needs none.

    Where rows are `long`, take the sums of the state out to memory after each stretch of tiles.
    """
    tiles = count(spans.prefix, MASKED) + count(spans.sequence, MASKED)
    if long is None:
        for n in range(tiles):
            state = _take(step, n, state, mine, prefix, sequence, spans, how, MASKED, shape)
    else:
        for begin in range(0, tiles, long.stretch):
            for n in range(begin, tl.minimum(begin + long.stretch, tiles)):
                state = _take(step, n, state, mine, prefix, sequence, spans, how, MASKED, shape)
            state = set_aside(state, mine, long, how, shape)
    return state


@triton.jit
def _take(
    step: tl.constexpr,
    n,
    state,
    mine,
    prefix,
    sequence,
    spans,
    how,
    MASKED: tl.constexpr,
    shape: tl.constexpr,
):
    """The step at the n-th tile of both spans."""
    of_prefix = count(spans.prefix, MASKED)
    in_prefix = n < of_prefix
    from_sequence = nth(spans.sequence, n - of_prefix, MASKED)
    first = tl.where(in_prefix, nth(spans.prefix, n, MASKED), from_sequence) * shape.BLOCK_N
    return step(state, mine, prefix, sequence, in_prefix, first, how, shape.BLOCK_N, MASKED, shape)
