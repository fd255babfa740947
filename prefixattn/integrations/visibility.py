"""Who sees whom, as `prefixattn.prefix_attention` takes it, from a mask and from places."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefixattn.integrations.carrier import Carrier, Entry, Slot, Span
from prefixattn.integrations.documents import Documents


class Seat(NamedTuple):
    """A module's own part of a carrier."""

    carrier: Carrier
    slot: Slot
    span: Span
    entry: Entry | None

    @property
    def plain(self) -> bool:
        """Whether there is one prefix for all rows, and nothing but causality hides a key."""
        entry, slot, documents = self.entry, self.slot, self.carrier.documents
        return (
            entry is not None
            and entry.index is entry.lengths is entry.gate is entry.bias is None
            and slot.window is slot.chunk is self.span.query_offset is None
            and not slot.crosses
            and (documents is None or not documents.by_lengths)
        )

    @property
    def counts_as_text(self) -> bool:
        """Whether windows and chunks treat the prefix as text before the text."""
        return self.carrier.options.prefix_in_window == "positions"

    @property
    def documents(self) -> Documents | None:
        """Those of the text, which a layer that sees other keys has nothing to do with."""
        return None if self.slot.crosses else self.carrier.documents

    def once(self, name: str, like: Tensor | None, make: Callable[[], Tensor]) -> Tensor:
        """What ``make`` gives, made once per forward for all layers that see alike."""
        if torch.compiler.is_compiling():  # which sees by itself what is computed twice
            return make()
        entry, slot, span = self.entry, self.slot, self.span
        size = None if entry is None else (entry.key.shape[2], id(entry.lengths))
        alike = (slot.window, slot.chunk, span.key_length, id(span.query_offset))
        key = (name, id(like), size, alike)
        if key not in self.carrier.kept:
            self.carrier.kept[key] = (make(), like)  # the latter keeps its id from other use
        return self.carrier.kept[key][0]


def by_place(
    query: Tensor, key: Tensor, mask: Tensor | None, seat: Seat | None, causal: bool
) -> dict[str, Any]:
    """Arguments where a key's place says whether it is seen, beside a padding mask ``[B, N]``."""
    arguments: dict[str, Any] = {"is_causal": causal}
    if seat is not None:
        arguments["query_offset"] = seat.span.query_offset
        if seat.slot.window is not None:  # else a plain call, which has a short way
            arguments["window"] = seat.slot.window
            arguments["prefix_in_window"] = seat.carrier.options.prefix_in_window
        mask = None if seat.carrier.unpadded else mask
    if mask is not None and mask.shape[-1] != key.shape[2]:
        raise ValueError(
            f"attention_mask must cover the {key.shape[2]} keys, got {tuple(mask.shape)}"
        )
    if seat is not None and seat.slot.chunk is not None:
        return _in_chunks(query, key.shape[2], mask, seat)
    if mask is not None:
        visible = mask[:, None, None, :]
        arguments["attn_mask"] = (
            visible if seat is None else seat.once("mask", mask, lambda: visible)
        )
        if seat is not None and seat.slot.window is not None:
            arguments["key_start"] = seat.once("start", mask, lambda: _start(seat, mask, key))
    return arguments


def by_mask(query: Tensor, mask: Tensor, seat: Seat | None, causal: bool) -> dict[str, Any]:
    """Arguments where a mask ``[B, 1, M, N]`` rules the sequence half."""
    if seat is not None and (documents := seat.documents) is not None and documents.apart:
        mask = by_document(query, mask, seat, documents)
    arguments: dict[str, Any] = {"attn_mask": mask, "is_causal": False}
    if seat is None:
        return arguments
    if seat.slot.chunk is not None and seat.documents is not None:
        # The mask cuts chunks where the moved text does, and here they may begin elsewhere.
        return _in_chunks(query, mask.shape[-1], None, seat)
    if seat.entry is None or not seat.counts_as_text:
        return arguments
    if seat.slot.chunk is not None:
        raise NotImplementedError(
            "layers that attend in chunks cannot follow a caller's 4D mask behind a prefix that "
            'counts as text; prefix_in_window="visible" can'
        )
    window, entry = seat.slot.window, seat.entry
    if window is not None:

        def bias() -> Tensor:
            distance = seat.carrier.positions.to(query.device)[:, None, :, None]
            distance = distance - places_of(entry, query.device)
            # transformers counts the far end in where a window has two sides.
            return _hide(~(distance < window if causal else distance <= window), query)

        arguments["prefix_bias"] = seat.once("window", None, bias)
    return arguments


