"""The backward: delta, dq, and (in `dkv`) the gradients of keys and values.

With `p = exp(score - lse)` and `delta = sum(dout * out) - dlse` the gradient of a score is
`p * (dout · value - delta)` (Dao et al., "FlashAttention", 2022, appendix B.4; the gradient of lse
joins delta). dq walks slots as the forward does. What is kept from the forward is its inputs, its
output and `lse`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefixattn.kernels import dkv
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
from prefixattn.kernels.forward import halves
from prefixattn.kernels.rows import (
    key_spans,
    locate,
    query_tile,
    used_slots,
    walk,
)
from prefixattn.kernels.scores import keep, score, weigh
from prefixattn.kernels.tile import (
    dot,
    load_slots,
    load_tile,
    place,
    source,
    store_tile,
    wide,
)
from prefixattn.kernels.upstream import Upstream, at_queries, drop, load_queries, of_half
from prefixattn.problem import Problem, room_like


def backward(
    problem: Problem,
    dout: Tensor | None,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    wanted: tuple[str, ...],
) -> list[Tensor]:
    """Gradients of the `wanted` arguments, each in its own dtype."""
    p = problem
    if p.rows * p.M == 0:
        return [torch.zeros_like(getattr(p, name)) for name in wanted]
    with on_device_of(p.query):
        up = _upstream(p, torch.zeros_like(out) if dout is None else dout, dlse, out, lse)
        grads = dkv.slots(p, up, wanted)
        if "query" in wanted:
            grads["query"] = _queries(p, up)
    if "sinks" in wanted:
        grads["sinks"] = _sinks(p, up)
    if "prefix_gate" in wanted:
        grads["prefix_gate"] = up.prefix_delta.sum((0, 2))
    return [grads[name].to(getattr(p, name).dtype) for name in wanted]


def _upstream(p: Problem, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor) -> Upstream:
    if p.prefix_gate is None:
        return Upstream(dout, lse, _delta(p, dout, out, dlse), None, None, None)
    # Only the sum of the two outputs was kept: they are made again.
    out, lse, prefix_out, prefix_lse = halves(p)
    delta, prefix_delta = _delta(p, dout, out, dlse), _delta(p, dout, prefix_out, None)
    return Upstream(dout, lse, delta, prefix_lse, prefix_delta, p.prefix_gate)


def _delta(p: Problem, dout: Tensor, out: Tensor, dlse: Tensor | None) -> Tensor:
    """`sum(dout * out) - dlse`, `[B, H, M]`."""
    delta = torch.empty(p.B, p.H, p.M, dtype=torch.float32, device=out.device)
    shape = tiles_for(p, "dkv")
    blocks = triton.cdiv(p.M, shape.BLOCK_M)
    dlse = None if dlse is None else dlse.contiguous()
    _delta_kernel[(blocks * p.B * p.H,)](
        view(dout), view(out), dlse, delta, p.H, p.M, blocks, shape, **options(shape)
    )
    return delta


def _sinks(p: Problem, up: Upstream) -> Tensor:
    """A sink's probability times minus delta, summed over all queries of its head."""
    assert p.sinks is not None
    share = torch.exp(p.sinks.to(up.lse.dtype)[:, None] - up.lse)
    return -(share.masked_fill(up.lse == -torch.inf, 0) * up.delta).sum((0, 2))


def _queries(p: Problem, up: Upstream) -> Tensor:
    shape = tiles_for(p, "dq")
    dquery = room_like(p.query)
    _dq[(tiles_of(p.M, shape.BLOCK_M, p) * p.B * p.H,)](
        view(p.query),
        view(p.key),
        view(p.value),
        view(p.prefix_key),
        view(p.prefix_value),
        up._replace(dout=view(up.dout)),
        view(dquery),
        where(p),
        how(p),
        *lengths(p),
        shape,
        **options(shape),
    )
    return dquery


