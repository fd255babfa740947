"""What people do with an encoder-decoder: a prefix in its encoder, its decoder, and between them.

The truth is the stock model again. Its encoder reads a text that sees only itself before the
source; its memory begins with ``P`` more vectors; its decoder begins with another text.
"""

import copy
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from prefixattn import EncoderDecoderPrefix, Prefix

from . import generation, objects, oracle, specimen, training
from .specimen import PAD, P, RefusedError, Situation, UnavailableError, padded

PARTS = ("encoder", "decoder", "cross")
TARGETS = 7
START = 1


class Specimen(specimen.Specimen):
    """``logits [2, TARGETS, V]`` are the stock model's with all three prefixes."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        draw = torch.Generator().manual_seed(2)
        self.targets = torch.randint(2, 90, (2, TARGETS), generator=draw)
        self.vectors = torch.randn(1, P, 32, generator=draw, dtype=torch.double)
        # `generate` puts the first token of all texts before those that begin with another.
        self.text[:, 0] = self.targets[:, 0] = START
        model.generation_config.update(decoder_start_token_id=START)

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """Those that this model can have: some encoders attend in a way of their own."""

        def attends(model: Any) -> bool:
            with oracle.eager(model) as records, torch.no_grad():
                model.get_encoder()(self.text)
            return bool(records)

        try:
            return PARTS if self.ask(attends) else PARTS[1:]
        except UnavailableError:
            return PARTS

    @property
    def source(self) -> Tensor:
        """One text for both rows: what its decoder makes of a text depends on it."""
        return self.ids[:1].repeat(2, 1)

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.source, "decoder_input_ids": self.targets}

    def loss(self, model: Any) -> Tensor:
        return self.forward(model).square().sum()

    def behind(self, model: Any, parts: tuple[str, ...] = (), **source: Tensor) -> Tensor:
        """What the stock model says of the targets."""
        logits = model(**self.inputs_behind(model, parts, **source)).logits
        return logits[:, -TARGETS:]

    def inputs_behind(
        self, model: Any, parts: tuple[str, ...] = (), **source: Tensor
    ) -> dict[str, Any]:
        """What a stock model is asked that has these prefixes, all if none are named."""
        parts = parts or self.parts
        memory, mask = self.memory(model, parts, **(source or {"input_ids": self.source}))
        targets = self.behind_text(self.targets) if "decoder" in parts else self.targets
        return {"encoder_outputs": memory, "attention_mask": mask, "decoder_input_ids": targets}

    def memory(
        self, model: Any, parts: tuple[str, ...], input_ids: Tensor, attention_mask: Any = None
    ) -> tuple[Any, Tensor]:
        """The encoder's output, ``[B, N, D]`` and whatever else, and the decoder's mask of it."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        stack = model.get_encoder()
        if "encoder" in parts:
            with oracle.eager(model, apart=P):
                grown = shown(mask)
                out = stack(self.behind_text(input_ids), attention_mask=grown, return_dict=True)
            hidden = out.last_hidden_state[:, P:]
        else:
            out = stack(input_ids, attention_mask=mask, return_dict=True)
            hidden = out.last_hidden_state
        if "cross" in parts:
            vectors = self.vectors.to(hidden.dtype).expand(len(hidden), -1, -1)
            hidden, mask = torch.cat([vectors, hidden], dim=1), shown(mask)
        out["last_hidden_state"] = hidden
        return out, mask

    def make_prefix(self) -> EncoderDecoderPrefix:
        return self.prefix_of(self.parts)

    def prefix_of(self, parts: tuple[str, ...], **source: Tensor) -> EncoderDecoderPrefix:
        """The keys and values that the stock model itself computes in each place."""
        source = {name: x[:1] for name, x in (source or {"input_ids": self.source}).items()}
        pairs = self.ask(lambda model: self._pairs(model, parts, source))
        return EncoderDecoderPrefix(
            **{part: Prefix(*zip(*found, strict=True)) for part, found in pairs.items()}
        )

    @torch.no_grad()
    def _pairs(self, model: Any, parts: tuple[str, ...], source: dict[str, Tensor]) -> Any:
        found: dict[str, list[tuple[Tensor, Tensor]]] = {}
        if "encoder" in parts:
            with oracle.eager(model) as records:
                model.get_encoder()(self.text)
                found["encoder"] = [(key[0], value[0]) for key, value in records]
        memory, mask = self.memory(model, parts, **source)
        begin = {"decoder_input_ids": self.text, "use_cache": True}
        caches = model(encoder_outputs=memory, attention_mask=mask, **begin).past_key_values
        if "cross" in parts:
            layers = caches.cross_attention_cache.layers
            found["cross"] = [(layer.keys[0, :, :P], layer.values[0, :, :P]) for layer in layers]
        if "decoder" in parts:
            layers = caches.self_attention_cache.layers
            found["decoder"] = [(layer.keys[0], layer.values[0]) for layer in layers]
        return found

    def changed(self, change: Callable[[Prefix], Any]) -> Any:
        parts = self.prefix().parts
        return EncoderDecoderPrefix(**{name: change(prefix) for name, prefix in parts.items()})


