"""A folder of adapters: found by name, known by content, held against the model."""

from __future__ import annotations

import errno
import hashlib
import reprlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR
from threading import Lock

import torch
from torch import Tensor

from prefixattn.checkpoints import load
from prefixattn.prefix import Prefix
from prefixattn.vllm.claim import Claim

CHUNK = 2**20
SETTLED_NS = 2 * 10**9  # the coarsest clock of a file system that is in use
NO_NAME = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
Stamp = tuple[tuple[str, tuple[int, ...]], ...]
Pairs = Sequence[tuple[Tensor, Tensor]]
UNREADABLE = (OSError, TypeError, ValueError, NotImplementedError)  # what reading files raises


@dataclass(frozen=True)
class ModelShape:
    """What a prefix must fit: layers, key/value heads and head dim of the whole model."""

    num_layers: int
    num_heads: int
    head_dim: int

    def check(self, name: str, pairs: Pairs) -> None:
        """Refuse keys and values ``[H_kv, P, D]`` of another model (ValueError)."""
        if len(pairs) != self.num_layers:
            raise ValueError(
                f"adapter {name!r} has a prefix in {len(pairs)} layers, and the model has "
                f"{self.num_layers}; vLLM needs one in each"
            )
        num_tokens = pairs[0][0].shape[1]
        wanted = (self.num_heads, num_tokens, self.head_dim)
        for layer, pair in enumerate(pairs):
            for what, tensor in zip(("keys", "values"), pair, strict=True):
                if tuple(tensor.shape) != wanted:
                    raise ValueError(
                        f"adapter {name!r}, layer {layer}: {what} must be [H_kv, P, D] = {wanted} "
                        f"for this model, got {tuple(tensor.shape)}"
                    )
                if not torch.isfinite(tensor).all():
                    raise ValueError(
                        f"adapter {name!r}, layer {layer}: {what} hold NaN or infinity"
                    )


class FolderUnavailable(OSError):
    """The folder of adapters is not there, or cannot be looked at: none of them can be served."""


@dataclass(frozen=True)
class Seen:
    """What an adapter's files were when they were read last.

    Attributes:
        stamp: of the files.
        claim: of their content.
        settled: whether another content must have another stamp. Files that were written just
            before they were read can change again within one tick of the file system's clock.
    """

    stamp: Stamp
    claim: Claim
    settled: bool


class AdapterFolder:
    """Adapters as they lie on disk now: one that is added or replaced is seen at its next use.

    The folder itself may come later, and go: every method looks anew.
    """

    def __init__(self, path: Path, shape: ModelShape) -> None:
        self.path, self.shape = path, shape
        self._seen: dict[str, Seen] = {}
        self._locks: dict[str, Lock] = {}

    def __contains__(self, name: object) -> bool:
        """Whether there is an adapter of this name (FolderUnavailable: that cannot be said)."""
        if not isinstance(name, str) or not _is_plain(name):
            return False
        try:
            found = _is_folder(self.path / name)
        except OSError as error:
            raise FolderUnavailable(f"adapter {name!r} cannot be looked at: {error}") from error
        if not found:
            self.check()
        return found

    def __iter__(self) -> Iterator[str]:
        """Their names, in order (FolderUnavailable: they cannot be listed)."""
        try:
            names = [each.name for each in self.path.iterdir()]
        except OSError as error:
            raise self._unavailable(error) from error
        return iter(sorted(name for name in names if name in self))

    def check(self) -> None:
        """Raise FolderUnavailable where there is no folder of adapters."""
        try:
            if not S_ISDIR(self.path.stat().st_mode):
                raise NotADirectoryError(errno.ENOTDIR, "it is not a folder")
        except OSError as error:
            raise self._unavailable(error) from error

    def known(self, name: str) -> Claim | None:
        """The claim of an adapter that was read before and is the same; None: it must be read.

        Raises:
            KeyError: there is none.
            OSError: it cannot be looked at.
        """
        self._require(name)
        seen = self._seen.get(name)
        if seen is None or not seen.settled or seen.stamp != _stamp(self.path / name):
            return None
        return seen.claim

    def claim(self, name: str) -> Claim:
        """The adapter of this name, read and checked once for each content.

        Raises:
            KeyError: there is none.
            OSError, TypeError, ValueError, NotImplementedError: its files are damaged, or another
                model's, or the folder is not there.
        """
        self._require(name)
        with self._locks.setdefault(name, Lock()):
            if (claim := self.known(name)) is not None:
                return claim
            self._seen[name] = seen = self._again(name) or self._read(name)[0]
            return seen.claim

    def pairs(self, claim: Claim) -> Pairs:
        """Keys and values ``[H_kv, P, D]`` of the content that a request was accepted with.

        Raises:
            KeyError: the adapter is gone.
            ValueError: it is damaged, or was replaced by another since.
        """
        self._require(claim.name)
        seen, pairs = self._read(claim.name)
        if seen.claim != claim:
            raise ValueError(f"adapter {claim.name!r} was replaced while a request of it waited")
        return pairs

    def _require(self, name: str) -> None:
        if name not in self:
            raise KeyError(
                f"no adapter {reprlib.repr(name)} in {self.path}, where a folder's name is the "
                "adapter's"
            )

    def _unavailable(self, error: OSError) -> FolderUnavailable:
        why = error.strerror or str(error)
        return FolderUnavailable(
            f"the folder of adapters {self.path} cannot be read ({why}): requests with an adapter "
            "are answered once it is there, and requests without one as ever"
        )

    def _again(self, name: str) -> Seen | None:
        """What was seen, where its files have the same content still: they need not be loaded."""
        before = self._seen.get(name)
        now, stamp = time.time_ns(), _stamp(self.path / name)
        if before is None or before.stamp != stamp:
            return None
        if _digest(self.path / name, stamp) != before.claim.digest:
            return None
        return Seen(stamp, before.claim, _settled(stamp, now))

    def _read(self, name: str) -> tuple[Seen, Pairs]:
        folder = self.path / name
        for _ in range(3):  # a writer may be at it
            now, stamp = time.time_ns(), _stamp(folder)
            digest, settled = _digest(folder, stamp), _settled(stamp, now)
            pairs = plain_pairs(name, load(folder))
            if stamp == _stamp(folder) and (settled or digest == _digest(folder, stamp)):
                self.shape.check(name, pairs)
                return Seen(stamp, Claim(name, digest, pairs[0][0].shape[1]), settled), pairs
        raise ValueError(f"adapter {name!r} is being written: write elsewhere, and rename")


