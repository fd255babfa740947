"""Live modules that are given another class, which copies and pickles know how to make again."""

import inspect
from collections.abc import Callable
from functools import partial, wraps
from types import MethodType
from typing import Any

from torch import nn

from prefixattn.integrations.uncompiled import with_code_of_its_own

Members = Callable[[type], dict[str, Any]]


def derive(module: nn.Module, members: Members) -> Callable[[], None]:
    """Give ``module`` a subclass of its class, of the same name, with ``members(class)``.

    Args:
        module: it stays the same object.
        members: a function of a module, which pickles name; it is called with the old class.

    Returns:
        What gives the old class back.

    Raises:
        RuntimeError: the object has a method of its own where the subclass has one.
    """
    old = type(module)
    new = _derived(old, members)
    _check_not_hidden(module, old, new)
    _rebind(module, old, new, _methods(new))
    module.__class__ = new
    return partial(_give_back, module, *_origin(new))  # no pickle finds the new class by its name


def is_hidden(module: nn.Module, members: Members) -> bool:
    """Whether `derive` would refuse: the object has a method of its own in the place of one."""
    old = type(module)
    return _hidden(module, old, _derived(old, members)) is not None


def _give_back(module: nn.Module, root: type, *chain: Members) -> None:
    old, derived = _made(root, *chain[:-1]), _made(root, *chain)
    _rebind(module, derived, old, _methods(derived))
    module.__class__ = _without(type(module), derived, old)


def _without(kind: type, derived: type, old: type) -> Any:
    """``kind`` as if ``derived`` had never been: FSDP makes classes of those that it finds."""
    if kind is derived:
        return old
    if derived not in kind.__mro__:
        return kind
    bases = tuple(_without(base, derived, old) for base in kind.__bases__)
    body = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
    return type(kind)(kind.__name__, bases, body)


def _methods(derived: type) -> list[str]:
    """The methods of the class that a derived one has others for."""
    old = derived.__base__
    return [n for n, held in vars(derived).items() if callable(held) and hasattr(old, n)]


def _rebind(module: nn.Module, old: type, new: type, names: list[str]) -> None:
    """Have bound methods that lie on the object be those of its new class.

    PEFT's ``disable_adapter`` leaves ``forward`` there, accelerate's hooks ``_old_forward``.
    """
    for key, held in list(vars(module).items()):
        for name in names:
            if isinstance(held, MethodType) and held.__func__ is getattr(old, name):
                vars(module)[key] = MethodType(getattr(new, name), module)


def _check_not_hidden(module: nn.Module, old: type, new: type) -> None:
    """Refuse a method that lies on the object and would run in the place of the new class's."""
    if (name := _hidden(module, old, new)) is not None:
        raise RuntimeError(
            f"{old.__name__}.{name} was replaced on the object, and would not bring the "
            "prefix: attach first, or, where accelerate did it for mixed precision, call "
            "accelerator.unwrap_model(model, keep_fp32_wrapper=False) before"
        )


def _hidden(module: nn.Module, old: type, new: type) -> str | None:
    """The first method of the new class that one on the object would run in the place of."""
    for name in _methods(new):
        # With hooks of accelerate, `forward` lies there and calls `_old_forward`.
        held = vars(module).get(f"_old_{name}", vars(module).get(name))
        function = getattr(held, "__func__", held)
        if held is None or function is getattr(old, name):
            continue
        if not _wraps(function, getattr(new, name)):
            return name
    return None


def _wraps(function: Any, wanted: Any) -> bool:
    """Whether ``wanted`` is what ``function`` wraps, if not the function itself."""
    return inspect.unwrap(function, stop=lambda at: at is wanted) is wanted


_classes: dict[tuple[type, Members], type] = {}
_origins: dict[type, tuple[Any, ...]] = {}


def _derived(old: type, members: Members) -> type:
    if (old, members) not in _classes:
        origin = (*_origin(old), members)

        @wraps(old.__init__)  # type: ignore[misc]
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            """A module that is made from the class by itself is none of ours."""
            self.__class__ = origin[0]
            origin[0].__init__(self, *args, **kwargs)

        body = {name: with_code_of_its_own(held) for name, held in members(old).items()} | {
            "__module__": old.__module__,
            "__init__": init,
            "__qualname__": old.__qualname__,  # transformers looks up by it what can be recorded
            "__reduce_ex__": lambda self, protocol: (_empty, origin, self.__getstate__()),
        }
        _classes[old, members] = new = type(old.__name__, (old,), body)
        _origins[new] = origin
    return _classes[old, members]


def _origin(kind: type) -> tuple[Any, ...]:
    """The class that ``kind`` was derived from first, and the members that it was given in turn."""
    return _origins.get(kind, (kind,))


def _made(root: type, *chain: Members) -> type:
    """The class of this origin."""
    for members in chain:
        root = _derived(root, members)
    return root


def _empty(root: type, *chain: Members) -> Any:
    """An object of the derived class, without attributes yet."""
    cls = _made(root, *chain)
    make: Any = cls.__new__
    return make(cls)
