"""Prefix attention from PyTorch's own attention: each part with its log-sum-exp, merged.

`parts` cuts the prefix and the sequence into what a kernel, or a loop over blocks, can compute
where the tensors lie. With `lse = logaddexp(lse_1, lse_2)` the output of the whole softmax is the
sum of `exp(lse_i - lse) * out_i`; the backward of each part is its own backward run with the
*merged* output and `lse`, so that no gradient ever passes through a part's `lse`.

PyTorch's kernels have two weaknesses, which blocks of plain PyTorch do not have. They give a
log-sum-exp as one number, whose rounding counts where scores are large: a query all of whose keys
are hidden by an additive `finfo.min` would have probabilities of 1 in place of `1 / N`. And their
backward computes the same score by other sums than their forward did, so that the gradients of a
query's scores do not add up to 0; that sum reaches the query's gradient times whatever keys have
in common, which is large where one channel of the keys is. Both are looked for, and such a problem
is computed in blocks (`_rounds`, `_uneven`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prefixattn.aten import find_kernels
from prefixattn.gradients import Index, LogSum, Total, Upstream, merge, sink_gradient
from prefixattn.parts import BlockPart, Part, obstacle, plan
from prefixattn.problem import Problem, of_segment

# Keys' largest number by their mean one, from which on a query's gradient is computed with care. It
# is 6 for a million normal numbers, and 43 where one channel of 64 is a hundred times the others.
UNEVEN = 16


def forward(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[B, H, M, D_v]` in the query's dtype, `lse` and `lse_rest [B, H, M]`."""
    if not problem.packed:
        out, (lse, lse_rest) = _forward(problem)
        return out.to(problem.query.dtype), lse, lse_rest
    out, lse, lse_rest = problem.no_output()
    for segment in problem.segments():
        part_out, (part_lse, part_rest) = _forward(segment.problem)
        for whole, part in ((out, part_out), (lse, part_lse), (lse_rest, part_rest)):
            whole[:, :, segment.queries] = part.to(whole.dtype)
    return out, lse, lse_rest


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
    arguments: dict[str, Tensor] = {name: getattr(problem, name) for name in wanted}
    totals = {
        name: Total(tensor.shape, problem.accumulator, tensor.device)
        for name, tensor in arguments.items()
    }
    up = Upstream(torch.zeros_like(out) if dout is None else dout, out, lse, lse_rest, dlse)
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
        _backward(segment.problem, up.at((slice(None), slice(None), queries)), views)


def _forward(p: Problem) -> tuple[Tensor, LogSum]:
    """A dense problem's output, in the dtype it came in, and its log-sum-exp."""
    if p.prefix_gate is None:
        return _softmax(p, ("prefix", "sequence"))
    prefix_out, _ = _softmax(p, ("prefix",))
    out, numbers = _softmax(p, ("sequence",))
    return out.to(p.accumulator) + _per_head(p.prefix_gate, p) * prefix_out, numbers


def _softmax(p: Problem, halves: tuple[str, ...]) -> tuple[Tensor, LogSum]:
    """One softmax over some halves of a dense problem, and the sinks if the sequence is one."""
    kernels = find_kernels(p.query, p.key, p.value)
    out, numbers = _merge(p, [part for half in halves for part in plan(p, half, kernels)])
    if kernels is not None and (_rounds(numbers[0]) or _overflowed(out)):
        out, numbers = _merge(p, [part for half in halves for part in plan(p, half, None)])
    return _with_sinks(p, out, numbers) if "sequence" in halves else (out, numbers)


def _rounds(lse: Tensor) -> bool:
    """Whether the rounding of some log-sum-exp counts.

    Below this size it moves a probability by 2^-17 of itself at most, as much as the rounding of
    such a score does. On other devices than the CPU no kernel takes a bias, and none is asked.
    """
    if lse.device.type != "cpu":
        return False
    return bool(((lse.abs() >= 128) & lse.isfinite()).any())


def _overflowed(out: Tensor) -> bool:
    """Whether a kernel's sum of values, which it divides last, may have left the dtype's range."""
    return out.device.type == "cpu" and not bool(out.isfinite().all())


def _uneven(p: Problem) -> bool:
    """Whether some key has a number that is far larger than keys' numbers are on average.

    Only float32 is asked: with 16 bits the rounding of scores in eager attention counts for more.
    """
    if p.query.dtype != torch.float32 or p.query.device.type != "cpu":
        return False
    for key in (p.key, p.prefix_key):
        largest = torch.linalg.vector_norm(key, torch.inf) if key.numel() else key.new_zeros(())
        mean = torch.linalg.vector_norm(key, 1) / max(key.numel(), 1)
        if not largest <= UNEVEN * mean:  # true for NaN, in slots that nothing sees
            return True
    return False


