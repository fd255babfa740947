"""A live PeftModel with a prefix-tuning adapter, taken over in place."""

import functools
import inspect
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from peft import PeftModel, PeftType
from torch import Tensor, nn

from prefixattn.integrations.carrier import Options
from prefixattn.integrations.derived import derive
from prefixattn.integrations.handle import Handle, check_shapes, install, warn_of_dead_tokens
from prefixattn.integrations.survey import Site, check_model, check_part, own_sites, survey
from prefixattn.integrations.text_side import has_encoder
from prefixattn.integrations.undo import Undo
from prefixattn.kept import Kept
from prefixattn.layers import LayerShape, PrefixBatch, split_layers

TYPES = (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE)
BASE = "__base__"
"""PEFT's name for a row without an adapter."""

SOURCE = "prefixattn_source"

BASE_PREPARES = "base_model_prepare_inputs_for_generation"
"""Where a PeftModel that generates keeps this method of its base model's."""


def is_prompt_learning(model: nn.Module) -> bool:
    """Whether this PeftModel's active adapter is one that adds virtual tokens."""
    return isinstance(model, PeftModel) and bool(model.active_peft_config.is_prompt_learning)


def attach_peft(model: PeftModel, options: Options) -> Handle:
    """Take over ``model``: the same object, API and files, with our attention.

    Its class is replaced by a subclass of its own class; ``detach()`` gives the old one back.

    Raises:
        NotImplementedError: the active adapter is of another type, or the base model cannot carry
            a prefix.
    """
    config = model.active_peft_config
    if config.peft_type not in TYPES:
        raise NotImplementedError(
            f"{type(model).__name__} with a {config.peft_type.value} adapter has no prefix; "
            f"supported are {', '.join(t.value for t in TYPES)}"
        )
    if config.task_type == "SEQ_2_SEQ_LM" and config.num_transformer_submodules == 1:
        raise NotImplementedError(
            "num_transformer_submodules must be 2 for an encoder-decoder: with 1, PEFT's own "
            "forward and generation disagree"
        )
    base = check_model(model)
    part = "decoder" if has_encoder(base) else "self"
    sites = survey(base)
    own = own_sites(sites, part)
    check_part(base, sites, part)
    source = PeftSource(model, [site.layer_shape for site in own])
    check_shapes(source, own, part)
    _say_what_is_skipped(source, own)
    with Undo() as undo:
        install(base, sites, {part: source}, options, undo)
        warn_of_dead_tokens(config.num_virtual_tokens, own, options, stacklevel=5)
        setattr(model, SOURCE, source)
        undo.callback(delattr, model, SOURCE)
        undo.callback(derive(model, _leaves_the_prefix_to_the_attention))
        return Handle(model, model.prompt_encoder, undo)


class Adapter(NamedTuple):
    """A prefix adapter of a PeftModel: what PEFT holds of it."""

    config: Any
    encoder: Any
    tokens: Tensor

    @property
    def shapes(self) -> list[LayerShape]:
        """Per layer by PEFT's count."""
        dim = self.config.token_dim // self.config.num_attention_heads
        shape = LayerShape(self.config.num_attention_heads, dim, dim)
        return [shape] * self.config.num_layers

    def flat(self) -> Tensor:
        """``[P, 2 * L * H_kv * D]``."""
        config, weight = self.config, self.encoder.embedding.weight
        projects = getattr(self.encoder, "prefix_projection", False) and not config.inference_mode
        if not projects and not hasattr(weight, "device_mesh"):
            return cast("Tensor", weight)
        tokens = self.tokens[: config.num_virtual_tokens].to(weight.device)
        if config.inference_mode and config.peft_type == PeftType.PREFIX_TUNING:
            return cast("Tensor", self.encoder.embedding(tokens))
        return cast("Tensor", self.encoder(tokens[None])[0])


class _Calls(threading.local):
    """The calls of attached PeftModels that run in this thread, the innermost last."""

    running: "tuple[tuple[PeftSource, Sequence[str] | None], ...]" = ()


