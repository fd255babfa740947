"""Taking back, step by step, what was done to a model."""

from collections.abc import Callable
from typing import Any, Protocol, Self


class Undoing(Protocol):
    """What learns how to take steps back: an `Undo`, or an ``ExitStack`` for a moment."""

    def callback(self, step: Callable[..., object], /, *args: Any) -> object:
        """Call ``step(*args)`` when it is time."""


class Undo:
    """Steps to take back, the last one first.

    A model keeps those of its prefix: a copy, or one that was unpickled, takes back its own. So
    steps are functions that pickles can name, methods and partials of them.
    """

    def __init__(self) -> None:
        self._steps: list[tuple[Callable[..., object], tuple[Any, ...]]] = []

    def callback(self, step: Callable[..., object], *args: Any) -> None:
        """Call ``step(*args)`` when it is time."""
        self._steps.append((step, args))

    def close(self) -> None:
        """Take every step back. A second call does nothing."""
        while self._steps:
            step, args = self._steps.pop()
            try:
                step(*args)
            except BaseException:
                self.close()
                raise

    def __bool__(self) -> bool:
        return bool(self._steps)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        """Close where something went wrong."""
        if kind is not None:
            self.close()
