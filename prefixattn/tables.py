"""Entries of a bank side by side in memory: filled when they come into use, and kept."""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from prefixattn.kept import Seen, current_text, unchanged
from prefixattn.layers import LayerShape

Entry = tuple[int, ...]
"""Members whose tokens one row reads, in this order."""

Pairs = list[tuple[Tensor, Tensor]]
"""Per layer that has a prefix, key ``[H_kv, P, D]`` and value ``[H_kv, P, D_v]``."""


class Tables:
    """Per layer a key ``[slots, H_kv, P, D]`` and a value ``[slots, H_kv, P, D_v]``.

    A slot holds one entry, whose tokens come first. The shapes stay while entries come and go;
    they grow where more entries are in use at once than there are slots, or a longer one.

    Args:
        capacity: slots there are from the start.
        budget_bytes: what the tables may take. None: no limit.
    """

    def __init__(self, capacity: int, budget_bytes: int | None) -> None:
        self.capacity = capacity
        self.budget_bytes = budget_bytes
        self.clear()

    def clear(self) -> None:
        """Let go of all entries. Tensors handed out stay as they are."""
        self.pairs: Pairs = []
        self.lengths = torch.zeros(0, dtype=torch.long)
        self.slots: dict[Entry, int] = {}  # the entry used longest ago comes first
        self.seen: dict[Entry, list[Seen] | None] = {}
        self.texts: dict[Entry, int] = {}  # when each was filled

    def __getstate__(self) -> dict[str, object]:
        """Copies and pickles fill their own tables."""
        return vars(Tables(self.capacity, self.budget_bytes))

    @property
    def shape(self) -> tuple[int, int]:
        """Slots, and tokens of each."""
        return (len(self.lengths), self.pairs[0][0].shape[2] if self.pairs else 0)

    def reserve(
        self, shapes: Sequence[LayerShape], num_slots: int, num_tokens: int, like: Tensor
    ) -> None:
        """Have room for ``num_slots`` entries of ``num_tokens`` at once, of ``like``'s dtype.

        Raises:
            ValueError: they take more than the budget.
        """
        have, longest = self.shape
        if have >= num_slots and longest >= num_tokens:
            return
        slot_bytes = sum(shape.width for shape in shapes) * num_tokens * like.element_size()
        slots = max(have, self.capacity, num_slots)
        if self.budget_bytes is not None:
            slots = min(slots, self.budget_bytes // slot_bytes)
            if slots < num_slots:
                raise ValueError(
                    f"the {num_slots} entries in use need {num_slots * slot_bytes} bytes in slots "
                    f"of {num_tokens} tokens, more than budget_bytes = {self.budget_bytes}"
                )
        self.clear()
        with torch.inference_mode(False):  # a later change must be allowed anywhere
            self.pairs = [
                (
                    like.new_zeros(slots, shape.num_heads, num_tokens, shape.key_dim),
                    like.new_zeros(slots, shape.num_heads, num_tokens, shape.value_dim),
                )
                for shape in shapes
            ]
            self.lengths = torch.zeros(slots, dtype=torch.long, device=like.device)

    def holds(self, entry: Entry, tensors: Sequence[Tensor]) -> bool:
        """Whether ``entry`` has a slot, filled from ``tensors`` as they are now.

        Those that may train are trusted for one text: a fused optimizer's step is not counted.
        """
        if entry not in self.slots or not unchanged(tensors, self.seen[entry]):
            return False
        return self.texts[entry] == current_text() or not any(x.requires_grad for x in tensors)

    def put(
        self,
        entry: Entry,
        in_use: Collection[Entry],
        tensors: Sequence[Tensor],
        read: Callable[[int], Pairs],
    ) -> None:
        """Fill a slot with ``entry``; there must be room beside those ``in_use``.

        Args:
            entry: its members' tokens follow one another.
            in_use: entries whose slots must stay.
            tensors: what ``read`` depends on, where that may change.
            read: the tensors of one member.
        """
        slot = self.slots.pop(entry, None)
        if slot is None:
            slot = self._free(in_use)
        with torch.inference_mode(False), torch.no_grad():
            end = 0
            for member in entry:
                start = end
                for pair, table in zip(read(member), self.pairs, strict=True):
                    end = start + pair[0].shape[1]
                    for tensor, whole in zip(pair, table, strict=True):
                        whole[slot, :, start:end].copy_(tensor)
            self.lengths[slot] = end
        self.slots[entry], self.seen[entry] = slot, Seen.of(tensors)
        self.texts[entry] = current_text()

    def doubt(self, members: Collection[int]) -> None:
        """Fill anew what holds ``members`` when it is next used: they may be about to train."""
        for entry in self.slots:
            if any(member in members for member in entry):
                self.seen[entry] = None

    def touch(self, entry: Entry) -> None:
        """Count ``entry`` as used just now."""
        self.slots[entry] = self.slots.pop(entry)

    def _free(self, in_use: Collection[Entry]) -> int:
        """A slot that nobody has, or that of the entry used longest ago."""
        empty = set(range(len(self.lengths))) - set(self.slots.values())
        if empty:
            return min(empty)
        oldest = next(entry for entry in self.slots if entry not in in_use)
        del self.seen[oldest], self.texts[oldest]
        return self.slots.pop(oldest)


def side_by_side(
    entries: Sequence[Sequence[Pairs]], shapes: Sequence[LayerShape], like: Tensor
) -> Pairs:
    """New tensors ``[R, H_kv, P, D]`` and ``[R, H_kv, P, D_v]`` per layer, one copy of each number.

    Args:
        entries: ``R`` of them, each the pieces whose tokens follow one another.
        shapes: per layer.
        like: gives the device, and the dtype of what fills up to the longest entry.
    """
    lengths = [sum(piece[0][0].shape[1] for piece in pieces) for pieces in entries]
    longest = max(1, *lengths)

    def joined(layer: int, half: int, heads: int, dim: int) -> Tensor:
        parts = []
        for pieces, length in zip(entries, lengths, strict=True):
            parts += [piece[layer][half] for piece in pieces]
            parts.append(like.new_zeros(heads, longest - length, dim))
        whole = torch.cat(parts, dim=1)  # [H_kv, R * P, D]
        return whole.unflatten(1, (len(entries), longest)).transpose(0, 1)

    return [
        (
            joined(i, 0, shape.num_heads, shape.key_dim),
            joined(i, 1, shape.num_heads, shape.value_dim),
        )
        for i, shape in enumerate(shapes)
    ]
