"""`prefixattn bench`: run suites, compare two results or commits, draw the page."""

from __future__ import annotations

import os
import shlex
import sys
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from prefixattn.bench import machine, records, tables
from prefixattn.bench.measure import FEWEST, Plan
from prefixattn.bench.providers import PROVIDERS
from prefixattn.bench.run import Selection, broken, measure
from prefixattn.bench.shapes import DEFAULT, DTYPES, SUITES, UNITS, cases

app = typer.Typer(
    help="Measure the operation against everything else that could be called.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
INTERRUPTED = 130  # as a shell reports Ctrl-C
Device = Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="a GPU if any")]
Suites = Annotated[list[str] | None, typer.Option(help=f"Any of {', '.join(SUITES)}.")]
Shapes = Annotated[list[str] | None, typer.Option(help="Only these shapes or models: see `list`.")]
Providers = Annotated[list[str] | None, typer.Option(help="Only these, and the floor.")]
Threads = Annotated[
    int | None,
    typer.Option(help="CPU threads.", show_default="all", min=1, max=os.cpu_count() or 1),
]


@app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    suite: Suites = None,
    shape: Shapes = None,
    provider: Providers = None,
    device: Device = None,
    rounds: Annotated[
        int | None, typer.Option(help="Interleaved rounds.", min=FEWEST, show_default="25")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="For each provider of a case.", min=0, show_default="1")
    ] = None,
    warm: Annotated[bool, typer.Option("--warm", help="Leave the caches as they are.")] = False,
    threads: Threads = None,
    out: Annotated[
        Path | None, typer.Option(help="Results, as JSON lines; a run goes on with what is there.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin --out anew.")] = False,
) -> None:
    """Verify, then time. Without --suite: every suite but quick."""
    if context.invoked_subcommand is not None:
        return
    selection = Selection(
        suites=tuple(suite or DEFAULT),
        shapes=tuple(shape or ()),
        providers=tuple(provider or ()),
        device=_device(device),
        plan=_plan(rounds, seconds),
        warm=warm,
    )
    if threads is not None:
        torch.set_num_threads(threads)
    console, errors = Console(), Console(stderr=True)
    if (load := machine.load()) is not None and load > machine.QUIET:
        errors.print(f"other work runs here (load {load}): expect wrong ratios")
    try:
        total = len(selection.cases())
        writer = records.Writer(out, fresh)
        kept = len(records.rows_of(writer.records))
        done = _measure(selection, writer, total, errors)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    for table in tables.of_rows(records.rows_of(writer.records), selection.suites):
        console.print(table)
    if out is not None:
        new = len(records.rows_of(writer.records)) - kept
        console.print(f"{out}: {new} rows measured, {kept} were there")
    if not done:
        errors.print("interrupted: what is shown was measured before")
        raise typer.Exit(INTERRUPTED)
    for row in (faults := broken(records.rows_of(writer.records))):
        errors.print(f"{row['state']}: {row['provider']}, {row['case']}: {row['reason']}")
    if faults:
        raise typer.Exit(1)


def _measure(selection: Selection, writer: records.Writer, total: int, console: Console) -> bool:
    """Whether the run came to its end."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    command = shlex.join(["prefixattn", "bench", *_arguments()])
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=total)
        try:
            for case, _ in measure(selection, writer, command):
                progress.update(task, advance=1, description=f"{case.suite} {case.name}")
        except KeyboardInterrupt:
            return False
    return True


def _arguments() -> list[str]:
    """What was typed after `bench`."""
    typed = sys.argv[1:]
    return typed[1:] if typed[:1] == ["bench"] else typed


def _device(name: str | None) -> str:
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in DTYPES:
        raise typer.BadParameter(f"--device: expected {' or '.join(DTYPES)}, got {name}")
    if name == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("--device: torch finds no CUDA or ROCm device here")
    return name


def _plan(rounds: int | None, seconds: float | None) -> Plan | None:
    """The suite's own where neither is given."""
    if rounds is None and seconds is None:
        return None
    default = Plan()
    if seconds is not None and not isfinite(seconds):
        raise typer.BadParameter(f"--seconds: expected a number of seconds, got {seconds}")
    return Plan(rounds or default.rounds, default.seconds if seconds is None else seconds)