def _in_blocks(p: Problem, up: Upstream, halves: tuple[str, ...]) -> Upstream:
    """What the backward starts from, as blocks compute it.

    Where `up` is of a softmax over more keys than these, it stays as it is.
    """
    parts = [BlockPart(part.problem, part.half) for half in halves for part in plan(p, half, None)]
    _, numbers = _merge(p, parts)
    if "sequence" in halves:
        _, numbers = _with_sinks(p, up.out, numbers)
    own = torch.isclose(numbers[0], up.lse, rtol=1e-4, atol=1e-4)
    given = (up.lse, up.lse_rest)
    lse, lse_rest = (torch.where(own, x, y) for x, y in zip(numbers, given, strict=True))
    up = replace(up, lse=lse, lse_rest=lse_rest)
    weighed = sum((part.weighed(up) for part in parts), torch.zeros_like(lse))
    from_out = up.delta if up.dlse is None else up.delta + up.dlse
    return replace(up, weighed=torch.where(own, weighed, from_out))


def _backward(p: Problem, up: Upstream, totals: dict[str, Total]) -> None:
    """Add a dense problem's gradients to the totals."""
    prefix_up = sequence_up = up
    if p.prefix_gate is not None:
        prefix_up, sequence_up = _split_by_gate(p, up, totals)
    in_blocks = _rounds(prefix_up.lse) or _rounds(sequence_up.lse) or _uneven(p)
    if in_blocks and p.prefix_gate is None:
        prefix_up = sequence_up = _in_blocks(p, up, ("prefix", "sequence"))
    elif in_blocks:
        prefix_up = _in_blocks(p, prefix_up, ("prefix",))
        sequence_up = _in_blocks(p, sequence_up, ("sequence",))
    for half, of_half in (("prefix", prefix_up), ("sequence", sequence_up)):
        mine = ("prefix_key", "prefix_value", "prefix_bias")
        names = mine if half == "prefix" else ("key", "value", "attn_mask")
        if not any(name in totals for name in ("query", *names)):
            continue
        kernels = find_kernels(p.query, p.key, p.value)
        # The kernels know neither the gradient of a bias nor of a log-sum-exp.
        beyond = of_half.dlse is not None or names[2] in totals
        varies = kernels is not None and p.deterministic and not kernels.deterministic
        for part in plan(p, half, None if beyond or varies or in_blocks else kernels):
            part.backward(of_half, totals)
    if "sinks" in totals and p.sinks is not None:
        totals["sinks"].add(sink_gradient(p.sinks, sequence_up))


def _split_by_gate(p: Problem, up: Upstream, totals: dict[str, Total]) -> tuple[Upstream, Upstream]:
    """Each half's own softmax. Both outputs are computed again: only their sum was kept."""
    assert p.prefix_gate is not None
    gate, dtype = _per_head(p.prefix_gate, p), p.query.dtype
    prefix_out, prefix_numbers = _softmax(p, ("prefix",))
    sequence_out, _ = _softmax(p, ("sequence",))
    dout = up.dout.to(p.accumulator)
    if "prefix_gate" in totals:
        totals["prefix_gate"].add((dout * prefix_out).sum((0, 2, 3)))
    prefix_up = Upstream((dout * gate).to(dtype), prefix_out.to(dtype), *prefix_numbers, None)
    of_sequence = (up.lse, up.lse_rest, up.dlse)
    return prefix_up, Upstream(up.dout, sequence_out.to(dtype), *of_sequence)


def _merge(p: Problem, parts: Sequence[Part]) -> tuple[Tensor, LogSum]:
    """One softmax over all parts: `out` in the accumulating dtype, or a lone part's own."""
    found: tuple[Tensor, LogSum] | None = None
    for part in parts:
        if found is None and part.index is None:
            found = part.forward()
        else:
            found = _merge_part(found or _nothing(p), part.forward(), part.index)
    return found or _nothing(p)


def _merge_part(
    so_far: tuple[Tensor, LogSum], part: tuple[Tensor, LogSum], index: Index | None
) -> tuple[Tensor, LogSum]:
    out, numbers = so_far
    out = out.to(numbers[0].dtype)
    # Views, but for the copies that a tensor of row numbers makes.
    whole = (out, *numbers)
    region = whole if index is None else tuple(x[index] for x in whole)
    merged, share = merge((region[1], region[2]), part[1])
    region[0].lerp_(part[0].to(out.dtype), share[..., None])  # the shares sum to one
    for old, new in zip(region[1:], merged, strict=True):
        old.copy_(new)
    if index is not None and isinstance(index[0], Tensor):
        for x, new in zip(whole, region, strict=True):
            x[index] = new
    return out, numbers


def _nothing(p: Problem) -> tuple[Tensor, LogSum]:
    """What a softmax over no keys gives."""
    out, *numbers = p.no_output()
    return out.to(p.accumulator), (numbers[0], numbers[1])


def _with_sinks(p: Problem, out: Tensor, numbers: LogSum) -> tuple[Tensor, LogSum]:
    """Let the sinks into the denominator."""
    if p.sinks is None:
        return out, numbers
    sinks = p.sinks.to(numbers[0].dtype)[:, None].expand_as(numbers[0])
    merged, share = merge((sinks, torch.zeros_like(sinks)), numbers)
    return out.to(p.accumulator) * share[..., None], merged


def _per_head(gate: Tensor, p: Problem) -> Tensor:
    return gate.to(p.accumulator)[:, None, None]