@triton.jit(do_not_specialize=["heads", "M", "blocks"])
def _delta_kernel(dout, out, dlse, delta, heads, M, blocks, shape: tl.constexpr):
    program = tl.program_id(0)
    first, program = program % blocks * shape.BLOCK_M, program // blocks
    head, batch = program % heads, program // heads
    total = tl.full((shape.BLOCK_M,), 0.0, tl.float32)
    d, o = place(dout, batch, head, first), place(out, batch, head, first)
    d = load_tile(d, dout.token, first, 0, M, shape.BLOCK_M, shape.D_V, shape.BLOCK_DV, True)
    o = load_tile(o, out.token, first, 0, M, shape.BLOCK_M, shape.D_V, shape.BLOCK_DV, True)
    total += tl.sum(d.to(tl.float32) * o.to(tl.float32), 1)
    query = first + tl.arange(0, shape.BLOCK_M)
    places = wide(program) * M + query
    if dlse is not None:
        total -= tl.load(dlse + places, mask=query < M, other=0.0)
    tl.store(delta + places, total, mask=query < M)


class Queries(NamedTuple):
    """Queries `[BLOCK_M, BLOCK_D]`, their `dout`, numbers `[BLOCK_M]`, head, row, upstream."""

    q: Any
    dout: Any
    number: Any
    head: Any
    at: Any
    up: Any


@triton.jit(do_not_specialize=LENGTHS)
def _dq(
    query,
    key,
    value,
    prefix_key,
    prefix_value,
    up,
    dquery,
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
    number = first + tl.arange(0, shape.BLOCK_M)
    q, d = load_queries(query, up.dout, first, head, at, True, shape)
    here = at_queries(up, number, head, at, M, kv_heads * shape.GROUP)
    mine = Queries(q, d, number, head, at, here)
    kv_head = head // shape.GROUP
    prefix = source(prefix_key, prefix_value, tl.maximum(at.entry, 0), kv_head, 0)
    sequence = source(key, value, at.batch, kv_head, at.first_key)

    dq = tl.full((shape.BLOCK_M, shape.BLOCK_D), 0.0, tl.float32)
    spans = key_spans(first, at, how, shape)
    if shape.BLOCK_P > 0:
        yes = tl.full((), True, tl.int1)
        dq = _to_query(dq, mine, prefix, sequence, yes, 0, how, shape.BLOCK_P, True, shape)
    dq = walk(_to_query, dq, mine, prefix, sequence, spans, how, False, shape)
    dq = walk(_to_query, dq, mine, prefix, sequence, spans, how, True, shape)
    start = place(dquery, at.batch, head, at.first_query + first)
    store_tile(
        dq * how.scale,
        start,
        dquery.token,
        first,
        at.queries,
        shape.BLOCK_M,
        shape.D,
        shape.BLOCK_D,
    )


@triton.jit
def _to_query(
    dq,
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
    """dq with the share of one more tile of slots."""
    low, high = used_slots(in_prefix, mine.at)
    k, v = load_slots(prefix, sequence, in_prefix, first, low, high, BLOCK, MASKED, shape)
    slot = first + tl.arange(0, BLOCK)[None, :]
    number, at = mine.number[:, None], mine.at
    nothing = tl.full((shape.BLOCK_M, BLOCK), 0.0, tl.float32)
    lse, delta = of_half(mine.up, in_prefix)
    products = dot(mine.q, tl.trans(k), nothing, shape)
    scores, slope = score(products, number, slot, in_prefix, mine.head, at, how, MASKED)
    weights = weigh(scores, lse[:, None], how) * tl.where(in_prefix, mine.up.gate, 1.0)
    grads = dot(mine.dout, tl.trans(v), nothing, shape)
    if how.dropout_seed is not None:
        grads = drop(grads, keep(number, slot, in_prefix, mine.head, at, how), how)
    grads = weights * (grads - delta[:, None]) * slope
    return dot(grads.to(k.dtype), k, dq, shape)
