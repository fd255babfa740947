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
    score,
    soften,
)
from prefixattn.kernels.tile import (
    INFINITY,
    dot,
    load_slots,
    load_tile,
    number_of,
    place,
    source,
    store_tile,
)
from prefixattn.problem import Problem


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Output `[B, H, M, D_v]` in the query's dtype and `lse [B, H, M]`."""
    out, lse = problem.empty_output()
    if out.numel() > 0:
        with on_device_of(out):
            few = decode.suits(problem)
            (decode.launch if few else launch)(problem, out, lse)
    return out, lse


def halves(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of a gated problem: the sequence's output and `lse`, the prefix's output and `lse`."""
    (out, lse), (prefix_out, prefix_lse) = problem.empty_output(), problem.empty_output()
    with on_device_of(out):
        launch(problem, out, lse, prefix_out, prefix_lse)
    return out, lse, prefix_out, prefix_lse


def launch(
    problem: Problem,
    out: Tensor,
    lse: Tensor,
    prefix_out: Tensor | None = None,
    prefix_lse: Tensor | None = None,
) -> None:
    """Fill `out` and `lse`; with the last two, with a gated problem's halves apart."""
    p = problem
    shape = tiles_for(p, "forward")
    _forward[(tiles_of(p.M, shape.BLOCK_M, p) * p.B * p.H,)](
        view(p.query),
        view(p.key),
        view(p.value),
        view(p.prefix_key),
        view(p.prefix_value),
        view(out),
        lse,
        view(prefix_out),
        prefix_lse,
        p.sinks,
        p.prefix_gate,
        where(p),
        how(p),
        *lengths(p),
        shape,
        **options(shape),
    )


class Queries(NamedTuple):
    """A program's queries `[BLOCK_M, BLOCK_D]`, their numbers `[BLOCK_M]`, their head and row."""

    q: Any
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
    out,
    lse,
    prefix_out,
    prefix_lse,
    sinks,
    gate,
    where,
    how,
    rows,
    kv_heads,
    M,
    N,
    P,
    query_offset,
    shape: tl.constexpr,
):
    row, head, tile = query_tile(tl.program_id(0), where, rows, kv_heads, M, shape)
    at = locate(where, row, rows, M, N, P, query_offset)
    first = tile * shape.BLOCK_M
    if first >= at.queries:
        return
    start = place(query, at.batch, head, at.first_query + first)
    q = load_tile(
        start, query.token, first, 0, at.queries, shape.BLOCK_M, shape.D, shape.BLOCK_D, True
    )
    mine = Queries(q, first + tl.arange(0, shape.BLOCK_M), head, at)
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
        of_prefix = Spans(spans.prefix, no_span(first))
        state = walk(_absorb, state, mine, prefix, sequence, of_prefix, how, False, shape)
        state = walk(_absorb, state, mine, prefix, sequence, of_prefix, how, True, shape)
        prefix_state = state
        spans = Spans(no_span(first), spans.sequence)
        state = begin(sink, shape)
    state = walk(_absorb, state, mine, prefix, sequence, spans, how, False, shape)
    state = walk(_absorb, state, mine, prefix, sequence, spans, how, True, shape)

    values = mean(state, how)
    heads = kv_heads * shape.GROUP
    if prefix_out is not None:
        prefix_values = mean(prefix_state, how)
        _store(prefix_values, prefix_state, prefix_out, prefix_lse, mine, first, M, heads, shape)
    elif gate is not None:
        values += tl.load(gate + head).to(tl.float32) * mean(prefix_state, how)
    _store(values, state, out, lse, mine, first, M, heads, shape)


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
    return State(state.peak, state.total, summed)


@triton.jit
def _store(values, state, out, lse, mine, first, M, heads, shape: tl.constexpr):
    """Write a tile's output and `lse`."""
    at = mine.at
    start = place(out, at.batch, mine.head, at.first_query + first)
    store_tile(
        values, start, out.token, first, at.queries, shape.BLOCK_M, shape.D_V, shape.BLOCK_DV
    )
    places = lse + number_of(at.batch, mine.head, at.first_query + mine.number, M, heads)
    tl.store(places, log_sum(state.peak, state.total), mask=mine.number < at.queries)
