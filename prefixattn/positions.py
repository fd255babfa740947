"""Prefixes moved to other places, as the model they are for would have them there."""

import copy
from typing import TYPE_CHECKING, TypeVar

import torch

from prefixattn.initialise import random_text
from prefixattn.prefix import Prefix, frozen_names
from prefixattn.projected import ProjectedPrefix
from prefixattn.scalars import integer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T", bound=Prefix)

PROBE_TOKENS = 8


def move_prefix(prefix: T, model: "PreTrainedModel", by: int, *, part: str | None = None) -> T:
    """A copy of ``prefix`` whose tokens stand ``by`` places further on in ``model``'s text.

    Keys are turned as ``model`` turns its own; values have no place. The ``P`` tokens of a prefix
    for ``attach(..., positions="shift")`` stand at ``0 … P - 1`` and the text begins at ``P``; for
    ``positions="keep"`` the text begins at 0. So ``by=-P`` makes a prefix for "keep" of one for
    "shift", and ``by=P`` is the way back; ``by=Q`` puts it behind another one of ``Q`` tokens.

    How the model turns keys is found by three forwards of a few tokens, and held against what it
    does over at least ``by`` and ``P`` places. Models whose keys have no place (ALiBi, relative
    bias) leave them as they are; models that add a place to the text itself cannot be followed.
    Where a model scales its queries by their own place, that differs between the two policies.

    Args:
        prefix: of any kind that holds its keys. Frozen tokens, gates and what trains stay.
        model: the transformers model it is for; a prefix that it has attached does not matter.
        by: places, of either sign.
        part: of an encoder-decoder, what the prefix is for, as for `Prefix.from_text`.

    Raises:
        TypeError: a prefix that a network computes (fold it first), or none at all.
        ValueError: the prefix does not fit the model.
        NotImplementedError: the keys cannot be moved; the message names the layer and says why.
    """
    from prefixattn.integrations.handle import check_shapes, without_prefix
    from prefixattn.integrations.rotary import find_rotations
    from prefixattn.integrations.survey import check_model

    if isinstance(prefix, ProjectedPrefix):
        raise TypeError("prefix must hold its keys, got a ProjectedPrefix: move prefix.folded()")
    if not isinstance(prefix, Prefix):
        raise TypeError(f"prefix must be a prefixattn.Prefix, got a {type(prefix).__name__}")
    places = integer(by)
    if places is None:
        raise TypeError(f"by must be an integer, got {by!r}")
    model = without_prefix(model)
    text = random_text(check_model(model), PROBE_TOKENS, torch.Generator().manual_seed(0))
    layers = find_rotations(model, text[None], max(abs(places), prefix.num_tokens), part)
    check_shapes(prefix, [site for site, _ in layers], layers[0][0].part)
    with torch.inference_mode(False), torch.no_grad():  # what is copied there could never train
        moved = copy.deepcopy(prefix)
        for i, layer in enumerate(prefix.layers):
            keys = [moved.keys[i]]
            if prefix.num_frozen_tokens:
                keys.append(moved.get_buffer(frozen_names(i)[0]))
            for key in keys:
                key.copy_(layers[layer][1].turned(key, places))
    return moved
