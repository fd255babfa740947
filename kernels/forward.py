"""The forward kernel: one softmax over a prefix and a sequence that stay where they are.

A program owns `BLOCK_M` queries of one head. It walks the tiles of the prefix and of the sequence
in one loop, in which only the pointers tell them apart: first the tiles that every query sees
wholly, without a mask, then those on an edge. A prefix much shorter than a tile has a narrow tile
of its own before the loop. With a gate the two halves have a softmax each, in the same pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from prefixattn.kernels import decode
from prefixattn.kernels.arguments import (
    LENGTHS,
    how,
    lengths,
    long,
    on_device_of,
    options,
    tiles_for,
    tiles_of,
    view,
    where,
)
from prefixattn.kernels.rows import (
    Spans,
    key_spans,
    locate,
    no_span,
    query_tile,
    used_slots,
    walk,
)
from prefixattn.kernels.scores import (
    State,
    begin,
    keep,
    load_sink,
    log_sum,
    mean,
    octaves,
    score,
    soften,
    weigh,
)
from prefixattn.kernels.tile import (
    INFINITY,
    add_tile,
    dot,
    inner,
    load_slots,
    load_tile,
    number_of,
    place,
    source,
    store_tile,
    tile_pointers,
)
from prefixattn.problem import Problem


class Results(NamedTuple):
    """`out [B, H, M, D_v]`, a view for kernels; `lse [B, H, M]` and what rounding took from it."""

    out: Any
    lse: Tensor
    rest: Tensor


def forward(problem: Problem) -> Results:
    """Output `[B, H, M, D_v]`, `lse [B, H, M]` and its rest."""
    p = problem
    results = Results(*p.empty_output())
    if results.out.numel() > 0:
        with on_device_of(results.out):
            if decode.suits(p):
                decode.launch(p, *results)
            else:
                launch(p, results)
    return results


def halves(problem: Problem) -> tuple[Results, Results]:
    """What a gated problem's two softmaxes give: that of the sequence, and that of the prefix."""
    results, of_prefix = (Results(*problem.empty_output()) for _ in range(2))
    with on_device_of(results.out):
        launch(problem, results, of_prefix)
    return results, of_prefix


def launch(problem: Problem, results: Results, of_prefix: Results | None = None) -> None:
    """Fill the results; with the last, with a gated problem's halves apart."""
    p = problem
    shape = tiles_for(p, "forward")
    _forward[(tiles_of(p.M, shape.BLOCK_M, p) * p.B * p.H,)](
        view(p.query),
        view(p.key),
        view(p.value),
        view(p.prefix_key),
        view(p.prefix_value),
        results._replace(out=view(results.out)),
        None if of_prefix is None else of_prefix._replace(out=view(of_prefix.out)),
        p.sinks,
        p.prefix_gate,
        where(p),
        how(p),
        long(p, shape, p.D_v),
        *lengths(p),
        shape,
        **options(shape),
    )


class Queries(NamedTuple):
    """A program's queries `[BLOCK_M, BLOCK_D]`, the first's number, all, their head and row."""

    q: Any
    first: Any
    number: Any
    head: Any
    at: Any


@triton.jit(do_not_specialize=LENGTHS)
def _forward(
    query,
    key,
    value,
    prefix_key,
    prefix_value,
    results,
    of_prefix,
    sinks,
    gate,
    where,
    how,
    long,
    rows,
    kv_heads,
    M,
    N,
    P,
    query_offset,
    shape: tl.constexpr,
):
    row, head, tile = query_tile(tl.program_id(0), where, rows, kv_heads, M, shape)
    at = locate(where, how, row, rows, M, N, P, query_offset)
    first = tile * shape.BLOCK_M
    if first >= at.queries:
        return
    start = place(query, at.batch, head, at.first_query + first)
    q = load_tile(
        start, query.token, first, 0, at.queries, shape.BLOCK_M, shape.D, shape.BLOCK_D, True
    )
    mine = Queries(q, first, first + tl.arange(0, shape.BLOCK_M), head, at)
    kv_head = head // shape.GROUP
    prefix = source(prefix_key, prefix_value, tl.maximum(at.entry, 0), kv_head, 0)
    sequence = source(key, value, at.batch, kv_head, at.first_key)

    spans = key_spans(first, at, how, shape)
    sink = tl.where(row < rows, load_sink(sinks, head), -INFINITY)
    state = begin(sink if gate is None else -INFINITY, shape)
    if shape.BLOCK_P > 0:
        yes = tl.full((), True, tl.int1)
        state = _absorb(state, mine, prefix, sequence, yes, 0, how, shape.BLOCK_P, True, shape)
    if gate is not None:
        only_prefix = Spans(spans.prefix, no_span(first))
        state = _walk(state, mine, prefix, sequence, only_prefix, how, long, shape)
        prefix_state = state
        spans = Spans(no_span(first), spans.sequence)
        state = begin(sink, shape)
    state = _walk(state, mine, prefix, sequence, spans, how, long, shape)

    values = mean(state, how)
    heads = kv_heads * shape.GROUP
    if of_prefix is not None:
        _store(mean(prefix_state, how), prefix_state, of_prefix, mine, how, M, heads, shape)
    elif gate is not None:
        values += tl.load(gate + head).to(tl.float32) * mean(prefix_state, how)
    _store(values, state, results, mine, how, M, heads, shape)


