"""The library that has AMX's tiles in C++, for processors without them."""

import ctypes
from functools import cache
from pathlib import Path

from filelock import FileLock

from prefixattn import build, compiler, cpu

SETS = ("amx_emulated",)  # which no library that is installed has


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