_calls = _Calls()


class PeftSource:
    """Gives the active adapter's prefix, computed once per forward, for no copies of the batch.

    The base model has it within calls of the PeftModel alone, as in PEFT.

    Args:
        model: the PeftModel.
        slots: what the base model's layers with keys of their own are like. PEFT also allots
            numbers to layers that borrow keys, which come last, and does not use them. Where
            layers differ (Gemma 4), each takes the first of PEFT's numbers, or none if it has more.
    """

    def __init__(self, model: PeftModel, slots: Sequence[LayerShape]) -> None:
        self.model = model
        self.slots = list(slots)
        self._traced: tuple[Sequence[str] | None, ...] = ()  # the same, for a compiler
        self._ready: Kept[PrefixBatch] = Kept()
        self._active: Adapter | None = None
        self.note_active()

    def __call__(self) -> PrefixBatch | None:
        asked = self._asked()
        if not asked or self.model._adapters_disabled:
            return None
        chosen = asked[-1]
        found = [self.active] if chosen is None else map(self._adapter, _distinct(chosen))
        adapters = [adapter for adapter in found if adapter is not None]
        if not adapters:
            return None
        flats = [adapter.flat() for adapter in adapters]
        if torch.compiler.is_compiling() or any(not isinstance(x, nn.Parameter) for x in flats):
            return self._batch(adapters, flats, chosen)
        # What a decoded token needs is the same as for the one before it.
        return self._ready.of(flats, lambda: self._batch(adapters, flats, chosen), options=chosen)

    @property
    def active(self) -> Adapter | None:
        """The active adapter, if it is a prefix.

        A compiler reads no name, which would give each adapter a graph of its own.
        """
        if not torch.compiler.is_compiling():
            self.note_active()
        return self._active

    def note_active(self) -> None:
        """See which adapter is active now."""
        name = self.model.active_adapter
        self._active = self._adapter(name) if isinstance(name, str) else None

    def _adapter(self, name: str) -> Adapter | None:
        """None: it is no prefix."""
        model = self.model
        if model.peft_config[name].peft_type not in TYPES:
            return None
        return Adapter(
            model.peft_config[name], model.prompt_encoder[name], model.prompt_tokens[name]
        )

    def _asked(self) -> tuple[Sequence[str] | None, ...]:
        """For each running call of the PeftModel, outermost first, its ``adapter_names``."""
        if torch.compiler.is_compiling():
            return self._traced
        return tuple(names for source, names in _calls.running if source is self)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Every adapter's."""
        return list(self.model.prompt_encoder.parameters())

    @property
    def num_tokens(self) -> int:
        """``P`` of the active adapter; 0 if that is no prefix."""
        active = self.active
        return 0 if active is None else int(active.config.num_virtual_tokens)

    def _batch(
        self, adapters: list[Adapter], flats: list[Tensor], chosen: Sequence[str] | None
    ) -> PrefixBatch:
        index = lengths = None
        if chosen is not None:
            places = {name: place for place, name in enumerate(_distinct(chosen))} | {BASE: -1}
            index = torch.tensor([places[name] for name in chosen], device=flats[0].device)
            lengths = torch.tensor([len(flat) for flat in flats], device=flats[0].device)
        most = max(len(flat) for flat in flats)
        entries = [
            split_layers(nn.functional.pad(x, (0, 0, 0, most - len(x))), adapter.shapes)
            for adapter, x in zip(adapters, flats, strict=True)
        ]
        pairs: list[tuple[Tensor, Tensor] | None] = []
        for slot, layer in enumerate(self._layers(adapters[0])):
            halves = zip(*(entry[layer] for entry in entries), strict=True)
            key, value = (torch.stack(x) if len(x) > 1 else x[0][None] for x in halves)
            shape = self._fitted(slot, adapters[0])
            if shape is None:
                pairs.append(None)
            else:
                heads = shape.num_heads
                pairs.append(
                    (key[:, :heads, :, : shape.key_dim], value[:, :heads, :, : shape.value_dim])
                )
        return PrefixBatch(pairs, index, lengths)

    def _layers(self, adapter: Adapter) -> list[int]:
        """Where in PEFT's order each of our layers has its prefix."""
        count = len(adapter.shapes)
        if adapter.config.num_transformer_submodules == 1:
            return list(range(min(count, len(self.slots))))
        # For an encoder-decoder PEFT doubles the layers and gives each decoder layer two of them.
        return [(2 * layer) % count for layer in range(len(self.slots))]

    @property
    def layer_shapes(self) -> list[LayerShape | None]:
        """What the active adapter holds, per slot."""
        active = self.active
        if active is None:
            return [None] * len(self.slots)
        return [self._fitted(slot, active) for slot in range(len(self._layers(active)))]

    def _fitted(self, slot: int, adapter: Adapter) -> LayerShape | None:
        """What a slot takes of the adapter's numbers; None: it needs more than there are."""
        held, wanted = adapter.shapes[0], self.slots[slot]
        if len(set(self.slots)) == 1:
            return held
        fits = all(need <= have for need, have in zip(wanted, held, strict=True))
        return wanted if fits else None

    @contextmanager
    def rows(self, names: Sequence[str] | None, *inputs: Any) -> Iterator[None]:
        """A call of the PeftModel: row ``i`` reads the adapter ``names[i]``; None: the active.

        The first tensor of ``inputs`` has a row for each name; one row may be several, packed.
        """
        model = self.model
        if isinstance(names, str) or (names is not None and not names):
            raise ValueError(f"adapter_names must be a list of a name for each row, got {names!r}")
        count = next((len(x) for x in inputs if isinstance(x, Tensor)), 1)
        if names is not None and count not in (1, len(names)):
            raise ValueError(
                "adapter_names must hold a name for each row: they were chosen for "
                f"{len(names)} rows, but the input has {count}"
            )
        for name in names or ():
            if name != BASE and name not in model.peft_config:
                raise ValueError(
                    f"adapter_names must be of {[BASE, *model.peft_config]}, got {name!r}"
                )
            if name != BASE and model.peft_config[name].peft_type not in TYPES:
                raise NotImplementedError(f"adapter_names: {name!r} is not a prefix")
        chosen = None if names is None else list(names)
        # A compiler cannot read what belongs to a thread; generate may compile the base alone.
        traced, self._traced = self._traced, (*self._traced, chosen)
        if torch.compiler.is_compiling():
            yield
            self._traced = traced
            return
        running, _calls.running = _calls.running, (*_calls.running, (self, chosen))
        try:
            yield
        finally:
            _calls.running, self._traced = running, traced


