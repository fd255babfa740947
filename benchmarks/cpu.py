"""Measure the operation on this machine's CPU: `python -m benchmarks.cpu`, or `make bench`.

Every provider is verified against the float64 reference before it is timed, gradients too, and has
no time if it is wrong. Rounds are interleaved; every ratio is of medians of the same run. The last
table holds the figures against the targets that the kernels were written for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.measure import interleaved, machine
from benchmarks.memory import ROWS, growth
from benchmarks.providers import PROVIDERS, WITHOUT_PREFIX, Shape, Tensors, make_tensors, ours
from benchmarks.targets import verdicts
from prefixattn import prefix_attention

MHA, GQA = {"H": 8, "H_kv": 8}, {"H": 8, "H_kv": 2}
PREFILL = (
    Shape(B=1, **MHA, M=128, C=0, P=16, D=64),
    Shape(B=1, **GQA, M=128, C=0, P=2048, D=64),
    Shape(B=4, **MHA, M=128, C=0, P=128, D=128),
    Shape(B=16, **GQA, M=128, C=0, P=512, D=64),
    Shape(B=16, **MHA, M=128, C=0, P=16, D=128),
    Shape(B=1, **GQA, M=512, C=0, P=64, D=128),
    Shape(B=4, **GQA, M=512, C=0, P=16, D=64),
    Shape(B=2, **MHA, M=512, C=0, P=1024, D=64),
    Shape(B=8, **MHA, M=256, C=0, P=32, D=64),
    Shape(B=1, **MHA, M=1024, C=0, P=128, D=64),
    Shape(B=2, **GQA, M=1024, C=0, P=512, D=128),
    Shape(B=1, **GQA, M=2048, C=0, P=16, D=64),
    Shape(B=1, **MHA, M=2048, C=0, P=256, D=128),
    Shape(B=1, **GQA, M=2048, C=0, P=2048, D=128),
)
DECODE = (
    Shape(B=1, **MHA, M=1, C=128, P=16, D=64),
    Shape(B=1, **GQA, M=1, C=1024, P=128, D=128),
    Shape(B=1, **MHA, M=1, C=4096, P=2048, D=64),
    Shape(B=2, **GQA, M=1, C=4096, P=16, D=64),
    Shape(B=4, **MHA, M=1, C=512, P=128, D=128),
    Shape(B=8, **GQA, M=1, C=128, P=512, D=64),
    Shape(B=8, **MHA, M=1, C=512, P=1024, D=128),
    Shape(B=8, **GQA, M=1, C=2048, P=2048, D=128),
    Shape(B=16, **GQA, M=1, C=128, P=2048, D=128),
    Shape(B=16, **MHA, M=1, C=1024, P=512, D=64),
    Shape(B=16, **GQA, M=1, C=4096, P=1024, D=64),
)
PEAK = Shape(B=1, **MHA, M=2048, C=0, P=16, D=128)
TINY = Shape(B=1, **MHA, M=1, C=15, P=16, D=64)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (2e-2, 4e-2)}  # of the largest number
SUITES = ("prefill", "decode", "peak", "overhead", "memory")
QUICK = 2  # shapes of a suite


class Job(NamedTuple):
    """One row: what is timed on which shape."""

    suite: str
    shape: Shape
    dtype: str
    passes: str  # "fwd", "fwd+bwd" or "bwd"


def jobs(suites: tuple[str, ...], dtypes: tuple[str, ...], quick: bool) -> Iterator[Job]:
    """Every row in the order of its suite."""
    most = QUICK if quick else None
    for dtype in dtypes:
        if "prefill" in suites:
            for shape in PREFILL[:most]:
                yield Job("prefill", shape, dtype, "fwd")
                yield Job("prefill", shape, dtype, "fwd+bwd")
        if "decode" in suites:
            for shape in DECODE[:most]:
                yield Job("decode", shape, dtype, "fwd")
        if "peak" in suites:
            yield Job("peak", PEAK, dtype, "fwd")
            yield Job("peak", PEAK, dtype, "bwd")
    if "overhead" in suites:
        yield Job("overhead", TINY, "float32", "fwd")
    if "memory" in suites:
        yield Job("memory", Shape(B=0, **MHA, M=128, C=0, P=2048, D=128), "float32", "fwd+bwd")


def run_job(job: Job, rounds: int) -> dict[str, Any]:
    """The row of a job, as it is written to JSON."""
    row: dict[str, Any] = {
        "suite": job.suite,
        "shape": job.shape.name,
        "dtype": job.dtype,
        "pass": job.passes,
    }
    if job.suite == "memory":
        return row | {"rows": list(ROWS), "MiB": growth(job.shape)}
    tensors = make_tensors(job.shape, DTYPES[job.dtype])
    if job.suite == "peak":
        return row | _peak(job, tensors, rounds)
    if job.suite == "overhead":
        return row | _overhead(tensors, rounds)
    right, errors = _verified(tensors, backward=job.passes != "fwd")
    runs = {name: _run(PROVIDERS[name], tensors, job.passes) for name in right}
    times = interleaved(runs, rounds)
    facts = {"B": job.shape.B, "P": job.shape.P}
    return row | facts | {"error": errors, "ms": {name: times[name] for name in runs}}


def _verified(tensors: Tensors, backward: bool) -> tuple[list[str], dict[str, list[float]]]:
    """The providers that are right, and each one's errors relative to the largest number."""
    bounds = TOLERANCE[tensors.query.dtype]
    seed = torch.randn(tensors.query.shape, generator=torch.Generator().manual_seed(1))

    def results(provider: Callable[[Tensors], Tensor], t: Tensors) -> list[Tensor]:
        out = provider(t)
        if not backward:
            return [out.detach().double()]
        grads = torch.autograd.grad(out, t.all, seed.to(out.dtype))
        return [x.double() for x in (out.detach(), *grads)]

    exact = Tensors(*(x.detach().double().requires_grad_() for x in tensors.all))
    truth = results(_reference, exact)
    right, errors = [], {}
    for name, provider in PROVIDERS.items():
        if name in WITHOUT_PREFIX:
            right.append(name)
            continue
        got = results(provider, tensors)
        errors[name] = [
            ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, truth, strict=True)
        ]
        if errors[name][0] < bounds[0] and all(error < bounds[1] for error in errors[name][1:]):
            right.append(name)
    return right, errors


