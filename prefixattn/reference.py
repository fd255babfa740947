"""The reference: what prefix attention means, in plain PyTorch. Every implementation meets it.

It materialises all scores and is meant for truth, not for speed. In float64 it is the oracle.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from prefixattn.gradients import log_sum
from prefixattn.philox import keep_mask, random_words
from prefixattn.problem import DIFFERENTIABLE, FURTHEST, Problem


def forward(problem: Problem, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[B, H, M, D_v]` in the query's dtype, `lse [B, H, M]` and its `lse_rest [B, H, M]`.

    Args:
        problem: a checked problem.
        dtype: what to compute in; None: float32, or float64 for float64 input.
    """
    dtype = dtype or problem.accumulator
    if not problem.packed:
        out, lse, lse_rest = _attend(problem, dtype)
    else:
        results = [_attend(segment.problem, dtype) for segment in problem.segments()]
        covered = sum(part[0].shape[2] for part in results)
        blank = problem.no_output()  # for queries of no segment
        results.append(
            (blank[0][:, :, covered:], blank[1][:, :, covered:], blank[2][:, :, covered:])
        )
        out, lse, lse_rest = (
            torch.cat([part.to(dtype) for part in parts], dim=2)
            for parts in zip(*results, strict=True)
        )
    lse, lse_rest = lse.to(problem.accumulator), lse_rest.detach().to(problem.accumulator)
    return out.to(problem.query.dtype), lse, lse_rest


def backward(
    problem: Problem,
    dout: Tensor | None,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    lse_rest: Tensor,
    wanted: tuple[str, ...],
) -> list[Tensor]:
    """Gradients of the `wanted` arguments, by autograd through `forward`.

    `out`, `lse` and `lse_rest` may be of a softmax over more keys than these, merged from several
    calls.
    """
    leaves = {
        name: getattr(problem, name).detach().requires_grad_(name in wanted)
        for name in DIFFERENTIABLE
        if getattr(problem, name) is not None and getattr(problem, name).is_floating_point()
    }
    with _autograd():
        results = forward(replace(problem, **leaves))
    if problem.prefix_gate is None:
        dout, dlse = _share_of(results, (out, lse, lse_rest), dout, dlse)
    inputs = [leaves[name] for name in wanted]
    pairs = [
        (result, grad)
        for result, grad in zip(results[:2], (dout, dlse), strict=True)
        if grad is not None and result.requires_grad
    ]
    if not pairs:  # nothing wanted has a part in the results: an empty bank, say
        return [torch.zeros_like(leaf) for leaf in inputs]
    outputs, upstream = zip(*pairs, strict=True)
    grads = torch.autograd.grad(outputs, inputs, upstream, allow_unused=True)
    return [
        torch.zeros_like(leaf) if grad is None else grad
        for leaf, grad in zip(inputs, grads, strict=True)
    ]


