"""Prefix attention from PyTorch's own attention: each part with its log-sum-exp, merged.

`parts` cuts the prefix and the sequence into what a kernel, or a loop over blocks, can compute
where the tensors lie. With `lse = logaddexp(lse_1, lse_2)` the output of the whole softmax is the
sum of `exp(lse_i - lse) * out_i`; the backward of each part is its own backward run with the
*merged* output and `lse`, so that no gradient ever passes through a part's `lse`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefixattn.aten import find_kernels
from prefixattn.gradients import Index, Total, Upstream
from prefixattn.parts import Part, obstacle, plan
from prefixattn.problem import Problem, of_segment


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Output `[B, H, M, D_v]` in the query's dtype and `lse [B, H, M]`."""
    if not problem.packed:
        out, lse = _forward(problem)
        return out.to(problem.query.dtype), lse
    out, lse = problem.empty_output()
    out.zero_()
    lse.fill_(-torch.inf)
    for segment in problem.segments():
        part_out, part_lse = _forward(segment.problem)
        out[:, :, segment.queries] = part_out.to(out.dtype)
        lse[:, :, segment.queries] = part_lse
    return out, lse


def backward(
    problem: Problem,
    dout: Tensor | None,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    wanted: tuple[str, ...],
) -> list[Tensor]:
    """Gradients of the `wanted` arguments, each in its own dtype."""
    arguments: dict[str, Tensor] = {name: getattr(problem, name) for name in wanted}
    totals = {
        name: Total(tensor.shape, problem.accumulator, tensor.device)
        for name, tensor in arguments.items()
    }
    up = Upstream(torch.zeros_like(out) if dout is None else dout, out, lse, dlse)
    if problem.packed:
        _backward_packed(problem, up, totals)
    else:
        _backward(problem, up, totals)
    return [
        (total.dense() if total.value is None else total.value).to(arguments[name].dtype)
        for name, total in totals.items()
    ]


def describe(problem: Problem) -> str:
    """What computes each half of a problem, and why where it is not one of PyTorch's kernels."""
    kernels = find_kernels(problem.query, problem.key, problem.value)
    if kernels is None:
        return (
            "both halves in blocks of plain PyTorch: no kernel for these head dims, dtype, device"
        )
    dense = problem
    if problem.packed:
        dense = next((segment.problem for segment in problem.segments()), problem)
    words = []
    for half in ("prefix", "sequence"):
        reason = obstacle(dense, half, kernels)
        how = f"in blocks of plain PyTorch because of {reason}" if reason else f"by {kernels.name}"
        words.append(f"{half} {how}")
    return ", ".join(words) + ", merged by log-sum-exp"


def _backward_packed(problem: Problem, up: Upstream, totals: dict[str, Total]) -> None:
    """Segment by segment, each adding to its own part of the sums."""
    for segment in problem.segments():
        queries, keys, views = segment.queries, segment.keys, {}
        for name, total in totals.items():
            view = of_segment(name, total.dense(), queries, keys)
            assert view is not None
            views[name] = Total(view.shape, total.dtype, total.device, view)
        dlse = None if up.dlse is None else up.dlse[:, :, queries]
        dout, out, lse = (x[:, :, queries] for x in (up.dout, up.out, up.lse))
        _backward(segment.problem, Upstream(dout, out, lse, dlse), views)


def _forward(p: Problem) -> tuple[Tensor, Tensor]:
    """A dense problem's output, in the dtype it came in, and `lse`."""
    kernels = find_kernels(p.query, p.key, p.value)
    prefix, sequence = plan(p, "prefix", kernels), plan(p, "sequence", kernels)
    if p.prefix_gate is None:
        return _with_sinks(p, *_merge(p, prefix + sequence))
    prefix_out, _ = _merge(p, prefix)
    out, lse = _with_sinks(p, *_merge(p, sequence))
    return out.to(p.accumulator) + _per_head(p.prefix_gate, p) * prefix_out, lse


