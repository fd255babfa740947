"""Which modules of a model attend, and to what, learned by running it once."""

import inspect
from collections import Counter
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from prefixattn.integrations.adapters import adapt, is_adapted
from prefixattn.integrations.carrier import SLOT
from prefixattn.integrations.implementation import own_configs, set_implementation
from prefixattn.integrations.places import known_positions
from prefixattn.integrations.refusal import refusal
from prefixattn.integrations.spread import is_sharded
from prefixattn.integrations.tensor_parallel import whole_sites
from prefixattn.integrations.text_side import has_encoder, is_text_decoder, question, reads
from prefixattn.integrations.transformers import attention_forward
from prefixattn.integrations.uncompiled import uncompiled, unwrapped
from prefixattn.layers import LayerShape

SURVEY_NAME = "prefixattn-survey"
PROBE_KEYWORD = "prefix_attention_probe"
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
OTHER_LAYERS = {"linear_attention", "conv", "mamba", "mamba2", "mlp", "moe"}
SEEN = -1e4  # what is added to a score that counts is more
PARTS = ("self", "encoder", "decoder", "cross")


@dataclass(frozen=True, eq=False)
class Site:
    """One attention module and what it attended to in the survey.

    ``part``: "self" in a model of one stack, else "encoder", "decoder" or "cross". ``key
    [1, H_kv, N, D]`` is after RoPE. ``slot`` counts the layers of the part that have keys of their
    own; a module that borrows another's keys has that one's slot. ``num_heads`` are the query's.
    ``causal``, ``window`` and ``chunk`` are the layer's. ``layer`` is the module to relay the
    prefix from, where keywords do not reach this one; ``informed`` says whether they reach it.
    ``group`` are the processes that share the module's heads; keys, values and heads here are of
    all of them.
    """

    name: str
    module: nn.Module
    part: str
    slot: int
    key: Tensor
    value: Tensor
    num_heads: int
    causal: bool
    window: int | None
    chunk: int | None
    carries: bool
    biased: bool
    layer: nn.Module | None
    informed: bool
    group: Any = None

    @property
    def layer_shape(self) -> LayerShape:
        return LayerShape(self.key.shape[1], self.key.shape[3], self.value.shape[3])


@dataclass
class _Recording:
    names: dict[nn.Module, str]
    lengths: dict[tuple[int, int], str]  # queries and keys -> part
    chunk: int | None
    sites: list[Site] = field(default_factory=list)
    slots: dict[tuple[str, int], int] = field(default_factory=dict)  # address of a key -> its slot
    windows: dict[int, int | None] = field(default_factory=dict)  # id of a mask -> its window
    masks: list[Tensor | None] = field(default_factory=list)  # keeps those ids from other use
    masked: set[tuple[int, int]] = field(default_factory=set)  # queries and keys of those
    layers: list[tuple[nn.Module, bool]] = field(default_factory=list)  # those that run now
    unsure: bool = False  # a mask and its module say different things of causality
    unmasked: dict[nn.Module, bool] | None = None  # causality, in a run without a mask


_recording: ContextVar[_Recording | None] = ContextVar("prefixattn_recording", default=None)


