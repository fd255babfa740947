"""What a provider is, and how it says that it cannot take a shape."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

from torch import Tensor

from prefixattn.bench.inputs import Tensors
from prefixattn.bench.shapes import Shape

Attention = Callable[[], Tensor]
Provider = Callable[[Shape, Tensors, str], Attention]


class Unsupported(Exception):
    """A provider cannot take a shape here; the message says why."""


def need(package: str) -> None:
    """Raise `Unsupported` where a package is not installed."""
    if find_spec(package) is None:
        raise Unsupported(f"{package} is not installed")


def need_gpu(t: Tensors, package: str) -> None:
    """Raise `Unsupported` where a package is not installed, or the tensors are on no GPU."""
    need(package)
    if t.query.device.type != "cuda":
        raise Unsupported(f"{package} takes tensors on a GPU only")


def no_softcap(shape: Shape, what: str) -> None:
    """Raise `Unsupported` for a shape with a softcap."""
    if shape.softcap is not None:
        raise Unsupported(f"{what} has no softcap")
