"""What a softmax's backward starts from, and sums that grow part by part."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Index = tuple[slice | Tensor, ...]


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
    """What a softmax's backward starts from: `dout, out [B, H, M, D_v]`, `lse, dlse [B, H, M]`."""

    dout: Tensor
    out: Tensor
    lse: Tensor
    dlse: Tensor | None

    @cached_property
    def delta(self) -> Tensor:
        """`sum(dout * out) - dlse`, `[B, H, M]`: what the score gradient subtracts."""
        delta = (self.dout.to(self.lse.dtype) * self.out.to(self.lse.dtype)).sum(-1)
        return delta if self.dlse is None else delta - self.dlse
