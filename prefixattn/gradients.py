"""What a softmax's backward starts from, log-sum-exps, and sums that grow part by part.

A log-sum-exp is two numbers, `lse + lse_rest`, of which the second is what rounding took from the
first. It matters where scores are large: a query all of whose keys are hidden by an additive
`finfo.min` has `lse = finfo.min + log(N)`, which rounds to `finfo.min`. Without the rest each key
would have the probability `exp(finfo.min - lse) = 1` in place of `1 / N`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

Index = tuple[slice | Tensor, ...]
LogSum = tuple[Tensor, Tensor]  # `lse` and `lse_rest`


@dataclass
class Total:
    """A gradient that grows part by part, in the accumulating dtype; None until something came."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    value: Tensor | None = None

    def add(self, grad: Tensor, index: Index | None = None) -> None:
        """Add to the part at `index` (None: to all of it)."""
        if index is None and self.value is None:
            self.value = grad
            return
        value = self.dense()
        if index is None:
            value.add_(grad)
        else:
            value[index] += grad

    def dense(self) -> Tensor:
        """The sum so far as a writable tensor of the accumulating dtype."""
        if self.value is None:
            self.value = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        elif self.value.dtype != self.dtype:
            self.value = self.value.to(self.dtype)
        return self.value


@dataclass(frozen=True)
class Upstream:
    """What a softmax's backward starts from.

    `dout, out [B, H, M, D_v]`; `lse, lse_rest, dlse [B, H, M]`; `weighed [B, H, M]` is
    `sum(dout * out)` where that is known better than from `out`.
    """

    dout: Tensor
    out: Tensor
    lse: Tensor
    lse_rest: Tensor
    dlse: Tensor | None
    weighed: Tensor | None = None

    def at(self, index: Index) -> Upstream:
        """The same for some rows, heads or queries, views."""
        dout, out, lse, lse_rest, dlse, weighed = (
            None if x is None else x[index] for x in (getattr(self, f.name) for f in fields(self))
        )
        assert dout is not None and out is not None and lse is not None and lse_rest is not None
        return Upstream(dout, out, lse, lse_rest, dlse, weighed)

    @cached_property
    def delta(self) -> Tensor:
        """`sum(dout * out) - dlse`, `[B, H, M]`: what the score gradient subtracts."""
        delta = self.weighed
        if delta is None:
            delta = (self.dout.to(self.lse.dtype) * self.out.to(self.lse.dtype)).sum(-1)
        return delta if self.dlse is None else delta - self.dlse


def log_sum(peak: Tensor, total: Tensor) -> LogSum:
    """`lse` and `lse_rest` of a softmax whose weights `exp(score - peak)` sum to `total`.

    A total of 0, which is that of no keys, gives -inf and 0.
    """
    log = torch.log(total)
    lse = peak + log
    rest = (peak - lse) + log
    return lse, rest.masked_fill(~lse.isfinite(), 0)


def merge(one: LogSum, other: LogSum) -> tuple[LogSum, Tensor]:
    """The log-sum-exp over the keys of two, and the share in `[0, 1]` that the other has in it.

    Args:
        one: `lse` and `lse_rest` of some keys.
        other: those of other keys.
    """
    peak = torch.maximum(one[0], other[0])
    peak = peak.masked_fill(peak == -torch.inf, 0)
    mine, others = (torch.exp((lse - peak) + rest) for lse, rest in (one, other))
    total = mine + others
    return log_sum(peak, total), others / total.masked_fill(total == 0, 1)


def sink_gradient(sinks: Tensor, up: Upstream) -> Tensor:
    """`[H]`: a sink takes `exp(sink - lse)` of every query and gives nothing to the output."""
    share = torch.exp((sinks.to(up.lse.dtype)[:, None] - up.lse) - up.lse_rest)
    share = share.masked_fill(up.lse == -torch.inf, 0)
    return -(share * up.delta).sum((0, 2))