def _reference(t: Tensors) -> Tensor:
    out = prefix_attention(*t.all, is_causal=True, implementation="reference")
    assert isinstance(out, Tensor)
    return out


def _run(provider: Callable[[Tensors], Tensor], t: Tensors, passes: str) -> Callable[[], object]:
    def forward() -> None:
        with torch.no_grad():
            provider(t)

    def both() -> None:
        out = provider(t)
        torch.autograd.grad(out, t.all, torch.ones_like(out), allow_unused=True)

    return forward if passes == "fwd" else both


def _peak(job: Job, t: Tensors, rounds: int) -> dict[str, Any]:
    """Useful GFLOP/s of ours beside torch's square matmul, and the percentage."""
    s = job.shape
    flops = 4 * s.B * s.H * s.D * (s.M * s.P + s.M * (s.M + 1) / 2)
    square = torch.randn(2048, 2048).to(t.query.dtype)
    out = ours(t)
    upstream = torch.ones_like(out)

    def backward() -> None:
        torch.autograd.grad(out, t.all, upstream, retain_graph=True)

    run = _run(ours, t, "fwd")
    if job.passes == "bwd":
        run, flops = backward, 2.5 * flops  # five products for the forward's two
    times = interleaved({"ours": run, "matmul": lambda: square @ square}, 3 * rounds)
    rate = flops / times["ours"].median / 1e6
    matmul = 2 * 2048**3 / times["matmul"].median / 1e6
    return {"ms": times, "GFLOP/s": rate, "matmul GFLOP/s": matmul, "of matmul": rate / matmul}


