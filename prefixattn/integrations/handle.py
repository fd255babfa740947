"""Attaching a prefix to a model, and taking it off again."""

import copy
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from prefixattn.encoder_decoder import EncoderDecoderPrefix
from prefixattn.integrations.adapters import adapt
from prefixattn.integrations.boarding import BATCHING_WORDS, Boarding, Group, Source
from prefixattn.integrations.carrier import CAUSAL, SLOT, Options, Slot
from prefixattn.integrations.direct import board_directly, note_directly
from prefixattn.integrations.implementation import INTERNAL, Naming, set_implementation
from prefixattn.integrations.outline import Hooks
from prefixattn.integrations.refusal import refusal
from prefixattn.integrations.relay import relay
from prefixattn.integrations.survey import (
    Site,
    check_model,
    check_not_nested,
    check_part,
    own_sites,
    survey,
)
from prefixattn.integrations.tensor_parallel import OwnHeads
from prefixattn.integrations.text_side import has_encoder
from prefixattn.integrations.transformers import NAME, register
from prefixattn.integrations.uncompiled import (
    compiled_alone,
    unwrapped,
    with_code_of_its_own,
)
from prefixattn.integrations.undo import Undo
from prefixattn.layers import LayerShape, Positions, PrefixBatch, PrefixSource

SUBMODULE = "prefixattn"
BATCHING = {"generate_batch", "init_continuous_batching"}
"""The ways into transformers' continuous batching."""

UNDO = "prefixattn_undo"
"""The attribute of an attached transformers model that knows how to detach it."""


class Handle:
    """A prefix attached to a model. ``detach()`` leaves the model as it was.

    Attributes:
        model: the model.
        prefix: the module that gives the keys and values.
    """

    def __init__(self, model: nn.Module, prefix: nn.Module, undo: Undo) -> None:
        self.model = model
        self.prefix = prefix
        self._undo = undo

    def detach(self) -> None:
        """Take the prefix off the model. A second call does nothing."""
        self._undo.close()

    def __repr__(self) -> str:
        kinds = f"{type(self.model).__name__}, {type(self.prefix).__name__}"
        return f"Handle({kinds}{'' if self._undo else ', detached'})"


def detach_prefix(model: nn.Module) -> None:
    """See `prefixattn.detach`."""
    found = [undo for m in model.modules() if (undo := getattr(m, UNDO, None)) is not None]
    if not found:
        raise ValueError(f"{type(model).__name__} has no prefix attached")
    for undo in found:
        undo.close()


def without_prefix(model: Any) -> Any:
    """``model``, or a copy of it on the same weights that has no prefix, where it has one."""
    if not isinstance(model, nn.Module) or not any(hasattr(m, UNDO) for m in model.modules()):
        return model
    weights = {id(x): x for x in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, weights)
    detach_prefix(copied)
    return copied