def _say_what_is_skipped(source: PeftSource, sites: Sequence[Site]) -> None:
    """Name the layers that PEFT's prefix is too narrow for.

    Raises:
        ValueError: all of them are.
    """
    shapes = source.layer_shapes
    pairs = zip(sites, shapes, strict=True)
    skipped = [site.name for site, shape in pairs if shape is None]
    if not skipped:
        return
    if len(skipped) == len(sites):
        raise ValueError(
            f"the prefix is too narrow for every layer, {sites[0].layer_shape} and more: override "
            "token_dim and num_attention_heads in PrefixTuningConfig"
        )
    warnings.warn(f"the prefix is too narrow for {skipped}, which have none", stacklevel=5)


def _distinct(chosen: Sequence[str]) -> list[str]:
    """The adapters of these rows, each once."""
    return [name for name in dict.fromkeys(chosen) if name != BASE]


def _has_prefix(model: PeftModel) -> bool:
    """Whether the active adapter is one, there may be none left, and the model attached to.

    A method that accelerate wrapped while it was outlives `detach`.
    """
    source: PeftSource | None = getattr(model, SOURCE, None)
    return source is not None and source.active is not None


def _leaves_the_prefix_to_the_attention(old: type) -> dict[str, Any]:
    """The members of a PeftModel's subclass whose forward and generation bring no prefix."""
    base: Any = old
    kind = old.__name__
    signature = inspect.signature(base.forward)

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _has_prefix(self):
            return base.forward(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs).arguments
        given = {name: value for name, value in bound.items() if name not in ("self", "kwargs")}
        given |= bound.get("kwargs", {})
        names = given.pop("adapter_names", None)
        for name in (*self.special_peft_forward_args, "task_ids"):
            if given.pop(name, None) is not None:
                raise NotImplementedError(f"{name} is not supported by an attached {kind}")
        if hasattr(self, BASE_PREPARES):
            _drop_token_types(given)
        inputs = given.get("input_ids"), given.get("inputs_embeds")
        with getattr(self, SOURCE).rows(names, *inputs):
            return self.base_model(**{name: v for name, v in given.items() if v is not None})

    def generate(self: Any, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
        with getattr(self, SOURCE).rows(adapter_names, *_inputs_of(args, kwargs)):
            if not _has_prefix(self) or not hasattr(self, BASE_PREPARES):
                return base.generate(self, *args, **kwargs)
            for name in (*self.special_peft_forward_args, "task_ids"):
                if kwargs.pop(name, None) is not None:
                    raise NotImplementedError(f"{name} is not supported by an attached {kind}")
            with _generates_for(self):
                return self.base_model.generate(*args, **kwargs)

    def prepare_inputs_for_generation(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if not _has_prefix(self):
            return cast("dict[str, Any]", base.prepare_inputs_for_generation(self, *args, **kwargs))
        kwargs.pop("task_ids", None)
        inputs: dict[str, Any] = self.base_model_prepare_inputs_for_generation(*args, **kwargs)
        _drop_token_types(inputs)
        return inputs

    def set_active(self: Any, name: Any) -> None:
        vars(self)["active_adapter"] = name
        if (source := getattr(self, SOURCE, None)) is not None:
            source.note_active()

    members: dict[str, Any] = {
        "forward": forward,
        "active_adapter": property(lambda self: vars(self)["active_adapter"], set_active),
    }
    if hasattr(old, "generate"):
        members["generate"] = generate
    if hasattr(old, "prepare_inputs_for_generation"):
        members["prepare_inputs_for_generation"] = prepare_inputs_for_generation
    return members


def _inputs_of(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """What a call of ``generate`` has a row for each text in, whichever of its forms it has."""
    encoded = kwargs.get("encoder_outputs")
    named = ("inputs", "input_ids", "inputs_embeds", "decoder_input_ids")
    encoded = encoded if encoded is None or isinstance(encoded, Tensor) else encoded[0]
    return [*args[:1], *map(kwargs.get, named), encoded]


@contextmanager
def _generates_for(model: Any) -> Iterator[None]:
    """Within it the base model generates with the PeftModel's settings and by its method.

    PEFT does the same, and hides which inputs the base model takes: ``generate`` reads them off
    the method's signature. PEFT also wants keywords, and a text for an encoder-decoder.
    """
    base, own = model.base_model, getattr(model, BASE_PREPARES)
    before, prepare = base.generation_config, model.prepare_inputs_for_generation

    @functools.wraps(own)
    def prepare_inputs(*args: Any, **kwargs: Any) -> Any:
        return prepare(*args, **kwargs)

    base.prepare_inputs_for_generation = prepare_inputs
    base.generation_config = model.generation_config
    try:
        yield
    finally:
        base.prepare_inputs_for_generation, base.generation_config = own, before


def _drop_token_types(inputs: dict[str, Any]) -> None:
    """Causal prefix tuning in PEFT ignores token types, and says so."""
    if inputs.pop("token_type_ids", None) is not None:
        warnings.warn(
            "Token type ids are not supported for parameter efficient tuning. "
            "Ignoring token type ids",
            stacklevel=3,
        )
