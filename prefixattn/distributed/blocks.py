"""One block of a spread sequence, by the operator; and the sum of several blocks' softmaxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefixattn.api import make_problem
from prefixattn.choose import choose
from prefixattn.gradients import merge
from prefixattn.ops import attention
from prefixattn.problem import TENSORS, Problem


@dataclass(frozen=True)
class Blocks:
    """How blocks are computed. `options` are `prefix_attention`'s, the same for all of them."""

    implementation: str
    options: dict[str, Any]
    prefix_options: dict[str, Any]  # those that concern the prefix: for the block that has it

    @classmethod
    def like(cls, problem: Problem, implementation: str) -> Blocks:
        """Blocks of a problem that was checked as a whole."""
        options = {"scale": problem.scale, "softcap": problem.softcap}
        banked = {name: getattr(problem, name) for name in ("prefix_index", "prefix_lengths")}
        return cls(implementation, options, banked)

    def problem(
        self, query: Tensor, key: Tensor, value: Tensor, prefix: Sequence[Tensor] | None, **own: Any
    ) -> Problem:
        """The block's problem; `prefix` None: it sees none. `own` are options of it alone."""
        if prefix is None:
            first, second = (x.new_empty(1, x.shape[1], 0, x.shape[3]) for x in (key, value))
        else:
            first, second = prefix
            own |= self.prefix_options
        return make_problem(query, key, value, first, second, **self.options, **own)

    def forward(self, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
        """Output, lse and lse_rest of one block, without gradients."""
        return attention(problem, choose(self.implementation, problem))

    def backward(self, problem: Problem, *upstream: Tensor | None) -> list[Tensor]:
        """The gradients of the five tensors for the output and lse of all blocks together.

        Args:
            problem: the block's.
            *upstream: dout, dlse, out, lse and lse_rest.
        """
        name = choose(self.implementation, problem)
        operator = torch.ops.prefixattn.attention_backward
        grads: list[Tensor] = operator(*upstream, *problem.arguments, name, list(TENSORS))
        return grads


class Merged:
    """One softmax over blocks that come one after another, over the rows that each is about."""

    def __init__(self, query: Tensor, value_dim: int) -> None:
        """No keys yet: zeros and -inf. Sums are float32, or float64 for float64 queries."""
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        self.out = query.new_zeros(*query.shape[:3], value_dim, dtype=dtype)
        self.lse = query.new_full(query.shape[:3], -torch.inf, dtype=dtype)
        self.lse_rest = torch.zeros_like(self.lse)

    def add(self, rows: slice, out: Tensor, lse: Tensor, lse_rest: Tensor) -> None:
        """Take in a block's output, lse and lse_rest, of these queries."""
        mine = self.lse[:, :, rows], self.lse_rest[:, :, rows]
        merged, share = merge(mine, (lse, lse_rest))
        self.out[:, :, rows].lerp_(out.to(self.out.dtype), share[..., None])
        for old, new in zip(mine, merged, strict=True):
            old.copy_(new)