def by_document(query: Tensor, mask: Tensor | None, seat: Seat, documents: Documents) -> Tensor:
    """``[B or 1, 1, M, M]``: what is seen in packed rows, beside what ``mask`` shows of images.

    transformers' own mask may cut a text where its places jump; what else it shows is kept. A mask
    of numbers is of a model with a bias by position, which makes it without a look at places.
    """
    if mask is not None and mask.dtype != torch.bool:
        return mask

    def seen() -> Tensor:
        own = documents.seen(seat.slot.window).to(query.device)
        if mask is None:
            return own
        return (mask | own) & documents.same().to(query.device)

    return seat.once("documents", mask, seen)


def places_of(entry: Entry, device: torch.device) -> Tensor:
    """``[B or 1, 1, 1, P]``: where prefix tokens stand, where the text begins at 0."""
    num_entries, most = entry.key.shape[0], entry.key.shape[2]
    token = torch.arange(most, device=device)
    if entry.lengths is None and entry.index is None:
        return (token - most)[None, None, None]
    if entry.lengths is None:
        lengths = torch.full((num_entries,), most, device=device)
    else:
        lengths = entry.lengths.to(device)
    if entry.index is not None:
        lengths = torch.where(entry.index < 0, 0, lengths[entry.index.clamp(min=0)])
    return token - lengths[:, None, None, None]


def _start(seat: Seat, mask: Tensor, key: Tensor) -> Tensor:
    """``[B]``: the first real token of each row, where the prefix ends.

    A sliding cache may have dropped it: then index 0 stands in, which no prefix token reaches
    either. What is masked behind it is no padding.
    """
    whole, dropped = seat.carrier.mask, seat.span.dropped
    if whole is None or whole.shape[1] == mask.shape[1]:  # nothing was dropped, or of it, too
        whole, dropped = mask, 0
    first = (whole.to(mask.device) != 0).int().argmax(dim=1)
    return (first - dropped).clamp(min=0).expand(key.shape[0])


def _in_chunks(query: Tensor, num_keys: int, mask: Tensor | None, seat: Seat) -> dict[str, Any]:
    """Arguments where the text is cut into chunks, from its first token or from the prefix's.

    So is each document of packed rows, beside a mask of None.
    """
    chunk, entry, carrier = seat.slot.chunk, seat.entry, seat.carrier
    assert chunk is not None
    length = query.shape[2]
    token = None if entry is None or not seat.counts_as_text else places_of(entry, query.device)
    before = 0 if token is None else -token[..., :1]  # text tokens count from the prefix's first

    def seen() -> Tensor:
        text = carrier.positions.to(query.device)[:, None, :, None]  # [B or 1, 1, M, 1]
        shown = None if mask is None else mask[:, None, None, :]
        if carrier.documents is not None:
            place = text.mT
            shown = carrier.documents.same().to(query.device)
        else:
            offset = seat.span.query_offset
            last = (num_keys - length if offset is None else offset) + length - 1
            place = torch.arange(num_keys, device=query.device) - last + text[:, :, -1:]
        found = (place <= text) & (((place + before) // chunk) == ((text + before) // chunk))
        return found if shown is None else found & shown

    arguments: dict[str, Any] = {
        "attn_mask": seat.once("chunk", mask, seen),
        "is_causal": False,
    }
    if token is not None:

        def bias() -> Tensor:
            text = carrier.positions.to(query.device)[:, None, :, None]
            return _hide(((token + before) // chunk) != ((text + before) // chunk), query)

        arguments["prefix_bias"] = seat.once("chunk prefix", None, bias)
    return arguments


def _hide(hidden: Tensor, like: Tensor) -> Tensor:
    """Minus infinity where ``hidden``, else 0, in the dtype of ``like``."""
    zero = torch.zeros((), dtype=like.dtype, device=like.device)
    return torch.where(hidden, -torch.inf, zero)
