"""Peak memory of a training step over the batch, each measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.providers import Shape, Tensors, make_tensors, providers

MEASURED = ("ours", "sdpa", "cat", "stock")
COPIES = "a copy of the prefix for each row"


def growth(shape: Shape, implementation: str) -> dict[str, dict[str, float]]:
    """MiB by provider: what a step needs over its inputs and gradients.

    The last entry is what a copy of the prefix for each row would take.
    """
    found = {name: _measured(name, shape, implementation) for name in MEASURED}
    copies = 2 * shape.B * shape.H_kv * shape.P * shape.D * 4 / 2**20
    return {"MiB": found | {COPIES: copies}}


def _measured(name: str, shape: Shape, implementation: str) -> float:
    """The figure of a fresh process: peaks never go down again."""
    arguments = [name, json.dumps(asdict(shape)), implementation]
    command = [sys.executable, "-m", "benchmarks.memory", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if result.returncode != 0:
        raise RuntimeError(f"the training step of {name} failed: {result.stderr.strip()}")
    return float(result.stdout)


def step(name: str, shape: Shape, implementation: str) -> float:
    """MiB that one training step takes beyond its inputs, output and gradients."""
    tensors = make_tensors(shape, torch.float32)
    provider = providers(implementation)[name]

    def train(t: Tensors) -> None:
        out = provider(t)
        torch.autograd.grad(out, t.all, torch.ones_like(out))

    train(make_tensors(Shape(B=1, H=8, H_kv=8, M=2, C=0, P=2, D=8), torch.float32))  # libraries
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmHWM")
    train(tensors)
    # The output, its gradient, and the gradients of the inputs.
    needed = sum(x.nbytes for x in tensors.all) + 2 * tensors.query.nbytes
    return (_status("VmHWM") - before) / 1024 - needed / 2**20


def _status(field: str) -> int:
    """A field of /proc/self/status, in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    print(step(sys.argv[1], Shape(**json.loads(sys.argv[2])), sys.argv[3]))
