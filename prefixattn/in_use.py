"""What ``with source.use(...)`` put in use, for the forwards inside it."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from weakref import WeakSet

import torch

from prefixattn.kept import await_cache, begin_text, current_cache, current_text

T = TypeVar("T")


@dataclass(eq=False)
class _Held(Generic[T]):
    """An item, who holds it, and the texts that began under it.

    Those are told by the thread that runs them, and by the cache that they are in.
    """

    item: T
    holder: object
    texts: dict[int, int] = field(default_factory=dict)
    caches: "WeakSet[Any]" = field(default_factory=WeakSet)

    def reads(self, goes_on: bool, cache: object) -> bool:
        """Whether this thread's text, or that in ``cache`` where it goes on, began here."""
        if goes_on and cache is not None:
            return cache in self.caches
        return self.texts.get(threading.get_ident()) == current_text()

    def note(self, cache: object) -> None:
        """This thread's text reads the item."""
        self.texts[threading.get_ident()] = current_text()
        if cache is None:
            await_cache(self.caches)
        else:
            self.caches.add(cache)


class InUse(Generic[T]):
    """The items of contexts that are open, of one thread or task at a time; copies begin with none.

    Any thread reads them: text is often streamed out of one that was started inside a context.

    Args:
        owner: what is in use, by its name in messages.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self._held: list[_Held[T]] = []

    @property
    def innermost(self) -> T | None:
        """The item of the context entered last, if one is open."""
        return self._held[-1].item if self._held else None

    @property
    def items(self) -> list[T]:
        """Of every open context, the innermost last."""
        return [held.item for held in self._held]

    def read(self) -> T | None:
        """The innermost item, for a forward; a compiler does not see whose it is.

        Raises:
            RuntimeError: a text that goes on began with another item, whose context is open.
        """
        if not self._held or torch.compiler.is_compiling():
            return self.innermost
        held, (cache, goes_on) = self._held[-1], current_cache()
        for other in self._held[:-1]:
            if other.reads(goes_on, cache):
                raise self._mixed("a text that is decoded now began under another `use`")
            if cache is not None:
                other.caches.discard(cache)  # which begins another text
        held.note(cache)
        return held.item

    @contextmanager
    def hold(self, item: T) -> Iterator[None]:
        """Have ``item`` be the innermost; this thread begins a text.

        Raises:
            RuntimeError: the owner is in use by another thread or task, whose forwards would read
                ``item``; or this context ended before one that was entered within it.
        """
        held = _Held(item, (threading.get_ident(), _task()))
        self._held.append(held)  # before looking: of two threads at once, none may miss the other
        try:
            if any(other.holder != held.holder for other in self._held):
                raise self._mixed("it is in use by another thread or task")
            begin_text()
            yield
            if self._held[-1] is not held:
                raise self._mixed("a `use` that was entered later is open still")
        finally:
            self._held.remove(held)

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
