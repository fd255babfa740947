"""Numbers as callers give them: Python's own, NumPy's scalars, and what compilers follow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NUMPY: tuple[Any, ...] = ()
try:
    import numpy
except ModuleNotFoundError:  # torch works without it
    pass
else:
    NUMPY = (numpy.generic,)


def plain(value: Any) -> Any:
    """The Python number that a scalar of NumPy or of a compiler holds; anything else as it is.

    An integer that a compiler follows (`torch.SymInt`) stays what it is: operators take it.
    """
    if isinstance(value, NUMPY):
        return value.item()
    if isinstance(value, torch.SymFloat):
        return float(value)
    return bool(value) if isinstance(value, torch.SymBool) else value


def integer(value: Any) -> int | None:
    """The integer that `value` is, of whatever library; None where it is none."""
    value = plain(value)
    if isinstance(value, torch.SymInt):
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def real(value: Any) -> float | None:
    """The number that `value` is, of whatever library; None where it is none."""
    value = plain(value)
    if isinstance(value, torch.SymInt):
        return int(value)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def kind(value: object) -> str:
    """The type of what came in the place of a number, and how it becomes one.

    A tensor is not read: that would wait for its device, and a compiler could not follow it.
    """
    name = type(value).__name__
    single = isinstance(value, Tensor) or name == "ndarray"
    return f"{name} (pass the number: .item())" if single else name
