"""Having one model name an attention implementation, and nobody else who has its configuration.

A model that was built from the same configuration object, or from one that was taken from the model
and copied, pickled or saved, names what it would without us. So the name does not stand in the
configuration: the modules of the model see theirs through a `View`, which names ours.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from prefixattn.integrations.adapters import CONFIG
from prefixattn.integrations.derived import derive

INTERNAL = "_attn_implementation_internal"
"""The attribute of a configuration that holds the name."""

NAMING = "prefixattn_naming"
"""The attribute of a `View` that holds its `Naming`."""

BY_LAYER = "per_layer_config"
"""The property of a configuration that gives one for each layer."""

HELD = {"config": "prefixattn_naming_of_config", CONFIG: "prefixattn_naming_of_our_config"}
"""The attributes of a module that hold a configuration, and where its `Naming` lies meanwhile."""


class Naming:
    """What the modules of one model see in the place of one configuration.

    Args:
        config: the configuration, which others may have too.
        name: the attention implementation that it names here; None: the same as everywhere.
        inner: the same for its sub-configurations, by attribute.
        compact: whether all modules that get a mask from this configuration have a place of their
            own among the carrier's, so that a mask need not say what places do.
    """

    def __init__(
        self, config: Any, name: str | None, inner: dict[str, "Naming"], compact: bool
    ) -> None:
        self.config = _plain(config)
        self.name = name
        self.inner = inner
        self.compact = compact
        self.given = name
        self.view: Any = _view(self)

    def of(self, config: Any) -> "Naming":
        """The same for another configuration."""
        inner = {
            key: naming.of(getattr(config, key))
            for key, naming in self.inner.items()
            if isinstance(getattr(config, key, None), PreTrainedConfig)
        }
        return Naming(config, self.given, inner, self.compact)

    def read(self, view: "View") -> Any:
        """What ``view`` names: where it is no longer that of the model, what the others name."""
        if self.view is view and self.name is not None:
            return self.name
        return vars(self.config).get(INTERNAL)

    def write(self, view: "View", name: str | None) -> None:
        """Have ``view`` name something.

        A model that is built from a configuration begins by naming again what it found there: the
        view is that model's from then on, and the attached model has a new one.
        """
        if self.view is not view:
            vars(self.config)[INTERNAL] = name
        elif name == self.read(view):
            self.view = _view(self)
        elif self.name is None:
            vars(self.config)[INTERNAL] = name
        else:
            self.name = name
            if name != self.given:
                vars(self.config)[INTERNAL] = name

    def close(self) -> None:
        """The model sees its configuration itself again, and so do all that were given a view."""
        self.view = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A view is made anew: what is copied or pickled of one by itself is the configuration."""
        state = {"name": self.name}
        return Naming, (self.config, self.given, self.inner, self.compact), state


class View:
    """A configuration that names another attention implementation, and is the same in all else.

    Both have one ``__dict__``. Copies, pickles and files of a view are of the configuration.
    """

    __slots__ = (NAMING,)
    of: Any

    def __init_subclass__(cls) -> None:
        """Not what transformers does with a new kind of configuration."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """One that is made from a view's class has nothing to do with the view."""
        return cls.of(*args, **kwargs)

    def __copy__(self) -> Any:
        return copy.copy(getattr(self, NAMING).config)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(getattr(self, NAMING).config, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Later protocols want an object of the class that they are asked for.
        return getattr(self, NAMING).config.__reduce_ex__(1)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PreTrainedConfig) and vars(self) == vars(other)


class ByLayer(Sequence[Any]):
    """The configurations of single layers, which name what that of the whole model names.

    transformers makes one by a copy of the whole configuration, whenever a model asks for it.
    """

    def __init__(self, naming: Naming, each: Sequence[Any]) -> None:
        self.naming = naming
        self.each = each

    def __len__(self) -> int:
        return len(self.each)

    def __getitem__(self, layer: Any) -> Any:
        found = self.each[layer]
        return [self._seen(c) for c in found] if isinstance(layer, slice) else self._seen(found)

    def _seen(self, config: Any) -> Any:
        if self.naming.view is None:  # the model is detached
            return config
        if config is self.naming.config:  # all layers have the same
            return self.naming.view
        own = self.naming.of(config)
        own.name = self.naming.name
        return own.view


def _plain(config: Any) -> Any:
    """The configuration itself: a model that was built from a view goes on having that."""
    return getattr(config, NAMING).config if isinstance(config, View) else config


class _Kind(type):
    """The class of a view's class, which passes for that of the configuration among keys."""

    of: Any

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.of

    def __hash__(cls) -> int:
        return hash(cls.of)


_kinds: dict[tuple[type, tuple[str, ...]], Any] = {}


