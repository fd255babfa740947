"""Setting a model's attention implementation, and setting it back."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel


def own_configs(model: nn.Module) -> list[Any]:
    """The distinct configurations of ``model``, its sub-models and its modules."""
    found = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = config
    if isinstance(model, PreTrainedModel):
        found.setdefault(id(model.config), model.config)
    return list(found.values())


def set_implementation(name: str, configs: Sequence[Any]) -> Callable[[], None]:
    """Have all ``configs`` name this attention implementation.

    Returns:
        What sets them back. A configuration that was given another name meanwhile keeps that one.
    """
    before = [config._attn_implementation_internal for config in configs]
    for config in configs:
        config._attn_implementation_internal = name

    def restore() -> None:
        for config, old in zip(configs, before, strict=True):
            if config._attn_implementation_internal == name:
                config._attn_implementation_internal = old

    return restore
