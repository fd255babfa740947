"""The results as pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median

from matplotlib.figure import Figure

from benchmarks.methods.report import KIB, better, names, of, scored, sizes
from prefixattn.bench.records import Record
from prefixattn.demo.tasks import LOSS

SHADES = ("#9ecae1", "#4292c6", "#08306b")  # few to many examples
PREFIX, OTHER = "#d95f02", "#555555"
NEAR = 1.6  # how far to the right of its point a name stands
LINES, COLUMNS_A_DECADE = 22, 1.5
SUFFIXES = ("svg", "png")


def save(records: Sequence[Record], folder: Path) -> list[Path]:
    """Each picture as SVG and PNG; the files written."""
    rows, written = scored(records), []
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        figure = draw(rows)
        for suffix in SUFFIXES:
            written.append(folder / f"{name}.{suffix}")
            figure.savefig(written[-1], dpi=130, metadata={"Date": None} if suffix == "svg" else {})
    return written


def scores(rows: Sequence[Record]) -> Figure:
    """A panel for each task: a line for each method, a point for each number of examples."""
    tasks = names(rows, "task")
    figure = Figure(figsize=(4.2 * len(tasks), 5.2), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        chosen = of(rows, task=task)
        score_name = chosen[0]["score_name"]
        order = _by_score(chosen, sizes(chosen)[-1])
        for place, method in enumerate(order):
            axes.axhline(place, color="0.92", zorder=0)
            for shade, count in zip(SHADES[-len(sizes(rows)) :], sizes(rows), strict=True):
                values = [row["score"] for row in of(chosen, method=method, examples=count)]
                axes.plot([min(values), max(values)], [place, place], color=shade, lw=1.5)
                axes.plot(mean(values), place, "o", color=shade, ms=6)
        axes.set_yticks(range(len(order)), order)
        for label in axes.get_yticklabels():
            label.set_color(PREFIX if "prefix" in label.get_text() else "black")
        unit = "nats a token, held out: less is better" if score_name == LOSS else score_name
        axes.set_title(task)
        axes.set_xlabel(unit)
        if score_name == LOSS:
            axes.invert_xaxis()
        axes.spines[["top", "right"]].set_visible(False)
    for shade, count in zip(SHADES[-len(sizes(rows)) :], sizes(rows), strict=True):
        panels[-1].plot([], [], "o", color=shade, label=f"{count} examples")
    figure.legend(loc="outside lower center", ncols=len(SHADES), frameon=False)
    return figure


def sizes_on_disk(rows: Sequence[Record]) -> Figure:
    """What a task takes on disk against its score from the most examples; names are apart."""
    tasks = names(rows, "task")
    figure = Figure(figsize=(5.6 * len(tasks), 4.4), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        chosen = of(rows, task=task, examples=sizes(rows)[-1])
        points = {}
        for method in names(chosen, "method"):
            mine = of(chosen, method=method)
            size = median(row["bytes"] for row in mine) / KIB
            if size:
                points[method] = size, mean(row["score"] for row in mine)
        for method, (size, score) in points.items():
            axes.plot(size, score, "o", color=PREFIX if "prefix" in method else OTHER, ms=5)
        for method, height in _heights(points).items():
            color = PREFIX if "prefix" in method else OTHER
            size, score = points[method]
            least = size < NEAR * min(size for size, _ in points.values())
            end = size / NEAR if least else size * NEAR
            axes.plot([size, end], [score, height], color=color, lw=0.4)
            side = "right" if least else "left"
            axes.text(end, height, f" {method} ", size=7, va="center", ha=side, color=color)
        axes.set_xscale("log")
        axes.set_xlabel("KiB on disk")
        axes.set_title(f"{task}: {chosen[0]['score_name']}")
        if chosen[0]["score_name"] == LOSS:
            axes.invert_yaxis()
        least, most = axes.get_xlim()
        axes.set_xlim(least / 5, most * 5)  # room for the names
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _heights(points: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Where the names of points stand: those of much the same size one above the other."""
    scores = [score for _, score in points.values()]
    least = (max(scores) - min(scores)) / LINES or 1.0
    found: dict[str, float] = {}
    below: dict[int, float] = {}
    for method, (size, score) in sorted(points.items(), key=lambda item: item[1][1]):
        column = round(COLUMNS_A_DECADE * math.log10(size))
        found[method] = max(score, below.get(column, -math.inf) + least)
        below[column] = found[method]
    return found


PICTURES = {"methods-scores": scores, "methods-size": sizes_on_disk}


def _by_score(rows: Sequence[Record], count: int) -> list[str]:
    """The methods, the best one last: it is drawn on top."""
    means = {
        method: mean(row["score"] for row in of(rows, method=method, examples=count))
        for method in names(rows, "method")
    }
    return sorted(means, key=means.__getitem__, reverse=better(rows[0]["score_name"]) is min)
