"""How long a call takes, how much memory, and what torch's own product and copy reach here."""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from prefixattn.bench.machine import last_level_cache

Run = Callable[[], object]
WARM_UP, FEWEST = 2, 7
# Bytes that are written between calls at least. On a GPU the host prepares a call meanwhile: less
# than this takes, so that the device never waits for it.
SMALLEST_BUFFER = {"cpu": 2**26, "cuda": 2**29}


class Times(NamedTuple):
    """Milliseconds of one call: the median, the 20th and the 80th percentile, and the rounds."""

    median: float
    low: float
    high: float
    rounds: int

    def of_each(self, calls: int) -> Times:
        """The times of one of the `calls` that were timed as one."""
        return Times(self.median / calls, self.low / calls, self.high / calls, self.rounds)


@dataclass(frozen=True)
class Plan:
    """How calls are timed: at most so many rounds, for so many seconds each; `warm` or cold."""

    rounds: int = 25
    seconds: float = 1.0
    warm: bool = False


def interleaved(runs: Mapping[str, Run], device: str, plan: Plan) -> dict[str, Times]:
    """Time each run in turn, round after round: a noisy moment hits all of them alike.

    Before each call a buffer larger than the last cache is written, unless the plan is warm. A run
    that would take longer than the plan's seconds sits out evenly spread rounds, down to `FEWEST`.
    """
    flush = (lambda: None) if plan.warm else _flusher(device)
    timed_round = _cuda_round if device == "cuda" else _cpu_round
    for _ in range(WARM_UP):
        found = timed_round(runs, flush)
    counts = {
        name: min(plan.rounds, max(FEWEST, int(1e3 * plan.seconds / max(ms, 1e-6))))
        for name, ms in found.items()
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(plan.rounds):
        due = {name: run for name, run in runs.items() if _due(number, counts[name], plan.rounds)}
        for name, ms in timed_round(due, flush).items():
            times[name].append(ms)
    return {name: _summary(values) for name, values in times.items()}


def _due(number: int, count: int, rounds: int) -> bool:
    """Whether round `number` is one of `count` evenly spread over `rounds`."""
    return number * count // rounds != (number + 1) * count // rounds


def _summary(values: list[float]) -> Times:
    low, *_, high = statistics.quantiles(values, n=5)
    return Times(statistics.median(values), low, high, len(values))


def _flusher(device: str) -> Run:
    size = max(2 * last_level_cache(device), SMALLEST_BUFFER[device])
    buffer = torch.zeros(size // 4, dtype=torch.int32, device=device)
    return lambda: buffer.add_(1)


def _cpu_round(runs: Mapping[str, Run], flush: Run) -> dict[str, float]:
    found = {}
    for name, run in runs.items():
        flush()
        start = time.perf_counter()
        run()
        found[name] = 1e3 * (time.perf_counter() - start)
    return found


def _cuda_round(runs: Mapping[str, Run], flush: Run) -> dict[str, float]:
    """By events: the flush runs while the host prepares the call; only the device counts."""
    events = {}
    for name, run in runs.items():
        flush()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        events[name] = (start, end)
    torch.cuda.synchronize()
    return {name: start.elapsed_time(end) for name, (start, end) in events.items()}


def peak_memory(run: Run, device: str) -> int | None:
    """Bytes that a call holds at its peak beyond what was there before, its results included.

    None where the system does not say (neither a GPU nor Linux).
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = run()
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    if not hasattr(library, "malloc_trim"):  # another libc keeps what was freed
        return None
    library.malloc_trim(0)  # what was freed goes back, or it would hide the next allocations
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _highest_resident()
    run()
    return max(0, _highest_resident() - before)


def _highest_resident() -> int:
    """Bytes of VmHWM in /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(peak) * 1024


class Rates(NamedTuple):
    """What torch reaches on this machine: FLOP/s of a square product, bytes/s of a copy."""

    matmul: float
    copy: float


def measure_rates(device: str, dtype: torch.dtype) -> Rates:
    """The rates of one dtype, now; a copied byte counts twice, as read and as written."""
    side, size = (8192, 2**30) if device == "cuda" else (2048, 2**27)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    runs: dict[str, Run] = {"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}
    with torch.no_grad():
        found = interleaved(runs, device, Plan(rounds=9, seconds=1.0, warm=True))
    work = {"matmul": 2 * side**3, "copy": 2 * size}
    return Rates(**{name: 1e3 * work[name] / times.median for name, times in found.items()})
