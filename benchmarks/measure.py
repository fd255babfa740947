"""How things are timed here, and what a result says of where it was measured."""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import torch

WARM_UP = 1
FEWEST = 9


class Times(NamedTuple):
    """Milliseconds of one call: the median, and the 20th and 80th percentile."""

    median: float
    low: float
    high: float


def interleaved(
    runs: Mapping[str, Callable[[], object]], rounds: int, seconds: float = 4.0
) -> dict[str, Times]:
    """Time each run in turn, round after round: a noisy moment hits all of them alike.

    Args:
        runs: what to call, by name.
        rounds: rounds that count, after `WARM_UP` that do not.
        seconds: after so long no further round begins, once there were `FEWEST`.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    for number in range(WARM_UP + rounds):
        if number >= WARM_UP + FEWEST and time.perf_counter() > end:
            break
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    found = {}
    for name, all_of_them in times.items():
        counted = all_of_them[WARM_UP:]
        low, *_, high = statistics.quantiles(counted, n=5)
        found[name] = Times(statistics.median(counted), low, high)
    return found


def machine(module: str) -> dict[str, object]:
    """What figures were measured on, and the command that repeats them."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": commit or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "command": " ".join([f"python -m {module}", *sys.argv[1:]]),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
