"""Setting a model's attention implementation, and setting it back."""

from collections.abc import Callable, Sequence
from functools import partial
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


# By config and name: how many models have set it, the name before, and the config, which keeps its
# id its own. Models that were built from one config object share it.
_users: dict[tuple[int, str], tuple[int, str, Any]] = {}


def set_implementation(name: str, configs: Sequence[Any]) -> Callable[[], None]:
    """Have all ``configs`` name this attention implementation.

    Returns:
        What sets them back, once the last model that shares a configuration asks for it. A
        configuration that was given another name meanwhile keeps that one.
    """
    befores = [config._attn_implementation_internal for config in configs]
    for config, own in zip(configs, befores, strict=True):
        count, before, _ = _users.get((id(config), name), (0, own, config))
        _users[id(config), name] = (count + 1, before, config)
        config._attn_implementation_internal = name
    return partial(_restore, name, list(configs), befores)


def _restore(name: str, configs: Sequence[Any], befores: Sequence[str]) -> None:
    for config, own in zip(configs, befores, strict=True):
        # A copy of a configuration has one user, its copied model, which nobody counted.
        count, before, _ = _users.pop((id(config), name), (1, own, config))
        if count > 1:
            _users[id(config), name] = (count - 1, before, config)
        elif config._attn_implementation_internal == name:
            config._attn_implementation_internal = before
