"""Finished work on disk: a folder is there whole, with a manifest that proves it, or not at all."""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def default_folder() -> Path:
    """`prefixattn/demo` in the user's cache folder: `$XDG_CACHE_HOME`, else `~/.cache`."""
    configured = os.environ.get("XDG_CACHE_HOME")
    root = Path(configured) if configured else Path.home() / ".cache"
    return root / "prefixattn" / "demo"


def cached(
    root: Path,
    name: str,
    key: Mapping[str, Any],
    build: Callable[[Path], None],
    say: Callable[[str], None],
) -> Path:
    """The folder `root/name-<digest of key>`, made by `build` where it is not there whole.

    Args:
        root: the cache's folder; made where missing.
        name: what is kept, for the folder's name.
        key: everything that determines the content, as JSON.
        build: fills the empty folder it is given. If it raises, or is interrupted, nothing stays.
        say: told, in one line each, what is reused and what is rebuilt and why.
    """
    folder = root / f"{name}-{_digest(json.dumps(key, sort_keys=True).encode())[:16]}"
    if folder.exists():
        damage = damage_of(folder)
        if damage is None:
            say(f"{name}: taken from {folder}")
            return folder
        say(f"{name}: {folder} is damaged ({damage}); building it again")
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=f".{name}-") as temporary:
        work = Path(temporary) / name
        work.mkdir()
        build(work)
        digests = {file.name: _digest(file.read_bytes()) for file in sorted(work.iterdir())}
        content = json.dumps({"key": dict(key), "sha256": digests}, indent=2, sort_keys=True)
        (work / MANIFEST).write_text(content + "\n", encoding="utf-8")
        replace_folder(work, folder)
    return folder


def damage_of(folder: Path) -> str | None:
    """What is wrong with a folder that `cached` made, in words; None where nothing is."""
    try:
        digests = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["sha256"]
        for name, digest in digests.items():
            if _digest((folder / name).read_bytes()) != digest:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    return None


def replace_folder(finished: Path, target: Path) -> None:
    """Move the folder `finished` to `target` on the same disk, in place of what is there."""
    if target.exists():
        aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
        os.replace(target, aside / target.name)
        os.replace(finished, target)
        shutil.rmtree(aside)
    else:
        os.replace(finished, target)


def recipe(sources: Sequence[Path], **content: Any) -> dict[str, Any]:
    """A cache key: `content`, the code in `sources`, and the Python and libraries that run."""
    import torch

    libraries = {name: version(name) for name in ("torch", "transformers", "tokenizers")}
    return {
        **content,
        "source": _digest(b"".join(file.read_bytes() for file in sources)),
        "python": sys.version,
        "libraries": libraries,
        "threads": torch.get_num_threads(),
    }


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
