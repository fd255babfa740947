"""A folder of adapters: found by name, known by content, held against the model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from prefixattn.checkpoints import load
from prefixattn.prefix import Prefix
from prefixattn.vllm.claim import Claim

CHUNK = 2**20
Stamp = tuple[tuple[str, int, int, int], ...]
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


class AdapterFolder:
    """Adapters as they lie on disk now: one that is added or replaced is seen at its next use."""

    def __init__(self, path: Path, shape: ModelShape) -> None:
        """Raises NotADirectoryError where there is no such folder."""
        if not path.is_dir():
            raise NotADirectoryError(f"adapters: {path} is not a folder")
        self.path, self.shape = path, shape
        self._seen: dict[str, tuple[Stamp, Claim]] = {}
        self._lock = Lock()

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and _is_plain(name) and (self.path / name).is_dir()

    def __iter__(self) -> Iterator[str]:
        """Their names, in order."""
        return iter(sorted(each.name for each in self.path.iterdir() if each.name in self))

    def claim(self, name: str) -> Claim:
        """The adapter of this name, read and checked once for each content.

        Raises:
            KeyError: there is none.
            OSError, TypeError, ValueError, NotImplementedError: its files are damaged, or another
                model's.
        """
        if name not in self:
            raise KeyError(f"no adapter {name!r} in {self.path}")
        with self._lock:
            before = self._seen.get(name)
            if before is not None and before[0] == _stamp(self.path / name):
                return before[1]
            stamp, claim, _ = self._read(name)
            self._seen[name] = stamp, claim
            return claim

    def pairs(self, claim: Claim) -> Pairs:
        """Keys and values ``[H_kv, P, D]`` of the content that a request was accepted with.

        Raises:
            KeyError: the adapter is gone.
            ValueError: it is damaged, or was replaced by another since.
        """
        if claim.name not in self:
            raise KeyError(f"no adapter {claim.name!r} in {self.path}")
        _, found, pairs = self._read(claim.name)
        if found != claim:
            raise ValueError(f"adapter {claim.name!r} was replaced while a request of it waited")
        return pairs

    def _read(self, name: str) -> tuple[Stamp, Claim, Pairs]:
        folder = self.path / name
        for _ in range(3):  # a writer may be at it
            stamp = _stamp(folder)
            digest = _digest(folder, stamp)
            pairs = plain_pairs(name, load(folder))
            if stamp == _stamp(folder):
                self.shape.check(name, pairs)
                return stamp, Claim(name, digest, pairs[0][0].shape[1]), pairs
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


def _stamp(folder: Path) -> Stamp:
    """What changes when a file does."""
    found = [(file.name, file.stat()) for file in sorted(folder.iterdir()) if file.is_file()]
    return tuple((name, s.st_ino, s.st_size, s.st_mtime_ns) for name, s in found)


def _digest(folder: Path, stamp: Stamp) -> str:
    content = hashlib.sha256()
    for name, *_ in stamp:
        content.update(repr(name).encode())
        with (folder / name).open("rb") as file:
            while chunk := file.read(CHUNK):
                content.update(chunk)
    return content.hexdigest()[:32]
