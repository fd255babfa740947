"""Measure the numbers of csrc/tuning.h again, on this machine: `python -m benchmarks.tune_cpu`.

Each number is varied by itself. The kernels are built with every value, and the calls of a few
shapes are timed with each of them in turn. A row shows how many times as fast the calls are as with
the value that stands in the file; more than 1 is faster. Nothing is changed: whoever finds a better
value writes it into the file, with what measured it.
"""

from __future__ import annotations

import re
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from ctypes import CDLL
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from prefixattn import compiler, cpu, quick
from prefixattn.bench import machine
from prefixattn.bench.inputs import make_tensors
from prefixattn.bench.measure import Plan, interleaved
from prefixattn.bench.providers import ours
from prefixattn.bench.shapes import Case, Shape

VALUES: dict[str, tuple[str, ...]] = {
    "kBlock": ("32", "64", "128"),
    "kTile": ("64", "96", "128", "160"),
    "kPanelRows": ("4", "5", "6", "8"),
    "kPanelVectors": ("2", "4"),
    "kFewNumbers": ("4", "8", "12", "16", "24"),
    "kFewPairs": ("3", "5", "7", "9", "12"),
    "kStripsOfTask": ("4", "8", "16", "32"),
    "kKeysOfGroup": ("256", "512", "1024"),
    "kWorthThreads": ("2e5", "1e6", "5e6"),
    "kTasksEach": ("1", "2", "4"),
}
TRAINING = "fwd+bwd"
CASES = (
    Case("prefill", Shape("SmolLM2-135M", B=4, M=256, P=256)),
    Case("prefill", Shape("Qwen3-0.6B", B=1, M=512, P=128)),
    Case("training", Shape("SmolLM2-135M", B=2, M=256, P=128), TRAINING),
    Case("training", Shape("Qwen3-0.6B", B=1, M=256, P=512), TRAINING),
    Case("decode", Shape("Llama-3.2-1B", B=1, M=1, C=2047, P=128)),
    Case("decode", Shape("Llama-3.2-1B", B=1, M=3, C=1023, P=128)),
    Case("shared-prefix", Shape("Llama-3.2-1B", B=8, M=1, C=127, P=2048)),
)
DTYPES = ("float32", "bfloat16")
DEFINITION = r"(constexpr \w+ {name} = )([^;]+);"


def main(
    number: Annotated[
        list[str] | None, typer.Option(help="Numbers to vary; all unless given.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=7, help="Rounds of each call.")] = 15,
) -> None:
    """Time the calls with every value of every number."""
    if unknown := set(number or ()) - set(VALUES):
        raise typer.BadParameter(
            f"--number: expected some of {', '.join(VALUES)}, got {', '.join(sorted(unknown))}"
        )
    console = Console()
    facts = machine.facts("cpu", "python -m benchmarks.tune_cpu")
    console.print(f"{facts['processor']}, {facts['kernels']}, {facts['threads']} threads")
    for name in number or VALUES:
        with tempfile.TemporaryDirectory() as folder:
            libraries = dict(built(name, Path(folder), console))
            if len(libraries) > 1:
                console.print(table(name, measured(libraries, Plan(rounds)), standing(name)))


def standing(name: str) -> list[str]:
    """The values that a number has in the file, one for each group of instruction sets."""
    text = (compiler.SOURCES / "tuning.h").read_text()
    return [found[1] for found in re.findall(DEFINITION.format(name=name), text)]


def built(name: str, folder: Path, console: Console) -> Iterator[tuple[str, CDLL]]:
    """The libraries of each value: for the instruction set in use, and for what it hands on."""
    sources, instructions = compiler.SOURCES, cpu.instructions()
    sets = {"plain", instructions} | ({"avx512"} if instructions == "amx" else set())
    for value in track(VALUES[name], f"building {name}", console=console, transient=True):
        copy = folder / value / "csrc"
        shutil.copytree(sources, copy)
        header = copy / "tuning.h"
        text = re.sub(DEFINITION.format(name=name), rf"\g<1>{value};", header.read_text())
        header.write_text(text)
        compiler.SOURCES = copy
        try:
            yield value, cpu.load(compiler.build(folder / value / "build", sets=sorted(sets)))
        except compiler.BuildError as error:  # an assertion of the sources says what cannot be
            console.print(f"{name} = {value} cannot be built: {str(error).splitlines()[0]}")
        finally:
            compiler.SOURCES = sources


def measured(libraries: Mapping[str, CDLL], plan: Plan) -> dict[str, dict[str, float]]:
    """Milliseconds of each case with each library."""
    found = {}
    for case in (replace(c, shape=replace(c.shape, dtype=d)) for d in DTYPES for c in CASES):
        tensors = make_tensors(case, "cpu")
        call = ours(case.shape, tensors, case.passes, "cpu")
        runs = {value: run_with(library, call, case) for value, library in libraries.items()}
        times = interleaved(runs, "cpu", plan)
        found[case.name] = {value: times[value].median for value in libraries}
    return found


def run_with(library: CDLL, call: Callable[[], torch.Tensor], case: Case) -> Callable[[], object]:
    """A call, with its backward where the case has one, by one of the libraries."""

    def run() -> None:
        cpu.library = lambda: library  # type: ignore[assignment]
        quick.forget()
        out = call()
        if case.passes == TRAINING:
            out.backward(torch.ones_like(out))

    return run


def table(name: str, found: Mapping[str, Mapping[str, float]], now: list[str]) -> Table:
    """How many times as fast each value is as the one that stands in the file."""
    values = list(next(iter(found.values())))
    base = next((value for value in values if value in now), values[0])
    shown = Table("case", *(f"{v} (now)" if v in now else v for v in values), title=name)
    for case, times in found.items():
        shown.add_row(case, *(f"{times[base] / times[value]:.2f}" for value in values))
    means = [
        statistics.geometric_mean([times[base] / times[value] for times in found.values()])
        for value in values
    ]
    shown.add_section()
    shown.add_row("geometric mean", *(f"{mean:.3f}" for mean in means))
    return shown


if __name__ == "__main__":
    typer.run(main)