def examine(path: Path) -> Iterator[tuple[str, int | Exception]]:
    """Each adapter of a folder with its prefix tokens, or with what is wrong with its files."""
    for folder in sorted(each for each in path.iterdir() if each.is_dir() and _is_plain(each.name)):
        try:
            pairs = plain_pairs(folder.name, load(folder))
        except UNREADABLE as error:
            yield folder.name, error
        else:
            yield folder.name, pairs[0][0].shape[1]


def plain_pairs(name: str, prefix: object) -> Pairs:
    """Keys and values of a prefix that is nothing more (ValueError otherwise)."""
    if not isinstance(prefix, Prefix) or prefix.kind == "gated":
        raise ValueError(
            f"adapter {name!r} must be a prefix of keys and values, got {type(prefix).__name__}, "
            "of which vLLM's cache would lose something"
        )
    if prefix.positions != "shift":
        raise ValueError(
            f"adapter {name!r} is for positions={prefix.positions!r}, and vLLM moves the text "
            "behind it: `prefixattn convert` can move it, where the model allows"
        )
    if len(prefix.layers) != prefix.num_layers:
        raise ValueError(f"adapter {name!r} has a prefix in layers {prefix.layers} alone")
    with torch.no_grad():
        return [(key.detach(), value.detach()) for key, value in prefix()]


def _is_plain(name: str) -> bool:
    """Whether it names something in a folder, and not a way out of it."""
    return bool(name) and Path(name).name == name and not name.startswith(".") and "\0" not in name


def _is_folder(path: Path) -> bool:
    """Whether there is such a folder (OSError: that cannot be said)."""
    try:
        return S_ISDIR(path.stat().st_mode)
    except OSError as error:
        if error.errno in NO_NAME:
            return False
        raise
    except ValueError:  # no file system has such a name
        return False


def _stamp(folder: Path) -> Stamp:
    """What changes when a file does; a copy can keep a file's other times, and not its ctime."""
    found = [(file.name, file.stat()) for file in sorted(folder.iterdir()) if file.is_file()]
    return tuple(
        (name, (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)) for name, s in found
    )


def _settled(stamp: Stamp, now: int) -> bool:
    """Whether the files were last changed long enough before ``now`` (nanoseconds)."""
    return all(times[-1] < now - SETTLED_NS for _, times in stamp)


def _digest(folder: Path, stamp: Stamp) -> str:
    content = hashlib.sha256()
    for name, *_ in stamp:
        content.update(repr(name).encode())
        with (folder / name).open("rb") as file:
            while chunk := file.read(CHUNK):
                content.update(chunk)
    return content.hexdigest()[:32]
