"""`python -m benchmarks.methods`: every way to adapt one base to three tasks, side by side.

The base is a small model that was trained here, on one part of the standard library; tasks are held
out by file. Each method's learning rate is chosen once for each task by the validation loss of a
seed that does not count: the search goes on until the best rate lies between two worse ones. Each
run ends at its best validation loss. Rows are written as they come, and a run goes on with what its
file holds.
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here is downloaded

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.methods.cell import Place, Sizes
from benchmarks.methods.grid import FIELDS, Grid, measure, measure_peaks, one_thread
from benchmarks.methods.report import table
from benchmarks.methods.ways import METHODS
from prefixattn.bench import machine
from prefixattn.bench.records import Record, Writer, read, rows_of, runs_of
from prefixattn.demo.base import cached_tokenizer
from prefixattn.demo.cache import default_folder
from prefixattn.demo.reader import TINY, ReaderSizes, cached_reader
from prefixattn.demo.tasks import BUILDERS
from prefixattn.demo.text import library_root, read_library

INTERRUPTED = 130  # as a shell reports Ctrl-C
QUICK_SIZES = Sizes(steps=2, batch=4, num_tokens=8, shots=160, validation=4, measure_every=1)
QUICK_HELD_OUT = 8


def main(
    method: Annotated[list[str] | None, typer.Option(help=f"Any of: {'; '.join(METHODS)}.")] = None,
    task: Annotated[list[str] | None, typer.Option(help=f"Any of: {', '.join(BUILDERS)}.")] = None,
    seeds: Annotated[int, typer.Option(help="How many.", min=1)] = 3,
    quick: Annotated[
        bool, typer.Option("--quick", help="Minute sizes: shows that it runs, and nothing more.")
    ] = False,
    workers: Annotated[int, typer.Option(help="Processes of one thread each.", min=1)] = 2,
    text: Annotated[
        Path | None, typer.Option(help="Python source.", show_default="the standard library")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="For the base.", show_default="user cache")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Results, as JSON lines.")] = None,
    peaks: Annotated[
        bool, typer.Option("--peaks", help="Train nothing: the memory of --out's rows anew.")
    ] = False,
    show: Annotated[
        Path | None, typer.Option(help="Measure nothing: the tables of such a file.")
    ] = None,
    pictures: Annotated[
        Path | None, typer.Option(help="With --show: a folder for the plots.")
    ] = None,
) -> None:
    """Train every method on every task, from few examples and from more, and compare."""
    console, errors = Console(), Console(stderr=True)
    if show is not None:
        try:
            records = read(show, FIELDS)
        except (ValueError, OSError) as error:
            raise typer.BadParameter(str(error)) from None
        typer.echo(table(records))
        if pictures is not None:
            from benchmarks.methods import plots

            errors.print("wrote " + ", ".join(map(str, plots.save(records, pictures))))
        return
    if peaks and (out is None or not out.exists()):
        raise typer.BadParameter("--peaks: expected a file of rows, --out, to measure them anew")
    try:
        grid = Grid(
            methods=tuple(method or METHODS),
            tasks=tuple(task or BUILDERS),
            examples=(16,) if quick else (16, 64, 256),
            seeds=tuple(range(1 if quick else seeds)),
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    sizes = Sizes(**asdict(QUICK_SIZES) | {"held_out": QUICK_HELD_OUT}) if quick else Sizes()
    one_thread()
    try:
        writer = Writer(out, fields=FIELDS)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    check(writer, sizes)
    command = shlex.join(["python", "-m", "benchmarks.methods", *sys.argv[1:]])
    header = {"kind": "run", "run": len(runs_of(writer.records)), "sizes": asdict(sizes)}
    writer.add([header | machine.facts("cpu", command) | {"workers": workers}])
    source, reader = text or library_root(), TINY if quick else ReaderSizes()
    try:
        with tempfile.TemporaryDirectory() as tokenizer:
            place = prepare(source, cache or default_folder(), Path(tokenizer), reader, sizes)
            if peaks:
                measure_all_peaks(place, writer, workers, errors)
            else:
                train(grid, place, writer, workers, errors)
    except KeyboardInterrupt:
        errors.print("interrupted: what was measured is kept" if out else "interrupted")
        raise typer.Exit(INTERRUPTED) from None
    console.print(table(writer.records), markup=False, highlight=False, soft_wrap=True)


def prepare(text: Path, cache: Path, folder: Path, reader: ReaderSizes, sizes: Sizes) -> Place:
    """The tokenizer in ``folder`` and the base, trained on the files that are not held out."""
    modules, _ = read_library(text).split()
    say = Console(stderr=True).print
    tokenizer = cached_tokenizer(cache, modules, reader.model, say)
    with Progress(TextColumn("training the base"), BarColumn(), MofNCompleteColumn()) as progress:
        bar = progress.add_task("", total=reader.steps)
        base = cached_reader(
            cache, modules, tokenizer, reader, lambda loss: progress.advance(bar), say
        )
        progress.update(bar, completed=reader.steps)
    tokenizer.save_pretrained(folder)
    return Place(text, folder, base, sizes)


def check(writer: Writer, sizes: Sizes) -> None:
    """Figures of two sets of sizes, or of two machines, have no place in one file."""
    for before in runs_of(writer.records)[-1:]:
        if before.get("sizes") != asdict(sizes):
            raise typer.BadParameter(f"--out: {writer.path} holds a run of other sizes")
        here = machine.facts("cpu", "")
        for fact in ("processor", "torch"):
            if before[fact] != here[fact]:
                raise typer.BadParameter(
                    f"--out: {writer.path} was measured with {fact} {before[fact]}, here it is "
                    f"{here[fact]}"
                )


def train(grid: Grid, place: Place, writer: Writer, workers: int, console: Console) -> None:
    """All cells, with a bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("measuring", completed=len(rows_of(writer.records)))
        for row in measure(grid, place, writer, workers):
            total = grid.num_cells(rows_of(writer.records))
            progress.update(bar, advance=1, total=total, description=describe(row))


def measure_all_peaks(place: Place, writer: Writer, workers: int, console: Console) -> None:
    """The memory of every row, which replaces what the file says of it."""
    rows = rows_of(writer.records)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("measuring", total=sum(row["purpose"] == "score" for row in rows))
        for row in measure_peaks(rows, place, workers):
            progress.update(bar, advance=1, description=describe(row))
    writer.write_all()


def describe(row: Record) -> str:
    """A row in a few words."""
    return f"{row['task']}, {row['method']}, {row['examples']} examples"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(main)

if __name__ == "__main__":
    app()
