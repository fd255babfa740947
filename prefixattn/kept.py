"""What is computed from tensors, kept for as long as they hold the same numbers."""

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


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
    """Keeps a result in inference, where it would be the same in every decoded token.

    With gradients, and while compiling, it is computed each time; gradients let go of what was
    kept, since a step of the optimizer follows.
    """

    def __init__(self) -> None:
        self._seen: list[Seen] | None = None
        self._result: T | None = None

    def of(self, tensors: Sequence[Tensor], make: Callable[[], T]) -> T:
        """The result of ``make``, which depends on ``tensors`` alone."""
        if torch.compiler.is_compiling():
            return make()
        if torch.is_grad_enabled():
            self._seen = self._result = None
            return make()
        if self._result is None or not unchanged(tensors, self._seen):
            with torch.inference_mode(False), torch.no_grad():
                self._seen, self._result = Seen.of(tensors), make()
        return self._result

    def __getstate__(self) -> dict[str, None]:
        """Copies and pickles need not hold what can be computed again."""
        return {"_seen": None, "_result": None}
