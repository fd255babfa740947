"""Masks and places as they are given to a stack: by a caller, or by a model around the stack."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefixattn.integrations.per_thread import PerThread

CACHES = ("cache", "past_key_values")  # its name from transformers 5.24 on, and before


class Caller(NamedTuple):
    """What the caller of a model said of padding and places: a mask ``[B, N]``, if there is one.

    ``masks`` and ``places``: whether there was a mask of any form, and whether there were places.
    """

    mask: Tensor | None
    masks: bool
    places: bool


def by_key(mask: Any) -> Tensor | None:
    """The mask ``[B, N]``, or the widest of those by kind of layer, which static caches have."""
    widest: Tensor | None = None
    for found in mask.values() if isinstance(mask, dict) else [mask]:
        flat = isinstance(found, Tensor) and found.ndim == 2
        if flat and (widest is None or found.shape[1] > widest.shape[1]):
            widest = found
    return widest


def cache_in(kwargs: dict[str, Any]) -> Any:
    """The cache that a forward is given, if there is one."""
    return next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)


def row_of(places: Tensor | None) -> Tensor | None:
    """``[B or 1, M]`` of places, where they have one number a token.

    Families whose images have rows and columns have three, or four with the token's own first.
    """
    if places is not None and places.ndim == 3:
        return places[0] if len(places) == 4 else None
    return places


def checked_places(given: Any, inputs: Tensor) -> Tensor | None:
    """What was given for ``position_ids``; one number a token is one row for all.

    Raises:
        TypeError: it is no tensor.
        ValueError: it is not of the tokens of this forward.
    """
    if given is None:
        return None
    if not isinstance(given, Tensor):
        raise TypeError(f"position_ids must be a tensor, got a {type(given).__name__}")
    rows, length = inputs.shape[:2]
    places = given[None] if given.ndim == 1 else given
    if places.ndim == 2 and (places.shape[0] not in (1, rows) or places.shape[1] != length):
        raise ValueError(
            f"position_ids must be [{rows}, {length}] or [1, {length}], a place for each new "
            f"token, got {tuple(given.shape)}"
        )
    return places


class Outer:
    """The places that a model around the stack makes for all rows at once."""

    def __init__(self) -> None:
        self.counts: PerThread[Tensor] = PerThread()  # whether they count padding, when last seen

    def without_padding(self, given: Tensor, mask: Tensor, cached: int | Tensor) -> Tensor:
        """``[B, M]``: the same, where they count padding before the text, less that padding.

        Args:
            given: ``[1, M]``.
            mask: ``[B, N]`` bool, of cached tokens too.
            cached: tokens in the cache.
        """
        first = mask.to(given.device).int().argmax(dim=1, keepdim=True)  # [B, 1]
        at_text = first.clamp(max=given.shape[1] - 1)
        through = given.expand(len(first), -1).gather(1, at_text) - given[:, :1] == first
        # Behind cached text that is not seen: the model does what it did where the text began.
        known = self.counts.get()
        behind = given[:, :1] >= cached if known is None else known
        if isinstance(cached, int):
            through = behind if cached else through
        else:
            through = torch.where(cached == 0, through, behind)
        if not torch.compiler.is_compiling():
            padded = first > 0
            self.counts.set(torch.where(padded.any(), (through & padded).any(), behind.any()))
        return (given - torch.where(through, first, 0)).clamp(min=0)
