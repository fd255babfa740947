"""How a prefix starts: from a text, from random text, from random numbers."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from prefixattn.layers import LayerShape, check_count, check_layers, check_number, describe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prefixattn.integrations.survey import Site

SPECIAL = ("_token_id", "_token_ids", "_token_index")


class Start(NamedTuple):
    """The keys and values of a new prefix, for ``layers`` of a model's ``num_layers``.

    ``num_heads``: query heads of each of these layers.
    """

    keys: list[Tensor]
    values: list[Tensor]
    num_heads: list[int]
    layers: list[int]
    num_layers: int


class Places(NamedTuple):
    """What the layers of a model ask of a prefix, and a tensor of their device and dtype."""

    shapes: list[LayerShape]
    num_heads: list[int]
    layers: list[int]
    num_layers: int
    like: list[Tensor]


def start_from_text(
    model: "PreTrainedModel",
    input_ids: Tensor,
    num_tokens: int | None,
    part: str | None,
    layers: Sequence[int] | None,
) -> Start:
    """See `prefixattn.Prefix.from_text`."""
    sites, chosen = _sites(model, _token_row(input_ids, num_tokens), part, layers)
    own = [sites[layer] for layer in chosen]
    return Start(
        [site.key[0] for site in own],
        [site.value[0] for site in own],
        [site.num_heads for site in own],
        chosen,
        len(sites),
    )


def start_at_random(
    places: Places, num_tokens: int, std: float, generator: torch.Generator | None
) -> Start:
    """See `prefixattn.Prefix.random`."""
    num_tokens, std = check_count("num_tokens", num_tokens), check_number("std", std, 0, math.inf)
    keys, values = [], []
    for shape, like in zip(places.shapes, places.like, strict=True):
        draws = [
            torch.randn(shape.num_heads, num_tokens, dim, generator=generator) * std
            for dim in (shape.key_dim, shape.value_dim)
        ]
        keys.append(draws[0].to(like))
        values.append(draws[1].to(like))
    return Start(keys, values, places.num_heads, places.layers, places.num_layers)


def places_in(
    model: "PreTrainedModel", part: str | None = None, layers: Sequence[int] | None = None
) -> Places:
    """What the chosen ``layers`` of a ``part`` of ``model`` ask for; None: see `Prefix.from_text`.

    ``like`` is in float32 where the model is in half precision.
    """
    sites, chosen = _sites(model, None, part, layers)
    own = [sites[layer] for layer in chosen]
    return Places(
        [site.layer_shape for site in own],
        [site.num_heads for site in own],
        chosen,
        len(sites),
        [master_copy(site.key[:, :, :0]) for site in own],
    )


def random_text(
    model: "PreTrainedModel", num_tokens: int, generator: torch.Generator | None
) -> Tensor:
    """``[P]`` token ids of the model's vocabulary, drawn uniformly, without its special tokens.

    Special are the ids that the configuration names: its ``*_token_id`` and their like.
    """
    num_tokens = check_count("num_tokens", num_tokens)
    config = model.config.get_text_config()
    size = getattr(config, "vocab_size", None)
    if not isinstance(size, int):
        raise ValueError(f"model must have a vocab_size in its configuration, got {size!r}")
    special: set[int] = set()
    for name, ids in [*model.config.to_dict().items(), *config.to_dict().items()]:
        if name.endswith(SPECIAL):
            special |= {i for i in (ids if isinstance(ids, list) else [ids]) if type(i) is int}
    usable = torch.tensor(sorted(set(range(size)) - special))
    if not len(usable):
        raise ValueError(f"model must have tokens that are not special, got {size} that all are")
    return usable[torch.randint(len(usable), (num_tokens,), generator=generator)]


def master_copy(tensor: Tensor) -> Tensor:
    """A copy to train: contiguous, and float32 where ``tensor`` is in half precision."""
    dtype = torch.float32 if tensor.dtype.itemsize < 4 else tensor.dtype
    return tensor.detach().to(dtype, copy=True).contiguous()


def _sites(
    model: "PreTrainedModel",
    input_ids: Tensor | None,
    part: str | None,
    layers: Sequence[int] | None,
) -> tuple[list["Site"], list[int]]:
    """The layers with keys of their own in one part of the model, and which are chosen."""
    from prefixattn.integrations.handle import without_prefix
    from prefixattn.integrations.survey import check_part, own_sites, survey

    model = without_prefix(model)
    found = survey(model, input_ids, part or "decoder")
    sites = own_sites(found, part)
    if not sites:
        parts = sorted({site.part for site in found})
        raise ValueError(f"part must be one of {parts} for {type(model).__name__}, got {part!r}")
    check_part(model, found, sites[0].part)
    return sites, check_layers(layers, len(sites))


def _token_row(input_ids: Tensor, num_tokens: int | None) -> Tensor:
    """``[1, P]``: the first ``num_tokens`` of a text, or all."""
    if not isinstance(input_ids, Tensor) or input_ids.is_floating_point():
        raise TypeError(f"input_ids must be an integer tensor, got {describe(input_ids)}")
    row = input_ids[None] if input_ids.ndim == 1 else input_ids
    if row.ndim != 2 or row.shape[0] != 1 or row.shape[1] == 0:
        raise ValueError(
            f"input_ids must be [P] or [1, P] with P >= 1, got {tuple(input_ids.shape)}"
        )
    if num_tokens is None:
        return row
    num_tokens = check_count("num_tokens", num_tokens)
    if row.shape[1] < num_tokens:
        raise ValueError(
            f"input_ids must hold at least num_tokens = {num_tokens} tokens, got {row.shape[1]}"
        )
    return row[:, :num_tokens]
