"""From the C++ sources to a shared library: the compiler, the flags, and ninja that runs both.

Nothing of torch or Python is compiled in, so that one library serves every version of either.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

SOURCES = Path(__file__).resolve().parent / "csrc"
PER_SET = "kernels.cpp"  # compiled for each instruction set, every other file once
NAME = "libprefixattn.so"
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread"),
    # Forward and backward must compute the same score, so products and sums are fused where
    # simd.h says so and nowhere else.
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (
    *(*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    "-mprefer-vector-width=512",
)
AVX512BF16 = (*AVX512, "-mavx512bf16")
# The instruction sets of a machine and their flags; every machine has "plain".
SETS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "avx2": AVX2,
        "avx512": AVX512,
        "avx512bf16": AVX512BF16,
        "amx": (*AVX512BF16, "-mamx-tile", "-mamx-bf16"),
    },
    # NEON is in "plain" already; here it is with products of bfloat16.
    "aarch64": {"neon_bf16": ("-march=armv8.2-a+bf16",)},
}
# Sets for tests, which are built when they are named: AMX's tiles in C++, for other processors.
FOR_TESTS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {"amx_emulated": (*AVX512BF16, "-DPREFIXATTN_EMULATED_TILES")},
}
COMPILERS = ("c++", "g++", "clang++")
POSIX = ("getuid", "statvfs")  # functions of `os` that the cache needs, and that Windows lacks
LONGEST = 1800  # seconds until a build counts as hung: a machine may be busy with other work


class BuildError(RuntimeError):
    """There is no library of C++ kernels, and none can be built; the message says why."""


class NoCompilerError(BuildError):
    """No C++ compiler is installed, or none could build the kernels for this system."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: how it is called, what it calls itself, and the machine it compiles for."""

    command: tuple[str, ...]
    version: str
    machine: str

    def flags(self) -> dict[str, tuple[str, ...]]:
        """The flags of each instruction set that its machine may have."""
        return {"plain": (), **SETS.get(self.machine, {})}

    def all_flags(self) -> dict[str, tuple[str, ...]]:
        """The same, and those of the sets for tests."""
        return {**self.flags(), **FOR_TESTS.get(self.machine, {})}


def find_compiler() -> Compiler:
    """The compiler that CXX names, else the first of `COMPILERS` on the PATH.

    Raises:
        NoCompilerError: none of `COMPILERS` is there, or this is no POSIX system.
        BuildError: CXX names none, or the compiler does not even say its version.
    """
    # The sources need pthreads and dlfcn.h, too. A compiler for Windows would fail after a while.
    if missing := [f"os.{name}" for name in POSIX if not hasattr(os, name)]:
        raise NoCompilerError(
            "the C++ kernels need a POSIX system such as Linux, macOS or Windows' WSL, and Python "
            f"has no {' and no '.join(missing)} on {platform.system() or sys.platform}"
        )
    named = os.environ.get("CXX", "").split()
    found = [path for name in named[:1] or COMPILERS if (path := shutil.which(name))]
    if not found and named:
        raise BuildError(f"CXX={' '.join(named)}: no such compiler")
    if not found:
        raise NoCompilerError(f"no C++ compiler: looked for {', '.join(COMPILERS)} on the PATH")
    command = (os.path.abspath(found[0]), *named[1:])
    version = _run([*command, "--version"], limit=60).partition("\n")[0].strip()
    machine = _run([*command, "-dumpmachine"], limit=60).strip().partition("-")[0]
    return Compiler(command, version, machine)


def ingredients(compiler: Compiler) -> list[object]:
    """Everything that determines the library, for a digest of it.

    Raises:
        BuildError: there are no sources.
    """
    sources = sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")])
    if not sources:
        raise BuildError(f"no C++ sources in {SOURCES}")
    contents = [(source.name, source.read_bytes()) for source in sources]
    return [compiler, platform.libc_ver(), FLAGS, compiler.flags(), contents]


