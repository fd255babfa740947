"""What ``with source.use(...)`` put in use, for the forwards inside it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(eq=False)
class _Held(Generic[T]):
    item: T
    thread: int


class InUse(Generic[T]):
    """The items of contexts that are open, of one thread at a time; copies begin with none.

    Any thread reads them: text is often streamed out of one that was started inside a context.
    """

    def __init__(self) -> None:
        self._held: list[_Held[T]] = []

    @property
    def innermost(self) -> T | None:
        """The item of the context entered last, if one is open."""
        return self._held[-1].item if self._held else None

    @property
    def items(self) -> list[T]:
        """Of every open context, the innermost last."""
        return [held.item for held in self._held]

    @contextmanager
    def hold(self, item: T, owner: object) -> Iterator[None]:
        """Have ``item`` be the innermost.

        Raises:
            RuntimeError: ``owner``, whose items these are, is in use by another thread, whose
                forwards would read ``item``.
        """
        held = _Held(item, threading.get_ident())
        self._held.append(held)  # before looking: of two threads at once, none may miss the other
        try:
            if any(other.thread != held.thread for other in self._held):
                raise RuntimeError(
                    f"this {type(owner).__name__} is in use by another thread, whose forwards "
                    "would read what this one puts in use: let one wait for the other, or put the "
                    "rows of both in one batch"
                )
            yield
        finally:
            self._held.remove(held)

    def __reduce__(self) -> tuple[Any, ...]:
        return InUse, ()
