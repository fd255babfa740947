"""What is computed from tensors, kept from one decoded token to the next."""

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn

T = TypeVar("T")

_texts = itertools.count(1)


class _Now(threading.local):
    """What this thread's forwards are about."""

    def __init__(self) -> None:
        self.text = next(_texts)  # a number of its own for each text that was begun
        self.continues = False
        self.cache: object = None
        self.awaited: list[WeakSet[Any]] = []


_now = _Now()


def begin_text() -> None:
    """Trust nothing that was kept until now: optimizers may have run, which no tensor counts."""
    _now.text = next(_texts)


@contextmanager
def forward(continues: bool, cache: object = None) -> Iterator[None]:
    """Within, a forward gathers its prefixes.

    Args:
        continues: whether it follows on cached text.
        cache: where that text is, or will be.
    """
    if not continues:
        begin_text()
    _now.continues, _now.cache, _now.awaited = continues, cache, []
    try:
        yield
    finally:
        _now.continues, _now.cache = False, None


def current_text() -> int:
    """The number of the text that this thread's forwards continue."""
    return _now.text


def current_cache() -> tuple[object, bool]:
    """Where the text of this thread's forward is kept, if it is, and whether it goes on."""
    return _now.cache, _now.continues


def await_cache(found: "WeakSet[Any]") -> None:
    """Have the cache that this thread's forward makes for its text be put into ``found``."""
    _now.awaited.append(found)


def made_cache(cache: Any) -> None:
    """This thread's forward made ``cache``."""
    for found in _now.awaited:
        found.add(cache)
    _now.awaited = []


class Seen(NamedTuple):
    """What tells whether a tensor holds the same numbers as before, as autograd counts changes.

    A view is known by its base, since views are made anew. Changes through ``.data`` are not
    counted, here as in autograd.
    """

    tensor: Tensor
    version: int
    place: int
    shape: torch.Size

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "list[Seen] | None":
        """One for each of ``tensors``. None: one of them does not count its changes."""
        if any(tensor.is_inference() for tensor in tensors):
            return None
        return [
            cls(
                tensor if tensor._base is None else tensor._base,
                tensor._version,
                tensor.data_ptr(),
                tensor.shape,
            )
            for tensor in tensors
        ]


def unchanged(tensors: Sequence[Tensor], before: list[Seen] | None) -> bool:
    """Whether ``tensors`` are those seen ``before``, with the same numbers.

    Each decoded token asks this of every layer: it makes no objects.
    """
    if before is None or len(tensors) != len(before):
        return False
    for tensor, (owner, version, place, shape) in zip(tensors, before, strict=True):
        if tensor is not owner and tensor._base is not owner:
            return False
        if tensor._version != version or tensor.data_ptr() != place or tensor.shape != shape:
            return False
    return True


def stores(module: nn.Module) -> list[dict[str, Any]]:
    """What a module and those inside it have their parameters and buffers in.

    Each decoded token asks for this: ``parameters()`` takes several times as long.
    """
    found: list[dict[str, Any]] = [module._parameters, module._buffers]
    for inner in module._modules.values():
        if inner is not None:
            found += stores(inner)
    return found


class _Known(NamedTuple, Generic[T]):
    """A result, and what it was computed from."""

    text: int
    options: object
    seen: list[Seen] | None
    result: T


class Kept(Generic[T]):
    """Keeps a result while a text is decoded, where it would be the same in every token.

    Anywhere else it is computed each time: fused optimizers and ``.data`` change numbers that no
    tensor counts, but not in the middle of a text. Threads may share one: each finds what it kept
    itself, or computes it again.
    """

    def __init__(self) -> None:
        self._known: _Known[T] | None = None  # replaced whole: other threads read it meanwhile

    def of(self, tensors: Sequence[Tensor], make: Callable[[], T], options: object = None) -> T:
        """The result of ``make``, which depends on ``tensors`` and ``options`` alone."""
        if torch.compiler.is_compiling():
            return make()
        if torch.is_grad_enabled() or not _now.continues:
            self._known = None
            return make()
        known, at = self._known, (_now.text, options)
        if known is None or at != known[:2] or not unchanged(tensors, known.seen):
            with torch.inference_mode(False), torch.no_grad():
                known = _Known(*at, Seen.of(tensors), make())
            self._known = known
        return known.result

    def __getstate__(self) -> dict[str, object]:
        """Copies and pickles need not hold what can be computed again."""
        return {"_known": None}
