"""Measure the operation on this machine's CPU: `python -m benchmarks.cpu`, or `make bench`.

Every provider is verified against the float64 reference before it is timed, gradients too, and has
no time if it is wrong. Rounds are interleaved; every ratio is of medians of the same run. The last
table holds the figures against the targets that the kernels were written for.

Other work on the machine slows the peers more than ours, whose threads do not wait for each other:
the load found at the start is part of the result.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.cpu_shapes import FLOAT32_ONLY, PASSES, SHAPES
from benchmarks.cpu_tables import tables
from benchmarks.measure import interleaved, machine
from benchmarks.memory import growth
from benchmarks.providers import (
    WITHOUT_PREFIX,
    Provider,
    Shape,
    Tensors,
    attention,
    make_tensors,
    providers,
)
from benchmarks.targets import Row, verdicts
from prefixattn import cpu
from prefixattn.choose import choose

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (2e-2, 4e-2)}  # of the largest number
ROUNDS = {"peak": 3, "overhead": 200}  # times as many rounds as the other suites
QUICK = 2  # shapes of a suite
QUIET = 0.5  # load of a machine with nothing else to do
INTERRUPTED = 130  # as a shell reports Ctrl-C


class Job(NamedTuple):
    """One shape of a suite: a row for each of the suite's passes."""

    suite: str
    shape: Shape
    dtype: str


def jobs(suites: tuple[str, ...], dtypes: tuple[str, ...], quick: bool) -> Iterator[Job]:
    """Every job in the order of the suites."""
    for suite in suites:
        for dtype in ("float32",) if suite in FLOAT32_ONLY else dtypes:
            for shape in SHAPES[suite][: QUICK if quick else None]:
                yield Job(suite, shape, dtype)


def run_job(job: Job, found: dict[str, Provider], implementation: str, rounds: int) -> list[Row]:
    """The rows of a job, as they are written to JSON; `found` are the providers by name."""
    s = job.shape
    row = {"suite": job.suite, "shape": s.name, "dtype": job.dtype, "B": s.B, "P": s.P}
    if job.suite == "memory":
        return [row | growth(s, implementation)]
    tensors = make_tensors(s, DTYPES[job.dtype])
    if job.suite in ROUNDS:
        found = {"ours": found["ours"]}
    right, errors = _verified(found, tensors, backward=len(PASSES[job.suite]) > 1)
    rows = []
    for passes in PASSES[job.suite]:
        runs = {name: _run(found[name], tensors, passes) for name in right}
        runs |= _yardsticks(job, tensors)
        if job.suite == "overhead" and "ours" in right:
            runs["ours"] = _bare(tensors, implementation)
        with torch.set_grad_enabled(job.suite != "overhead"):
            times = interleaved(runs, rounds * ROUNDS.get(job.suite, 1))
        facts: Row = {"pass": passes, "error": errors, "ms": times}
        if job.suite == "peak":
            facts |= _rates(s, passes, times)
        rows.append(row | facts)
    return rows


def _verified(
    found: dict[str, Provider], tensors: Tensors, backward: bool
) -> tuple[list[str], dict[str, list[float]]]:
    """The providers that are right, and each one's errors relative to the largest number."""
    bounds = TOLERANCE[tensors.query.dtype]
    seed = torch.randn(tensors.query.shape, generator=torch.Generator().manual_seed(1))

    def results(provider: Provider, t: Tensors) -> list[Tensor]:
        with torch.set_grad_enabled(backward):
            out = provider(t)
        if not backward:
            return [out.double()]
        grads = torch.autograd.grad(out, t.all, seed.to(out.dtype))
        return [x.double() for x in (out.detach(), *grads)]

    exact = Tensors(*(x.detach().double().requires_grad_() for x in tensors.all))
    truth = results(lambda t: attention(t, "reference"), exact)
    right, errors = [], {}
    for name, provider in found.items():
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