@app.command("list")
def list_names(suite: Suites = None, device: Device = None) -> None:
    """The suites' shapes, the providers, and what the letters mean."""
    console = Console()
    try:
        for name in suite or SUITES:
            console.print(f"[bold]{name}")
            for case in cases(name, _device(device)):
                console.print(f"  {case.name}  ({case.passes})", highlight=False)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    console.print(f"[bold]providers[/bold]\n  {', '.join(PROVIDERS)}", highlight=False)
    console.print("[bold]letters")
    for letter, meaning in UNITS.items():
        console.print(f"  {letter}: {meaning}", highlight=False)


@app.command()
def compare(
    before: Annotated[str, typer.Argument(help="A results file or a git ref.", metavar="A")],
    after: Annotated[str, typer.Argument(help="Another one.", metavar="B")],
    suite: Suites = None,
    shape: Shapes = None,
    provider: Providers = None,
    device: Device = None,
    repeats: Annotated[int, typer.Option(help="Runs of each ref, A B A B.", min=1)] = 3,
    threads: Threads = None,
) -> None:
    """Say row by row what became slower or faster, and by how much beyond the noise.

    Ends with status 1 where something is slower, or has no time any more. Refs are measured here
    and now, our implementations only unless --provider names others; options concern refs alone.
    """
    from prefixattn.bench import comparison, refs

    console, errors = Console(), Console(stderr=True)
    options = refs.Options(
        suites=tuple(suite or ("quick",)),
        shapes=tuple(shape or ()),
        providers=tuple(provider or ()),
        device=_device(device),
        repeats=repeats,
        threads=threads or torch.get_num_threads(),
    )
    try:
        sides = refs.sides(before, after, options, lambda words: errors.print(words))
    except (ValueError, RuntimeError) as error:
        raise typer.BadParameter(str(error)) from None
    except KeyboardInterrupt:
        errors.print("interrupted: nothing was compared")
        raise typer.Exit(INTERRUPTED) from None
    for difference in comparison.strangers(*sides):
        errors.print(f"not of one machine: {difference}", highlight=False)
    found = comparison.compare(*sides)
    if all(verdict.word.startswith("only in") for verdict in found):
        raise typer.BadParameter("A and B have no row in common")
    console.print(tables.of_verdicts(found, before, after))
    console.print(comparison.summary(found))
    if any(verdict.worse for verdict in found):
        raise typer.Exit(1)


@app.command()
def page(
    results: Annotated[Path, typer.Argument(help="A results file.")],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("bench.html"),
    pictures: Annotated[
        Path | None, typer.Option(help="A folder for the plots as PNG and SVG too.")
    ] = None,
) -> None:
    """One page of plots and tables that needs nothing else, no network either."""
    if find_spec("matplotlib") is None:
        raise typer.BadParameter("the page needs matplotlib: pip install matplotlib")
    from prefixattn.bench.page import html, save_pictures

    try:
        found = records.read(results, records.FIELDS)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(html(found))
        written = [out, *(save_pictures(found, pictures) if pictures else [])]
    except OSError as error:
        raise typer.BadParameter(str(error)) from None
    Console().print("wrote " + ", ".join(map(str, written)), highlight=False)


@app.command()
def markdown(
    results: Annotated[Path, typer.Argument(help="A results file.")],
    suite: Suites = None,
) -> None:
    """The results as the tables that README and docs show."""
    from prefixattn.bench.figures import table

    try:
        for name in suite or ():
            cases(name, "cpu")  # it names the known ones
        found = records.read(results, records.FIELDS)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    chosen, there = suite or DEFAULT, {row["suite"] for row in records.rows_of(found)}
    if not there.intersection(chosen):
        raise typer.BadParameter(
            f"{results} has rows of {sorted(there)} alone: name one of these with --suite"
        )
    typer.echo(table(found, tuple(chosen)))


@app.command()
def targets(results: Annotated[Path, typer.Argument(help="A results file.")]) -> None:
    """What the C++ kernels have to reach; ends with status 1 where they do not."""
    from prefixattn.bench.targets import verdicts

    try:
        found = verdicts(records.read(results, records.FIELDS))
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    if not found:
        raise typer.BadParameter(f"{results} has no row that a target is about")
    Console().print(tables.of_targets(found))
    if not all(target.met for target in found):
        raise typer.Exit(1)