class Submodule:
    """The source that is the model's own submodule, whichever it is by then.

    Args:
        model: the model that owns it.
        name: its path from there.
        sites: that it is for.
        part: theirs.
    """

    def __init__(self, model: nn.Module, name: str, sites: list[Site], part: str) -> None:
        self.model = model
        self.name = name
        self.sites = sites
        self.part = part
        prefix: Any = model.get_submodule(name)
        self.positions: Positions = getattr(prefix, "positions", "shift")
        self._seen = prefix

    def __call__(self) -> PrefixBatch:
        prefix: Any = self.model.get_submodule(self.name)
        if prefix is not self._seen:
            self._check(prefix)
            if not torch.compiler.is_compiling():
                self._seen = prefix
        batch: PrefixBatch = prefix.batch()
        return batch

    def _check(self, prefix: Any) -> None:
        """Hold what was put in the prefix's place to the rules of `attach`."""
        path = f"{type(self.model).__name__}.{self.name}"
        if not isinstance(prefix, PrefixSource):
            raise TypeError(f"{path} must be a prefixattn.Prefix, got a {type(prefix).__name__}")
        check_shapes(prefix, self.sites, self.part)
        if (positions := getattr(prefix, "positions", "shift")) != self.positions:
            raise ValueError(
                f"{path} was attached for positions={self.positions!r}, and is now a prefix for "
                f"{positions!r}: attach that one anew"
            )

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Of the submodule."""
        return list(self.model.get_submodule(self.name).parameters())

    @property
    def num_tokens(self) -> int:
        """``P`` of the submodule."""
        prefix: Any = self.model.get_submodule(self.name)
        return int(prefix.num_tokens)


def attach_prefix(model: nn.Module, prefix: nn.Module | None, options: Options) -> Handle:
    """See `prefixattn.attach`."""
    model = unwrapped(model)
    check_not_nested(model)
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        from prefixattn.integrations.peft import attach_peft, is_prompt_learning

        if is_prompt_learning(model):
            if prefix is not None:
                brought: Any = model.active_peft_config
                raise ValueError(
                    "prefix must be None for a PeftModel that brings virtual tokens of its own "
                    f"({brought.peft_type.value}): attach it to the base model, "
                    "get_base_model(), beside those"
                )
            return attach_peft(model, options)
    if not isinstance(prefix, PrefixSource | EncoderDecoderPrefix):
        none = "none, and the model brings no prefix tuning adapter of PEFT's"
        raise TypeError(
            "prefix must be a prefixattn.Prefix, got "
            f"{none if prefix is None else f'a {type(prefix).__name__}'}"
        )
    target = check_model(model)
    if hasattr(target, SUBMODULE):
        raise ValueError(f"{type(target).__name__} already has a submodule named {SUBMODULE!r}")
    sites = survey(target)
    parts = _parts(target, prefix)
    for part, own in parts.items():
        check_part(target, sites, part)
        check_shapes(own, own_sites(sites, part), part)
    with Undo() as undo:
        prefix.to(sites[0].key.device)
        target.add_module(SUBMODULE, prefix)
        undo.callback(_remove, target, SUBMODULE)
        whole = parts.get("self") is prefix or parts.get("decoder") is prefix
        sources = {
            part: Submodule(
                target, SUBMODULE if whole else f"{SUBMODULE}.{part}", own_sites(sites, part), part
            )
            for part in parts
        }
        install(target, sites, sources, options, undo)
        if target is not model:
            from prefixattn.integrations.beside import keep_beside

            if not keep_beside(model, prefix, undo):
                warnings.warn(
                    f"the files of this {type(model).__name__} do not hold the prefix: save and "
                    f"load it by {type(prefix).__name__}.save_pretrained and from_pretrained",
                    stacklevel=3,
                )
        for part, own in parts.items():
            warn_of_dead_tokens(own.num_tokens, own_sites(sites, part), options, stacklevel=4)
        return Handle(model, prefix, undo)


def _remove(model: nn.Module, name: str) -> None:
    """Delete a submodule, which its owner may have done."""
    if hasattr(model, name):
        delattr(model, name)


def _parts(
    model: PreTrainedModel, prefix: PrefixSource | EncoderDecoderPrefix
) -> dict[str, PrefixSource]:
    """Which layers of ``model`` get which prefix."""
    if not isinstance(prefix, EncoderDecoderPrefix):
        return {"decoder" if has_encoder(model) else "self": prefix}
    if not has_encoder(model):
        raise ValueError(
            f"{type(model).__name__} is no encoder-decoder: it takes a prefixattn.Prefix, got an "
            "EncoderDecoderPrefix"
        )
    return dict(prefix.parts)


def install(
    model: PreTrainedModel,
    sites: list[Site],
    sources: Mapping[str, Source],
    options: Options,
    undo: Undo,
) -> None:
    """Hook ``model`` up to ``sources``, by part; ``undo`` learns how to take every step back."""
    register()
    setattr(model, UNDO, undo)
    undo.callback(delattr, model, UNDO)
    for name in BATCHING & set(dir(model)):
        setattr(model, name, partial(_refuse_batching, type(model).__name__))
        undo.callback(delattr, model, name)
    adapt(model, undo)
    stacks: dict[PreTrainedModel, list[str]] = {}
    for part in sources:
        members = [site for site in sites if site.part == part]
        stacks.setdefault(stack_of(model, members), []).append(part)
    for site in sites:
        setattr(site.module, CAUSAL, site.causal)
        undo.callback(delattr, site.module, CAUSAL)
    namings = _name(model, stacks, sites, undo)
    for stack, parts in stacks.items():
        own = {part: [s for s in sites if s.part == part] for part in parts}
        boarding = _install_stack(model, stack, own, sources, options, namings, undo)
        inside = set(stack.modules())
        attentions = [site.module for site in sites if site.module in inside]
        boarding.hooks = Hooks(boarding, model, stack, attentions)
        undo.callback(boarding.hooks.remove)


def _name(
    model: PreTrainedModel,
    stacks: Mapping[PreTrainedModel, list[str]],
    sites: list[Site],
    undo: Undo,
) -> list[Naming]:
    """Have the modules of all stacks, and the models around them, find our attention function.

    An encoder-decoder makes its decoder's masks for a static cache by a configuration of its own.
    """
    inside = {module for stack in stacks for module in stack.modules()}
    parts = [part for own in stacks.values() for part in own]
    owners = [*stacks, model] if "decoder" in parts else list(stacks)
    configs: dict[int, Any] = {id(owner.config): owner.config for owner in owners}
    for site in sites:
        config = getattr(site.module, "config", None)
        if site.part in parts and hasattr(config, INTERNAL):
            configs[id(config)] = config
    namings, take_back = set_implementation(NAME, model, list(configs.values()), inside)
    undo.callback(take_back)
    # Modules without a place of their own need masks that say all.
    compact = all(s.part in ("cross", *parts) for s in sites if s.module in inside)
    for naming in namings:
        naming.compact = compact
    return namings


def _refuse_batching(model: str, *args: Any, **kwargs: Any) -> None:
    raise NotImplementedError(
        f"{model} has a prefix attached, which transformers' continuous batching (generate_batch) "
        f"would lose: {BATCHING_WORDS}"
    )


def _install_stack(
    model: PreTrainedModel,
    stack: PreTrainedModel,
    sites: Mapping[str, list[Site]],
    sources: Mapping[str, Source],
    options: Options,
    namings: list[Naming],
    undo: Undo,
) -> Boarding:
    """Hook up the parts that one stack runs: itself, or a decoder's own and cross attention."""
    every = [site for members in sites.values() for site in members]
    groups, first = [], 0
    for part, members in sites.items():
        own = own_sites(members, part)
        source = sources[part]
        if any(site.group is not None for site in own):
            source = OwnHeads(source, [site.group for site in own])
        groups.append(Group(source, [_slot(s) for s in own], _owners(own, stack)))
        for site in members:
            setattr(site.module, SLOT, first + site.slot)
            undo.callback(delattr, site.module, SLOT)
        first += len(own)
    boarding = Boarding(groups, options, stack, namings)
    if options.positions == "shift" and not boarding.places.movable and "cross" not in sites:
        why = f"{type(stack).__name__}.forward takes no position_ids to shift"
        if boarding.places.restarts:
            why = 'its recurrence begins anew at position 0: positions="keep" can'
        raise refusal(stack, why)
    if stack is not model:
        note = with_code_of_its_own(boarding.note_caller)
        forget = with_code_of_its_own(boarding.forget_caller)
        outer = model.register_forward_pre_hook(note, with_kwargs=True, prepend=True)
        undo.callback(outer.remove)
        undo.callback(model.register_forward_hook(forget, always_call=True).remove)
        note_directly(model, boarding, undo)
    undo.callback(boarding.close)
    board_directly(stack, boarding, undo)
    board, leave = with_code_of_its_own(boarding.__call__), with_code_of_its_own(boarding.leave)
    undo.callback(stack.register_forward_pre_hook(board, with_kwargs=True).remove)
    undo.callback(stack.register_forward_hook(leave, always_call=True).remove)
    _install_relays(model, every, boarding, undo)
    return boarding


