"""Measure the operation on this machine: `python -m benchmarks.attention`, or `make bench`.

Every provider is verified against the float64 reference before it is timed, and has no time if it
is wrong. Rounds are interleaved, so that a noisy moment hits all providers alike; the ratios are of
medians of the same run.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.providers import PROVIDERS, WITHOUT_PREFIX, Shape, Tensors, make_tensors
from prefixattn import prefix_attention

SHAPES = {
    "prefill": (
        Shape(B=1, H=16, H_kv=8, M=512, C=0, P=16, D=64),
        Shape(B=1, H=16, H_kv=8, M=512, C=0, P=512, D=64),
        Shape(B=4, H=16, H_kv=4, M=256, C=0, P=128, D=64),
        Shape(B=1, H=8, H_kv=8, M=1024, C=0, P=64, D=128),
    ),
    "decode": (
        Shape(B=1, H=16, H_kv=4, M=1, C=1024, P=1024, D=64),
        Shape(B=8, H=16, H_kv=4, M=1, C=512, P=1024, D=64),
        Shape(B=16, H=16, H_kv=4, M=1, C=128, P=2048, D=128),
    ),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of the largest output


def main(
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.", min=3)] = 15,
    out: Annotated[Path | None, typer.Option(help="Also write the rows here, as JSON.")] = None,
) -> None:
    """Time forward (and, for prefill, forward with backward) against what users have today."""
    if dtype not in DTYPES:
        raise typer.BadParameter(f"expected one of {', '.join(DTYPES)}, got {dtype}")
    console = Console()
    cases = [
        (suite, shape, backward)
        for suite, shapes in SHAPES.items()
        for shape in shapes
        for backward in ((False, True) if suite == "prefill" else (False,))
    ]
    rows = [
        measure(shape, DTYPES[dtype], backward, rounds) | {"suite": suite}
        for suite, shape, backward in track(cases, "measuring", console=console, transient=True)
    ]
    console.print(_table(rows, dtype))
    console.print(
        "Medians of interleaved rounds. floor: no prefix at all. cat: concatenation and SDPA. "
        "stock: as transformers and PEFT do it. /cat, /stock: their time over ours."
    )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
        console.print(f"wrote {out}")


def measure(shape: Shape, dtype: torch.dtype, backward: bool, rounds: int) -> dict[str, object]:
    """One row: the median milliseconds of every provider, None for one that is wrong."""
    tensors = make_tensors(shape, dtype)
    truth = prefix_attention(*tensors.double().all, is_causal=True, implementation="reference")
    assert isinstance(truth, Tensor)
    errors, runs = {}, {}
    for name, provider in PROVIDERS.items():
        with torch.no_grad():
            error = (provider(tensors).double() - truth).abs().max() / truth.abs().max()
        errors[name] = None if name in WITHOUT_PREFIX else error.item()
        if name in WITHOUT_PREFIX or error < TOLERANCE[dtype]:
            runs[name] = _timed(provider, tensors, backward)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(2 + rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {
        "shape": shape.name,
        "pass": "fwd+bwd" if backward else "fwd",
        "ms": {
            name: statistics.median(times[name][2:]) if name in times else None
            for name in PROVIDERS
        },
        "error": errors,
    }


def _timed(
    provider: Callable[[Tensors], Tensor], tensors: Tensors, backward: bool
) -> Callable[[], None]:
    def forward() -> None:
        with torch.no_grad():
            provider(tensors)

    def both() -> None:
        out = provider(tensors)
        torch.autograd.grad(out, tensors.all, torch.ones_like(out), allow_unused=True)

    return both if backward else forward


def machine() -> dict[str, object]:
    """What the figures were measured on, and the command that repeats them."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": commit or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "command": " ".join(["python -m benchmarks.attention", *sys.argv[1:]]),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _table(rows: list[dict[str, object]], dtype: str) -> Table:
    title = f"{dtype}, {torch.get_num_threads()} threads: milliseconds a call"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, min_width=78)
    for heading in ("shape", "pass", *PROVIDERS, "/cat", "/stock"):
        words = heading in ("shape", "pass")
        table.add_column(heading, justify="left" if words else "right", no_wrap=True)
    for row in rows:
        times = row["ms"]
        assert isinstance(times, dict)
        mine, cat, stock, _ = times.values()
        ratios = [f"{peer / mine:.2f}" if mine and peer else "-" for peer in (cat, stock)]
        cells = ["wrong" if ms is None else f"{ms:.3g}" for ms in times.values()]
        table.add_row(str(row["shape"]), str(row["pass"]), *cells, *ratios)
    return table


if __name__ == "__main__":
    typer.run(main)
