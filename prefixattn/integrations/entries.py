"""A prefix in the form that the attention takes, made once for as long as it stays the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_

import torch
from torch import Tensor

from prefixattn.integrations.carrier import Entry
from prefixattn.kept import Kept
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
    """A batch's tensors, in the dtype that the layers compute in, made once for all tokens."""

    def __init__(self) -> None:
        self._kept: Kept[list[tuple[Tensor, Tensor] | None]] = Kept()
        self._made: tuple[tuple[object, ...], list[Entry | None]] | None = None

    def of(self, batch: PrefixBatch, dtype: torch.dtype, rows: Rows) -> list[Entry | None]:
        """One entry per layer, None where a layer has none."""
        pairs = self._cast(batch.pairs, dtype)
        if torch.compiler.is_compiling():
            return _entries(pairs, batch, rows)
        parts = (pairs, rows.index, batch.lengths, batch.gates)
        made = self._made  # which another thread may replace
        if made is not None and all(map(is_, made[0], parts)):
            return made[1]
        found = _entries(pairs, batch, rows)
        self._made = None if torch.is_grad_enabled() else (parts, found)  # holds no graph
        return found

    def __getstate__(self) -> dict[str, object]:
        """Copies and pickles need not hold what can be made again."""
        return self.__dict__ | {"_made": None}

    def _cast(
        self, pairs: Sequence[tuple[Tensor, Tensor] | None], dtype: torch.dtype
    ) -> Sequence[tuple[Tensor, Tensor] | None]:
        tensors = [x for pair in pairs if pair for x in pair]
        if all(x.dtype == dtype for x in tensors):
            return pairs
        return self._kept.of(
            tensors,
            lambda: [None if p is None else (p[0].to(dtype), p[1].to(dtype)) for p in pairs],
            options=dtype,
        )


def _entries(
    pairs: Sequence[tuple[Tensor, Tensor] | None], batch: PrefixBatch, rows: Rows
) -> list[Entry | None]:
    gates = batch.gates or [None] * len(pairs)
    return [
        None if pair is None else Entry(*pair, rows.index, batch.lengths, gate)
        for pair, gate in zip(pairs, gates, strict=True)
    ]