def _backward(p: Problem, up: Upstream, totals: dict[str, Total]) -> None:
    """Add a dense problem's gradients to the totals."""
    prefix_up = sequence_up = up
    if p.prefix_gate is not None:
        prefix_up, sequence_up = _split_by_gate(p, up, totals)
    for half, of_half in (("prefix", prefix_up), ("sequence", sequence_up)):
        mine = ("prefix_key", "prefix_value", "prefix_bias")
        names = mine if half == "prefix" else ("key", "value", "attn_mask")
        if not any(name in totals for name in ("query", *names)):
            continue
        kernels = find_kernels(p.query, p.key, p.value)
        # The kernels know neither the gradient of a bias nor of a log-sum-exp.
        beyond = of_half.dlse is not None or names[2] in totals
        varies = kernels is not None and p.deterministic and not kernels.deterministic
        for part in plan(p, half, None if beyond or varies else kernels):
            part.backward(of_half, totals)
    if "sinks" in totals and p.sinks is not None:
        share = torch.exp(p.sinks.to(up.lse.dtype)[:, None] - sequence_up.lse)
        share = share.masked_fill(sequence_up.lse == -torch.inf, 0)
        totals["sinks"].add(-(share * sequence_up.delta).sum((0, 2)))


def _split_by_gate(p: Problem, up: Upstream, totals: dict[str, Total]) -> tuple[Upstream, Upstream]:
    """Each half's own softmax. Both outputs are computed again: only their sum was kept."""
    assert p.prefix_gate is not None
    gate, dtype = _per_head(p.prefix_gate, p), p.query.dtype
    kernels = find_kernels(p.query, p.key, p.value)
    prefix_out, prefix_lse = _merge(p, plan(p, "prefix", kernels))
    sequence_out, _ = _with_sinks(p, *_merge(p, plan(p, "sequence", kernels)))
    dout = up.dout.to(p.accumulator)
    if "prefix_gate" in totals:
        totals["prefix_gate"].add((dout * prefix_out).sum((0, 2, 3)))
    prefix_up = Upstream((dout * gate).to(dtype), prefix_out.to(dtype), prefix_lse, None)
    return prefix_up, Upstream(up.dout, sequence_out.to(dtype), up.lse, up.dlse)


def _merge(p: Problem, parts: list[Part]) -> tuple[Tensor, Tensor]:
    """One softmax over all parts: `out` in the accumulating dtype (or a lone part's own), `lse`."""
    out = lse = None
    for part in parts:
        part_out, part_lse = part.forward()
        if out is None and part.index is None:
            out, lse = part_out, part_lse
        else:
            out, lse = _merge_part(p, out, lse, (part_out, part_lse), part.index)
    return (out, lse) if out is not None and lse is not None else _nothing(p)


def _merge_part(
    p: Problem,
    out: Tensor | None,
    lse: Tensor | None,
    part: tuple[Tensor, Tensor],
    index: Index | None,
) -> tuple[Tensor, Tensor]:
    if out is None or lse is None:
        out, lse = _nothing(p)
    out = out.to(p.accumulator)
    # Views, but for the copies that a tensor of row numbers makes.
    region_out, region_lse = (out, lse) if index is None else (out[index], lse[index])
    merged = torch.logaddexp(region_lse, part[1])
    weight = torch.exp(part[1] - merged.masked_fill(merged == -torch.inf, 0))
    region_out.lerp_(part[0].to(p.accumulator), weight[..., None])  # the weights sum to one
    region_lse.copy_(merged)
    if index is not None and isinstance(index[0], Tensor):
        out[index], lse[index] = region_out, region_lse
    return out, lse


def _nothing(p: Problem) -> tuple[Tensor, Tensor]:
    """What a softmax over no keys gives."""
    out, lse = p.empty_output()
    return torch.zeros_like(out, dtype=p.accumulator), lse.fill_(-torch.inf)


def _with_sinks(p: Problem, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Let the sinks into the denominator."""
    if p.sinks is None:
        return out, lse
    total = torch.logaddexp(lse, p.sinks.to(lse.dtype)[:, None])
    safe = total.masked_fill(total == -torch.inf, 0)
    return out.to(p.accumulator) * torch.exp(lse - safe)[..., None], total


def _per_head(gate: Tensor, p: Problem) -> Tensor:
    return gate.to(p.accumulator)[:, None, None]
