"""Compile what a launch would run, for any GPU and without one.

The real launch code runs on CPU tensors under a driver that names the GPU and launches nothing:
Triton specialises, compiles and caches as it would there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm86": GPUTarget("cuda", 86, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


def compiled(
    target: str, functions: Sequence[Any], launch: Callable[[], object]
) -> list[list[Any]]:
    """Run launch code for a target: the kernels it compiled of each JIT function, in its order.

    Args:
        target: a name of `TARGETS`.
        functions: `@triton.jit` functions that the code launches.
        launch: runs on CPU tensors; what the kernels would write is left as it is.

    Raises:
        RuntimeError: `TRITON_INTERPRET` is set, under which Triton compiles nothing.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: Triton interprets and compiles nothing")
    with _driven_by(_Driver(target)):
        for function in functions:
            function.device_caches.pop(target, None)
        launch()
        caches = [function.device_caches.pop(target, [{}])[0] for function in functions]
    return [list(cache.values()) for cache in caches]


class _Driver:
    """A driver of no device. Triton caches by device, which here bears the name of the target."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.utils = _Utils()

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]

    def get_current_device(self) -> str:
        return self.target

    def get_current_stream(self, device: str) -> int:
        return 0

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        return lambda *arguments: None


class _Utils:
    """Takes any binary: whether it fits the chip is for the report to say."""

    def get_device_properties(self, device: str) -> dict[str, int]:
        return {"max_shared_mem": 2**30}

    def load_binary(self, *arguments: object) -> tuple[None, None, int, int, int]:
        """Module, function, registers, spills, most threads; without a module none is unloaded."""
        return None, None, 0, 0, 1024


@contextmanager
def _driven_by(stub: _Driver) -> Iterator[None]:
    before = driver._active  # `driver.active` would look for a GPU
    driver.set_active(stub)
    try:
        yield
    finally:
        driver.set_active(before)
