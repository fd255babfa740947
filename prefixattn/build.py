"""Where the library of C++ kernels is: shipped in a wheel, cached, or else built into the cache.

A compiler is never required: `obstacle` says why there is no library, and callers do without.
`python -m prefixattn.build` prints the library's path.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import stat
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import cache
from pathlib import Path

from prefixattn.compiler import (
    LONGEST,
    NAME,
    BuildError,
    Compiler,
    NoCompilerError,
    build,
    find_compiler,
    ingredients,
)

SHIPPED = Path(__file__).resolve().parent / "lib" / NAME
FORMAT = 1  # of the cache; another number leaves alone what was cached before
SECONDS = 40  # of one core, for the whole build
UNUSED = 30 * 24 * 3600  # seconds after which a cached library goes


def library() -> Path:
    """The path of a library that can be loaded; built now, in a visible line, if there is none.

    Raises:
        BuildError: there is none: no compiler, or it failed, or no folder can be written.
    """
    found = _found()
    if isinstance(found, BuildError):
        raise found
    return found


@cache
def obstacle() -> str | None:
    """Why there is no library; None if there is one, which may be built now.

    The answer holds for the whole process. What somebody could repair is a warning too; a machine
    without a compiler is none.
    """
    found = _found()
    if not isinstance(found, BuildError):
        return None
    if not isinstance(found, NoCompilerError):
        warnings.warn(f"prefixattn runs without its C++ kernels: {found}", stacklevel=2)
    return str(found)


def state() -> str:
    """In words, and without building: where the library is, what would build it, or why nothing."""
    try:
        if _found.cache_info().currsize:
            return f"built: {library()}"
        if SHIPPED.exists():
            return f"built: {SHIPPED}"
        compiler = find_compiler()
        cached = _cached(_key(compiler))
    except (BuildError, OSError) as error:
        return str(error)
    return f"built: {cached}" if cached else f"{compiler.version} would build it at first use"


@cache
def _found() -> Path | BuildError:
    """The library, or why there is none: tried once in a process."""
    try:
        path = SHIPPED if SHIPPED.exists() else _cached_or_built()
    except BuildError as error:
        return error
    except OSError as error:  # the sources cannot be read
        return BuildError(str(error))
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        return BuildError(f"the library cannot be loaded: {error}")
    return path


def _cached_or_built() -> Path:
    compiler = find_compiler()
    key = _key(compiler)
    if cached := _cached(key):
        return cached
    reasons: list[str] = []
    for place in PLACES:
        try:
            folder = place()
            folder.mkdir(parents=True, exist_ok=True)
            if os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0):
                raise OSError(f"libraries cannot be loaded from {folder}: it is mounted noexec")
            if reasons:
                _say(f"the cache cannot be used ({reasons[0]}); taking {folder}")
            return _build_cached(folder, key, compiler)
        except (OSError, NotImplementedError) as error:  # the latter: a folder without locks
            reasons.append(str(error))
    raise BuildError(f"no folder to keep the built library in: {'; '.join(reasons)}")


def _user_cache() -> Path:
    """The user's cache folder, by freedesktop.org's rules."""
    configured = os.environ.get("XDG_CACHE_HOME", "")
    try:
        root = Path(configured) if os.path.isabs(configured) else Path.home() / ".cache"
    except RuntimeError as error:
        raise OSError(str(error)) from None
    return root / "prefixattn"


def _temporary_cache() -> Path:
    """A folder of temporary files that nobody else can write to: what lies there is loaded."""
    folder = Path(tempfile.gettempdir()).absolute() / f"prefixattn-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise OSError(f"{folder} is not a folder that this user alone can open")
    return folder


PLACES: tuple[Callable[[], Path], ...] = (_user_cache, _temporary_cache)


def _key(compiler: Compiler) -> str:
    """The name of a library's folder in the cache."""
    return f"cpu-{_digest(repr([FORMAT, *ingredients(compiler)]).encode())[:16]}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _cached(key: str) -> Path | None:
    """The undamaged library of this key, in whichever place it lies."""
    for place in PLACES:
        with suppress(OSError):  # such a place has none
            if path := _undamaged(place() / key):
                return path
    return None


def _undamaged(folder: Path) -> Path | None:
    """The library in `folder` if there is one and it is what was built."""
    path = folder / NAME
    try:
        said = (folder / f"{NAME}.sha256").read_bytes()  # a damaged one may be no text
        if _digest(path.read_bytes()).encode() != said:
            return None
    except OSError:
        return None
    with suppress(OSError):  # it counts as used now, unless the folder is read-only
        os.utime(folder)
    return path


def _build_cached(place: Path, key: str, compiler: Compiler) -> Path:
    """Build into `place / key`: whole or not at all, and once, however many processes try."""
    with _locked(place):
        if path := _undamaged(place / key):
            return path
        _tidy(place, key)
        with tempfile.TemporaryDirectory(dir=place, prefix=".cpu-") as temporary:
            built, ready = _build_visibly(Path(temporary), compiler), Path(temporary) / key
            ready.mkdir()
            (ready / f"{NAME}.sha256").write_text(_digest(built.read_bytes()))
            os.replace(built, ready / NAME)
            os.replace(ready, place / key)
    return place / key / NAME


def _build_visibly(folder: Path, compiler: Compiler) -> Path:
    seconds = max(10, SECONDS // (os.cpu_count() or 1))
    line = f"prefixattn: building its C++ kernels with {compiler.version} (once, ~{seconds} s) ..."
    print(line, end=" ", file=sys.stderr, flush=True)
    start, end = time.monotonic(), "failed"
    try:
        path = build(folder, compiler)
        end = f"done in {time.monotonic() - start:.0f} s"
    finally:
        print(end, file=sys.stderr, flush=True)
    return path


def _locked(place: Path) -> AbstractContextManager[object]:
    """The sole right to change what is in `place`; the system takes it back from a dead process."""
    from filelock import FileLock, Timeout

    lock = FileLock(place / "cpu.lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        _say("waiting for another process that builds the C++ kernels")
        return lock.acquire(timeout=LONGEST)


def _tidy(place: Path, key: str) -> None:
    """Remove what interrupted builds left, a damaged library, and libraries long out of use.

    Each is renamed first: the compilers of a killed process live on, and write into its folder.
    """
    oldest = time.time() - UNUSED
    libraries = place.glob("cpu-*")
    unused = [each for each in libraries if each.name == key or each.stat().st_mtime < oldest]
    leftovers = [*place.glob(".cpu-*"), *unused]
    with tempfile.TemporaryDirectory(dir=place, prefix=".cpu-", ignore_cleanup_errors=True) as out:
        for folder in leftovers:
            with suppress(OSError):  # what cannot be removed harms nobody
                os.replace(folder, Path(out) / folder.name)


def _say(text: str) -> None:
    print(f"prefixattn: {text}", file=sys.stderr, flush=True)


def main() -> None:
    """Print the path of the library, or build another elsewhere."""
    parser = argparse.ArgumentParser(prog="python -m prefixattn.build", description=main.__doc__)
    parser.add_argument("--into", type=Path, metavar="FOLDER", help="build there, past the cache")
    folder = parser.parse_args().into
    try:
        print(build(folder) if folder else library())
    except BuildError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
