"""The side of a model that reads text, and what to run it on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from prefixattn.integrations.places import argument_names

TEXT = "input_ids"
NO_CACHE = {"use_cache": False}
SOUNDLESS = 5  # states that stand in for what an encoder makes of no text; another text, if as long


@dataclass
class _States(BaseModelOutput):
    """What an encoder made. Moonshine's says besides which of it is padding."""

    attention_mask: Tensor | None = None


class Question(NamedTuple):
    """How to run the text side of a model, and which lengths of queries and keys mean which part.

    Texts of an encoder-decoder have different lengths, to tell the parts apart.
    """

    run: Callable[..., Any]
    inputs: dict[str, Any]
    lengths: dict[tuple[int, int], str]


def has_encoder(model: PreTrainedModel) -> bool:
    """Whether the model runs an encoder and a decoder. Either by itself has one stack."""
    return bool(model.config.is_encoder_decoder) and "decoder_input_ids" in argument_names(
        model.base_model
    )


def reads(model: PreTrainedModel) -> str | None:
    """What the model, or the encoder that it runs first, takes in the place of text; else None."""
    name = str(model.main_input_name)
    return None if name == TEXT else name


def is_text_decoder(model: PreTrainedModel) -> bool:
    """Whether the model decodes text from whatever its encoder makes of its input."""
    return has_encoder(model) and "encoder_outputs" in argument_names(model.base_model)


def question(model: PreTrainedModel, ids: Tensor, part: str) -> Question:
    """What to ask ``model``.

    Args:
        model: the model.
        ids: ``[1, N]`` tokens.
        part: of an encoder-decoder, what they are for.
    """
    length, inner = ids.shape[1], model.base_model
    if not has_encoder(model):
        inputs: dict[str, Any] = {TEXT: ids, "attention_mask": torch.ones_like(ids)}
        lengths = {(length, length): "self"}
        # Where a tower for images or sound stands beside, it cannot be run on text.
        beside = getattr(inner, "get_text_features", None)
        return Question(beside or inner, inputs | ({} if beside else NO_CACHE), lengths)
    if reads(model) is not None:
        return _for_a_text_decoder(model, ids)
    other = torch.cat([ids, ids[:, :1]], dim=1)
    source, target = (other, ids) if part == "decoder" else (ids, other)
    encoder, decoder = source.shape[1], target.shape[1]
    inputs = {TEXT: source, "attention_mask": torch.ones_like(source), **NO_CACHE}
    return Question(
        inner,
        inputs | {"decoder_input_ids": target},
        {
            (encoder, encoder): "encoder",
            (decoder, decoder): "decoder",
            (decoder, encoder): "cross",
        },
    )


def _for_a_text_decoder(model: PreTrainedModel, ids: Tensor) -> Question:
    """The decoder alone, beside states of zeros: its encoder reads no text."""
    config = model.get_encoder().config
    widths = (getattr(config, name, None) for name in ("output_hidden_size", "hidden_size"))
    width = next(width for width in widths if width is not None)
    length = ids.shape[1]
    count = SOUNDLESS + (length == SOUNDLESS)
    states = torch.zeros(1, count, width, dtype=model.dtype, device=ids.device)
    inputs = {"decoder_input_ids": ids, "encoder_outputs": _States(states), **NO_CACHE}
    return Question(
        model.base_model, inputs, {(length, length): "decoder", (length, count): "cross"}
    )
