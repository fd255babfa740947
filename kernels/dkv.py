"""dk and dv of the sequence and of the prefix: one kernel, one launch.

A program owns `BLOCK_N` slots and sums over the queries that see them. A bank entry's slots are
seen by all queries of all of its rows: that sum is split into float32 parts, which are added in a
fixed order, without atomics. Those programs are the longest and come first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefixattn.kernels import config
from prefixattn.kernels.arguments import (
    LENGTHS,
    how,
    lengths,
    options,
    target,
    tiles_for,
    tiles_of,
    view,
    where,
)
from prefixattn.kernels.rows import (
    count,
    locate,
    nth,
    query_span,
    segment_of,
    tiles_in,
)
from prefixattn.kernels.scores import keep, score, weigh
from prefixattn.kernels.tile import (
    INFINITY,
    add_tile,
    dot,
    load_slots,
    place,
    source,
    store_tile,
)
from prefixattn.kernels.upstream import Upstream, at_queries, delta_at, drop, load_queries
from prefixattn.problem import Problem, room_like

KEYS = ("prefix_key", "key")
VALUES = ("prefix_value", "value")


def slots(p: Problem, up: Upstream, wanted: tuple[str, ...]) -> dict[str, Tensor]:
    """The gradients of keys and values of both sources, of those that are wanted."""
    names = [name for name in (*KEYS, *VALUES) if name in wanted]
    shape = tiles_for(p, "dkv")
    own_entry = p.prefix_index is None and p.R > 1
    plan = config.plan(
        target(),
        shape,
        bank_tiles=p.R * p.H_kv * triton.cdiv(p.P, shape.BLOCK_N),
        bank_rows=1 if own_entry else p.rows,
        row_queries=p.max_seqlen_q or p.M,
        key_tiles=p.B * p.H_kv * tiles_of(p.N, shape.BLOCK_N, p),
        bits=8 * p.query.element_size(),
    )
    parts = {name: _parts(p, name, plan) for name in names}
    together = shape.BLOCK_D + shape.BLOCK_DV <= config.WIDEST_PAIR
    for side in ((*KEYS, *VALUES),) if together else (KEYS, VALUES):
        _launch_slots(p, up, shape, plan, {name: parts[name] for name in names if name in side})
    return {name: part.sum(0) if part.shape[0] > 1 else part[0] for name, part in parts.items()}


def _parts(p: Problem, name: str, plan: config.Plan) -> Tensor:
    """Room for an argument's gradient `[1, …]`, or for float32 parts of it `[splits, …]`.

    Zeros where sums are added to it, and where keys of no segment have no program.
    """
    argument: Tensor = getattr(p, name)
    splits = plan.prefix_splits if name.startswith("prefix") else plan.key_splits
    if splits == 1 and plan.stretches is None:
        room = room_like(argument).unsqueeze(0)
    else:
        room = argument.new_empty((splits, *argument.shape), dtype=torch.float32)
    return room.zero_() if p.packed or plan.stretches is not None else room


def _launch_slots(
    p: Problem, up: Upstream, shape: config.Tiles, plan: config.Plan, parts: dict[str, Tensor]
) -> None:
    """Fill the parts, those of the prefix first."""
    programs = 0
    if any(name.startswith("prefix") for name in parts):
        programs += plan.prefix_programs
    if "key" in parts or "value" in parts:
        programs += plan.key_programs
    if programs == 0:
        return
    grads = {name: view(part.flatten(0, 1)) for name, part in parts.items()}
    _dkv[(programs,)](
        view(p.query),
        view(p.key),
        view(p.value),
        view(p.prefix_key),
        view(p.prefix_value),
        up._replace(dout=view(up.dout)),
        Grads(*(grads.get(name) for name in Grads._fields)),
        where(p),
        how(p),
        plan.stretches,
        *lengths(p),
        p.R,
        plan.prefix_splits,
        plan.key_splits,
        plan.chunks,
        plan.chunk,
        p.B,
        shape,
        **options(shape),
    )


class Grads(NamedTuple):
    """Where the gradients go, those of them that are wanted."""

    prefix_key: Any
    key: Any
    prefix_value: Any
    value: Any


class Slots(NamedTuple):
    """A program's slots, of a bank entry or of a row's sequence.

    Keys and values; slots' numbers `[BLOCK_N]`; whether they are a prefix's; the first and the last
    in use; the entry's number; the row and its `Row`; key head.
    """

    k: Any
    v: Any
    number: Any
    in_prefix: Any
    first: Any
    last: Any
    entry: Any
    row: Any
    at: Any
    kv_head: Any


class Sums(NamedTuple):
    """dk `[BLOCK_N, BLOCK_D]` and dv `[BLOCK_N, BLOCK_DV]` so far; a scalar where not wanted."""

    key: Any
    value: Any


@triton.jit(
    do_not_specialize=[
        *LENGTHS,
        "entries",
        "prefix_splits",
        "key_splits",
        "chunks",
        "chunk",
        "batches",
    ]
)
def _dkv(
    query,
    key,
    value,
    prefix_key,
    prefix_value,
    up,
    grads,
    where,
    how,
    stretches,
    rows,
    kv_heads,
    M,
    N,
    P,
    query_offset,
    entries,
    prefix_splits,
    key_splits,
    chunks,
    chunk,
    batches,
    shape: tl.constexpr,
):
    # Which tile of which bank entry or row, and which part of the sum over queries.
    prefix_tiles = tl.cdiv(P, shape.BLOCK_N)
    prefix_programs = 0
    if grads.prefix_key is not None or grads.prefix_value is not None:
        prefix_programs = prefix_tiles * kv_heads * entries * prefix_splits
    program = tl.program_id(0)
    in_prefix = program < prefix_programs
    program -= tl.where(in_prefix, 0, prefix_programs)
    tiles = tl.where(in_prefix, prefix_tiles, tiles_in(N, rows, where, shape.BLOCK_N))
    splits = tl.where(in_prefix, prefix_splits, key_splits)
    tile, program = program % tiles, program // tiles
    kv_head, program = program % kv_heads, program // kv_heads
    split, number = program % splits, program // splits
    row = tl.where(in_prefix, 0, number)
    if where.cu_seqlens_k is not None:
        segment, segment_tile = segment_of(where.cu_seqlens_k, tile, rows, shape.BLOCK_N)
        row = tl.where(in_prefix, 0, segment)
        tile = tl.where(in_prefix, tile, segment_tile)

    at = locate(where, how, row, rows, M, N, P, query_offset)
    size = tl.where(in_prefix, P, N)
    if where.cu_seqlens_k is not None:
        size = tl.where(in_prefix, P, at.stop)
    tokens = P
    if where.prefix_lengths is not None:
        tokens = tl.load(where.prefix_lengths + number, mask=in_prefix, other=0).to(tl.int32)
    first = tile * shape.BLOCK_N
    if first >= size:
        return
    low, high = tl.where(in_prefix, 0, at.start), tl.where(in_prefix, tokens, at.stop)
    prefix = source(prefix_key, prefix_value, tl.where(in_prefix, number, 0), kv_head, 0)
    sequence = source(key, value, at.batch, kv_head, at.first_key)
    k, v = load_slots(prefix, sequence, in_prefix, first, low, high, shape.BLOCK_N, True, shape)
    slot = first + tl.arange(0, shape.BLOCK_N)
    used = (slot >= low) & (slot < high)
    first_used, last_used = tl.maximum(first, low), tl.minimum(first + shape.BLOCK_N, high) - 1
    mine = Slots(k, v, slot, in_prefix, first_used, last_used, number, row, at, kv_head)

    # A unit is one chunk of one row's queries, of one head of the group.
    cut = Cut(chunks, chunk, 1, M)
    if stretches is not None:
        cut = Cut(chunks, chunk, stretches.key_chunks, stretches.key_chunk)
    units = shape.GROUP * tl.where(in_prefix, cut.chunks, cut.key_chunks)
    if where.own_entry is None:
        units *= tl.where(in_prefix, rows, 1)
    begins, ends = split * units // splits, (split + 1) * units // splits
    number = tl.where(in_prefix, number + split * entries, at.batch + split * batches)
    if stretches is None:
        sums = _sum(
            begins, ends, mine, query, up, grads, where, how, cut, rows, kv_heads, M, N, P,
            query_offset, shape,
        )  # fmt: skip
        _write(sums, grads, mine, used, number, first, size, how, False, shape)
    else:
        stretch = tl.where(in_prefix, stretches.prefix_units, stretches.key_units)
        for begin in range(begins, ends, stretch):
            sums = _sum(
                begin, tl.minimum(begin + stretch, ends), mine, query, up, grads, where, how, cut,
                rows, kv_heads, M, N, P, query_offset, shape,
            )  # fmt: skip
            _write(sums, grads, mine, used, number, first, size, how, True, shape)


class Cut(NamedTuple):
    """Chunks of a row's queries, and queries of a chunk: for prefix slots, and for the sequence."""

    chunks: Any
    chunk: Any
    key_chunks: Any
    key_chunk: Any


