"""What is computed from tensors, kept from one decoded token to the next."""

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_texts = itertools.count(1)


class _Now(threading.local):
    """What this thread's forwards are about."""

    text = 0  # a number of its own for each text that was begun
    continues = False


_now = _Now()


def begin_text() -> None:
    """Trust nothing that was kept until now: optimizers may have run, which no tensor counts."""
    _now.text = next(_texts)


@contextmanager
def forward(continues: bool) -> Iterator[None]:
    """Within, a forward gathers its prefixes; ``continues`` one that follows on cached text."""
    if not continues:
        begin_text()
    _now.continues = continues
    try:
        yield
    finally:
        _now.continues = False


def current_text() -> int:
    """The number of the text that this thread's forwards continue."""
    return _now.text


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


class Kept(Generic[T]):
    """Keeps a result while a text is decoded, where it would be the same in every token.

    Anywhere else it is computed each time: fused optimizers and ``.data`` change numbers that no
    tensor counts, but not in the middle of a text.
    """

    def __init__(self) -> None:
        self._seen: list[Seen] | None = None
        self._result: T | None = None
        self._text = 0

    def of(self, tensors: Sequence[Tensor], make: Callable[[], T]) -> T:
        """The result of ``make``, which depends on ``tensors`` alone."""
        if torch.compiler.is_compiling():
            return make()
        if torch.is_grad_enabled() or not _now.continues:
            self._seen = self._result = None
            return make()
        if self._text != _now.text or not unchanged(tensors, self._seen):
            with torch.inference_mode(False), torch.no_grad():
                self._seen, self._result, self._text = Seen.of(tensors), make(), _now.text
        assert self._result is not None
        return self._result

    def __getstate__(self) -> dict[str, object]:
        """Copies and pickles need not hold what can be computed again."""
        return {"_seen": None, "_result": None, "_text": 0}
