"""Few queries, long keys: the keys are split over programs, whose results are merged by `lse`.

One launch covers both sources. A sequence program owns one row's queries, of all heads of a group,
and a part of its slots. A prefix program's tile packs the queries of many rows, sorted by bank
entry: rows that share an entry read it once together. It takes the entries in its tile one after
another. Grids depend on sizes alone and nothing is read on the host, so that graphs capture it.
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
    view,
    where,
)
from prefixattn.kernels.rows import key_interval, locate, used_slots
from prefixattn.kernels.scores import (
    LOG2E,
    State,
    add,
    begin,
    load_sink,
    log_sum,
    mean,
    score,
    soften,
)
from prefixattn.kernels.tile import INFINITY, dot, inner, load_slots, number_of, place, source, wide
from prefixattn.problem import Problem

NO_ENTRY = tl.constexpr(2**31 - 1)
MERGED = tl.constexpr(16)  # parts at a time


def suits(problem: Problem) -> bool:
    """Whether this kernel, which has neither packing nor dropout, is the better one."""
    p = problem
    able = not p.packed and p.dropout_seed is None
    return able and config.is_decode(p.M * p.H // p.H_kv, p.N + p.P)


def launch(problem: Problem, out: Tensor, lse: Tensor, rest: Tensor) -> None:
    """Fill `out`, `lse` and its rest."""
    p = problem
    # Rows that may share a bank entry pack their queries in the same tiles.
    packed_rows = p.B if p.prefix_index is not None or p.R == 1 else 1
    queries = p.M * p.H // p.H_kv
    shape = tiles_for(p, "decode" if queries * packed_rows > 16 else "decode16")
    plan = config.decode_plan(
        target(),
        shape,
        p.B * p.H_kv,
        queries,
        packed_rows,
        prefix_slots=p.P if p.R else 0,
        keys=p.N,
        bits=8 * p.query.element_size(),
    )
    splits = plan.prefix_splits + plan.key_splits
    part_out = torch.empty(
        (splits, p.B, p.H, p.M, p.D_v), dtype=torch.float32, device=p.query.device
    )
    part_lse = torch.empty((splits, p.B, p.H, p.M), dtype=torch.float32, device=p.query.device)
    parts = Parts(part_out, part_lse, torch.empty_like(part_lse))
    _decode[(plan.prefix_programs + plan.key_programs,)](
        view(p.query),
        view(p.key),
        view(p.value),
        view(p.prefix_key),
        view(p.prefix_value),
        parts,
        # Rows in the order of their entries; a row with none comes first.
        None if p.prefix_index is None else torch.argsort(p.prefix_index, stable=True),
        where(p),
        how(p),
        *lengths(p),
        plan.prefix_splits,
        plan.key_splits,
        packed_rows,
        shape,
        **options(shape),
    )
    _combine[(p.B * p.H * p.M,)](
        parts,
        view(out),
        lse,
        rest,
        p.sinks,
        p.prefix_gate,
        p.H,
        p.M,
        p.B * p.H * p.M,
        plan.prefix_splits,
        splits,
        shape,
        **(options(shape) | {"num_warps": 1}),
    )


class Parts(NamedTuple):
    """What the splits found: mean values `[splits, B, H, M, D_v]`, `lse` and its rest."""

    out: Any
    lse: Any
    rest: Any


class Queries(NamedTuple):
    """A tile's queries `[BLOCK_M, BLOCK_D]`; per query `[BLOCK_M, 1]`: number, head, row.

    `reads` says which of them read the source at hand.
    """

    q: Any
    number: Any
    head: Any
    at: Any
    reads: Any


@triton.jit(do_not_specialize=[*LENGTHS, "prefix_splits", "key_splits", "packed_rows"])
def _decode(
    query,
    key,
    value,
    prefix_key,
    prefix_value,
    parts,
    order,
    where,
    how,
    rows,
    kv_heads,
    M,
    N,
    P,
    query_offset,
    prefix_splits,
    key_splits,
    packed_rows,
    shape: tl.constexpr,
):
    # Which split of which source's slots, and which tile of the queries that read it.
    queries = M * shape.GROUP  # of one row and key head
    prefix_tiles = tl.cdiv(queries * packed_rows, shape.BLOCK_M)
    prefix_programs = prefix_tiles * kv_heads * prefix_splits * (rows // packed_rows)
    program = tl.program_id(0)
    in_prefix = program < prefix_programs
    program -= tl.where(in_prefix, 0, prefix_programs)
    tiles = tl.where(in_prefix, prefix_tiles, tl.cdiv(queries, shape.BLOCK_M))
    splits = tl.where(in_prefix, prefix_splits, key_splits)
    tile, program = program % tiles, program // tiles
    kv_head, program = program % kv_heads, program // kv_heads
    split, group = program % splits, program // splits
    size = tl.where(in_prefix, packed_rows, 1)  # rows whose queries are packed

    packed = tile * shape.BLOCK_M + tl.arange(0, shape.BLOCK_M)[:, None]
    real = packed < queries * size
    row = group * size + packed // queries
    if order is not None:
        sorted_row = tl.load(
            order + row, mask=packed < tl.where(in_prefix, queries * size, 0), other=0
        )
        row = tl.where(in_prefix, sorted_row, row)
    row = tl.where(real, row, rows).to(tl.int32)
    at = locate(where, how, row, rows, M, N, P, query_offset)
    member = packed % queries
    number, head = member // shape.GROUP, kv_head * shape.GROUP + member % shape.GROUP
    width = tl.arange(0, shape.BLOCK_D)[None, :]
    start = place(query, row, head, number)
    q = tl.load(start + width, mask=inner(real, shape.D, shape.BLOCK_D), other=0)
    low, high = key_interval(number, in_prefix, at, how)
    entry = tl.where(in_prefix, at.entry, row)
    entry = tl.where(real & (entry >= 0) & (low < high), entry, NO_ENTRY)

    state = begin(-INFINITY, shape)
    current = tl.min(entry)
    while current != NO_ENTRY:
        mine = Queries(q, number, head, at, entry == current)
        prefix = source(prefix_key, prefix_value, tl.where(in_prefix, current, 0), kv_head, 0)
        sequence = source(key, value, tl.where(in_prefix, 0, current), kv_head, 0)
        # All queries of a source have the same slots in use, of which these are seen by any.
        used_low, used_high = used_slots(in_prefix, at)
        used_low = tl.min(tl.where(mine.reads, used_low, NO_ENTRY))
        used_high = tl.max(tl.where(mine.reads, used_high, 0))
        first = tl.min(tl.where(mine.reads, low, NO_ENTRY)) // shape.BLOCK_N
        tiles = tl.cdiv(tl.max(tl.where(mine.reads, high, 0)), shape.BLOCK_N) - first
        each = tl.cdiv(tiles, splits)  # split * tiles may have more than 32 bits
        first += split * each
        for n in range(tl.minimum(each, tiles - split * each)):
            slot = (first + n) * shape.BLOCK_N
            k, v = load_slots(
                prefix, sequence, in_prefix, slot, used_low, used_high, shape.BLOCK_N, True, shape
            )
            state = _absorb(state, mine, k, v, in_prefix, slot, how, shape)
        current = tl.min(tl.where(entry > current, entry, NO_ENTRY))

    split += tl.where(in_prefix, 0, prefix_splits)
    part = wide(split) * rows + row
    place_of = number_of(part, head, number, M, kv_heads * shape.GROUP)
    width = tl.arange(0, shape.BLOCK_DV)[None, :]
    inside = inner(real, shape.D_V, shape.BLOCK_DV)
    tl.store(parts.out + place_of * shape.D_V + width, mean(state, how), mask=inside)
    lse, rest = log_sum(state.peak, state.total, how.unit)
    tl.store(parts.lse + place_of, lse[:, None], mask=real)
    tl.store(parts.rest + place_of, rest[:, None], mask=real)


@triton.jit
def _absorb(state, mine, k, v, in_prefix, first, how, shape: tl.constexpr):
    """The state with one more tile of slots, for the queries that read their source."""
    products = tl.full((shape.BLOCK_M, shape.BLOCK_N), 0.0, tl.float32)
    products = dot(mine.q, tl.trans(k), products, shape)
    slot = first + tl.arange(0, shape.BLOCK_N)[None, :]
    scores, _ = score(products, mine.number, slot, in_prefix, mine.head, mine.at, how, True)
    state, weights = soften(state, tl.where(mine.reads, scores, -INFINITY), how)
    summed = dot(weights.to(v.dtype), v, state.summed, shape)
    return State(state.peak, state.total, state.excess, summed, state.anchor)


@triton.jit(do_not_specialize=["heads", "M", "count", "prefix_splits", "splits"])
def _combine(
    parts,
    out,
    lse,
    rest,
    sinks,
    gate,
    heads,
    M,
    count,
    prefix_splits,
    splits,
    shape: tl.constexpr,
):
    """One query's softmax from the parts'; with a gate, from each half's apart."""
    program = tl.program_id(0)
    number, row_head = program % M, program // M
    head, batch = row_head % heads, row_head // heads
    sink, nothing = load_sink(sinks, head), load_sink(None, head)
    first = prefix_splits * 0 if gate is None else prefix_splits
    its_lse, its_rest, values = _merge(parts, first, splits, sink, program, count, shape)
    tl.store(lse + program, its_lse)
    tl.store(rest + program, its_rest)
    if gate is not None:
        _, _, prefix_values = _merge(parts, 0, prefix_splits, nothing, program, count, shape)
        values += tl.load(gate + head).to(tl.float32) * prefix_values
    width = tl.arange(0, shape.BLOCK_DV)
    start = place(out, batch, head, number)
    tl.store(start + width, values.to(start.dtype.element_ty), mask=width < shape.D_V)


