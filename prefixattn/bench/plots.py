"""The pictures: bars for each case of a suite, growth curves, the roofline."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator

from prefixattn.bench.figures import MEBIBYTE, by_case, tried
from prefixattn.bench.growth import AXES, PASSES, curve
from prefixattn.bench.providers import FLOOR, OURS, PROVIDERS
from prefixattn.bench.records import Record, timed

# Ours in blues, peers in warm colours and greys; each provider keeps its own everywhere.
COLOURS = {
    "ours-triton": "#0b2e59",
    "ours-cpu": "#1f6fc2",
    "ours-sdpa": "#6fb1ea",
    "ours-reference": "#b9d6ef",
    "transformers": "#c2410c",
    "cat+math": "#a8a29e",
    "cat+flash": "#f59e0b",
    "cat+efficient": "#d6b24a",
    "cat+cudnn": "#7c5c1e",
    "cat+flex": "#9d4edd",
    "copied+sdpa": "#e07a9a",
    "merge": "#2f9e6e",
    "flash-attn": "#b91c1c",
    "FlashInfer": "#4d7c0f",
    "xformers": "#57534e",
    FLOOR: "#1c1917",
}
MARKERS = dict(zip(PROVIDERS, "P o s X D v ^ < > p h d * H 8 .".split(), strict=True))
COLUMNS = 3
CLIP = 2.5  # medians; a bar that is longer goes on beyond the panel


def bars(rows: Sequence[Record]) -> Figure:
    """A panel for each case: milliseconds of every provider, and the floor as a dotted line."""
    cases = by_case(rows)
    shown = [name for name in tried(rows) if name != FLOOR]
    lines = math.ceil(len(cases) / COLUMNS)
    size = (4.4 * COLUMNS, lines * (0.9 + 0.22 * max(1, len(shown))))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(lines, COLUMNS, squeeze=False)
    for place, (case, chosen) in zip(grid.flat, cases.items(), strict=False):
        _panel(place, case, chosen, shown)
    for place in list(grid.flat)[len(cases) :]:
        place.set_axis_off()
    return figure


def _panel(place: Axes, case: str, rows: Sequence[Record], names: Sequence[str]) -> None:
    found = {row["provider"]: row for row in rows}
    floor = found.get(FLOOR)
    times = [row["ms"][0] for row in timed(rows)] or [1.0]
    longest = min(max(times), CLIP * statistics.median(times))
    for y, name in enumerate(names):
        row = found.get(name)
        if row is None or row["state"] != "timed":
            word = "" if row is None else row["state"].replace("unsupported", "—")
            colour = "#b91c1c" if word in ("wrong", "failed") else "#a8a29e"
            place.text(0.01 * longest, y, word, va="center", fontsize=7, color=colour)
            continue
        median, low, high = row["ms"]
        end = min(max(median, high), 1.1 * longest)
        place.barh(y, min(median, end), color=COLOURS[name], height=0.72)
        if low < end:
            place.plot([low, end], [y, y], color="black", linewidth=0.8)
        words = f"{median:.3g}" if median <= end else f"{median:.3g} →"
        place.text(end + 0.02 * longest, y, words, va="center", fontsize=7)
    if floor is not None and floor["state"] == "timed":
        place.axvline(floor["ms"][0], color=COLOURS[FLOOR], linestyle=":", linewidth=1)
    place.set_yticks(range(len(names)), names, fontsize=7)
    place.set_ylim(len(names) - 0.5, -0.5)
    place.set_xlim(0, 1.28 * longest)
    place.set_title(f"{case.replace(':', '  ', 1)}  {rows[0]['passes']}", fontsize=7.5, loc="left")
    place.tick_params(axis="x", labelsize=7)
    place.spines[["top", "right"]].set_visible(False)


def growth(rows: Sequence[Record]) -> Iterator[tuple[str, Figure]]:
    """For each pass that has curves: time above, peak memory below, a column for each letter."""
    for passes, words in PASSES.items():
        curves = {axis: curve(rows, axis, passes) for axis in AXES}
        curves = {axis: points for axis, points in curves.items() if points}
        if not curves:
            continue
        figure = Figure(figsize=(3.6 * len(curves), 6.4), layout="constrained")
        grid = figure.subplots(2, len(curves), squeeze=False, sharex="col")
        for column, (axis, points) in enumerate(curves.items()):
            _curves(grid[0][column], points, lambda row: row["ms"][0])
            _curves(grid[1][column], points, lambda row: (row["peak"] or 0) / MEBIBYTE)
            grid[1][column].set_xlabel(f"{axis}: {AXES[axis]}", fontsize=8)
        grid[0][0].set_ylabel(f"ms a {words} call" if passes == "fwd" else f"ms a {words}")
        grid[1][0].set_ylabel("MiB at the peak, beyond the inputs")
        names = {name for points in curves.values() for point in points.values() for name in point}
        _legend(figure, [name for name in PROVIDERS if name in names])
        yield passes, figure


def _curves(
    place: Axes, points: dict[int, dict[str, Record]], of: Callable[[Record], float]
) -> None:
    for name in PROVIDERS:
        found = [(value, of(point[name])) for value, point in points.items() if name in point]
        found = [(value, y) for value, y in found if y > 0]
        if found:
            width = 2.0 if name in OURS else 1.1
            style = ":" if name == FLOOR else "-"
            xs, ys = zip(*found, strict=True)
            place.plot(
                xs, ys, style, color=COLOURS[name], marker=MARKERS[name], lw=width, markersize=4
            )
    place.set_xscale("log", base=2)
    place.set_yscale("log")
    place.set_xticks(list(points), [str(value) for value in points], fontsize=7)
    place.minorticks_off()
    place.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5), numticks=9))
    place.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    place.tick_params(axis="y", labelsize=7)
    place.grid(alpha=0.25)
    place.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, names: Sequence[str]) -> None:
    handles = [
        Line2D([], [], color=COLOURS[name], marker=MARKERS[name], label=name, markersize=5)
        for name in names
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=8, frameon=False)


def roofline(rows: Sequence[Record]) -> Figure:
    """FLOP/s over FLOP/byte beside what torch's own product and copy reach, a panel per dtype."""
    rows = timed(rows)
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure = Figure(figsize=(5.6 * max(1, len(dtypes)), 4.8), layout="constrained")
    grid = figure.subplots(1, max(1, len(dtypes)), squeeze=False)[0]
    for place, dtype in zip(grid, dtypes, strict=False):
        chosen = [row for row in rows if row["dtype"] == dtype]
        intensities = [row["flops"] / row["bytes"] for row in chosen]
        for name in PROVIDERS:
            mine = [row for row in chosen if row["provider"] == name]
            place.scatter(
                [row["flops"] / row["bytes"] for row in mine],
                [1e3 * row["flops"] / row["ms"][0] for row in mine],
                color=COLOURS[name],
                marker=MARKERS[name],
                s=26 if name in OURS else 14,
                zorder=3 if name in OURS else 2,
                alpha=0.9,
            )
        _roof(place, chosen[-1]["rates"], min(intensities), max(intensities))
        place.set_title(dtype, fontsize=9, loc="left")
    names = {row["provider"] for row in rows}
    _legend(figure, [name for name in PROVIDERS if name in names])
    return figure