def survey(model: Any, input_ids: Tensor | None = None, part: str = "decoder") -> list[Site]:
    """The attention modules of ``model``, in the order they run.

    Runs the model once, in evaluation mode, without gradients and without a cache, and leaves it
    as it was.

    Args:
        model: a transformers model, or a ``PeftModel`` around one.
        input_ids: ``[1, N]`` tokens to run it on; default a few.
        part: of an encoder-decoder, what ``input_ids`` are for: "decoder", "encoder" or "cross"
            (which attends to what the encoder makes of them).

    Raises:
        TypeError: not a transformers model.
        NotImplementedError: a model that cannot carry a prefix, named, with the reason.
        ValueError: ``input_ids`` that the model has no embeddings for, or more than positions.
    """
    model = check_model(model)
    embeddings = input_embeddings(model)
    owner = model if embeddings is None else embeddings
    if input_ids is not None:
        if part != "decoder" and reads(model) is not None:
            raise ValueError(
                f"part must be 'decoder' for a text, which the encoder of {type(model).__name__} "
                f"does not read (it reads {reads(model)}), got {part!r}"
            )
        _check_tokens(model, input_ids, getattr(embeddings, "num_embeddings", None))
    device = offloaded_to(owner) or next(owner.parameters()).device
    ids = torch.tensor([[0, 1]]) if input_ids is None else input_ids
    asked = question(model, ids.to(device), part)
    recording = _Recording(
        names={m: name.replace("_orig_mod.", "") for name, m in model.named_modules()},
        lengths=asked.lengths,
        chunk=getattr(model.config.get_text_config(), "attention_chunk_size", None),
    )
    AttentionInterface.register(SURVEY_NAME, _record_attention)
    AttentionMaskInterface.register(SURVEY_NAME, _record_mask)
    training = [module for module in model.modules() if module.training]
    token = _recording.set(recording)
    with uncompiled(), ExitStack() as undo:
        undo.callback(_restore_training, model, training)
        undo.callback(_recording.reset, token)
        adapt(model, undo)
        undo.callback(set_implementation(SURVEY_NAME, model, own_configs(model))[1])
        _watch(model, recording, undo)
        model.eval()
        for module in model.modules():  # which packs its weights for good in a forward that is not
            module.training = type(module).__module__.startswith("bitsandbytes")
        with torch.inference_mode(False), torch.no_grad():
            asked.run(**asked.inputs)
            if recording.unsure:
                recording.unmasked = {}
                asked.run(**{k: v for k, v in asked.inputs.items() if k != "attention_mask"})
    _check_sites(model, recording.sites)
    for site in recording.sites:
        if (recording.unmasked or {}).get(site.module, site.causal) != site.causal:
            raise refusal(
                model, f"{site.name} hides what comes later only where an attention_mask is given"
            )
    met = {site.part for site in recording.sites}
    for missed in {asked.lengths[size] for size in recording.masked if size in asked.lengths} - met:
        raise refusal(model, f"its {missed} asks for masks, and then attends by itself")
    return whole_sites(model, recording.sites)


def _check_tokens(model: PreTrainedModel, ids: Tensor, vocabulary: int | None) -> None:
    low, high = int(ids.min()), int(ids.max())
    if vocabulary is not None and not 0 <= low <= high < vocabulary:
        raise ValueError(
            f"input_ids must be in [0, {vocabulary}), which {type(model).__name__} embeds, got "
            f"{low if low < 0 else high}"
        )
    known = known_positions(model, input_embeddings(model))
    if known is not None and ids.shape[1] > known:
        raise ValueError(
            f"input_ids must hold at most {known} tokens, for which {type(model).__name__} has "
            f"positions, got {ids.shape[1]}"
        )


def _restore_training(model: nn.Module, training: list[nn.Module]) -> None:
    model.eval()
    for module in training:
        module.training = True


