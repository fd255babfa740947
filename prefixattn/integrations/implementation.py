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


# By config and name: how many models have set it, the name before, and the config, which keeps its
# id its own. Models that were built from one config object share it.
_users: dict[tuple[int, str], tuple[int, str, Any]] = {}


def set_implementation(name: str, configs: Sequence[Any]) -> Callable[[], None]:
    """Have all ``configs`` name this attention implementation.

    Returns:
        What sets them back, once the last model that shares a configuration asks for it. A
        configuration that was given another name meanwhile keeps that one.
    """
    for config in configs:
        unset = (0, config._attn_implementation_internal, config)
        count, before, _ = _users.get((id(config), name), unset)
        _users[id(config), name] = (count + 1, before, config)
        config._attn_implementation_internal = name

    def restore() -> None:
        for config in configs:
            count, before, _ = _users.pop((id(config), name))
            if count > 1:
                _users[id(config), name] = (count - 1, before, config)
            elif config._attn_implementation_internal == name:
                config._attn_implementation_internal = before

    return restore
