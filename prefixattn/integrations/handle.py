"""Attaching a prefix to a model, and taking it off again."""

import warnings
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from prefixattn.integrations.boarding import Boarding, Source
from prefixattn.integrations.carrier import SLOT, Layout, Options
from prefixattn.integrations.implementation import set_implementation
from prefixattn.integrations.survey import (
    Site,
    check_model,
    input_embeddings,
    own_sites,
    refusal,
    survey,
)
from prefixattn.integrations.transformers import NAME, register
from prefixattn.layers import LayerShape
from prefixattn.prefix import Prefix

SUBMODULE = "prefixattn"


class Handle:
    """A prefix attached to a model. ``detach()`` leaves the model as it was.

    Attributes:
        model: the model.
        prefix: the module that gives the keys and values.
    """

    def __init__(self, model: nn.Module, prefix: nn.Module, undo: ExitStack) -> None:
        self.model = model
        self.prefix = prefix
        self._undo = undo

    def detach(self) -> None:
        """Take the prefix off the model. A second call does nothing."""
        self._undo.close()


class Submodule:
    """The source that is the model's own submodule, whichever it is by then."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self) -> list[tuple[Tensor, Tensor]]:
        prefix: Prefix = self.model.get_submodule(SUBMODULE)  # type: ignore[assignment]
        return prefix()


def attach_prefix(model: nn.Module, prefix: nn.Module | None, options: Options) -> Handle:
    """See `prefixattn.attach`."""
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        from prefixattn.integrations.peft import attach_peft, is_prompt_learning

        if is_prompt_learning(model):
            if prefix is not None:
                raise ValueError("prefix must be None for a PeftModel that brings its own")
            return attach_peft(model, options)
    if not isinstance(prefix, Prefix):
        raise TypeError(f"prefix must be a prefixattn.Prefix, got a {type(prefix).__name__}")
    target = check_model(model)
    if hasattr(target, SUBMODULE):
        raise ValueError(f"{type(target).__name__} already has a submodule named {SUBMODULE!r}")
    sites = survey(target)
    check_shapes(prefix.layer_shapes, sites)
    with ExitStack() as undo:
        prefix.to(sites[0].key.device)
        target.add_module(SUBMODULE, prefix)
        undo.callback(delattr, target, SUBMODULE)
        install(target, sites, Submodule(target), options, undo)
        if target is not model:
            warnings.warn(
                f"the files of this {type(model).__name__} do not hold the prefix: save and load "
                "it by Prefix.save_pretrained and from_pretrained",
                stacklevel=3,
            )
        warn_of_dead_tokens(prefix.num_tokens, sites, options, stacklevel=4)
        return Handle(model, prefix, undo.pop_all())


def install(
    model: PreTrainedModel, sites: list[Site], source: Source, options: Options, undo: ExitStack
) -> None:
    """Hook ``model`` up to ``source``; ``undo`` learns how to take every step back."""
    backbone = _backbone(model, sites)
    own = own_sites(sites)
    layout = Layout(
        cache_layers=tuple(_cache_layer(site) for site in own),
        windows=tuple(site.window for site in own),
    )
    causal = all(getattr(site.module, "is_causal", True) for site in sites)
    boarding = Boarding(source, layout, causal, options, backbone)
    if options.positions == "shift" and "position_ids" not in boarding.names:
        raise refusal(model, f"{type(backbone).__name__}.forward takes no position_ids to shift")
    register()
    configs = {id(m.config): m.config for m in (backbone, *(site.module for site in sites))}
    undo.callback(set_implementation(NAME, list(configs.values())))
    for site in sites:
        setattr(site.module, SLOT, site.slot)
        undo.callback(delattr, site.module, SLOT)
    hook = backbone.register_forward_pre_hook(boarding, with_kwargs=True)
    undo.callback(hook.remove)
    embeddings = input_embeddings(backbone)
    if embeddings is not None:
        undo.callback(embeddings.register_forward_hook(boarding.embedding_hook).remove)


def warn_of_dead_tokens(
    num_tokens: int, sites: list[Site], options: Options, stacklevel: int
) -> None:
    """Say where no query of any text reaches the first prefix tokens."""
    windows = [site.window for site in sites if site.window is not None]
    if options.prefix_in_window != "positions" or not windows:
        return
    dead = num_tokens - min(windows) + 1
    if dead > 0:
        warnings.warn(
            f"{dead} of {num_tokens} prefix tokens are out of every query's reach in "
            f"{len(windows)} of {len(sites)} layers, whose window is {min(windows)}; "
            'prefix_in_window="visible" shows them',
            stacklevel=stacklevel,
        )


def check_shapes(shapes: list[LayerShape], sites: list[Site]) -> None:
    """Hold a prefix's layers against those of the model."""
    own = own_sites(sites)
    if len(shapes) != len(own):
        raise ValueError(f"prefix must have {len(own)} layers like the model, got {len(shapes)}")
    for shape, site in zip(shapes, own, strict=True):
        wanted = LayerShape(site.key.shape[1], site.key.shape[3], site.value.shape[3])
        if shape != wanted:
            raise ValueError(
                f"prefix layer {site.slot} must be {wanted} for {site.name}, got {shape}"
            )


def _cache_layer(site: Site) -> int:
    index: Any = getattr(site.module, "layer_idx", None)
    return site.slot if index is None else int(index)


def _backbone(model: PreTrainedModel, sites: list[Site]) -> PreTrainedModel:
    """The innermost model that owns all target modules."""
    targets = {site.module for site in sites}
    innermost = model
    for module in model.modules():  # parents come before their children
        if isinstance(module, PreTrainedModel) and targets <= set(module.modules()):
            innermost = module
    return innermost
