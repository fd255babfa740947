"""The library that has AMX's tiles in C++, for processors without them."""

import ctypes
import platform
from functools import cache
from pathlib import Path

from filelock import FileLock

from prefixattn import build, compiler, cpu

# What no library that is installed has: for this machine, which may have none of them.
SETS = tuple(compiler.FOR_TESTS.get(platform.machine(), {}))


@cache
def path() -> Path:
    """Where it is; built now, or what changed of it since."""
    folder = build.PLACES[0]() / "for-tests"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        return compiler.build(folder, sets=("plain", *SETS))


@cache
def library() -> ctypes.CDLL:
    return cpu.load(path())
