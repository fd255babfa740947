"""Whether an implementation's results are right: a few lines of eager attention measure errors.

The rule is `prefixattn/testing.py`'s. Against the truth an implementation may err twice as much
(gradients: three times) as eager attention in the inputs' own precision does, whose error counts as
two units in the last place (gradients: four) more than it happens to be. Eager's own error depends
on the order in which it happens to sum: it is computed in several, and the largest counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import oracle
from .layouts import arrays

OUTPUT, GRADIENT = (2.0, 2.0), (3.0, 4.0)
ORDERS = 4
DIFFERENTIABLE = (
    *("query", "key", "value", "prefix_key", "prefix_value"),
    *("prefix_gate", "prefix_bias", "attn_mask", "sinks"),
)


def differentiate(
    a: dict[str, Any],
    run: Any,
    upstream: tuple[Tensor | None, Tensor | None],
    frozen: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """Output, lse and gradients of `run(arguments)`, by name: "out", "lse", "dquery", ..."""
    leaves = {
        name: x.detach().requires_grad_()
        for name, x in a.items()
        if isinstance(x, Tensor)
        and name in DIFFERENTIABLE
        and name not in frozen
        and x.is_floating_point()
    }
    results = run({**a, **leaves})
    found = dict(zip(("out", "lse"), (x.detach() for x in results), strict=True))
    pairs = [
        (result, grad)
        for result, grad in zip(results, upstream, strict=True)
        if grad is not None and result.requires_grad
    ]
    grads: tuple[Tensor | None, ...] = (None,) * len(leaves)
    if leaves and pairs:
        outputs, through = zip(*pairs, strict=True)
        grads = torch.autograd.grad(outputs, list(leaves.values()), through, allow_unused=True)
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        found[f"d{name}"] = torch.zeros_like(leaf) if grad is None else grad
    return found


def eager(a: dict[str, Any], order: int = 0) -> tuple[Tensor, Tensor]:
    """Attention over the prefix and the sequence side by side, each step in the query's dtype.

    Args:
        a: the arguments of `prefix_attention`.
        order: 0 to `ORDERS - 1`. Others than 0 sum over channels in another order; odd ones scale
            queries, not scores; from 2 on keys come backwards and the softmax is written out.
    """
    dtype, arguments = a["query"].dtype, arrays(a)
    (b, h, m, d), d_v = a["query"].shape, a["value"].shape[3]
    out = a["query"].new_zeros(b, h, m, d_v)
    lse = a["query"].new_full((b, h, m), -torch.inf)
    generator = torch.Generator().manual_seed(order)
    channels = torch.randperm(d, generator=generator) if order else torch.arange(d)
    per_head = {
        name: a[name].to(dtype)[:, None, None]
        for name in ("sinks", "prefix_gate", "alibi_slopes")
        if a.get(name) is not None
    }
    for row in oracle.rows_of(arguments):
        place = (row.batch, slice(None), row.queries)
        halves = [Half(a, arguments, row, prefix) for prefix in (True, False)]
        (first, values), (second, others) = (
            half.scores(per_head, channels, order) for half in halves
        )
        blank = a["query"].new_full((h, first.shape[1], 1), -torch.inf)
        sink = per_head["sinks"].expand_as(blank) if "sinks" in per_head else blank
        if "prefix_gate" not in per_head:
            every = torch.cat([first, second, sink], 2)
            out[place], lse[place] = _softmax(every, torch.cat([values, others], 1), order)
        else:
            of_prefix, _ = _softmax(torch.cat([first, blank], 2), values, order)
            own, lse[place] = _softmax(torch.cat([second, sink], 2), others, order)
            out[place] = own + per_head["prefix_gate"] * of_prefix
    return out, lse.to(torch.promote_types(dtype, torch.float32))


class Half:
    """The keys of the prefix, or of the sequence, that a row may use."""

    def __init__(
        self, a: dict[str, Any], arguments: dict[str, Any], row: oracle.Row, prefix: bool
    ) -> None:
        self.a, self.arguments, self.row, self.prefix = a, arguments, row, prefix
        self.first = 0 if prefix else row.keys.start
        start, stop = (0, row.tokens) if prefix else (row.start, max(row.start, row.stop))
        self.columns = slice(self.first + start, self.first + stop)

    def scores(
        self, per_head: dict[str, Tensor], channels: Tensor, order: int
    ) -> tuple[Tensor, Tensor]:
        """Scores `[H, m, K]`, -inf where a query does not see a key, and values `[H, K, D_v]`."""
        a, row, dtype = self.a, self.row, self.a["query"].dtype
        q = a["query"][row.batch, :, row.queries][..., channels]
        names = ("prefix_key", "prefix_value") if self.prefix else ("key", "value")
        k, v = (self._source(a[name]) for name in names)
        k = k[..., channels]
        scale = a["query"].shape[3] ** -0.5 if a.get("scale") is None else a["scale"]
        scores = (q * scale) @ k.mT if order % 2 else (q @ k.mT) * scale
        if (cap := a.get("softcap")) is not None:
            scores = cap * torch.tanh(scores / cap)
        shown, distance = self._seen(scores.shape[1])
        positions = not self.prefix or a.get("prefix_in_window") == "positions"
        if "alibi_slopes" in per_head and positions:
            scores = scores - per_head["alibi_slopes"] * distance.to(dtype)
        bias = a.get("prefix_bias" if self.prefix else "attn_mask")
        if bias is not None:
            bias = bias.expand(*a["query"].shape[:3], a[names[0]].shape[2])
            bias = bias[row.batch, :, row.queries, self.columns]
            if bias.dtype == torch.bool:
                shown = shown & bias
            else:
                scores = scores + bias.to(dtype)
        return scores.masked_fill(~shown, -torch.inf), v

    def _source(self, x: Tensor) -> Tensor:
        """Keys or values `[H, K, *]` of the row."""
        number = self.row.entry if self.prefix else self.row.batch
        found = (
            x[number, :, self.columns] if number >= 0 else x.new_zeros(x.shape[1], 0, x.shape[3])
        )
        return found.repeat_interleave(self.a["query"].shape[1] // x.shape[1], 0)

    def _seen(self, count: int) -> tuple[Tensor, Tensor]:
        """Which keys each of the queries sees `[m, K]`, and how far they are, in float64."""
        row, slots = self.row, np.arange(self.columns.start, self.columns.stop) - self.first
        shown = np.zeros((count, len(slots)), bool)
        distance = np.zeros((count, len(slots)))
        shift = row.start - row.tokens if self.prefix else 0
        for query in range(count):
            found = oracle.seen(self.arguments, row, query)[0 if self.prefix else 1]
            shown[query] = (slots >= found.start) & (slots < found.stop)
            distance[query] = np.abs(oracle.WIDE(row.offset + query - shift) - slots)
        return torch.from_numpy(shown), torch.from_numpy(distance)


def _softmax(every: Tensor, values: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """Weighted values and lse of scores whose last is a sink; zeros, -inf where nothing is seen."""
    blind = (every == -torch.inf).all(2, keepdim=True)
    every = every.masked_fill(blind, 0)
    # Not `logsumexp`: its gradient is N times too large where all scores are finfo.min.
    peak = every.detach().amax(2, keepdim=True)
    powers = (every - peak).exp()
    total = powers.sum(2, keepdim=True)
    weights = torch.softmax(every, 2) if order < 2 else powers / total
    weights = weights[..., :-1].masked_fill(blind, 0)
    lse = (peak + total.log()).masked_fill(blind, -torch.inf)[..., 0]
    return (weights.flip(2) @ values.flip(1) if order > 1 else weights @ values), lse


@dataclass
class Bound:
    """An exact result, and the error it may be given with; None where nothing is compared."""

    exact: Tensor  # float64
    dtype: torch.dtype
    blind: Tensor  # where it is -inf
    budget: float | None
    plain_error: float

    def fault(self, got: Tensor) -> str:
        """What is wrong with a result, in words; empty when all is well."""
        if got.shape != self.exact.shape:
            return f"shape {list(got.shape)}, expected {list(self.exact.shape)}"
        if got.dtype != self.dtype:
            return f"{got.dtype}, expected {self.dtype}"
        if self.budget is None or got.numel() == 0:
            return ""
        wide = got.double()
        if not torch.equal(wide == -torch.inf, self.blind):
            return "-inf in other places than the truth"
        wide = wide.masked_fill(self.blind, 0)
        if not wide.isfinite().all():
            return f"{int((~wide.isfinite()).sum())} numbers are not finite"
        error = (wide - self.exact.masked_fill(self.blind, 0)).abs().max().item()
        words = f"error {error:.2e}, budget {self.budget:.2e}, eager's {self.plain_error:.2e}"
        return "" if error <= self.budget else words


Bounds = dict[str, Bound]


def faults(bounds: Bounds, got: dict[str, Tensor]) -> list[str]:
    """Words for each result that errs more than it may."""
    found = {name: bounds[name].fault(x) for name, x in got.items()}
    return [f"{name}: {fault}" for name, fault in found.items() if fault]


def _bound(name: str, exact: Tensor, terms: float, runs: list[Tensor], dtype: torch.dtype) -> Bound:
    blind = exact == -torch.inf
    seen = exact.masked_fill(blind, 0)
    size = seen.abs().max().item() if seen.numel() else 0.0
    bound = Bound(exact, runs[0].dtype, blind, None, 0.0)
    if not size <= torch.finfo(bound.dtype).max:
        return bound
    for run in runs:
        wide = run.double()
        if not torch.equal(wide == -torch.inf, blind):
            return bound
        wide = wide.masked_fill(blind, 0)
        if not wide.isfinite().all():
            return bound
        if wide.numel():
            bound.plain_error = max(bound.plain_error, (wide - seen).abs().max().item())
    factor, units = OUTPUT if name in ("out", "lse") else GRADIENT
    # A gradient comes in its argument's dtype, which may be coarser than the query's.
    eps = (1e-12 if of == torch.float64 else torch.finfo(of).eps for of in (dtype, bound.dtype))
    unit = max(eps)
    # Where one key has all the weight, eager's gradient happens to be exactly 0: what it is the
    # difference of counts too, by one unit.
    bound.budget = factor * (bound.plain_error + units * unit * max(1.0, size) + unit * terms)
    return bound


def bounds_of(a: dict[str, Any], upstream: tuple[Tensor | None, Tensor | None]) -> Bounds:
    """The oracle's results on exactly these numbers, by name, and what they may be missed by."""
    dout, dlse = (None if x is None else x.double().resolve_neg().numpy() for x in upstream)
    answer = oracle.attention(arrays(a), dout, dlse)
    exact = {"out": answer.out, "lse": answer.lse}
    exact |= {f"d{name}": grad for name, grad in answer.grads.items()}
    runs = [differentiate(a, lambda x, o=order: eager(x, o), upstream) for order in range(ORDERS)]
    with np.errstate(over="ignore"):
        wide = {name: torch.from_numpy(x.astype(np.float64)) for name, x in exact.items()}
    terms = {f"d{name}": float(x.max()) for name, x in answer.sizes.items() if x.size}
    return {
        name: _bound(name, x, terms.get(name, 0.0), [run[name] for run in runs], a["query"].dtype)
        for name, x in wide.items()
    }