@triton.jit
def _sum(
    begins,
    ends,
    mine,
    query,
    up,
    grads,
    where,
    how,
    cut,
    rows,
    kv_heads,
    M,
    N,
    P,
    query_offset,
    shape: tl.constexpr,
):
    """The sums over some units."""
    WANT_KEY: tl.constexpr = grads.prefix_key is not None or grads.key is not None
    WANT_VALUE: tl.constexpr = grads.prefix_value is not None or grads.value is not None
    dk, dv = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    if WANT_KEY:
        dk = tl.full((shape.BLOCK_N, shape.BLOCK_D), 0.0, tl.float32)
    if WANT_VALUE:
        dv = tl.full((shape.BLOCK_N, shape.BLOCK_DV), 0.0, tl.float32)
    sums = Sums(dk, dv)
    in_prefix = mine.in_prefix
    chunks = tl.where(in_prefix, cut.chunks, cut.key_chunks)
    chunk = tl.where(in_prefix, cut.chunk, cut.key_chunk)
    for unit in range(begins, ends):
        head, rest = mine.kv_head * shape.GROUP + unit % shape.GROUP, unit // shape.GROUP
        its_row = rest // chunks
        if where.own_entry is not None:
            its_row = mine.entry
        its_row = tl.where(in_prefix, its_row, mine.row)
        there = locate(where, how, its_row, rows, M, N, P, query_offset)
        begin = rest % chunks * chunk
        end = tl.minimum(begin + chunk, there.queries)
        sees = tl.where(in_prefix, there.entry, mine.entry) == mine.entry
        sees = sees & (mine.first <= mine.last)
        end = tl.where(sees, end, begin)
        seen = query_span(mine.first, mine.last, begin, end, in_prefix, there, how, shape.BLOCK_M)
        sums = _gather(
            sums, mine, query, up, seen, head, there, M, kv_heads, how, WANT_KEY, WANT_VALUE,
            False, shape,
        )  # fmt: skip
        sums = _gather(
            sums, mine, query, up, seen, head, there, M, kv_heads, how, WANT_KEY, WANT_VALUE,
            True, shape,
        )  # fmt: skip
    return sums