def _overhead(t: Tensors, rounds: int) -> dict[str, Any]:
    """Microseconds of a tiny call beside plain `scaled_dot_product_attention`."""
    query, key, value = (x.detach() for x in (t.query, t.key, t.value))
    small = Tensors(*(x.detach() for x in t.all))
    runs = {
        "ours": lambda: prefix_attention(*small.all, is_causal=True, implementation="cpu"),
        "plain SDPA": lambda: scaled_dot_product_attention(query, key, value),
    }
    with torch.no_grad():
        times = interleaved(runs, 200 * rounds)
    us = {name: 1e3 * found.median for name, found in times.items()}
    return {"us": us, "ratio": us["ours"] / us["plain SDPA"]}


def main(
    suite: Annotated[list[str] | None, typer.Option(help=f"Any of {', '.join(SUITES)}.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16 or both.")] = None,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds of a row.", min=9)] = 25,
    quick: Annotated[bool, typer.Option(help="A few shapes only.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the rows here, as JSON.")] = None,
) -> None:
    """Time the C++ kernels against what users have today, and hold them to their targets."""
    suites, dtypes = tuple(suite or SUITES), tuple(dtype or DTYPES)
    for name, got, known in (("--suite", suites, SUITES), ("--dtype", dtypes, tuple(DTYPES))):
        if unknown := set(got) - set(known):
            raise typer.BadParameter(
                f"{name}: expected {', '.join(known)}, got {', '.join(sorted(unknown))}"
            )
    console, progress = Console(), Console(stderr=True)
    planned = list(jobs(suites, dtypes, quick))
    rows: list[dict[str, Any]] = []
    try:
        for job in track(planned, "measuring", console=progress, transient=True):
            rows.append(run_job(job, rounds))
    except KeyboardInterrupt:
        progress.print(f"interrupted: {len(rows)} of {len(planned)} rows were measured")
    for table in _tables(rows):
        console.print(table)
    found = verdicts(rows)
    console.print(_verdict_table(found))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        content = {"machine": machine("benchmarks.cpu"), "rows": rows, "targets": found}
        out.write_text(json.dumps(content, indent=1) + "\n")
        console.print(f"wrote {out}")


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in headings:
        words = heading in ("shape", "dtype", "pass", "target", "")
        table.add_column(heading, justify="left" if words else "right", no_wrap=not words)
    return table


def _tables(rows: list[dict[str, Any]]) -> Iterator[Table]:
    peers = [name for name in PROVIDERS if name != "ours"]
    for suite in ("prefill", "decode"):
        table = _table(
            f"{suite}: milliseconds of ours, and how many times as long the others take",
            *("shape", "dtype", "pass", "ours", *peers),
        )
        for row in rows:
            if row["suite"] == suite:
                ms = {name: times.median for name, times in row["ms"].items()}
                mine = ms.get("ours", math.nan)
                ratios = [f"{ms[name] / mine:.2f}" if name in ms else "wrong" for name in peers]
                words = (row["shape"], row["dtype"], row["pass"])
                table.add_row(*words, f"{mine:.3g}" if "ours" in ms else "wrong", *ratios)
        if table.row_count:
            yield table
    for row in rows:
        if row["suite"] == "memory":
            table = _table(
                f"memory of a training step over its inputs and gradients, MiB: {row['shape'][3:]}",
                *("", *(f"B{count}" for count in row["rows"])),
            )
            for name, numbers in row["MiB"].items():
                table.add_row(name, *(f"{number:.0f}" for number in numbers))
            yield table


def _verdict_table(found: list[dict[str, Any]]) -> Table:
    table = _table("targets", "target", "wanted", "measured", "")
    for line in found:
        ok = "met" if line["met"] else "MISSED"
        sign = "at most" if line["at_most"] else "at least"
        table.add_row(line["target"], f"{sign} {line['wanted']}", f"{line['measured']:.2f}", ok)
    return table


if __name__ == "__main__":
    typer.run(main)
