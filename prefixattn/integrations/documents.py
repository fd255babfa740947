"""Packed rows: which tokens are one document, told by places that begin again or by lengths."""

from collections.abc import Container
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefixattn.integrations.given import Caller, by_key, row_of

LENGTHS = "cu_seq_lens_q"
"""transformers' keyword for where packed documents begin, and where the last one ends."""


class Documents(NamedTuple):
    """The documents of packed rows.

    transformers' own mask takes every place that does not follow on the one before it for the
    first of a document. ``apart`` is whether that may differ from what is said here.
    """

    number: Tensor  # [B or 1, M]: which document of its row a token belongs to
    places: Tensor  # [B or 1, M]: how many tokens of its document stand before it
    by_lengths: bool
    apart: bool

    def same(self) -> Tensor:
        """``[B or 1, 1, M, M]``: whether query and key are of one document."""
        return (self.number[:, :, None] == self.number[:, None, :])[:, None]

    def seen(self, window: int | None) -> Tensor:
        """``[B or 1, 1, M, M]``: what a query sees of its document, in a window if there is one."""
        distance = (self.places[:, :, None] - self.places[:, None, :])[:, None]
        near = distance >= 0
        if window is not None:
            near = near & (distance < window)
        return near & self.same()


def tell_apart(
    kwargs: dict[str, Any], inputs: Tensor, caller: Caller | None, names: Container[str]
) -> tuple[Documents | None, bool]:
    """The documents of packed rows, and whether this gave the stack a mask that hides nothing.

    As in transformers, rows are packed where lengths or places say so, and there is neither a
    mask nor a cache. Such a mask keeps transformers from cutting a text where its places jump,
    and a compiler, which takes any places for those of packed rows, from a dense mask.

    Args:
        kwargs: of a causal stack's forward without a cache; what documents need is added to them.
        inputs: ``[B, M]`` tokens, or ``[B, M, E]``.
        caller: of a model around the stack.
        names: what the stack's forward takes.

    Raises:
        ValueError: the rows are packed, and a cache is asked for; or lengths are not the row's.
    """
    mask, bounds = kwargs.get("attention_mask"), kwargs.get(LENGTHS)
    # A model around the stack makes dense masks of its own where its caller gave none.
    made = caller is not None and not caller.masks and by_key(mask) is None
    if mask is not None and not made:
        return None, False
    places, compiling = row_of(kwargs["position_ids"]), torch.compiler.is_compiling()
    documents, jumps = None, False
    if bounds is not None and len(bounds) > 2 and len(inputs) == 1:
        documents = by_lengths(bounds, inputs.shape[1])
        if kwargs["position_ids"] is None:
            kwargs["position_ids"] = documents.places
    elif places is not None and not (compiling and kwargs.get("use_cache")):
        documents, jumps = by_places(places)
    if documents is not None and "use_cache" in names:
        if kwargs.get("use_cache"):
            raise ValueError(
                "packed rows (position_ids that start again, or cu_seq_lens_q) need "
                "use_cache=False; an attention_mask of ones says that a row is one text"
            )
        kwargs["use_cache"] = False
    if places is not None and documents is None and jumps and mask is not None:
        return one_document(places), False
    whole = documents is None and (jumps or (compiling and kwargs["position_ids"] is None))
    if whole and mask is None:
        kwargs["attention_mask"] = inputs.new_ones(inputs.shape[:2], dtype=torch.bool)
    return documents, whole and mask is None


def by_places(places: Tensor) -> tuple[Documents | None, bool]:
    """The documents of ``places [B or 1, M]``, and whether places jump within one.

    A document begins where a row comes back to its least place, as transformers' flash attention
    reads it. A place that jumps, forward or back, is no beginning: training on longer texts than
    there are skips places, and its texts are whole.

    A compiler must not look at places: it gets documents that may be one, and the answer True.
    """
    first = _again(places)
    if torch.compiler.is_compiling():
        return _documents(first, by_lengths=False, apart=True), True
    jumps = places.diff(dim=-1) != 1
    if not bool(jumps.any()):
        return None, False
    jump_inside = bool((jumps & ~first[:, 1:]).any())
    if not bool(first[:, 1:].any()):
        return None, jump_inside
    return _documents(first, by_lengths=False, apart=jump_inside), jump_inside


def by_lengths(bounds: Any, length: int) -> Documents:
    """The documents of one row of ``length`` tokens; ``bounds [documents + 1]`` from 0 to its end.

    Raises:
        ValueError: the bounds are not those of this row.
    """
    if not isinstance(bounds, Tensor) or bounds.ndim != 1:
        raise ValueError(f"{LENGTHS} must be a tensor [documents + 1], got {bounds!r}")
    if not torch.compiler.is_compiling() and (int(bounds[0]), int(bounds[-1])) != (0, length):
        raise ValueError(
            f"{LENGTHS} must begin with 0 and end with the row's {length} tokens, got "
            f"{bounds.tolist()}"
        )
    token = torch.arange(length, device=bounds.device)
    first = (token[:, None] == bounds[:-1]).any(dim=1)[None]
    return _documents(first, by_lengths=True, apart=True)


def one_document(places: Tensor) -> Documents:
    """Rows of one text each, whatever the mask that a model made of their places."""
    return _documents(torch.zeros_like(places, dtype=torch.bool), by_lengths=False, apart=True)


def _again(places: Tensor) -> Tensor:
    """``[B or 1, M]``: where a row stands at its least place."""
    return places == places.amin(dim=-1, keepdim=True)


def _documents(first: Tensor, *, by_lengths: bool, apart: bool) -> Documents:
    """Documents that begin at ``first``, and at the row's first token."""
    token = torch.arange(first.shape[1], device=first.device)
    start = torch.where(first, token, 0).cummax(dim=-1).values
    return Documents(first.cumsum(dim=-1), token - start, by_lengths, apart)
