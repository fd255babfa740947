"""What both backward kernels read at their queries, and what dropout does to gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from prefixattn.kernels.tile import INFINITY, load_tile, number_of, place


class Upstream(NamedTuple):
    """What the backward starts from: `dout`, and `lse`, `delta` `[B, H, M]` of the softmax.

    With a gate the prefix has its own softmax, whose gradients the gate multiplies.
    """

    dout: Any
    lse: Any
    delta: Any
    prefix_lse: Any
    prefix_delta: Any
    gate: Any


class AtQueries(NamedTuple):
    """The upstream at some queries; without a gate both halves have the same `lse` and `delta`."""

    lse: Any
    delta: Any
    prefix_lse: Any
    prefix_delta: Any
    gate: Any


@triton.jit
def at_queries(up, number, head, at, M, heads):
    """The upstream's numbers of queries; `lse` is inf where nothing is seen: all weights are 0."""
    places, real = number_of(at.batch, head, at.first_query + number, M, heads), number < at.queries
    lse = tl.load(up.lse + places, mask=real, other=INFINITY)
    lse = tl.where(lse == -INFINITY, INFINITY, lse)
    delta = tl.load(up.delta + places, mask=real, other=0.0)
    prefix_lse, prefix_delta, gate = lse, delta, tl.full((), 1.0, tl.float32)
    if up.gate is not None:
        prefix_lse = tl.load(up.prefix_lse + places, mask=real, other=INFINITY)
        prefix_lse = tl.where(prefix_lse == -INFINITY, INFINITY, prefix_lse)
        prefix_delta = tl.load(up.prefix_delta + places, mask=real, other=0.0)
        gate = tl.load(up.gate + head).to(tl.float32)
    return AtQueries(lse, delta, prefix_lse, prefix_delta, gate)


@triton.jit
def of_half(up, in_prefix):
    """`lse` and `delta` of the softmax that a tile belongs to."""
    lse = tl.where(in_prefix, up.prefix_lse, up.lse)
    delta = tl.where(in_prefix, up.prefix_delta, up.delta)
    return lse, delta


@triton.jit
def load_queries(query, dout, first, head, at, MASKED: tl.constexpr, shape: tl.constexpr):
    """Queries and their `dout` from number `first` of a row on."""
    start = place(query, at.batch, head, at.first_query + first)
    q = load_tile(
        start, query.token, first, 0, at.queries, shape.BLOCK_M, shape.D, shape.BLOCK_D, MASKED
    )
    start = place(dout, at.batch, head, at.first_query + first)
    d = load_tile(
        start, dout.token, first, 0, at.queries, shape.BLOCK_M, shape.D_V, shape.BLOCK_DV, MASKED
    )
    return q, d


@triton.jit
def drop(numbers, kept, how):
    """The numbers after dropout."""
    return tl.where(kept, numbers * how.dropout_scale, 0.0)
