"""From products of queries and keys to scores, and the running softmax over them.

Helpers take query numbers and slots of any broadcastable shapes, so that the same ones serve
`[queries, slots]` (forward, decode, dq) and `[slots, queries]` (dk and dv).

A score is rounded to float32 once, here, in the same way in every kernel: a backward whose scores
differ from the forward's in the last place has probabilities that do not sum to 1, which multiplies
whatever the keys have in common. `fma` is what makes sure of it, as a compiler may otherwise carry
a product on unrounded into the next addition, in one kernel and not in the other.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from prefixattn.kernels.rows import shift, visible
from prefixattn.kernels.tile import INFINITY, wide

LOG2E = tl.constexpr(1.4426950408889634)


class Bias(NamedTuple):
    """A tensor broadcast to `[row, head, query, slot]`: pointer and strides, 0 where broadcast."""

    data: Any
    row: Any
    head: Any
    query: Any
    slot: Any


class How(NamedTuple):
    """How scores come about; None switches a feature off when the kernel is compiled.

    Flags are 1 or None. `unit`: scores are products of queries and keys, in this unit (see
    `unit_of`); None: they are in natural units.
    """

    scale: Any
    unit: Any
    causal: Any
    window: Any
    prefix_window: Any
    softcap: Any
    alibi_slopes: Any
    attn_mask: Any
    prefix_bias: Any
    dropout_seed: Any
    dropout_threshold: Any
    dropout_scale: Any


def unit_of(scale: float, plain: bool) -> float | None:
    """The unit that scores may be left in, or None.

    Args:
        scale: of the scores.
        plain: whether nothing but the scale happens to a product, and no sink is a score.

    Products times a power of two are the same numbers in another unit, to the last bit. That saves
    a multiplication for each of them; any other scale rounds, and must do so before the softmax.
    """
    if not plain or not 2.0**-60 <= scale <= 2.0**60 or math.frexp(scale)[0] != 0.5:
        return None
    return scale


@triton.jit
def score(products, query, slot, in_prefix, head, at, how, MASKED: tl.constexpr):
    """Scores of `products` (query · key), -inf where unseen, and the slope of the soft cap."""
    scores, factor, slope = products, how.scale, 1.0
    if how.softcap is not None:
        bent = tanh(products * how.scale / how.softcap)
        scores, factor, slope = bent, how.softcap, 1.0 - bent * bent
    added = tl.full((), 0.0, tl.float32)
    if how.alibi_slopes is not None:
        steepness = tl.load(how.alibi_slopes + head).to(tl.float32)
        if how.prefix_window is None:
            steepness = tl.where(in_prefix, 0.0, steepness)
        # `offset` is in the range of slots; what it was beyond that is a float32 of its own.
        distance = (at.offset + query - slot - shift(in_prefix, at)).to(tl.float32) + at.beyond
        added = -(steepness * tl.abs(distance))
    if how.unit is None:
        scores = fused(scores, factor, added)
    real = query < at.queries
    if how.prefix_bias is not None:
        inside = real & (slot < tl.where(in_prefix, at.tokens, 0))
        scores += _bias(how.prefix_bias, query, slot, inside, head, at)
    if how.attn_mask is not None:
        inside = real & (slot >= at.start) & (slot < tl.where(in_prefix, 0, at.stop))
        found = _bias(how.attn_mask, query, at.first_key + slot, inside, head, at)
        if how.attn_mask.data.dtype.element_ty == tl.uint8:
            scores = tl.where((found == 0) & inside, -INFINITY, scores)
        else:
            scores += found
    if MASKED:
        scores = tl.where(visible(query, slot, in_prefix, at, how), scores, -INFINITY)
    return scores, slope


@triton.jit
def fused(x, y, z):
    """`x * y + z`, rounded once and never contracted with what comes next."""
    x, y = tl.broadcast(x, tl.cast(y, tl.float32))
    x, z = tl.broadcast(x, tl.cast(z, tl.float32))
    return tl.fma(x, y, z)


@triton.jit
def _bias(bias, query, slot, inside, head, at):
    data = bias.data + wide(at.batch) * bias.row + wide(head) * bias.head
    data = data + wide(at.first_query + query) * bias.query + wide(slot) * bias.slot
    return tl.load(data, mask=inside, other=0).to(tl.float32)


@triton.jit
def keep(query, slot, in_prefix, head, at, how):
    """Which probabilities dropout keeps; see `prefixattn.philox` for what decides."""
    seed, first_row = tl.load(how.dropout_seed), tl.load(how.dropout_seed + 1)
    column = slot + tl.where(in_prefix, 0, at.P)
    row = (at.number + first_row).to(tl.int32)
    word, _, _, _ = tl.philox(seed, column, query, head, row)
    return word.to(tl.int64) >= how.dropout_threshold


@triton.jit
def tanh(x):
    """Hyperbolic tangent to float32 accuracy: its series near zero, where 1 - 2 / (...) cancels."""
    square = x * x
    series = 2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835))
    near = x * (1 + square * (-1.0 / 3 + square * series))
    far = 1 - 2 / (1 + tl.exp2(x * (2 * LOG2E)))
    return tl.where(square < 0.0625, near, far)


@triton.jit
def octaves(how):
    """A score's unit in units of log 2."""
    found = tl.full((), LOG2E, tl.float32)
    if how.unit is not None:
        found = how.unit * LOG2E
    return found


