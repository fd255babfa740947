"""From products of queries and keys to scores, and the running softmax over them.

Helpers take query numbers and slots of any broadcastable shapes, so that the same ones serve
`[queries, slots]` (forward, decode, dq) and `[slots, queries]` (dk and dv).
"""

from __future__ import annotations

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

    Flags are 1 or None. `late_scale`: nothing but `scale` happens to a product, and `scale > 0`, so
    that the softmax multiplies by it. `additive`: a bias is added, which may hold `finfo.min`.
    """

    scale: Any
    late_scale: Any
    causal: Any
    window: Any
    prefix_window: Any
    softcap: Any
    alibi_slopes: Any
    attn_mask: Any
    prefix_bias: Any
    additive: Any
    dropout_seed: Any
    dropout_threshold: Any
    dropout_scale: Any


@triton.jit
def score(products, query, slot, in_prefix, head, at, how, MASKED: tl.constexpr):
    """Scores of `products` (query · key), -inf where unseen, and the slope of the soft cap.

    With `late_scale` they are still to be multiplied by `scale`, which `weigh` does.
    """
    scores, slope = products, 1.0
    if how.late_scale is None:
        scores = products * how.scale
    if how.softcap is not None:
        bent = tanh(scores / how.softcap)
        scores, slope = how.softcap * bent, 1.0 - bent * bent
    if how.alibi_slopes is not None:
        steepness = tl.load(how.alibi_slopes + head).to(tl.float32)
        if how.prefix_window is None:
            steepness = tl.where(in_prefix, 0.0, steepness)
        distance = at.offset + query - slot - shift(in_prefix, at)
        scores -= steepness * tl.abs(distance).to(tl.float32)
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
def weigh(scores, peak, how):
    """`exp(score - peak)`; `peak` in natural units and not -inf. 0 where the score is -inf."""
    if how.additive is not None:
        weights = tl.exp2((scores - peak) * LOG2E)  # finfo.min would overflow in units of log 2
    elif how.late_scale is not None:
        weights = tl.exp2(scores * (how.scale * LOG2E) - peak * LOG2E)
    else:
        weights = tl.exp2(scores * LOG2E - peak * LOG2E)
    return weights


class State(NamedTuple):
    """A running softmax: maximum and sum `[BLOCK_M]`, weighted values `[BLOCK_M, BLOCK_DV]`.

    The maximum is in natural units, -inf as long as nothing was seen.
    """

    peak: Any
    total: Any
    summed: Any


@triton.jit
def begin(sink, shape: tl.constexpr):
    """The state before any key: a sink, which has a weight and no value; -inf is none."""
    peak = tl.full((shape.BLOCK_M,), -INFINITY, tl.float32)
    total = tl.full((shape.BLOCK_M,), 0.0, tl.float32) + tl.where(sink == -INFINITY, 0.0, 1.0)
    summed = tl.full((shape.BLOCK_M, shape.BLOCK_DV), 0.0, tl.float32)
    return State(tl.maximum(peak, sink), total, summed)


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
    highest = tl.max(scores, 1)
    if how.late_scale is not None:
        highest *= how.scale
    peak = tl.maximum(state.peak, highest)
    safe = tl.where(peak == -INFINITY, 0.0, peak)
    weights = weigh(scores, safe[:, None], how)
    shrink = tl.exp2((state.peak - safe) * LOG2E)
    total = state.total * shrink + tl.sum(weights, 1)
    return State(peak, total, state.summed * shrink[:, None]), weights


@triton.jit
def mean(state, how):
    """The weighted mean of the values; zeros where nothing was seen."""
    found = state.summed / tl.where(state.total == 0, 1.0, state.total)[:, None]
    if how.dropout_scale is not None:
        found *= how.dropout_scale
    return found


@triton.jit
def log_sum(peak, total):
    """`lse` of a running softmax, -inf if nothing was seen."""
    return tl.where(total == 0, -INFINITY, peak + tl.log(tl.where(total == 0, 1.0, total)))
