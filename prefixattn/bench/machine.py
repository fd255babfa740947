"""What figures were measured on."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from prefixattn import build, cpu

PACKAGES = (
    *("prefixattn", "torch", "triton", "transformers"),
    *("flash-attn", "flashinfer-python", "xformers"),
)
CACHE_IF_UNKNOWN, MEMORY_IF_UNKNOWN = 2**26, 2**33
QUIET = 0.5  # load of a machine with nothing else to do
SAME = ("processor", "threads", "gpu", "torch")  # what makes times comparable
WITHIN = (*SAME, "code")  # what may not differ within one file
SOURCES = ("*.py", "*.h", "*.cpp")


def facts(device: str, command: str) -> dict[str, Any]:
    """The machine, the versions and the commit, as the header of a results file has them.

    Args:
        device: "cpu" or "cuda", which the figures are of.
        command: what repeats them.
    """
    found: dict[str, Any] = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command,
        "device": device,
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "kernels": cpu.instructions() if device == "cpu" and not build.obstacle() else None,
        "load": load(),
        "cache": last_level_cache(device),
        "gpu": None,
        "commit": commit(),
        "code": code(),
        "python": platform.python_version(),
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["capability"] = list(torch.cuda.get_device_capability())
        found["cuda"] = torch.version.cuda or torch.version.hip
    return found | {package: _version(package) for package in PACKAGES}


def load() -> float | None:
    """Processes that ran or waited over the last minute; None where the system does not count."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def free_memory(device: str) -> int:
    """Bytes that are free on the device; a guess on the small side where nothing says so."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return MEMORY_IF_UNKNOWN
    lines = meminfo.read_text().splitlines()
    (available,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return int(available) * 1024


def last_level_cache(device: str) -> int:
    """Bytes of the largest cache; a guess on the large side where the system does not say."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)
    sizes = [_bytes(path.read_text()) for path in _caches()]
    return max(sizes, default=CACHE_IF_UNKNOWN)


def _caches() -> list[Path]:
    return list(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))


def _bytes(text: str) -> int:
    """`32768K` as a number."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    text = text.strip()
    return int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text)


def commit() -> str:
    """The commit of the code that runs, `-dirty` with changes; empty where it is in no repository.

    Changed results and pages are none of the code's. A package that was installed into some other
    project's folder is not of that project's commit.
    """
    package = Path(__file__).resolve().parents[1]
    tracked = _git(package, "ls-files", "--error-unmatch", "__init__.py")
    if not tracked:
        return ""
    kinds = [f":(top)*{kind.removeprefix('*')}" for kind in (*SOURCES, ".toml")]
    changed = _git(package, "status", "--porcelain", "--", *kinds)
    return _git(package, "describe", "--always", "--exclude=*") + ("-dirty" if changed else "")


def code() -> str:
    """A digest of the package's sources: of changes that no commit has, too."""
    package = Path(__file__).resolve().parents[1]
    folders = (package, package / "kernels", package / "csrc")  # links, which `rglob` leaves out
    found = {p for folder in folders for kind in SOURCES for p in folder.rglob(kind)}
    digest = hashlib.sha256()
    for path in sorted(found):
        digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _git(folder: Path, *arguments: str) -> str:
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:  # no git here
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
