"""Setting a model's attention implementation, and setting it back."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple
from weakref import ref

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


class _Use(NamedTuple):
    """How many models have set a name, the one before, and what forgets both with the config."""

    models: int
    before: str
    config: ref[Any]


# By config and name. Models that were built from one config object share it.
_uses: dict[tuple[int, str], _Use] = {}


def set_implementation(name: str, configs: Sequence[Any]) -> Callable[[], None]:
    """Have all ``configs`` name this attention implementation.

    Returns:
        What sets them back, once the last model that shares a configuration asks for it. A
        configuration that was given another name meanwhile keeps that one.
    """
    befores = [config._attn_implementation_internal for config in configs]
    for config, own in zip(configs, befores, strict=True):
        key = (id(config), name)
        use = _uses.get(key) or _Use(0, own, ref(config, partial(_forget, key)))
        _uses[key] = use._replace(models=use.models + 1)
        config._attn_implementation_internal = name
    return partial(_restore, name, list(configs), befores)


def _restore(name: str, configs: Sequence[Any], befores: Sequence[str]) -> None:
    for config, own in zip(configs, befores, strict=True):
        # A copy of a configuration has one user, its copied model, which nobody counted.
        key = (id(config), name)
        use = _uses.pop(key, None)
        if use is not None and use.models > 1:
            _uses[key] = use._replace(models=use.models - 1)
        elif config._attn_implementation_internal == name:
            config._attn_implementation_internal = own if use is None else use.before


def _forget(key: tuple[int, str], config: ref[Any]) -> None:
    _uses.pop(key, None)
