"""The stock model's eager attention, asked for things that it does not offer."""

import functools
import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

NAME = "zoo"  # an attention implementation that is each family's own eager one, recorded

_records: list[tuple[Tensor, Tensor]] = []
_hidden: list[int] = []


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> Any:
    mask = attention_mask
    _records.append((key, value))
    if _hidden and query.shape[2] == key.shape[2]:
        first = _hidden[-1]
        bias = query.new_zeros(query.shape[2], key.shape[2])
        bias[:first, first:] = torch.finfo(query.dtype).min
        mask = bias if mask is None else mask + bias
    return sys.modules[type(module).__module__].eager_attention_forward(  # type: ignore[attr-defined]
        module, query, key, value, mask, **kwargs
    )


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, eager_mask)


@contextmanager
def eager(model: Any, apart: int = 0) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Within, ``model`` attends eagerly and the first ``apart`` tokens do not see the others.

    Gives the keys and values of every attention in the order in which they run.
    """
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise NotImplementedError("it does not go through the attention interface")
    _records.clear()
    _hidden.append(apart) if apart else None
    try:
        yield _records
    finally:
        _hidden.clear()


MIXERS = re.compile(
    "(Mixer|MambaLayer|DeltaNet|DeltaAttention|LightningAttention|ShortConv|RecurrentBlock"
    "|CCAProjection)$"
)


KEPT_IN_MODULES = {"recurrent_states", "conv1d_state"}  # by RecurrentGemma, whatever its cache


def split_mixers(model: Any, at: int) -> None:
    """Have the layers of ``model`` that are no attention begin anew behind ``at`` tokens.

    They have no keys that a prefix could hold: to them, the text before the input does not exist.
    """
    for module in mixers(model):
        module.forward = functools.partial(_split, module.forward, at)


def mixers(model: Any) -> list[Any]:
    """The layers' modules that carry a text on in a state, and no attention."""
    return [m for m in model.modules() if MIXERS.search(type(m).__name__)]


def _split(forward: Any, at: int, *args: Any, **kwargs: Any) -> Any:
    call = inspect.signature(forward).bind(*args, **kwargs)
    hidden = next(iter(call.arguments.values()))
    length = hidden.shape[1]
    if length <= at:
        return forward(*args, **kwargs)

    def piece(thing: Any, place: slice) -> Any:
        if isinstance(thing, tuple):
            return tuple(piece(one, place) for one in thing)
        sequence = isinstance(thing, Tensor) and thing.ndim > 1 and thing.shape[1] == length
        return thing[:, place] if sequence else thing

    outs = []
    for place in (slice(0, at), slice(at, None)):
        for module in forward.__self__.modules():
            for state in KEPT_IN_MODULES & set(vars(module)):
                setattr(module, state, None)
        cut = {name: piece(thing, place) for name, thing in call.arguments.items()}
        for name in ("cache_params", "past_key_values", "past_key_value"):
            if name in cut and place.start == 0:
                cut[name] = None
        more = cut.pop("kwargs", {})
        outs.append(forward(**cut, **{k: piece(v, place) for k, v in more.items()}))
    if isinstance(outs[0], Tensor):
        return torch.cat(outs, dim=1)
    return tuple(
        torch.cat(pair, dim=1) if isinstance(pair[0], Tensor) else pair[1]
        for pair in zip(*outs, strict=True)
    )
