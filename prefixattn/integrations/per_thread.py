"""What belongs to one forward, where several threads may run one model."""

import threading
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class PerThread(Generic[T]):
    """A value of its own in each thread, None at first; copies and pickles begin anew.

    A compiler cannot read what belongs to a thread: what it traces is shared.
    """

    def __init__(self) -> None:
        self._own = threading.local()
        self._traced: T | None = None

    def get(self) -> T | None:
        """This thread's value."""
        if torch.compiler.is_compiling():
            return self._traced
        return getattr(self._own, "value", None)

    def set(self, value: T | None) -> None:
        """Replace this thread's value."""
        if torch.compiler.is_compiling():
            self._traced = value
        else:
            self._own.value = value

    def __reduce__(self) -> tuple[Any, ...]:
        return PerThread, ()