def _view(naming: Naming) -> Any:
    old = type(naming.config)
    key = (old, tuple(naming.inner))
    if key not in _kinds:
        body = {
            "__slots__": (),
            "__module__": old.__module__,
            "__qualname__": old.__qualname__,
            "__hash__": old.__hash__,
            "of": old,
            INTERNAL: property(_read, _write),
        }
        body |= {name: property(partial(_inner, name), partial(_set, name)) for name in key[1]}
        if isinstance(by_layer := getattr(old, BY_LAYER, None), property):
            body[BY_LAYER] = property(_by_layer, by_layer.fset)
        _kinds[key] = _Kind(old.__name__, (View, old), body)
    view = object.__new__(_kinds[key])
    object.__setattr__(view, NAMING, naming)
    object.__setattr__(view, "__dict__", vars(naming.config))
    return view


def _read(view: Any) -> Any:
    return getattr(view, NAMING).read(view)


def _write(view: Any, name: str | None) -> None:
    getattr(view, NAMING).write(view, name)


def _inner(name: str, view: Any) -> Any:
    naming = getattr(view, NAMING)
    own = vars(view)[name]
    inner = naming.inner[name]
    return inner.view if naming.view is view and inner.config is own else own


def _by_layer(view: Any) -> Any:
    naming = getattr(view, NAMING)
    each = getattr(naming.config, BY_LAYER)
    return each if naming.view is not view else ByLayer(naming, each)


def _set(name: str, view: Any, value: Any) -> None:
    vars(view)[name] = value


def own_configs(model: nn.Module) -> list[Any]:
    """The distinct configurations of ``model``, its sub-models and its modules."""
    found = {}
    for module in model.modules():
        for attribute in HELD:
            config = vars(module).get(attribute)
            if hasattr(config, INTERNAL):
                found[id(config)] = config
    return list(found.values())


def set_implementation(
    name: str, model: nn.Module, configs: Sequence[Any], scope: Iterable[nn.Module] | None = None
) -> tuple[list[Naming], Callable[[], None]]:
    """Have modules of ``model`` find this attention implementation in all ``configs``.

    Args:
        name: of the implementation.
        model: whose modules are meant.
        configs: those that name it there; others who have them see no change.
        scope: the modules; default all. Those around them are told of it, too.

    Returns:
        One `Naming` for each of ``configs``, and what takes everything back. A configuration that
        was given another name by the model meanwhile keeps that one.
    """
    namings: dict[int, Naming | None] = {}
    inside = set(model.modules() if scope is None else scope)
    changed = []
    for module in list(model.modules()):
        if module not in inside and inside.isdisjoint(module.modules()):
            continue
        held = {}
        for attribute in HELD:
            config = vars(module).get(attribute)
            naming = _naming(config, name, {id(c) for c in configs}, namings)
            if naming is not None:
                held[attribute] = naming
        if held:
            changed.append((module, _hold(module, held)))
    found = [_naming(c, name, {id(c)}, namings) for c in configs]
    return [naming for naming in found if naming is not None], partial(_take_back, changed)


def _naming(
    config: Any, name: str, named: set[int], known: dict[int, Naming | None]
) -> Naming | None:
    """That of a configuration which is named, or has one inside it; None for any other."""
    if not hasattr(config, INTERNAL):
        return None
    if id(config) not in known:
        known[id(config)] = None  # for one that holds itself
        inner = {
            key: naming
            for key, value in vars(config).items()
            if isinstance(value, PreTrainedConfig)
            and (naming := _naming(value, name, named, known)) is not None
        }
        if id(config) in named or inner:
            own = name if id(config) in named else None
            known[id(config)] = Naming(config, own, inner, compact=True)
    return known[id(config)]


def _hold(module: nn.Module, held: dict[str, Naming]) -> list[Callable[[], None]]:
    undo = []
    for attribute, naming in held.items():
        undo.append(derive(module, MEMBERS[attribute]))
        vars(module)[HELD[attribute]] = naming
        del vars(module)[attribute]
    return undo


def _take_back(changed: list[tuple[nn.Module, list[Callable[[], None]]]]) -> None:
    for module, undo in reversed(changed):
        for attribute, place in HELD.items():
            naming = vars(module).pop(place, None)
            if naming is not None:
                vars(module)[attribute] = naming.config
                naming.close()
        for give_class_back in reversed(undo):
            give_class_back()


def _sees_config(old: type) -> dict[str, Any]:
    return {"config": _through(HELD["config"])}


def _sees_our_config(old: type) -> dict[str, Any]:
    return {CONFIG: _through(HELD[CONFIG])}


MEMBERS = {"config": _sees_config, CONFIG: _sees_our_config}


def _through(place: str) -> property:
    def get(module: Any) -> Any:
        naming = getattr(module, place)
        # A copy that shares its original's modules is not told that they were detached.
        return naming.config if naming.view is None else naming.view

    def put(module: Any, config: Any) -> None:
        naming = getattr(module, place)
        if config is not naming.view:
            setattr(module, place, naming.of(config))

    return property(get, put)
