"""What ``with source.use(...)`` put in use, for the forwards inside it."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from prefixattn.kept import current_text

T = TypeVar("T")


@dataclass(eq=False)
class _Held(Generic[T]):
    item: T
    holder: object


class _Read(NamedTuple, Generic[T]):
    """What a thread's last forward read, for which text."""

    held: _Held[T]
    text: int


class InUse(Generic[T]):
    """The items of contexts that are open, of one thread or task at a time; copies begin with none.

    Any thread reads them: text is often streamed out of one that was started inside a context.

    Args:
        owner: what is in use, by its name in messages.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self._held: list[_Held[T]] = []
        self._reads: dict[int, _Read[T]] = {}

    @property
    def innermost(self) -> T | None:
        """The item of the context entered last, if one is open."""
        return self._held[-1].item if self._held else None

    @property
    def items(self) -> list[T]:
        """Of every open context, the innermost last."""
        return [held.item for held in self._held]

    def read(self) -> T | None:
        """The innermost item, for a forward.

        Raises:
            RuntimeError: the text that this thread decodes began with another, which is open still.
        """
        if not self._held:
            return None
        held, text, thread = self._held[-1], current_text(), threading.get_ident()
        last = self._reads.get(thread)
        if last is not None and last.text == text and last.held is not held:
            raise self._mixed("what this thread decodes began with what an outer `use` gave")
        self._reads[thread] = _Read(held, text)
        return held.item

    @contextmanager
    def hold(self, item: T) -> Iterator[None]:
        """Have ``item`` be the innermost.

        Raises:
            RuntimeError: the owner is in use by another thread or task, whose forwards would read
                ``item``; or this context ended before one that was entered within it.
        """
        held = _Held(item, (threading.get_ident(), _task()))
        self._held.append(held)  # before looking: of two threads at once, none may miss the other
        try:
            if any(other.holder != held.holder for other in self._held):
                raise self._mixed("it is in use by another thread or task")
            yield
            if self._held[-1] is not held:
                raise self._mixed("a `use` that was entered later is open still")
        finally:
            self._held.remove(held)
            self._reads = {t: read for t, read in self._reads.items() if read.held is not held}

    def _mixed(self, why: str) -> RuntimeError:
        return RuntimeError(
            f"this {self.owner} cannot tell apart whose forwards read what: {why}. Let one wait "
            "for the other, or put the rows of both in one batch"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return InUse, (self.owner,)


def _task() -> object:
    """The asyncio task that runs in this thread, if one does."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None
