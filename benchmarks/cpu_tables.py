"""The rows of `benchmarks.cpu` as tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks.targets import Row

WORDS = ("shape", "dtype", "pass", "target", "")  # columns that hold no numbers
PEERS = ("sdpa", "cat", "stock", "floor")


def tables(rows: list[Row], verdicts: list[dict[str, Any]]) -> Iterator[Table]:
    """A table for each suite that was measured, then the targets."""
    shown = (("prefill", _ratios), ("decode", _ratios), ("peak", _peak), ("overhead", _overhead))
    for suite, make in (*shown, ("memory", _memory)):
        if chosen := [row for row in rows if row["suite"] == suite]:
            yield make(chosen)
    if verdicts:
        yield _targets(verdicts)


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in headings:
        words = heading in WORDS
        table.add_column(heading, justify="left" if words else "right", no_wrap=not words)
    return table


def _ratios(rows: list[Row]) -> Table:
    title = "milliseconds of ours, and how many times as long the others take"
    columns = ("shape", "dtype", "pass", "ours", *PEERS)
    table = _table(f"{rows[0]['suite']}: {title}", *columns)
    for row in rows:
        ms = {name: times.median for name, times in row["ms"].items()}
        mine = ms.get("ours")
        cells = ["wrong" if name not in ms else f"{ms[name] / (mine or 1):.2f}" for name in PEERS]
        if mine is None:  # there is nothing to compare with
            cells = ["" for _ in PEERS]
        words = (row["shape"], row["dtype"], row["pass"])
        table.add_row(*words, "wrong" if mine is None else f"{mine:.3g}", *cells)
    return table


def _peak(rows: list[Row]) -> Table:
    title = f"peak: useful GFLOP/s, {rows[0]['shape']}"
    table = _table(title, "dtype", "pass", "ours", "torch's matmul", "%")
    for row in rows:
        rate = row["GFLOP/s"]
        part = f"{100 * rate['ours'] / rate['matmul']:.0f}" if "ours" in rate else ""
        cells = [f"{rate[name]:.0f}" if name in rate else "wrong" for name in ("ours", "matmul")]
        table.add_row(row["dtype"], row["pass"], *cells, part)
    return table


def _overhead(rows: list[Row]) -> Table:
    title = f"overhead: microseconds of a call, {rows[0]['shape']}"
    table = _table(title, "", "median", "20 %", "80 %")
    for row in rows:
        for name, times in row["ms"].items():
            table.add_row(name, *(f"{1e3 * number:.1f}" for number in times))
    return table


def _memory(rows: list[Row]) -> Table:
    shape = rows[0]["shape"].partition(" ")[2]
    title = f"memory of a training step over its inputs and gradients, MiB: {shape}"
    table = _table(title, "", *(f"B{row['B']}" for row in rows))
    for name in rows[0]["MiB"]:
        table.add_row(name, *(f"{row['MiB'][name]:.0f}" for row in rows))
    return table


def _targets(found: list[dict[str, Any]]) -> Table:
    table = _table("targets", "target", "wanted", "measured", "")
    for line in found:
        sign = "at most" if line["at_most"] else "at least"
        measured = "wrong" if line["measured"] is None else f"{line['measured']:.2f}"
        verdict = "met" if line["met"] else "MISSED"
        table.add_row(line["target"], f"{sign} {line['wanted']}", measured, verdict)
    return table
