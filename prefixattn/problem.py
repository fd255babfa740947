"""One attention problem: its tensors and flags.

`Problem` lists every argument of the operators in schema order; the public function fills it,
`rules.check` holds it to the rules before any work, and the implementations read it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

TENSORS = ("query", "key", "value", "prefix_key", "prefix_value")
DIFFERENTIABLE = (*TENSORS, "prefix_gate", "prefix_bias", "attn_mask", "sinks")
# A query's position is kept within this, where no slot and no window (below 2^62) reaches it, so
# that sums with it stay within int64.
FURTHEST = 2**62 + 2**50


@dataclass(frozen=True)
class Problem:
    """The arguments of one call, in the order of the operators' schema (see `prefix_attention`).

    Sizes are `B, H, H_kv, M, N, P, R, D, D_v`; `rows` counts what `prefix_index` indexes: batch
    rows, or segments when packed. `query_offset` is an int or None, `query_offsets` a tensor.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    prefix_key: Tensor
    prefix_value: Tensor
    prefix_index: Tensor | None
    prefix_lengths: Tensor | None
    prefix_gate: Tensor | None
    prefix_bias: Tensor | None
    attn_mask: Tensor | None
    key_start: Tensor | None
    key_length: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    query_offsets: Tensor | None
    sinks: Tensor | None
    alibi_slopes: Tensor | None
    dropout_seed: Tensor | None
    query_offset: int | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    window: int | None
    is_causal: bool
    prefix_in_window: str
    scale: float
    softcap: float | None
    dropout_p: float
    deterministic: bool

    @property
    def arguments(self) -> tuple[object, ...]:
        """The values of all fields, in schema order."""
        return tuple(getattr(self, name) for name in FIELD_NAMES)

    def but(self, **fields: object) -> Problem:
        """The same problem with other fields, unchecked: quicker than `dataclasses.replace`."""
        problem = object.__new__(Problem)
        problem.__dict__.update(self.__dict__, **fields)
        return problem

    @property
    def B(self) -> int:
        return self.query.shape[0]

    @property
    def H(self) -> int:
        return self.query.shape[1]

    @property
    def M(self) -> int:
        return self.query.shape[2]

    @property
    def D(self) -> int:
        return self.query.shape[3]

    @property
    def H_kv(self) -> int:
        return self.key.shape[1]

    @property
    def N(self) -> int:
        return self.key.shape[2]

    @property
    def D_v(self) -> int:
        return self.value.shape[3]

    @property
    def R(self) -> int:
        return self.prefix_key.shape[0]

    @property
    def P(self) -> int:
        return self.prefix_key.shape[2]

    @property
    def packed(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def rows(self) -> int:
        return self.B if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1

    @property
    def accumulator(self) -> torch.dtype:
        """The dtype that sums and `lse` are kept in: float32, or float64 for float64 input."""
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32

    @property
    def windowed_prefix(self) -> bool:
        """Whether prefix tokens have positions, right before the row's text."""
        return self.prefix_in_window == "positions"

    @property
    def output_strides(self) -> tuple[int, int, int, int]:
        """Strides of `out [B, H, M, D_v]`, which is laid out as `[B, M, H, D_v]`."""
        # Not a transposed view: users change their outputs in place.
        return (self.M * self.H * self.D_v, self.D_v, self.H * self.D_v, 1)

    def empty_output(self) -> tuple[Tensor, Tensor, Tensor]:
        """Unwritten `out [B, H, M, D_v]`, `lse [B, H, M]` and `lse_rest [B, H, M]`."""
        out = self.query.new_empty_strided((self.B, self.H, self.M, self.D_v), self.output_strides)
        size, dtype = (self.B, self.H, self.M), self.accumulator
        return out, self.query.new_empty(size, dtype=dtype), self.query.new_empty(size, dtype=dtype)

    def no_output(self) -> tuple[Tensor, Tensor, Tensor]:
        """What a softmax over no keys gives: zeros, `lse = -inf` and nothing that it lacks."""
        out, lse, lse_rest = self.empty_output()
        return out.zero_(), lse.fill_(-torch.inf), lse_rest.zero_()

    def segments(self) -> Iterator[Segment]:
        """A packed problem as dense ones of one row each; reads `cu_seqlens` on the host."""
        assert self.cu_seqlens_q is not None and self.cu_seqlens_k is not None
        bounds_q, bounds_k = self.cu_seqlens_q.tolist(), self.cu_seqlens_k.tolist()
        for s in range(self.rows):
            queries = slice(bounds_q[s], bounds_q[s + 1])
            keys = slice(bounds_k[s], bounds_k[s + 1])
            yield Segment(self._segment(s, queries, keys), queries, keys)

    def _segment(self, s: int, queries: slice, keys: slice) -> Problem:
        index = self.prefix_index
        if index is not None:
            index = index[s : s + 1]
        elif self.R > 1:
            index = torch.full((1,), s, device=self.query.device)
        offset = self.query_offset
        if offset is None and self.query_offsets is None:
            offset = (keys.stop - keys.start) - (queries.stop - queries.start)
        offsets = self.query_offsets
        if offsets is not None and offsets.ndim == 1:
            offsets = offsets[s : s + 1]
        seed = self.dropout_seed
        if seed is not None:
            seed = seed + seed.new_tensor([0, s])
        cuts: dict[str, Any] = {
            name: of_segment(name, getattr(self, name), queries, keys) for name in DIFFERENTIABLE
        }
        return replace(
            self,
            **cuts,
            prefix_index=index,
            cu_seqlens_q=None,
            cu_seqlens_k=None,
            max_seqlen_q=None,
            max_seqlen_k=None,
            query_offset=offset,
            query_offsets=offsets,
            dropout_seed=seed,
        )


class Segment(NamedTuple):
    """One sequence of a packed batch: its dense problem and where it lies in the whole."""

    problem: Problem
    queries: slice
    keys: slice


FIELD_NAMES = tuple(field.name for field in fields(Problem))
TENSOR_FIELDS = tuple(field.name for field in fields(Problem) if "Tensor" in str(field.type))
SCHEMA_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "int | None": "SymInt?",
    "bool": "bool",
    "str": "str",
    "float": "float",
    "float | None": "float?",
}


