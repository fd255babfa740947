"""Peak memory of a few training steps, each way of tuning alone in a process of its own."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch
from safetensors.torch import load_file, save_file
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from prefixattn.demo.task import Batch
from prefixattn.demo.tune import WAYS, Recipe, Run

STEPS = 3
MEBIBYTE = 2**20


@dataclass(frozen=True)
class Memory:
    """Resident memory of one process, in MiB.

    Attributes:
        peak: the most the process ever held, interpreter and libraries included.
        growth: that less what it held right before its first training step.
    """

    peak: float
    growth: float


def measure_together(
    ways: Sequence[str], base: Path, start: Path, batch: Batch, folder: Path
) -> dict[str, Memory]:
    """Take the same few steps once per way, each in a fresh process; all at the same time.

    Args:
        ways: keys of `prefixattn.demo.tune.WAYS`.
        base: the base model's folder.
        start: the folder of the adapter to start from.
        batch: what each step sees.
        folder: an existing folder for a temporary file.
    """
    file = folder / "memory-batch.safetensors"
    save_file(batch, file)
    command = [sys.executable, "-m", "prefixattn.demo.memory", str(base), str(start), str(file)]
    command.append(str(torch.get_num_threads()))
    processes = {
        way: subprocess.Popen(
            [*command, way],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C reaches this process alone, which ends the others
        )
        for way in ways
    }
    measured = {}
    try:
        for way, process in processes.items():
            output, _ = process.communicate()
            if process.returncode:
                raise RuntimeError(f"measuring {way} ended with status {process.returncode}")
            measured[way] = Memory(**json.loads(output.splitlines()[-1]))
    finally:
        for process in processes.values():
            if process.poll() is None:
                process.kill()
                process.wait()
    return measured


def measure_here(base: Path, start: Path, batch: Batch, way: str) -> Memory:
    """The memory of this process over `STEPS` training steps; right only in a fresh one."""
    run = Run(WAYS[way](base, start), Recipe(steps=STEPS, lr=1e-3))
    before = psutil.Process().memory_info().rss
    for _ in range(STEPS):
        run.step(batch)
    peak = peak_resident()
    return Memory(peak / MEBIBYTE, (peak - before) / MEBIBYTE)


def peak_resident() -> int:
    """The most memory this process ever held, in bytes, as the operating system counts it."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where ru_maxrss starts at the peak of the process that forked
        lines = status.read_text().splitlines()
        (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
        return int(peak) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def main(arguments: Sequence[str]) -> None:
    """Measure one way and print it as JSON: `base start batch threads way`."""
    base, start, file, threads, way = arguments
    torch.set_num_threads(int(threads))
    disable_progress_bar()
    set_verbosity_error()
    memory = measure_here(Path(base), Path(start), load_file(file), way)
    print(json.dumps({"peak": memory.peak, "growth": memory.growth}))


if __name__ == "__main__":
    main(sys.argv[1:])
