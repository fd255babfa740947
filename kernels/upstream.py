"""What both backward kernels read at their queries, and what dropout does to gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from prefixattn.kernels.scores import LOG2E
from prefixattn.kernels.tile import INFINITY, load_tile, number_of, place


class Upstream(NamedTuple):
    """What the backward starts from: `dout`; `lse`, its rest and `delta` `[B, H, M]`.

    With a gate the prefix has its own softmax, whose gradients the gate multiplies.
    """

    dout: Any
    lse: Any
    rest: Any
    delta: Any
    prefix_lse: Any
    prefix_rest: Any
    prefix_delta: Any
    gate: Any


class AtQueries(NamedTuple):
    """The upstream at some queries, of one softmax, and the gate of its output.

    `level` and `rest` are `lse` and its rest, in the units of scores and of log 2.
    """

    level: Any
    rest: Any
    delta: Any
    gate: Any


@triton.jit
def at_queries(up, in_prefix, number, head, at, how, M, heads):
    """The numbers of queries; the level is inf where nothing is seen: all weights are 0."""
    places, real = number_of(at.batch, head, at.first_query + number, M, heads), number < at.queries
    lse, rest, gate = up.lse, up.rest, tl.full((), 1.0, tl.float32)
    if up.gate is not None:
        lse = tl.where(in_prefix, up.prefix_lse, lse)
        rest = tl.where(in_prefix, up.prefix_rest, rest)
        gate = tl.where(in_prefix, tl.load(up.gate + head).to(tl.float32), gate)
    level = tl.load(lse + places, mask=real, other=INFINITY)
    level = tl.where(level == -INFINITY, INFINITY, level)
    if how.unit is not None:
        level /= how.unit  # a power of two: exact
    rest = tl.load(rest + places, mask=real, other=0.0) * LOG2E
    return AtQueries(level, rest, delta_at(up, in_prefix, number, head, at, M, heads), gate)


@triton.jit
def delta_at(up, in_prefix, number, head, at, M, heads):
    """Delta at some queries, of one softmax."""
    places, real = number_of(at.batch, head, at.first_query + number, M, heads), number < at.queries
    delta = up.delta
    if up.gate is not None:
        delta = tl.where(in_prefix, up.prefix_delta, delta)
    return tl.load(delta + places, mask=real, other=0.0)


@triton.jit
def choose(in_prefix, of_prefix, of_sequence):
    """The numbers of the softmax that a tile belongs to."""
    return AtQueries(
        tl.where(in_prefix, of_prefix.level, of_sequence.level),
        tl.where(in_prefix, of_prefix.rest, of_sequence.rest),
        tl.where(in_prefix, of_prefix.delta, of_sequence.delta),
        tl.where(in_prefix, of_prefix.gate, of_sequence.gate),
    )


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
