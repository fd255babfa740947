"""A prefix in the form that the attention takes, made once for as long as it stays the same."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefixattn.integrations.carrier import Entry
from prefixattn.kept import current_text
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
        row it was made from reads. No training has such.

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
                if torch.is_grad_enabled():
                    raise ValueError(
                        f"the prefixes were chosen for {len(index)} rows, but the input has "
                        f"{count}: with gradients name one for each row"
                    )
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


class Boarded(NamedTuple):
    """A batch as one stack of layers takes it: one entry per layer, None where it has none."""

    rows: Rows
    entries: list[Entry | None]


class _Made(NamedTuple):
    batch: PrefixBatch
    like: tuple[object, ...]
    boarded: Boarded


class Entries:
    """A batch in the dtype that the layers compute in, made once for all tokens of a text."""

    def __init__(self) -> None:
        self._made: _Made | None = None  # replaced whole: other threads read it meanwhile

    def of(self, batch: PrefixBatch, stack: PreTrainedModel, inputs: Tensor) -> Boarded:
        """For a forward of ``stack``, whose text is ``inputs [B, M, ...]``."""
        autocast = _autocast_dtype(inputs.device.type)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            self._made = None  # it would hold a graph
            return _boarded(batch, autocast or stack.dtype, inputs)
        made, like = self._made, (current_text(), autocast, inputs.shape[0], inputs.device)
        if made is None or made.batch is not batch or made.like != like:
            boarded = _boarded(batch, autocast or stack.dtype, inputs)
            self._made = made = _Made(batch, like, boarded)
        return made.boarded

    def __getstate__(self) -> dict[str, object]:
        """Copies and pickles need not hold what can be made again."""
        return {"_made": None}


def _autocast_dtype(device: str) -> torch.dtype | None:
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def _boarded(batch: PrefixBatch, dtype: torch.dtype, inputs: Tensor) -> Boarded:
    rows, gates = Rows.of(batch, inputs), batch.gates or [None] * len(batch.pairs)
    entries = [
        None
        if pair is None
        else Entry(pair[0].to(dtype), pair[1].to(dtype), rows.index, batch.lengths, gate)
        for pair, gate in zip(batch.pairs, gates, strict=True)
    ]
    return Boarded(rows, entries)