def _share_of(
    own: tuple[Tensor, Tensor, Tensor],
    merged: tuple[Tensor, Tensor, Tensor],
    dout: Tensor | None,
    dlse: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of these keys' own output and lse, for those of `merged`.

    Its output is the sum of `share * own_out` over the calls that it was merged from, with
    `share = exp(own_lse - lse)`.
    """
    own_out, own_lse, own_rest = (x.detach() for x in own)
    out, lse, lse_rest = merged
    if torch.equal(own_out, out) and torch.equal(own_lse, lse) and torch.equal(own_rest, lse_rest):
        return dout, dlse
    share = torch.exp((own_lse - lse) + (own_rest - lse_rest))
    share = share.masked_fill(own_lse == -torch.inf, 0)
    through = torch.zeros_like(lse) if dlse is None else dlse
    if dout is not None:
        wide = dout.to(lse.dtype)
        through = through + (wide * (own_out.to(lse.dtype) - out.to(lse.dtype))).sum(dim=-1)
        dout = (wide * share[..., None]).to(dout.dtype)
    return dout, share * through


@contextmanager
def _autograd() -> Iterator[None]:
    """Record gradients although an operator's implementation runs below autograd."""
    with torch._C._PreserveDispatchKeyGuard(), torch.enable_grad():
        for key in ("AutogradFunctionality", "AutogradOther", "ADInplaceOrView"):
            torch._C._dispatch_tls_set_dispatch_key_excluded(
                getattr(torch._C.DispatchKey, key), False
            )
        yield


def _attend(p: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, for a dense problem."""
    start, stop, offset, tokens = _row_numbers(p)
    query_position = offset[:, None] + torch.arange(p.M, device=p.query.device)  # [B, M]

    prefix_slot = torch.arange(p.P, device=p.query.device)  # [P]
    prefix_position = start[:, None] + prefix_slot - tokens[:, None]  # [B, P]
    prefix_used = prefix_slot < tokens[:, None]  # [B, P]
    prefix_key, prefix_value = (_bank_rows(p, bank) for bank in (p.prefix_key, p.prefix_value))
    prefix_score = _score(p, prefix_key, prefix_used, dtype)  # [B, H, M, P]
    prefix_seen = prefix_used[:, None, None]
    if p.prefix_bias is not None:
        prefix_score = prefix_score + p.prefix_bias.to(dtype)
    if p.windowed_prefix:
        distance = query_position[:, None, :, None] - prefix_position[:, None, None]
        prefix_score = prefix_score + _alibi(p, distance, dtype)
        prefix_seen = prefix_seen & _in_window(p, distance)

    slot = torch.arange(p.N, device=p.query.device)  # [N]
    used = (slot >= start[:, None]) & (slot < stop[:, None])  # [B, N]
    distance = query_position[:, None, :, None] - slot  # [B, 1, M, N]
    score = _score(p, p.key, used, dtype) + _alibi(p, distance, dtype)  # [B, H, M, N]
    seen = used[:, None, None] & _in_window(p, distance)
    if p.is_causal:
        seen = seen & (distance >= 0)
    if p.attn_mask is not None and p.attn_mask.dtype == torch.bool:
        seen = seen & p.attn_mask
    elif p.attn_mask is not None:
        score = score + p.attn_mask.to(dtype)

    halves = [
        (
            score.masked_fill(~seen, -torch.inf),
            _values(p.value, used, dtype),
            _keep(p, p.P, p.N),
        ),
    ]
    prefix_half = (
        prefix_score.masked_fill(~prefix_seen, -torch.inf),
        _values(prefix_value, prefix_used, dtype),
        _keep(p, 0, p.P),
    )
    if p.prefix_gate is None:
        return _softmax_sum(p, [prefix_half, *halves], p.sinks)
    out, lse, lse_rest = _softmax_sum(p, halves, p.sinks)
    prefix_out, *_ = _softmax_sum(p, [prefix_half], None)
    return out + p.prefix_gate.to(dtype)[:, None, None] * prefix_out, lse, lse_rest


def _row_numbers(p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per row, int64 `[B]`: first key, end of the keys, position of query 0, prefix tokens."""

    def per_row(value: Tensor | int) -> Tensor:
        return torch.as_tensor(value, device=p.query.device).long().expand(p.B)

    start = per_row(0 if p.key_start is None else p.key_start)
    stop = per_row(p.N if p.key_length is None else p.key_length)
    offset = p.query_offsets if p.query_offsets is not None else p.query_offset
    offset = per_row(p.N - p.M if offset is None else offset).clamp(-FURTHEST, FURTHEST)
    lengths = p.prefix_lengths
    if lengths is None:
        lengths = torch.full((p.R,), p.P, device=p.query.device)
    if p.prefix_index is None:
        return start, stop, offset, per_row(lengths)
    tokens = torch.cat([lengths.long(), lengths.new_zeros(1).long()])[p.prefix_index.long()]
    return start, stop, offset, tokens


def _bank_rows(p: Problem, bank: Tensor) -> Tensor:
    """Each row's bank entry, `[B, H_kv, P, *]`; a row with none gets zeros, which nothing sees."""
    if p.prefix_index is None:
        return bank.expand(p.B, -1, -1, -1)
    return torch.cat([bank, bank.new_zeros(1, *bank.shape[1:])])[p.prefix_index.long()]


def _score(p: Problem, key: Tensor, used: Tensor, dtype: torch.dtype) -> Tensor:
    """Scaled and soft-capped dot products `[B, H, M, K]`; unused keys may hold anything."""
    key = torch.where(used[:, None, :, None], key.to(dtype), 0)
    query = p.query.to(dtype).unflatten(1, (p.H_kv, -1))  # [B, H_kv, group, M, D]
    score = (query @ key.mT.unsqueeze(2)).flatten(1, 2) * p.scale
    return score if p.softcap is None else p.softcap * torch.tanh(score / p.softcap)


def _values(value: Tensor, used: Tensor, dtype: torch.dtype) -> Tensor:
    """Values `[B, H_kv, K, D_v]` with unused slots zeroed."""
    return torch.where(used[:, None, :, None], value.to(dtype), 0)


def _alibi(p: Problem, distance: Tensor, dtype: torch.dtype) -> Tensor:
    """Linear biases `-slope * |distance|` (Press et al., "Train Short, Test Long", ICLR 2022)."""
    if p.alibi_slopes is None:
        return distance.new_zeros((), dtype=dtype)
    return -p.alibi_slopes.to(dtype)[:, None, None] * distance.abs()


def _in_window(p: Problem, distance: Tensor) -> Tensor:
    """A query at position `p` sees the keys at positions `> p - window`."""
    return torch.ones_like(distance, dtype=torch.bool) if p.window is None else distance < p.window


def _keep(p: Problem, first_column: int, columns: int) -> Tensor | None:
    """Which probabilities dropout keeps, `[B, H, M, columns]`; None without dropout."""
    if p.dropout_seed is None:
        return None
    row, head, query, column = (
        torch.arange(size, device=p.query.device) for size in (p.B, p.H, p.M, columns)
    )
    words = random_words(p.dropout_seed, row, head, query, first_column + column)
    return keep_mask(words, p.dropout_p)


def _softmax_sum(
    p: Problem, halves: list[tuple[Tensor, Tensor, Tensor | None]], sinks: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """One softmax over the scores of all halves, and the values it weighs.

    A row that sees nothing gives zeros and `lse = -inf`. A sink enters the denominator only.
    """
    scores = [score for score, _, _ in halves]
    if sinks is not None:
        scores.append(sinks.to(scores[0].dtype)[:, None, None].expand(p.B, -1, p.M, 1))
    every = torch.cat(scores, dim=-1)  # [B, H, M, K]
    peak = every.detach().amax(-1, keepdim=True) if every.shape[-1] else every.new_zeros(1)
    peak = peak.masked_fill(peak == -torch.inf, 0)
    total = torch.exp(every - peak).sum(-1, keepdim=True)  # [B, H, M, 1]
    blind = total == 0
    total = total.masked_fill(blind, 1)
    lse, lse_rest = (x[..., 0] for x in log_sum(peak, total))
    lse = lse.masked_fill(blind[..., 0], -torch.inf)
    out = total.new_zeros(p.B, p.H, p.M, p.D_v)
    for score, value, keep in halves:
        weight = torch.exp(score - peak) / total
        if keep is not None:
            weight = torch.where(keep, weight / (1 - p.dropout_p), 0)
        grouped = weight.unflatten(1, (p.H_kv, -1)) @ value.unsqueeze(2)
        out = out + grouped.flatten(1, 2)
    return out, lse, lse_rest
