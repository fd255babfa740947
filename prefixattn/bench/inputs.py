"""The tensors of a shape, laid out as a model lays them out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prefixattn.bench.shapes import Case

SPREAD = 16  # of a softcap


@dataclass(frozen=True)
class Tensors:
    """What a provider is given; all of it takes gradients but `index`.

    `query [B, H, M, D]`; `key`, `value [B, H_kv, C + M, D]`, the last M of them new; `prefix_key`,
    `prefix_value [R, H_kv, P, D]`; `index [B]`, the prefix of each row.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    prefix_key: Tensor
    prefix_value: Tensor
    index: Tensor

    @property
    def leaves(self) -> dict[str, Tensor]:
        """Every tensor that takes a gradient, by its argument's name."""
        names = ("query", "key", "value", "prefix_key", "prefix_value")
        return {name: getattr(self, name) for name in names}

    @property
    def group(self) -> int:
        """Query heads for each key head."""
        return self.query.shape[1] // self.key.shape[1]

    def rows(self) -> tuple[Tensor, Tensor]:
        """The prefix of each row, `[B, H_kv, P, D]`: a view where they share one."""
        pair = (self.prefix_key, self.prefix_value)
        if self.prefix_key.shape[0] == 1:
            key, value = (x.expand(self.query.shape[0], -1, -1, -1) for x in pair)
        else:
            key, value = (x[self.index] for x in pair)
        return key, value

    def concatenated(self) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, H_kv, P + C + M, D]`, the prefix in front of each row."""
        prefix_key, prefix_value = self.rows()
        key = torch.cat([prefix_key, self.key], dim=2)
        return key, torch.cat([prefix_value, self.value], dim=2)


def make_tensors(case: Case, device: str, seed: int = 0) -> Tensors:
    """Random tensors of a case; query, key and value are transposed views of `[B, S, H, D]`.

    They take gradients where the case has a backward, and nowhere else. Scores vary by 1; in half
    precision, beside a softcap, by a fair part of it: what it does to small ones is rounded away.
    """
    shape, trains = case.shape, case.passes != "fwd"
    generator = torch.Generator(device).manual_seed(seed)

    def normal(rows: int, tokens: int, heads: int, spread: float = 1.0) -> Tensor:
        size = (rows, tokens, heads, shape.D)
        x = spread * torch.randn(size, generator=generator, device=device)
        return x.to(shape.torch_dtype).transpose(1, 2).requires_grad_(trains)

    half = shape.torch_dtype.itemsize < 4
    spread = max(1.0, (shape.softcap or 0) / SPREAD) if half else 1.0

    def prefix() -> Tensor:
        x = normal(shape.R, shape.P, shape.H_kv)
        return x.detach().contiguous().requires_grad_(trains)

    return Tensors(
        query=normal(shape.B, shape.M, shape.H, spread),
        key=normal(shape.B, shape.N, shape.H_kv),
        value=normal(shape.B, shape.N, shape.H_kv),
        prefix_key=prefix(),
        prefix_value=prefix(),
        index=torch.arange(shape.B, device=device) % shape.R,
    )
