"""Live modules that are given another class, which copies and pickles know how to make again."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

Members = Callable[[type], dict[str, Any]]


def derive(module: nn.Module, members: Members) -> Callable[[], None]:
    """Give ``module`` a subclass of its class, of the same name, with ``members(class)``.

    Args:
        module: it stays the same object.
        members: a function of a module, which pickles name; it is called with the old class.

    Returns:
        What gives the old class back.
    """
    old = type(module)
    module.__class__ = _derived(old, members)
    return partial(_give_back, module, old)


def _give_back(module: nn.Module, old: type) -> None:
    module.__class__ = old


_classes: dict[tuple[type, Members], type] = {}


def _derived(old: type, members: Members) -> type:
    if (old, members) not in _classes:
        body = members(old) | {
            "__module__": old.__module__,
            "__reduce_ex__": lambda self, protocol: (_empty, (old, members), self.__getstate__()),
        }
        _classes[old, members] = type(old.__name__, (old,), body)
    return _classes[old, members]


def _empty(old: type, members: Members) -> Any:
    """An object of the derived class, without attributes yet."""
    cls = _derived(old, members)
    make: Any = cls.__new__
    return make(cls)