@triton.jit
def _merge(parts, first, last, sink, program, count, shape: tl.constexpr):
    """`lse`, its rest and the mean value of the softmax over some parts and a sink."""
    peak = sink
    total = tl.where(sink == -INFINITY, 0.0, 1.0)
    summed = tl.full((shape.BLOCK_DV,), 0.0, tl.float32)
    excess, of_summed = total * 0.0, summed
    width = tl.arange(0, shape.BLOCK_DV)[None, :]
    for start in range(first, last, MERGED):
        part = start + tl.arange(0, MERGED)
        place_of = wide(part) * count + program
        level = tl.load(parts.lse + place_of, mask=part < last, other=-INFINITY)
        rest = tl.load(parts.rest + place_of, mask=part < last, other=0.0)
        inside = inner((part < last)[:, None], shape.D_V, shape.BLOCK_DV)
        means = tl.load(parts.out + place_of[:, None] * shape.D_V + width, mask=inside, other=0.0)
        new = tl.maximum(peak, tl.max(level))
        safe = tl.where(new == -INFINITY, 0.0, new)
        # `lse` alone would not tell one key that is hidden by `finfo.min` from a million of them.
        weights = tl.exp2(((level - safe) + rest) * LOG2E)
        shrink = tl.exp2((peak - safe) * LOG2E)
        total, excess = add(total, excess, shrink, tl.sum(weights))
        summed, of_summed = add(summed, of_summed, shrink, tl.sum(weights[:, None] * means, 0))
        peak = new
    lse, rest = log_sum(peak, total, None)
    return lse, rest, summed / tl.where(total == 0, 1.0, total)