def schema_arguments() -> str:
    """The operators' argument list, one `Type name` per field of `Problem`."""
    return ", ".join(f"{SCHEMA_TYPES[str(field.type)]} {field.name}" for field in fields(Problem))


def room_like(argument: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Unwritten room for a gradient, laid out as its argument is, with a contiguous last dimension.

    `empty_like` alone gives an argument that overlaps itself some other last stride.
    """
    room = torch.empty_like(argument, dtype=dtype)
    if room.ndim and room.shape[-1] > 1 and room.stride(-1) != 1:
        room = torch.empty_like(argument, dtype=dtype, memory_format=torch.contiguous_format)
    return room


def of_segment(name: str, tensor: Tensor | None, queries: slice, keys: slice) -> Tensor | None:
    """The part of the argument `name` (or of its gradient) that one packed segment uses, a view."""
    if name == "query":
        return tensor[:, :, queries]  # type: ignore[index]
    if name in ("key", "value"):
        return tensor[:, :, keys]  # type: ignore[index]
    if name == "prefix_bias":
        return cut(tensor, queries, slice(None))
    if name == "attn_mask":
        return cut(tensor, queries, keys)
    return tensor


def cut(tensor: Tensor | None, queries: slice, keys: slice) -> Tensor | None:
    """The part, as a 4-D view, of a tensor that broadcasts to `[B, H, M, K]`."""
    if tensor is None:
        return None
    tensor = tensor[(None,) * (4 - tensor.ndim)]
    tensor = tensor if tensor.shape[-2] == 1 else tensor[..., queries, :]
    return tensor if tensor.shape[-1] == 1 else tensor[..., keys]