def shown(mask: Tensor) -> Tensor:
    """A mask that shows ``P`` more before."""
    return torch.nn.functional.pad(mask, (P, 0), value=1)


def part(*parts: str) -> Situation:
    """One forward with these prefixes."""

    @torch.no_grad()
    def situation(s: Specimen) -> str | None:
        if lacking := [name for name in parts if name not in s.parts]:
            _refused(s, lacking[0])
        truth = s.ask(lambda m: s.behind(m, parts))
        effect = float((truth - s.plain).abs().max()) / s.scale
        if effect < specimen.EFFECT:
            return f"vacuous: the prefix changes logits by {effect:.0e}"
        return s.compare(s.forward(s.attached(prefix=s.prefix_of(parts or s.parts))), truth)

    return situation


def _refused(s: Specimen, part: str) -> None:
    try:
        Prefix.zeros(copy.deepcopy(s.stock), P, part=part)
    except ValueError as error:
        raise RefusedError(str(error)) from error


def source_padding(**sides: int) -> Situation:
    """Padding in the source, counted in its positions as the stock model counts it."""

    @torch.no_grad()
    def situation(s: Specimen) -> str | None:
        source = padded(s.source, **sides)
        truth = s.ask(lambda m: s.behind(m, **source))
        model = s.attached(prefix=s.prefix_of(s.parts, **source))
        return s.compare(model(**source, decoder_input_ids=s.targets).logits, truth)

    return situation


def beams(s: Specimen) -> str | None:
    return generation.generates(s, num_beams=3, num_return_sequences=2)


def static_cache(s: Specimen) -> str | None:
    return generation.generates(s, cache_implementation="static", disable_compile=True)


def no_cache(s: Specimen) -> str | None:
    return generation.generates(s, use_cache=False)


@torch.no_grad()
def decode_loop(s: Specimen) -> str | None:
    s.ask(lambda m: m(input_ids=s.source, decoder_input_ids=s.targets, use_cache=True))
    model, cache, found = s.attached(), None, []
    for piece in s.targets.split([4, 2, 1], dim=1):
        inputs = {"input_ids": s.source, "decoder_input_ids": piece}
        out = model(**inputs, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits)
    return s.compare(torch.cat(found, dim=1))


SITUATIONS: dict[str, Situation] = {
    "no mask": part(),
    "encoder": part("encoder"),
    "decoder": part("decoder"),
    "cross": part("cross"),
    "left pad": source_padding(left=PAD),
    "right pad": source_padding(right=PAD),
    "rows": objects.rows,
    "gradients": training.differences,
    "checkpoint": training.checkpointed,
    "reentrant": training.checkpointed_reentrant,
    "greedy": generation.greedy,
    "no cache": no_cache,
    "static": static_cache,
    "beams": beams,
    "sampling": generation.sampling,
    "by hand": decode_loop,
    "compile": objects.compiled,
    "bf16": objects.half_precision,
    "autocast": objects.autocast,
    "copies": objects.copies,
    "detach": objects.detached,
    "raises": objects.raises,
    "switched": objects.switched_away,
}