def _install_relays(
    model: PreTrainedModel, sites: list[Site], boarding: Boarding, undo: Undo
) -> None:
    deaf: dict[nn.Module, list[Site]] = {}
    for site in sites:
        if not site.carries and site.layer is not None:
            deaf.setdefault(site.layer, []).append(site)
    for layer, members in deaf.items():
        sender = None if members[0].informed else boarding
        modules = [site.module for site in members]
        if compiled_alone(model, layer if sender else None, modules):
            raise refusal(
                model,
                f"{members[0].name} has its prefix from outside of what torch.compile was given, "
                "which cannot see it: call compile() of the layers, or compile the whole model",
            )
        relay(layer, modules, sender, undo)


def _slot(site: Site) -> Slot:
    index: Any = getattr(site.module, "layer_idx", None)
    layer = site.slot if index is None else int(index)
    return Slot(layer, site.causal, site.window, site.chunk, crosses=site.part == "cross")


def _owners(sites: list[Site], stack: nn.Module) -> list[Any]:
    """Per site the module whose relative bias it adds: its own, or the stack's first one's."""
    biased = [m for m in stack.modules() if hasattr(m, "relative_attention_bias")]
    if not biased or sites[0].part == "cross":
        return [None] * len(sites)
    return [site.module if site.module in biased else biased[0] for site in sites]