def _run(provider: Provider, t: Tensors, passes: str) -> Callable[[], object]:
    def forward() -> None:
        with torch.no_grad():
            provider(t)

    def both() -> None:
        out = provider(t)
        torch.autograd.grad(out, t.all, torch.ones_like(out), allow_unused=True)

    if passes != "bwd":
        return forward if passes == "fwd" else both
    out = provider(t)
    upstream = torch.ones_like(out)
    return lambda: torch.autograd.grad(out, t.all, upstream, retain_graph=True)


def _yardsticks(job: Job, t: Tensors) -> dict[str, Callable[[], object]]:
    """What a suite holds ours against, besides its peers."""
    if job.suite == "peak":
        square = torch.randn(2048, 2048).to(t.query.dtype)
        return {"matmul": lambda: square @ square}
    if job.suite == "overhead":
        query, key, value = (x.detach() for x in (t.query, t.key, t.value))
        return {"plain SDPA": lambda: scaled_dot_product_attention(query, key, value)}
    return {}


def _bare(t: Tensors, implementation: str) -> Callable[[], object]:
    """A call with nothing around it, where microseconds count."""
    tensors = Tensors(*(x.detach() for x in t.all))
    return lambda: attention(tensors, implementation)


def _rates(s: Shape, passes: str, times: dict[str, Any]) -> Row:
    """Useful GFLOP/s of ours beside torch's square matmul."""
    flops = 4 * s.B * s.H * s.D * (s.M * s.P + s.M * (s.M + 1) / 2)
    if passes == "bwd":
        flops *= 2.5  # five products for the forward's two
    useful = {"ours": flops, "matmul": 2 * 2048**3}
    return {"GFLOP/s": {name: useful[name] / found.median / 1e6 for name, found in times.items()}}


def main(
    suite: Annotated[list[str] | None, typer.Option(help=f"Any of {', '.join(SHAPES)}.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16 or both.")] = None,
    implementation: Annotated[str, typer.Option(help="What is held to the targets.")] = "cpu",
    rounds: Annotated[int, typer.Option(help="Interleaved rounds of a row.", min=9)] = 25,
    quick: Annotated[bool, typer.Option("--quick", help="A few shapes only.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the rows here, as JSON.")] = None,
) -> None:
    """Time the C++ kernels against what users have today, and hold them to their targets."""
    suites, dtypes = tuple(suite or SHAPES), tuple(dtype or DTYPES)
    for name, got, known in (("--suite", suites, SHAPES), ("--dtype", dtypes, DTYPES)):
        if unknown := set(got) - set(known):
            raise typer.BadParameter(
                f"{name}: expected {', '.join(known)}, got {', '.join(sorted(unknown))}"
            )
    try:
        chosen = choose(implementation)
    except (ValueError, NotImplementedError) as error:
        raise typer.BadParameter(f"--implementation: {error}") from error
    console, progress = Console(), Console(stderr=True)
    facts = _facts(chosen)
    if facts["load"] > QUIET:
        progress.print(f"other work runs here (load {facts['load']:.1f}): expect wrong ratios")
    planned, rows = list(jobs(suites, dtypes, quick)), list[Row]()
    try:
        for job in track(planned, "measuring", console=progress, transient=True):
            rows += run_job(job, providers(chosen), chosen, rounds)
            if out is not None:
                _write(out, facts, rows)  # a run that is stopped keeps what it has
    except KeyboardInterrupt:
        progress.print(f"interrupted: what is below was measured before ({len(rows)} rows)")
        raise typer.Exit(INTERRUPTED) from None
    finally:
        for table in tables(rows, verdicts(rows)):
            console.print(table)
        if out is not None and rows:
            console.print(f"wrote {out}")


def _facts(implementation: str) -> dict[str, Any]:
    """Where the figures come from."""
    return machine("benchmarks.cpu") | {
        "implementation": implementation,
        "kernels": cpu.instructions() if implementation == "cpu" else None,
        "load": os.getloadavg()[0],
    }


def _write(path: Path, facts: dict[str, Any], rows: list[Row]) -> None:
    content = {"machine": facts, "rows": rows, "targets": verdicts(rows)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