@triton.jit
def _write(
    sums, grads, mine, used, number, first, size, how, ADD: tl.constexpr, shape: tl.constexpr
):
    """Write the sums, or add them to those of other stretches."""
    dk, dv, used = sums.key, sums.value, used[:, None]
    first_key, head = mine.at.first_key, mine.kv_head
    if grads.prefix_key is not None or grads.key is not None:
        dk = tl.where(used, dk * how.scale, 0.0)
    if grads.prefix_value is not None or grads.value is not None:
        dv = tl.where(used, dv, 0.0)
    if mine.in_prefix:
        _store(
            dk, grads.prefix_key, number, head, 0, first, size, ADD, shape.D, shape.BLOCK_D, shape
        )
        _store(
            dv, grads.prefix_value, number, head, 0, first, size, ADD, shape.D_V, shape.BLOCK_DV,
            shape,
        )  # fmt: skip
    else:
        _store(
            dk, grads.key, number, head, first_key, first, size, ADD, shape.D, shape.BLOCK_D, shape
        )
        _store(
            dv, grads.value, number, head, first_key, first, size, ADD, shape.D_V, shape.BLOCK_DV,
            shape,
        )  # fmt: skip


@triton.jit
def _store(
    tile,
    view,
    number,
    kv_head,
    first_key,
    first,
    size,
    ADD: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    shape: tl.constexpr,
):
    if view is not None:
        start = place(view, number, kv_head, first_key + first)
        if ADD:
            add_tile(tile, start, view.token, first, size, shape.BLOCK_N, WIDTH, BLOCK_WIDTH)
        else:
            store_tile(tile, start, view.token, first, size, shape.BLOCK_N, WIDTH, BLOCK_WIDTH)


@triton.jit
def _gather(
    sums,
    mine,
    query,
    up,
    seen,
    head,
    at,
    M,
    kv_heads,
    how,
    WANT_KEY: tl.constexpr,
    WANT_VALUE: tl.constexpr,
    MASKED: tl.constexpr,
    shape: tl.constexpr,
):
    """The sums with the shares of the seen tiles of queries that need a mask, or need none."""
    dk, dv = sums.key, sums.value
    slot, in_prefix, heads = mine.number[:, None], mine.in_prefix, kv_heads * shape.GROUP
    nothing = tl.full((shape.BLOCK_N, shape.BLOCK_M), 0.0, tl.float32)
    for n in range(count(seen, MASKED)):
        first = nth(seen, n, MASKED) * shape.BLOCK_M
        q, d = load_queries(query, up.dout, first, head, at, MASKED, shape)
        query_number = first + tl.arange(0, shape.BLOCK_M)
        here = at_queries(up, in_prefix, query_number, head, at, how, M, heads)
        number = query_number[None, :]
        products = dot(mine.k, tl.trans(q), nothing, shape)
        scores, slope = score(products, number, slot, in_prefix, head, at, how, MASKED)
        if MASKED:  # past the last query a key of NaN would have a product, and a gradient, of NaN
            scores = tl.where(number < at.queries, scores, -INFINITY)
        weights = weigh(scores, here.level[None, :], here.rest[None, :], how) * here.gate
        if WANT_VALUE:
            kept = weights
            if how.dropout_seed is not None:
                kept = drop(weights, keep(number, slot, in_prefix, head, at, how), how)
            dv = dot(kept.to(d.dtype), d, dv, shape)
        if WANT_KEY:
            grads = dot(mine.v, tl.trans(d), nothing, shape)
            # Not before it is needed: this loop has no register to spare.
            delta = delta_at(up, in_prefix, query_number, head, at, M, heads)
            if how.dropout_seed is not None:
                grads = drop(grads, keep(number, slot, in_prefix, head, at, how), how)
            grads = weights * (grads - delta[None, :]) * slope
            dk = dot(grads.to(q.dtype), q, dk, shape)
    return Sums(dk, dv)