def warn_of_dead_tokens(
    num_tokens: int, sites: list[Site], options: Options, stacklevel: int
) -> None:
    """Say where no query of any text reaches the first prefix tokens."""
    if options.prefix_in_window != "positions":
        return
    layers: dict[tuple[int, str], list[str]] = {}
    for site in sites:
        dead, why = _dead_tokens(num_tokens, site)
        if dead > 0:
            layers.setdefault((dead, why), []).append(site.name)
    found = [
        f"{dead} of {num_tokens} in {len(names)} of {len(sites)} layers ({', '.join(names[:3])}"
        f"{', …' if len(names) > 3 else ''}), whose {why}"
        for (dead, why), names in layers.items()
    ]
    if found:
        warnings.warn(
            f"the first prefix tokens are out of every query's reach: {'; '.join(found)}; "
            'prefix_in_window="visible" shows them',
            stacklevel=stacklevel,
        )


def _dead_tokens(num_tokens: int, site: Site) -> tuple[int, str]:
    """How many tokens the first query of a text does not reach in a layer, and for what."""
    if site.chunk is not None:
        return num_tokens // site.chunk * site.chunk, f"chunks are of {site.chunk}"
    if site.window is not None:
        return num_tokens - site.window + site.causal, f"window is {site.window}"
    return 0, ""


def check_shapes(prefix: Any, sites: list[Site], part: str = "self") -> None:
    """Hold a prefix's layers against those of the model.

    Args:
        prefix: has ``layer_shapes``, and ``num_heads`` per layer if it has gates.
    """
    shapes: list[LayerShape | None] = prefix.layer_shapes
    where = "" if part == "self" else f" ({part})"
    if len(shapes) != len(sites):
        raise ValueError(
            f"prefix{where} must have {len(sites)} layers like the model, got {len(shapes)}"
        )
    for shape, site in zip(shapes, sites, strict=True):
        if shape is not None and shape != site.layer_shape:
            raise ValueError(
                f"prefix{where} layer {site.slot} must be {site.layer_shape} for {site.name}, got "
                f"{shape}"
            )
    gates: list[int | None] = getattr(prefix, "num_heads", [])
    for heads, site in zip(gates, sites, strict=False):
        if heads is not None and heads != site.num_heads:
            raise ValueError(
                f"prefix{where} layer {site.slot} must have a gate for each of the "
                f"{site.num_heads} query heads of {site.name}, got {heads}"
            )


def stack_of(model: PreTrainedModel, sites: list[Site]) -> PreTrainedModel:
    """The innermost model that owns all of these modules."""
    targets = {site.module for site in sites}
    innermost = model
    for module in model.modules():  # parents come before their children
        if isinstance(module, PreTrainedModel) and targets <= set(module.modules()):
            innermost = module
    return innermost