@triton.jit
def _walk(state, mine, prefix, sequence, spans, how, long, shape: tl.constexpr):
    """The state with all tiles of the spans."""
    state = walk(_absorb, _set_aside, state, mine, prefix, sequence, spans, how, long, False, shape)
    state = walk(_absorb, _set_aside, state, mine, prefix, sequence, spans, how, long, True, shape)
    if long is not None:
        state = _collect(_set_aside(state, mine, long, how, shape), mine, long, how, shape)
    return state


@triton.jit
def _set_aside(state, mine, long, how, shape: tl.constexpr):
    """The state without its sum of values, which is added to those of the stretches before.

    In memory a query's sums are relative to its `anchor`, the maximum when they were begun, and to
    2^32. Where the maximum has outgrown that by 2^64, what was there is nothing beside it, and they
    are begun anew: so sums are only ever added to, and none is read before the end.
    """
    start, number = _sums(mine, long), mine.number[:, None]
    known = state.anchor > -INFINITY
    grown = (state.peak - tl.where(known, state.anchor, 0.0)) * octaves(how)
    fits = known & (grown < 64.0)
    anchor = tl.where(fits, state.anchor, state.peak)
    inside = inner((number < mine.at.queries) & ~fits[:, None], shape.D_V, shape.BLOCK_DV)
    pointers = tile_pointers(start, long.sums.token, shape.BLOCK_M, shape.BLOCK_DV)
    nothing = tl.zeros_like(state.summed)
    tl.store(pointers, nothing, mask=inside)
    tl.debug_barrier()  # before other threads add to it
    growth = weigh(state.peak, tl.where(anchor == -INFINITY, 0.0, anchor), 32.0, how)
    add_tile(
        state.summed * growth[:, None], start, long.sums.token, mine.first, mine.at.queries,
        shape.BLOCK_M, shape.D_V, shape.BLOCK_DV,
    )  # fmt: skip
    return State(state.peak, state.total, state.excess, nothing, anchor)


@triton.jit
def _collect(state, mine, long, how, shape: tl.constexpr):
    """The state with its sum of values."""
    tl.debug_barrier()  # after what other threads have added
    summed = load_tile(
        _sums(mine, long), long.sums.token, mine.first, 0, mine.at.queries, shape.BLOCK_M,
        shape.D_V, shape.BLOCK_DV, True,
    )  # fmt: skip
    tl.debug_barrier()  # before a second softmax begins its sums here
    safe = tl.where(state.peak == -INFINITY, 0.0, state.peak)
    summed *= weigh(state.anchor, safe, -32.0, how)[:, None]
    return State(state.peak, state.total, state.excess, summed, state.anchor)


@triton.jit
def _sums(mine, long):
    """Where the sums of a program's queries lie."""
    return place(long.sums, mine.at.batch, mine.head, mine.at.first_query + mine.first)


@triton.jit
def _absorb(
    state,
    mine,
    prefix,
    sequence,
    in_prefix,
    first,
    how,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    shape: tl.constexpr,
):
    """The state with one more tile of slots."""
    low, high = used_slots(in_prefix, mine.at)
    k, v = load_slots(prefix, sequence, in_prefix, first, low, high, BLOCK, MASKED, shape)
    products = tl.full((shape.BLOCK_M, BLOCK), 0.0, tl.float32)
    products = dot(mine.q, tl.trans(k), products, shape)
    number, slot = mine.number[:, None], first + tl.arange(0, BLOCK)[None, :]
    scores, _ = score(products, number, slot, in_prefix, mine.head, mine.at, how, MASKED)
    state, weights = soften(state, scores, how)
    if how.dropout_seed is not None:
        kept = keep(number, slot, in_prefix, mine.head, mine.at, how)
        weights = tl.where(kept, weights, 0.0)
    summed = dot(weights.to(v.dtype), v, state.summed, shape)
    return State(state.peak, state.total, state.excess, summed, state.anchor)


@triton.jit
def _store(values, state, results, mine, how, M, heads, shape: tl.constexpr):
    """Write a tile's output, `lse` and its rest."""
    at, out = mine.at, results.out
    start = place(out, at.batch, mine.head, at.first_query + mine.first)
    store_tile(
        values, start, out.token, mine.first, at.queries, shape.BLOCK_M, shape.D_V, shape.BLOCK_DV
    )
    places = number_of(at.batch, mine.head, at.first_query + mine.number, M, heads)
    lse, rest = log_sum(state.peak, state.total, how.unit)
    tl.store(results.lse + places, lse, mask=mine.number < at.queries)
    tl.store(results.rest + places, rest, mask=mine.number < at.queries)
