"""The backward: delta, dq, and (in `dkv`) the gradients of keys and values.

With `p = exp(score - lse - lse_rest)` and `delta = sum(dout * out) - dlse` the gradient of a score
is `p * (dout · value - delta)` (Dao et al., "FlashAttention", 2022, appendix B.4; the gradient of
lse joins delta). dq walks slots as the forward does. What is kept from the forward is its inputs,
its output, `lse` and its rest.
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
    long,
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
    add_tile,
    dot,
    load_slots,
    load_tile,
    place,
    source,
    store_tile,
    wide,
)
from prefixattn.kernels.upstream import Upstream, at_queries, choose, drop, load_queries
from prefixattn.problem import Problem, room_like


def backward(
    problem: Problem,
    dout: Tensor | None,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    lse_rest: Tensor,
    wanted: tuple[str, ...],
) -> list[Tensor]:
    """Gradients of the `wanted` arguments, each in its own dtype."""
    p = problem
    if p.rows * p.M == 0:
        return [torch.zeros_like(getattr(p, name)) for name in wanted]
    with on_device_of(p.query):
        dout = torch.zeros_like(out) if dout is None else dout
        up = _upstream(p, dout, dlse, out, lse, lse_rest)
        grads = dkv.slots(p, up, wanted)
        if "query" in wanted:
            grads["query"] = _queries(p, up)
    if "sinks" in wanted:
        grads["sinks"] = _sinks(p, up)
    if "prefix_gate" in wanted:
        grads["prefix_gate"] = up.prefix_delta.sum((0, 2))
    return [grads[name].to(getattr(p, name).dtype) for name in wanted]


def _upstream(
    p: Problem, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, rest: Tensor
) -> Upstream:
    if p.prefix_gate is None:
        delta = _delta(p, dout, out, dlse)
        return Upstream(dout, lse.contiguous(), rest.contiguous(), delta, None, None, None, None)
    # Only the sum of the two outputs was kept: they are made again.
    own, prefix = halves(p)
    return Upstream(
        dout=dout,
        lse=own.lse,
        rest=own.rest,
        delta=_delta(p, dout, own.out, dlse),
        prefix_lse=prefix.lse,
        prefix_rest=prefix.rest,
        prefix_delta=_delta(p, dout, prefix.out, None),
        gate=p.prefix_gate,
    )


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
    share = torch.exp(p.sinks.to(up.lse.dtype)[:, None] - up.lse - up.rest)
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
        long(p, shape, p.D),
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
    """Queries `[BLOCK_M, BLOCK_D]`, their `dout`, the first's number and all, head, row.

    And the upstream of the prefix's softmax and of the sequence's, which are one without a gate.
    """

    q: Any
    dout: Any
    first: Any
    number: Any
    head: Any
    at: Any
    of_prefix: Any
    of_sequence: Any


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
    number = first + tl.arange(0, shape.BLOCK_M)
    q, d = load_queries(query, up.dout, first, head, at, True, shape)
    no, heads = tl.full((), False, tl.int1), kv_heads * shape.GROUP
    here = at_queries(up, no, number, head, at, how, M, heads)
    of_prefix = here
    if up.gate is not None:
        of_prefix = at_queries(up, ~no, number, head, at, how, M, heads)
    mine = Queries(q, d, first, number, head, at, of_prefix, here)
    kv_head = head // shape.GROUP
    prefix = source(prefix_key, prefix_value, tl.maximum(at.entry, 0), kv_head, 0)
    sequence = source(key, value, at.batch, kv_head, at.first_key)

    dq = tl.full((shape.BLOCK_M, shape.BLOCK_D), 0.0, tl.float32)
    spans = key_spans(first, at, how, shape)
    if shape.BLOCK_P > 0:
        yes = tl.full((), True, tl.int1)
        dq = _to_query(dq, mine, prefix, sequence, yes, 0, how, shape.BLOCK_P, True, shape)
    dq = walk(_to_query, _set_aside, dq, mine, prefix, sequence, spans, how, long, False, shape)
    dq = walk(_to_query, _set_aside, dq, mine, prefix, sequence, spans, how, long, True, shape)
    if long is not None:
        tl.debug_barrier()  # what other threads have added
        dq += _sums(mine, long, shape)
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
def _set_aside(dq, mine, long, how, shape: tl.constexpr):
    """Zeros, once dq is added to the sums of the stretches before."""
    start = place(long.sums, mine.at.batch, mine.head, mine.at.first_query + mine.first)
    add_tile(
        dq, start, long.sums.token, mine.first, mine.at.queries, shape.BLOCK_M, shape.D,
        shape.BLOCK_D,
    )  # fmt: skip
    return tl.zeros_like(dq)


@triton.jit
def _sums(mine, long, shape: tl.constexpr):
    """The sums of a program's queries so far."""
    start = place(long.sums, mine.at.batch, mine.head, mine.at.first_query + mine.first)
    return load_tile(
        start, long.sums.token, mine.first, 0, mine.at.queries, shape.BLOCK_M, shape.D,
        shape.BLOCK_D, True,
    )  # fmt: skip


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
    here = choose(in_prefix, mine.of_prefix, mine.of_sequence)
    products = dot(mine.q, tl.trans(k), nothing, shape)
    scores, slope = score(products, number, slot, in_prefix, mine.head, at, how, MASKED)
    weights = weigh(scores, here.level[:, None], here.rest[:, None], how) * here.gate
    grads = dot(mine.dout, tl.trans(v), nothing, shape)
    if how.dropout_seed is not None:
        grads = drop(grads, keep(number, slot, in_prefix, mine.head, at, how), how)
    grads = weights * (grads - here.delta[:, None]) * slope
    return dot(grads.to(k.dtype), k, dq, shape)