@triton.jit
def weigh(scores, peak, rest, how):
    """`exp(score - peak)` over `2^rest`; `peak` is a score and not -inf. 0 where a score is -inf.

    The difference comes first. It is exact where it matters, at any size: a multiple of the score
    less a multiple of the peak, in one instruction, is off by the peak's own rounding, and a weight
    of 1 is exp of that: 0 or inf at scores like 1e30. In units of log 2 the largest would overflow.
    """
    return tl.exp2((scores - peak) * octaves(how) - rest)


class State(NamedTuple):
    """A running softmax: maximum and sum `[BLOCK_M]`, weighted values `[BLOCK_M, BLOCK_DV]`.

    The maximum is a score, -inf as long as nothing was seen. `excess` is what rounding added to the
    sum, so that a sum of many tiles is as good as one of few. `anchor`: the maximum that the values
    are relative to that were summed before and lie in memory (see `Long`).
    """

    peak: Any
    total: Any
    excess: Any
    summed: Any
    anchor: Any


@triton.jit
def begin(sink, shape: tl.constexpr):
    """The state before any key: a sink, which has a weight and no value; -inf is none."""
    peak = tl.full((shape.BLOCK_M,), -INFINITY, tl.float32)
    nothing = tl.full((shape.BLOCK_M,), 0.0, tl.float32)
    summed = tl.full((shape.BLOCK_M, shape.BLOCK_DV), 0.0, tl.float32)
    total = nothing + tl.where(sink == -INFINITY, 0.0, 1.0)
    return State(tl.maximum(peak, sink), total, nothing, summed, peak)


@triton.jit
def load_sink(sinks, head):
    """A head's sink, or -inf without sinks."""
    sink = tl.full((), -INFINITY, tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32)
    return sink


@triton.jit
def soften(state, scores, how):
    """The state with more scores, its values not yet added, and the scores' weights."""
    peak = tl.maximum(state.peak, tl.max(scores, 1))
    safe = tl.where(peak == -INFINITY, 0.0, peak)
    weights = weigh(scores, safe[:, None], 0.0, how)
    shrink = weigh(state.peak, safe, 0.0, how)
    total, excess = add(state.total, state.excess, shrink, tl.sum(weights, 1))
    return State(peak, total, excess, state.summed * shrink[:, None], state.anchor), weights


@triton.jit
def add(total, excess, shrink, more):
    """`total * shrink + more`, and the excess: what rounding has added to the total so far.

    Kahan's sum (1965). Both products are fused, so that a compiler cannot fuse just one of them.
    """
    more -= excess * shrink
    new = fused(total, shrink, more)
    return new, fused(total, -shrink, new) - more


@triton.jit
def mean(state, how):
    """The weighted mean of the values; zeros where nothing was seen."""
    found = state.summed / tl.where(state.total == 0, 1.0, state.total)[:, None]
    if how.dropout_scale is not None:
        found *= how.dropout_scale
    return found


@triton.jit
def log_sum(peak, total, unit):
    """`lse` of a running softmax and its `lse_rest`: -inf and 0 if nothing was seen.

    The rest is what rounding took from `lse`; all of log(total) where the peak is `finfo.min`.
    """
    peak = tl.where(total == 0, 0.0, peak)
    if unit is not None:
        peak *= unit
    log = tl.log(tl.where(total == 0, 1.0, total))
    lse = peak + log
    rest = tl.where(tl.abs(lse) < INFINITY, (peak - lse) + log, 0.0)
    return tl.where(total == 0, -INFINITY, lse), rest
