"""Rows and verdicts as tables in a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.columns import Columns
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from prefixattn.bench.comparison import Verdict
from prefixattn.bench.figures import BY_PEAK, PEAK_WORDS, by_case, peak_words, tried
from prefixattn.bench.providers import FLOOR
from prefixattn.bench.records import Record, timed
from prefixattn.bench.targets import Target

STYLES = {"slower": "bold red", "lost": "bold red", "faster": "green"}
UNBOUNDED = 10_000
TIME_WORDS = "milliseconds a call (blank: the results file has the reason)"
# What is shown of each provider of a case, from the rows of it.
Cells = Callable[[Sequence[Record]], dict[str, str]]


def of_rows(rows: Sequence[Record], suites: Sequence[str]) -> Iterator[_Fitting]:
    """Each suite that has rows: milliseconds, the best of a case in bold; of some the peaks too."""
    for suite in suites:
        chosen = [row for row in rows if row["suite"] == suite]
        if chosen:
            yield _fitting(f"{suite}: {TIME_WORDS}", chosen, _times)
        if chosen and suite in BY_PEAK:
            yield _fitting(f"{suite}: {PEAK_WORDS}", chosen, _peaks)


@dataclass(frozen=True)
class _Fitting:
    """A wide form, and the one that is shown where the terminal is narrower than that."""

    wide: Table
    narrow: Group

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        unbounded = options.update(max_width=UNBOUNDED)
        wanted = console.measure(self.wide, options=unbounded).maximum
        yield self.wide if wanted <= options.max_width else self.narrow


def _fitting(title: str, rows: Sequence[Record], cells: Cells) -> _Fitting:
    return _Fitting(_matrix(title, rows, cells), _blocks(title, rows, cells))


def _matrix(title: str, rows: Sequence[Record], of: Cells) -> Table:
    """A line for each case, a column for each provider."""
    names = tried(rows)
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, title_justify="left")
    for heading in ("shape", "pass"):
        table.add_column(heading, no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for case, chosen in by_case(rows).items():
        cells = of(chosen)
        table.add_row(case, chosen[0]["passes"], *(cells.get(name, "") for name in names))
    return table


def _blocks(title: str, rows: Sequence[Record], of: Cells) -> Group:
    """The providers of each case in as many columns as there is room for."""
    parts: list[RenderableType] = [f"[italic]{title}"]
    for case, chosen in by_case(rows).items():
        cells = [f"{name} {cell}" for name, cell in of(chosen).items() if cell]
        columns = Columns(cells, padding=(0, 3))
        parts += [Text(f"{case}  {chosen[0]['passes']}", "bold"), Padding(columns, (0, 0, 1, 2))]
    return Group(*parts)


def _peaks(rows: Sequence[Record]) -> dict[str, str]:
    return {row["provider"]: peak_words(row) for row in rows}


def _times(rows: Sequence[Record]) -> dict[str, str]:
    times = [row["ms"][0] for row in timed(rows) if row["provider"] != FLOOR]
    best = min(times, default=0.0)
    return {row["provider"]: _cell(row, best) for row in rows}


def _cell(row: Record, best: float) -> str:
    if row["state"] == "unsupported":
        return ""
    if row["state"] != "timed":
        return f"[red]{row['state']}"
    text = f"{row['ms'][0]:.3g}"
    return f"[bold]{text}" if row["ms"][0] == best else text


def of_verdicts(found: Sequence[Verdict], a: str, b: str) -> Table:
    """A line for each row that both sides know something about."""
    title = f"A = {a}, B = {b}: milliseconds"
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, title_justify="left")
    for heading in ("suite", "shape", "provider"):
        table.add_column(heading, overflow="fold")
    table.add_column("A", justify="right")
    table.add_column("B", justify="right")
    table.add_column("verdict", overflow="fold")
    for verdict in found:
        if verdict.word == "no time in either":
            continue
        suite, case, provider, _ = verdict.key
        times = ("" if ms != ms else f"{ms:.3g}" for ms in (verdict.a, verdict.b))
        words = verdict.words
        style = STYLES.get(verdict.word, "")
        table.add_row(suite, case, provider, *times, words, style=style)
    return table


def of_targets(found: Sequence[Target]) -> Table:
    """A line for each target: what is wanted, what was measured."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("target", overflow="fold")
    for heading in ("wanted", "measured"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for target in found:
        sign = "at most" if target.at_most else "at least"
        measured = "wrong" if target.measured is None else f"{target.measured:.2f}"
        verdict = "met" if target.met else "[bold red]MISSED"
        table.add_row(target.words, f"{sign} {target.wanted}", measured, verdict)
    return table
