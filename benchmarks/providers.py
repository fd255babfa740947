"""What is timed: every way to attend to a prefix and a causal sequence, and the floor without one.

A provider takes the tensors of a `Shape` and returns the output `[B, H, S, D]`. Each is one small
function, so that what is compared can be read at a glance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from prefixattn import prefix_attention


@dataclass(frozen=True)
class Shape:
    """Rows, query and key heads, queries, cached keys, prefix tokens and head dim of one case."""

    B: int
    H: int
    H_kv: int
    M: int
    C: int
    P: int
    D: int

    @property
    def name(self) -> str:
        cached = f" C{self.C}" if self.C else ""
        return f"B{self.B} H{self.H}/{self.H_kv} M{self.M}{cached} P{self.P} D{self.D}"


@dataclass(frozen=True)
class Tensors:
    """`query [B, H, M, D]`, `key`, `value [B, H_kv, C + M, D]`, prefixes `[1, H_kv, P, D]`."""

    query: Tensor
    key: Tensor
    value: Tensor
    prefix_key: Tensor
    prefix_value: Tensor

    @property
    def all(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return (self.query, self.key, self.value, self.prefix_key, self.prefix_value)

    def double(self) -> Tensors:
        """The same numbers in float64, without gradients."""
        return Tensors(*(x.detach().double() for x in self.all))


def make_tensors(shape: Shape, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> Tensors:
    """Random tensors as a model makes them: `[B, S, H, D]` in memory."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(rows: int, tokens: int, heads: int) -> Tensor:
        size = (rows, tokens, heads, shape.D)
        x = torch.randn(size, generator=generator, device=device).to(dtype)
        return x.transpose(1, 2).requires_grad_()

    keys = shape.C + shape.M
    return Tensors(
        normal(shape.B, shape.M, shape.H),
        normal(shape.B, keys, shape.H_kv),
        normal(shape.B, keys, shape.H_kv),
        normal(1, shape.P, shape.H_kv),
        normal(1, shape.P, shape.H_kv),
    )


def attention(t: Tensors, implementation: str) -> Tensor:
    """prefix_attention, causal, by the implementation of that name."""
    out = prefix_attention(*t.all, is_causal=True, implementation=implementation)
    assert isinstance(out, Tensor)
    return out


def cat_sdpa(t: Tensors) -> Tensor:
    """One concatenation a call and `causal_lower_right`: the best that plain PyTorch offers."""
    key, value = concatenated(t)
    bias = causal_lower_right(t.query.shape[2], key.shape[2])
    return scaled_dot_product_attention(t.query, key, value, attn_mask=bias, enable_gqa=True)


def transformers_way(t: Tensors) -> Tensor:
    """What PEFT's users get: expand, concatenate, repeat the key heads, an explicit mask.

    A model makes one mask for all of its layers, so that making it is not timed.
    """
    key, value = concatenated(t)
    group = t.query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    mask = _causal_mask(t.query.shape[2], key.shape[2], key.device)
    return scaled_dot_product_attention(t.query, key, value, attn_mask=mask)


@lru_cache(maxsize=1)
def _causal_mask(m: int, n: int, device: torch.device) -> Tensor:
    """Bool `[1, 1, M, P + N]`, aligned at the bottom right."""
    return torch.ones(m, n, dtype=torch.bool, device=device).tril(n - m)[None, None]


def no_prefix(t: Tensors) -> Tensor:
    """The floor: the same attention with no prefix at all."""
    m, n = t.query.shape[2], t.key.shape[2]
    bias = None if m == n else causal_lower_right(m, n)
    return scaled_dot_product_attention(
        t.query, t.key, t.value, attn_mask=bias, is_causal=m == n, enable_gqa=True
    )


def concatenated(t: Tensors) -> tuple[Tensor, Tensor]:
    """Keys and values with the prefix in front, a copy for each row."""
    rows = t.query.shape[0]
    key, value = (
        torch.cat([prefix.expand(rows, -1, -1, -1), own], dim=2)
        for prefix, own in ((t.prefix_key, t.key), (t.prefix_value, t.value))
    )
    return key, value


Provider = Callable[[Tensors], Tensor]
WITHOUT_PREFIX = ("floor",)


def providers(implementation: str) -> dict[str, Provider]:
    """All that is timed, by name; "ours" is `prefix_attention` by that implementation."""
    return {
        "ours": partial(attention, implementation=implementation),
        "sdpa": partial(attention, implementation="sdpa"),
        "cat": cat_sdpa,
        "stock": transformers_way,
        "floor": no_prefix,
    }
