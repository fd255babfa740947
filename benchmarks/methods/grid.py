"""All cells in order, shared out to processes, each written once it is done."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product, repeat
from multiprocessing import get_context
from typing import Any

import torch
import transformers

from benchmarks.methods.cell import Cell, Place, peak_of, run
from benchmarks.methods.ways import LADDER, METHODS
from prefixattn.bench.records import Record, Writer, rows_of
from prefixattn.demo.tasks import BUILDERS

RATE_SEED = 1000  # of the cells that choose a rate; no score is of this seed
FIELDS = ("method", "task", "examples", "seed", "rate", "purpose")


@dataclass(frozen=True)
class Grid:
    """What is compared. The rate of a method is chosen once for each task, by validation loss."""

    methods: tuple[str, ...] = tuple(METHODS)
    tasks: tuple[str, ...] = tuple(BUILDERS)
    examples: tuple[int, ...] = (16, 64, 256)
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        """Refuse what is not there (ValueError)."""
        for name, got, known in (("method", self.methods, METHODS), ("task", self.tasks, BUILDERS)):
            if wrong := set(got) - set(known):
                raise ValueError(f"{name}: expected some of {_quoted(known)}; got {_quoted(wrong)}")

    def for_rates(self, rows: Sequence[Record]) -> list[Cell]:
        """The cells that choose rates, from a middling number of examples."""
        examples = sorted(self.examples)[len(self.examples) // 2]
        return [
            Cell(method, task, examples, RATE_SEED, rate, "rate")
            for task, method in product(self.tasks, self.methods)
            for rate in rates_to_try(METHODS[method].rates, tried_rates(rows, method, task))
        ]

    def for_scores(self, rows: Sequence[Record]) -> list[Cell]:
        """The cells that count, at the rates that the others chose."""
        cells = product(self.seeds, self.examples, self.tasks, self.methods)
        return [
            Cell(method, task, examples, seed, chosen_rate(rows, method, task))
            for seed, examples, task, method in cells
        ]

    def num_cells(self, rows: Sequence[Record]) -> int:
        """Cells of both kinds, as far as these rows tell."""
        return len(self.for_rates(rows)) + len(self.for_scores(rows))


def _quoted(names: Iterable[str]) -> str:
    """Names that may hold commas."""
    return ", ".join(repr(name) for name in sorted(names))


def tried_rates(rows: Sequence[Record], method: str, task: str) -> dict[float, float]:
    """Learning rates and the validation losses that they came to."""
    return {
        row["rate"]: row["validation"]
        for row in rows
        if (row["method"], row["task"], row["purpose"]) == (method, task, "rate")
    }


def rates_to_try(first: tuple[float, ...], tried: dict[float, float]) -> list[float]:
    """The first ones, and one beyond the best one for as long as that is an outermost one."""
    rates = sorted({*first, *tried})
    if not rates or not tried.keys() >= set(rates):
        return rates
    below, above = LADDER.index(rates[0]) - 1, LADDER.index(rates[-1]) + 1
    if tried[rates[0]] < min(tried[rate] for rate in rates[1:]) and below >= 0:
        rates.insert(0, LADDER[below])
    elif tried[rates[-1]] < min(tried[rate] for rate in rates[:-1]) and above < len(LADDER):
        rates.append(LADDER[above])
    return rates


def chosen_rate(rows: Sequence[Record], method: str, task: str) -> float:
    """The rate of the least validation loss; 0 for what is not trained."""
    tried = tried_rates(rows, method, task)
    return min(tried, key=tried.__getitem__, default=0.0)


def measure(grid: Grid, place: Place, writer: Writer, workers: int) -> Iterator[Record]:
    """Yields each new row. An interruption leaves what was written before."""
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=start_worker)
    try:
        while todo := to_do(grid, rows_of(writer.records)):
            futures: list[Future[dict[str, Any]]] = [pool.submit(run, c, place) for c in todo]
            for future in as_completed(futures):
                writer.add([future.result()])
                yield writer.records[-1]
    finally:
        pool.shutdown(cancel_futures=True)


def measure_peaks(rows: Sequence[Record], place: Place, workers: int) -> Iterator[Record]:
    """Yields each row that counts, with its memory measured anew."""
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=start_worker)
    try:
        chosen = [row for row in rows if row["purpose"] == "score"]
        cells = [Cell(**{name: row[name] for name in FIELDS}) for row in chosen]
        found = pool.map(peak_of, cells, repeat(place))
        for row, row["peak"] in zip(chosen, found, strict=True):
            yield row
    finally:
        pool.shutdown(cancel_futures=True)


def to_do(grid: Grid, rows: Sequence[Record]) -> list[Cell]:
    """The cells that can be measured now: those for scores once every rate is chosen."""
    done = {tuple(row[name] for name in FIELDS) for row in rows}

    def missing(cells: list[Cell]) -> list[Cell]:
        return [cell for cell in cells if _key(cell) not in done]

    return missing(grid.for_rates(rows)) or missing(grid.for_scores(rows))


def start_worker() -> None:
    """What each worker begins with; Ctrl-C is the parent's to hear."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    one_thread()


def one_thread() -> None:
    """One thread of arithmetic, and no words of transformers."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _key(cell: Cell) -> tuple[Any, ...]:
    return tuple(getattr(cell, name) for name in FIELDS)