def _roof(place: Axes, rates: dict[str, float], low: float, high: float) -> None:
    """Torch's copy up to where its matrix product takes over, as measured: no limits of nature."""
    ridge = rates["matmul"] / rates["copy"]
    xs = [min(low, ridge) / 2, ridge, max(high, ridge) * 2]
    place.plot(xs, [min(rates["matmul"], x * rates["copy"]) for x in xs], color="#1c1917", lw=1.4)
    place.text(xs[2], 1.15 * rates["matmul"], _flops(rates["matmul"]), ha="right", fontsize=8)
    words = f"torch's copy: {rates['copy'] / 1e9:.3g} GB/s"
    place.text(0.5 * ridge, rates["matmul"], words, ha="right", fontsize=8)  # beside its slope
    place.set_xscale("log")
    place.set_yscale("log")
    place.set_ylim(top=2.5 * rates["matmul"])
    place.set_xlabel("FLOP for each byte that must move")
    place.set_ylabel("FLOP/s")
    place.grid(alpha=0.25)
    place.spines[["top", "right"]].set_visible(False)


def _flops(rate: float) -> str:
    scale, unit = (1e12, "TFLOP/s") if rate >= 1e12 else (1e9, "GFLOP/s")
    return f"torch's matmul: {rate / scale:.3g} {unit}"
