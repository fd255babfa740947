"""Which modules of a model attend to themselves, learned by running it once."""

from collections import Counter
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from prefixattn.integrations.carrier import SLOT
from prefixattn.integrations.implementation import own_configs, set_implementation
from prefixattn.integrations.transformers import attention_forward

SURVEY_NAME = "prefixattn-survey"
PROBE_KEYWORD = "prefix_attention_probe"
ORDINARY_LAYERS = {"full_attention", "sliding_attention", None}


@dataclass(frozen=True, eq=False)
class Site:
    """One self-attention module and what it attended to in the survey.

    ``key [1, H_kv, N, D]`` is after RoPE. ``slot`` counts the layers that have keys of their own;
    a module that borrows another's keys has that one's slot. ``window`` is the layer's sliding
    window. ``carries`` says whether the backbone hands unknown keywords on to it.
    """

    name: str
    module: nn.Module
    slot: int
    key: Tensor
    value: Tensor
    window: int | None
    carries: bool
    biased: bool


@dataclass
class _Recording:
    names: dict[nn.Module, str]
    sites: list[Site]
    slots: dict[int, int]  # address of a key -> its slot
    windows: dict[int, int | None]  # id of a mask -> the window it was made for
    masks: list[Tensor | None]  # keeps the ids above from being used again
    length: int


_recording: ContextVar[_Recording | None] = ContextVar("prefixattn_recording", default=None)


def survey(model: Any, input_ids: Tensor | None = None) -> list[Site]:
    """The self-attention modules of ``model``, in the order they run.

    Runs the model once on ``input_ids [1, N]`` (default: two tokens), in evaluation mode, without
    gradients and without a cache, and leaves it as it was.

    Raises:
        TypeError: not a transformers model.
        NotImplementedError: a model that cannot carry a prefix, named, with the reason.
    """
    model = check_model(model)
    embeddings = input_embeddings(model)
    device = model.device if embeddings is None else next(embeddings.parameters()).device
    if input_ids is None:
        input_ids = torch.tensor([[0, 1]], device=device)
    recording = _Recording(
        names={module: name for name, module in model.named_modules()},
        sites=[],
        slots={},
        windows={},
        masks=[],
        length=input_ids.shape[1],
    )
    _register()
    training = [module for module in model.modules() if module.training]
    backbone = model.base_model
    token = _recording.set(recording)
    restore = set_implementation(SURVEY_NAME, own_configs(model))
    try:
        model.eval()
        with torch.inference_mode(False), torch.no_grad():
            backbone(
                input_ids=input_ids.to(device),
                attention_mask=torch.ones_like(input_ids, device=device),
                use_cache=False,
                **{PROBE_KEYWORD: recording},
            )
    finally:
        restore()
        _recording.reset(token)
        for module in training:
            module.training = True
    _check_sites(model, recording.sites)
    return recording.sites


def check_model(model: Any) -> PreTrainedModel:
    """The transformers model to work on, or the reason why there is none, before anything runs."""
    if hasattr(model, "get_base_model"):  # a PeftModel around it
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {_kind(model)}")
    if any(hasattr(module, SLOT) for module in model.modules()):
        raise ValueError(f"{_kind(model)} has a prefix attached already: detach() it first")
    if model.device.type == "meta":
        raise refusal(model, "it is on the meta device: load its weights first")
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder:
        raise refusal(model, "encoder-decoder models are not supported yet")
    if model.main_input_name != "input_ids":
        raise refusal(model, f"its input is {model.main_input_name}, not text")
    if not type(model)._can_set_attn_implementation():
        raise refusal(model, "it does not go through transformers' attention interface")
    unusual = set(getattr(config, "layer_types", None) or ()) - ORDINARY_LAYERS
    if unusual:
        raise refusal(model, f"its layers of type {sorted(unusual)} cannot carry a prefix")
    return model


def refusal(model: nn.Module, reason: str) -> NotImplementedError:
    """The error for a model that cannot carry a prefix."""
    return NotImplementedError(f"{_kind(model)} cannot carry a prefix: {reason}")


def _kind(model: nn.Module) -> str:
    return type(model).__name__


def input_embeddings(model: PreTrainedModel) -> nn.Module | None:
    """The module that embeds token ids, where the model has one."""
    try:
        found = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return found if isinstance(found, nn.Module) else None


def _register() -> None:
    AttentionInterface.register(SURVEY_NAME, _record_attention)
    AttentionMaskInterface.register(SURVEY_NAME, _record_mask)


def _record_mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> Tensor | None:
    """A dense mask, remembered with the window it is for: some modules do not pass theirs on."""
    recording = _recording.get()
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask = sdpa_mask(*args, local_size=local_size, **kwargs)
    if recording is not None:
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
    length = query.shape[2]
    if recording is not None and length == recording.length == key.shape[2]:
        known = recording.windows.get(id(attention_mask))
        window = kwargs.get("sliding_window", known) if known is None else known
        name = recording.names.get(module, type(module).__name__)
        slot = recording.slots.setdefault(key.data_ptr(), len(recording.slots))
        carries = probe is recording
        biased = id(attention_mask) not in recording.windows and _is_bias(attention_mask)
        recording.sites.append(Site(name, module, slot, key, value, window, carries, biased))
    return attention_forward(module, query, key, value, attention_mask, **kwargs)


def _is_bias(mask: Tensor | None) -> bool:
    """Whether ``mask`` holds anything but "seen" and "not seen"."""
    if mask is None or not mask.is_floating_point():
        return False
    return bool(((mask != 0) & (mask > -1e4)).any())


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
        if not site.carries:
            raise refusal(model, f"it does not hand unknown keywords on to {site.name}")
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", len(sites))
    if layers != len(sites):
        raise refusal(
            model, f"{len(sites)} attention modules were met in a model of {layers} layers"
        )


def own_sites(sites: list[Site]) -> list[Site]:
    """One site per slot: the first, whose keys they are."""
    first: dict[int, Site] = {}
    for site in sites:
        first.setdefault(site.slot, site)
    return list(first.values())
