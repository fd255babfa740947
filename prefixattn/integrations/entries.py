"""A prefix in the form that the attention takes, made once for as long as it stays the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from prefixattn.integrations.carrier import Entry
from prefixattn.layers import PrefixBatch


@dataclass(frozen=True)
class Rows:
    """Which entry each row of a forward reads, and how many tokens stand before its text.

    ``most`` is ``P``. ``shift`` is an int where all rows have as many tokens, else ``[B, 1]``.
    """

    index: Tensor | None
    lengths: Tensor | None  # [B], or [1] where all rows read the same entry
    shift: int | Tensor
    most: int

    @classmethod
    def of(cls, batch: PrefixBatch, inputs: Tensor) -> "Rows":
        """For a forward of ``inputs [B, M, ...]``.

        Rows of beams and of several returned sequences lie next to each other: each reads what the
        row it was made from reads.

        Raises:
            ValueError: the batch has another number of rows than the prefix was chosen for.
        """
        first = next(pair for pair in batch.pairs if pair is not None)
        num_entries, most = first[0].shape[0], first[0].shape[2]
        index = batch.index
        if index is None and num_entries > 1:
            index = torch.arange(num_entries, device=inputs.device)
        if index is not None:
            count = inputs.shape[0]
            if count % len(index):
                raise ValueError(
                    f"the prefixes were chosen for {len(index)} rows, but the input has {count}"
                )
            index = index.to(inputs.device)
            if count != len(index):
                index = index.repeat_interleave(count // len(index))
        if batch.lengths is None and batch.index is None:
            return cls(index, None, most, most)
        if batch.lengths is None:
            lengths = torch.full((num_entries,), most, device=inputs.device)
        else:
            lengths = batch.lengths.to(inputs.device)
        if index is not None:
            lengths = torch.where(index < 0, 0, lengths[index])
        return cls(index, lengths, lengths[:, None], most)


class Entries:
    """Casts a batch's tensors to the dtype that the layers compute in.

    Without gradients the result is kept until the tensors or their numbers change: a decoded token
    builds nothing.
    """

    def __init__(self) -> None:
        self._seen: list[_Seen] = []
        self._kept: list[tuple[Tensor, Tensor] | None] = []
        self._dtype: torch.dtype | None = None

    def of(self, batch: PrefixBatch, dtype: torch.dtype, rows: Rows) -> list[Entry | None]:
        """One entry per layer, None where a layer has none."""
        pairs = self._cast(batch.pairs, dtype)
        gates = batch.gates or [None] * len(pairs)
        return [
            None if pair is None else Entry(*pair, rows.index, batch.lengths, gate)
            for pair, gate in zip(pairs, gates, strict=True)
        ]

    def _cast(
        self, pairs: Sequence[tuple[Tensor, Tensor] | None], dtype: torch.dtype
    ) -> Sequence[tuple[Tensor, Tensor] | None]:
        tensors = [x for pair in pairs if pair for x in pair]
        if all(x.dtype == dtype for x in tensors):
            return pairs
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return [None if p is None else (p[0].to(dtype), p[1].to(dtype)) for p in pairs]
        if any(x.is_inference() for x in tensors):  # they do not count their changes
            return [None if p is None else (p[0].to(dtype), p[1].to(dtype)) for p in pairs]
        seen = [_Seen.of(x) for x in tensors]
        if self._dtype != dtype or not _same(seen, self._seen):
            self._seen, self._dtype = seen, dtype
            self._kept = [None if p is None else (p[0].to(dtype), p[1].to(dtype)) for p in pairs]
        return self._kept

    def __getstate__(self) -> dict[str, object]:
        """Copies and pickles of a model need not hold what can be made again."""
        return {"_seen": [], "_kept": [], "_dtype": None}


class _Seen(NamedTuple):
    """What tells whether a tensor holds the same numbers as before; views are made anew."""

    owner: Tensor
    version: int
    place: int
    shape: torch.Size

    @classmethod
    def of(cls, tensor: Tensor) -> "_Seen":
        owner = tensor if tensor._base is None else tensor._base
        return cls(owner, owner._version, tensor.data_ptr(), tensor.shape)


def _same(some: Sequence[_Seen], others: Sequence[_Seen]) -> bool:
    return len(some) == len(others) and all(
        a.owner is b.owner and a[1:] == b[1:] for a, b in zip(some, others, strict=True)
    )