def build(
    folder: Path,
    compiler: Compiler | None = None,
    sets: Iterable[str] | None = None,
    extra: Sequence[str] = (),
) -> Path:
    """Build the library in `folder` and return its path. What is up to date there is kept.

    Args:
        folder: made where missing.
        compiler: `find_compiler()` unless given.
        sets: names of instruction sets; all that the compiler's machine may have unless given.
            Other sources than kernels.cpp see a macro PREFIXATTN_HAS_<SET> for each.
        extra: more flags, for compiling and linking.

    Raises:
        BuildError: no compiler, or it failed; the message ends with its last words.
        OSError: `folder` cannot be written.
    """
    compiler = compiler or find_compiler()
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(_recipe(compiler, sets, extra), encoding="utf-8")
    # clang fails where TMPDIR is unusable, and the library needs room in `folder` anyway.
    _run([_ninja(), "-C", str(folder)], LONGEST, {**os.environ, "TMPDIR": str(folder)})
    return folder / NAME


def _accepts(compiler: Compiler, flags: Sequence[str]) -> bool:
    command = [*compiler.command, *flags, "-E", "-x", "c++", os.devnull]
    return not flags or subprocess.run(command, capture_output=True, check=False).returncode == 0


def _recipe(compiler: Compiler, sets: Iterable[str] | None, extra: Sequence[str]) -> str:
    """The text of build.ninja."""
    flags = compiler.all_flags()
    if sets is None:  # a compiler may be older than an instruction set
        sets = [name for name, own in compiler.flags().items() if _accepts(compiler, own)]
    chosen = list(sets)
    if unknown := set(chosen) - set(flags):
        raise BuildError(
            f"sets: expected some of {', '.join(flags)} for {compiler.machine},"
            f" got {', '.join(sorted(unknown))}"
        )
    call = shlex.join([*compiler.command, *FLAGS, *extra]).replace("$", "$$")
    lines = [
        "rule compile",
        f"  command = {call} -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "rule link",
        f"  command = {call} -shared $in -o $out -ldl",
    ]
    # The flags of each object, by source and set.
    objects: dict[tuple[str, str], Sequence[str]] = {}
    for name in chosen:
        objects[PER_SET, name] = (f"-DPREFIXATTN_ISA={name}", *flags[name])
    for source in sorted(SOURCES.glob("*.cpp")):
        if source.name != PER_SET:
            objects[source.name, "o"] = [f"-DPREFIXATTN_HAS_{name.upper()}" for name in chosen]
    for (source_name, name), own in objects.items():
        path = str(SOURCES / source_name)
        for special in "$ :":
            path = path.replace(special, f"${special}")
        lines += [f"build {source_name}.{name}: compile {path}", f"  flags = {' '.join(own)}"]
    lines.append(f"build {NAME}: link {' '.join('.'.join(each) for each in objects)}")
    return "\n".join(lines) + "\n"


def _ninja() -> str:
    """The program of the package ninja, else the one on the PATH."""
    try:
        from ninja import BIN_DIR as folder
    except ModuleNotFoundError:
        folder = ""
    path = shutil.which("ninja", path=folder) or shutil.which("ninja")
    if path is None:
        raise BuildError("no program ninja: pip install ninja")
    return path


def _run(command: list[str], limit: int, env: Mapping[str, str] | None = None) -> str:
    """What a command prints; `BuildError` with its last lines where it fails or hangs."""
    words = shlex.join(command)
    process = None
    try:
        with _interrupts_later():  # else one within Popen would leave a process that nobody ends
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=env,
                text=True,
                errors="replace",
            )
        printed, _ = process.communicate(timeout=limit)
    except OSError as error:
        raise BuildError(f"{words}: {error}") from None
    except subprocess.TimeoutExpired:
        raise BuildError(f"{words}: not done after {limit} s") from None
    finally:
        if process is not None:
            process.terminate()  # does nothing after its end; else ninja ends its compilers
            with process:  # closes its pipe, and waits for it
                pass
    if process.returncode:
        last = "\n".join(printed.strip().splitlines()[-20:])
        raise BuildError(f"{words} failed (exit status {process.returncode}):\n{last}")
    return printed


@contextmanager
def _interrupts_later() -> Iterator[None]:
    """Have a KeyboardInterrupt of the main thread wait until the end; other threads get none."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    interrupts: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda *interrupt: interrupts.append(interrupt))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupts:
        before(*interrupts[0])