def _watch(model: nn.Module, recording: _Recording, undo: ExitStack) -> None:
    """Send a probe into every stack, and note how far it comes."""

    def send(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs | {PROBE_KEYWORD: recording}

    def enter(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        recording.layers.append((module, kwargs.get(PROBE_KEYWORD) is recording))
        takes = takes_keywords(module)
        return args, {k: v for k, v in kwargs.items() if takes or k != PROBE_KEYWORD}

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        recording.layers.pop()

    for module in model.modules():
        if isinstance(module, PreTrainedModel) and takes_keywords(module):
            undo.callback(module.register_forward_pre_hook(send, with_kwargs=True).remove)
        elif isinstance(module, GradientCheckpointingLayer):
            undo.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            undo.callback(module.register_forward_hook(leave, always_call=True).remove)


def takes_keywords(module: nn.Module) -> bool:
    """Whether the module's forward takes keywords that it does not name."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    return any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters)


def check_not_nested(model: Any) -> None:
    """Raise where a PeftModel was made of a PeftModel.

    PEFT gives the inner one the configuration of a LoRA around it, and loses a prefix of its own.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else None
    if hasattr(inner, "get_base_model"):
        raise TypeError(
            f"model must be one PeftModel, got a {type(model).__name__} around a "
            f"{type(inner).__name__}: make one of the plain model, add further adapters to it by "
            "add_adapter, and attach a prefixattn.Prefix beside them; prefixattn.checkpoints.load "
            "reads one from PEFT's files"
        )


def check_model(model: Any) -> PreTrainedModel:
    """The transformers model to work on, or the reason why there is none, before anything runs."""
    model = unwrapped(model)
    check_not_nested(model)
    if hasattr(model, "get_base_model"):  # a PeftModel around it
        model = unwrapped(model.get_base_model())
    if not isinstance(model, PreTrainedModel):
        inner = getattr(model, "module", None)  # DataParallel's and its kin
        around = "" if inner is None else f" around a {type(inner).__name__}: give it that"
        raise TypeError(
            f"model must be a transformers PreTrainedModel, got {type(model).__name__}{around}"
        )
    if any(hasattr(module, SLOT) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has a prefix attached already: prefixattn.detach(model)"
        )
    if any(map(is_sharded, model.modules())):
        raise refusal(model, "it is sharded already: make and attach the prefix before fully_shard")
    if model.device.type == "meta" and not any(map(offloaded_to, model.modules())):
        raise refusal(model, "it is on the meta device: load its weights first")
    config = model.config.get_text_config()
    if reads(model) is not None and not is_text_decoder(model):
        raise refusal(model, f"its input is {reads(model)}, not text")
    with ExitStack() as undo:
        stacks = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
        if not (adapt(model, undo) or any(m._can_set_attn_implementation() for m in stacks)):
            raise refusal(model, "it does not go through transformers' attention interface")
    unusual = set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS - OTHER_LAYERS
    if unusual:
        raise refusal(model, f"its layers of type {sorted(unusual)} cannot carry a prefix")
    return model


def offloaded_to(module: nn.Module) -> torch.device | None:
    """Where accelerate brings a module's weights for its forward, which are on meta in between."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return None if device is None else torch.device(device)


def input_embeddings(model: PreTrainedModel) -> nn.Module | None:
    """The module that embeds token ids, where the model has one."""
    try:
        found = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return found if isinstance(found, nn.Module) else None


def _record_mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> Tensor | None:
    """A dense mask, remembered with the window it is for: some modules do not pass theirs on."""
    recording = _recording.get()
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask = sdpa_mask(*args, local_size=local_size, **kwargs)
    if recording is not None and mask is not None:
        recording.masked.add((mask.shape[2], mask.shape[3]))
        recording.windows[id(mask)] = local_size
        recording.masks.append(mask)
    return mask


def _record_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    recording = _recording.get()
    probe = kwargs.pop(PROBE_KEYWORD, None)
    part = None if recording is None else recording.lengths.get((query.shape[2], key.shape[2]))
    if recording is not None and part is not None:
        named = kwargs.get("is_causal")
        causal = _causal(module, attention_mask, recording, named)
        if recording.unmasked is not None:
            recording.unmasked[module] = causal
            return attention_forward(module, query, key, value, attention_mask, **kwargs)
        recording.unsure |= causal and not _causal(module, None, recording, named)
        known = recording.windows.get(id(attention_mask))
        window = kwargs.get("sliding_window", known) if known is None else known
        chunk = recording.chunk if window == recording.chunk else None
        layer, informed = recording.layers[-1] if recording.layers else (None, False)
        places = {place for place in recording.slots if place[0] == part}
        recording.sites.append(
            Site(
                name=recording.names.get(module, type(module).__name__),
                module=module,
                part=part,
                slot=recording.slots.setdefault((part, key.data_ptr()), len(places)),
                key=key,
                value=value,
                num_heads=query.shape[1],
                causal=causal,
                window=window if chunk is None else None,
                chunk=chunk,
                carries=probe is recording,
                biased=_biased(module, attention_mask, recording),
                layer=layer,
                informed=informed,
            )
        )
    return attention_forward(module, query, key, value, attention_mask, **kwargs)


def _causal(
    module: nn.Module, mask: Tensor | None, recording: _Recording, named: bool | None
) -> bool:
    """Whether the layer hides what stands behind a query: its mask says so before its name does."""
    if mask is not None and mask.ndim == 4 and mask.shape[-1] > 1:
        first = mask[0, 0, 0, -1]  # the last key, to the first query
        return not bool(first if first.dtype == torch.bool else first > SEEN)
    return bool(getattr(module, "is_causal", True) if named is None else named)


def _biased(module: nn.Module, mask: Tensor | None, recording: _Recording) -> bool:
    """Whether a module's mask holds anything but "seen" and "not seen" that we know nothing of."""
    if mask is None or id(mask) in recording.windows or is_adapted(module):
        return False
    return mask.is_floating_point() and bool(((mask != 0) & (mask > SEEN)).any())


def _check_sites(model: PreTrainedModel, sites: list[Site]) -> None:
    if not sites:
        raise refusal(model, "none of its modules went through transformers' attention interface")
    calls = Counter(site.module for site in sites)
    for site in sites:
        if calls[site.module] > 1:
            times = calls[site.module]
            raise refusal(model, f"{site.name} attends {times} times in one forward")
        if site.biased:
            raise refusal(model, f"{site.name} adds a bias of its own to the attention scores")
        if not site.carries and site.layer is None:
            raise refusal(model, f"it does not hand unknown keywords on to {site.name}")
    if not any(site.part in ("self", "decoder") for site in sites):
        raise refusal(model, "its decoder does not attend to its own text alone")


def check_part(model: PreTrainedModel, sites: list[Site], part: str) -> None:
    """Raise where some layers of a part attend in ways that the survey did not see."""
    met = sum(site.part == part for site in sites)
    expected = _expected(model, sites).get(part, met)
    if met != expected:
        where = "" if part == "self" else f" ({part})"
        raise refusal(
            model, f"{met} attention modules were met in {expected} layers that attend{where}"
        )


def _expected(model: PreTrainedModel, sites: list[Site]) -> dict[str, int]:
    """How many modules of each part the configuration lets us expect."""
    config = model.config.get_text_config()
    if has_encoder(model):
        encoder = getattr(config, "encoder_layers", None) or getattr(config, "num_layers", None)
        decoder = getattr(config, "decoder_layers", None) or getattr(
            config, "num_decoder_layers", None
        )
        counts = {"encoder": encoder, "decoder": decoder, "cross": decoder}
        return {part: count for part, count in counts.items() if count is not None}
    types = getattr(config, "layer_types", None)
    if types:
        return {"self": sum(kind in ATTENTION_LAYERS for kind in types)}
    if hasattr(config, "decoder_layers"):  # one stack of two, by itself: which, is not said
        return {"self": _depth(model, sites)}
    layers = getattr(config, "num_hidden_layers", None)
    return {} if layers is None else {"self": layers}


def _depth(model: PreTrainedModel, sites: list[Site]) -> int:
    """How many layers there are in the list that holds all of these modules."""
    modules = {site.module for site in sites}
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return next((len(m) for m in reversed(lists) if modules <= set(m.modules())), len(sites))


def own_sites(sites: list[Site], part: str | None = None) -> list[Site]:
    """One site per slot of a part: the first, whose keys they are.

    ``part`` None is where a plain `Prefix` goes: the only stack, or the decoder's own attention.
    """
    first: dict[int, Site] = {}
    for site in sites:
        if site.part == part or (part is None and site.part in ("self", "decoder")):
            first.setdefault(site.slot, site)
    return list(first.values())
