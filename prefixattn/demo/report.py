"""What the demo found: as JSON, as tables, and as a picture of the curves."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prefixattn.files import write_json

PEFT, OURS, CHECKPOINTED = "PEFT", "prefixattn", "prefixattn, checkpointed"
STYLES: dict[str, dict[str, Any]] = {
    PEFT: {"color": "#f2a65a", "linewidth": 6.0, "linestyle": "-"},
    OURS: {"color": "#1f4e79", "linewidth": 1.6, "linestyle": "-"},
    CHECKPOINTED: {"color": "#c2185b", "linewidth": 1.6, "linestyle": (0, (1.5, 3))},
}
MARKS = {PEFT: ("o", 13), OURS: ("s", 6), CHECKPOINTED: ("x", 6)}


@dataclass(frozen=True)
class Way:
    """One way of tuning: losses in nats per token, seconds per step, memory in MiB."""

    losses: list[float]
    held_out: dict[int, float]
    seconds: float
    peak_memory: float
    memory_growth: float
    overlap: float


@dataclass(frozen=True)
class Shown:
    """One held-out function with its real summary and the answers without and with the prefix."""

    path: str
    name: str
    real: str
    before: str
    after: str


@dataclass(frozen=True)
class Findings:
    """Everything the demo measured.

    Attributes:
        machine: where it ran, the versions, the commit and the command.
        settings: the run's settings.
        counts: sizes of the text, the model and the prefix.
        base_loss, base_overlap: on the held-out functions, without any prefix.
        ways: the three ways of tuning, by name.
        loss_difference: largest difference of a step's loss from stock PEFT's, by way.
        checkpointing_difference: the same between ours with and without checkpointing.
        same_answers: share of the greedy answers that are PEFT's to the letter, by way.
        peft_checkpointing: what happens when stock PEFT trains with checkpointing, in words.
        logits_difference: largest difference between our logits and those of stock PEFT with the
            adapter that we saved; `logits_size` is the largest logit.
        shown: generated examples, drawn by the seed.
        seconds: wall-clock time by part of the demo.
    """

    machine: dict[str, Any]
    settings: dict[str, Any]
    counts: dict[str, int]
    base_loss: float
    base_overlap: float
    ways: dict[str, Way]
    loss_difference: dict[str, float]
    checkpointing_difference: float
    same_answers: dict[str, float]
    peft_checkpointing: str
    logits_difference: float
    logits_size: float
    shown: list[Shown]
    seconds: dict[str, float]


def save(findings: Findings, folder: Path) -> None:
    """Write `report.json` and `curves.png` into `folder`, each whole or not at all."""
    write_json(folder / "report.json", asdict(findings))
    temporary = folder / f".curves-{os.getpid()}.png"
    try:
        draw(findings).savefig(temporary, dpi=150)
        os.replace(temporary, folder / "curves.png")
    finally:
        temporary.unlink(missing_ok=True)


def show(findings: Findings, console: Console) -> None:
    """Print the tables."""
    console.print(_comparison(findings))
    console.print(_checks(findings))
    console.print(_answers(findings.shown))


def _comparison(findings: Findings) -> Table:
    counts, ways = findings.counts, findings.ways
    table = Table(
        title=f"Prefix-tuning {counts['prefix_tokens']} tokens ({counts['prefix_parameters']:,} "
        f"parameters) of a frozen {counts['base_parameters']:,}-parameter Llama, "
        f"{counts['threads']} threads",
        title_justify="left",
    )
    table.add_column("")
    table.add_column("before", justify="right")
    for name in ways:
        table.add_column("stock PEFT" if name == PEFT else name, justify="right")

    def row(label: str, base: str, cells: Sequence[str]) -> None:
        table.add_row(label, base, *cells)

    all_ways = list(ways.values())
    last = len(all_ways[0].losses)
    row("training loss, step 1", "", [f"{way.losses[0]:.6f}" for way in all_ways])
    row(f"training loss, step {last}", "", [f"{way.losses[-1]:.6f}" for way in all_ways])
    largest = [f"{findings.loss_difference[name]:.1e}" if name != PEFT else "" for name in ways]
    row("  farthest from PEFT's", "", largest)
    base = f"{findings.base_loss:.3f}"
    row("held-out loss, at the start", base, [f"{way.held_out[0]:.3f}" for way in all_ways])
    row("held-out loss, at the end", "", [f"{way.held_out[last]:.3f}" for way in all_ways])
    overlaps = [f"{way.overlap:.1%}" for way in all_ways]
    row("held-out ROUGE-L F1", f"{findings.base_overlap:.1%}", overlaps)
    row("median time of a step", "", [f"{way.seconds * 1000:.0f} ms" for way in all_ways])
    row("peak memory, own process", "", [f"{way.peak_memory:.0f} MiB" for way in all_ways])
    row("  of it from training", "", [f"{way.memory_growth:.0f} MiB" for way in all_ways])
    return table


def _checks(findings: Findings) -> Table:
    table = Table(title="Beside it", title_justify="left", show_header=False)
    table.add_row(
        "gradient checkpointing, ours",
        f"trains; losses differ by up to {findings.checkpointing_difference:.1e} from ours without",
    )
    table.add_row("gradient checkpointing, stock PEFT", escape(findings.peft_checkpointing))
    table.add_row(
        "adapter saved by us, loaded by stock PEFT",
        f"logits differ by up to {findings.logits_difference:.1e} "
        f"(the largest is {findings.logits_size:.1f})",
    )
    table.add_row(
        "greedy answers equal to stock PEFT's",
        f"{findings.same_answers[OURS]:.0%} of {findings.counts['answered']}",
    )
    return table


def _answers(shown: Sequence[Shown]) -> Table:
    table = Table(
        title="Held-out functions, drawn by the seed", title_justify="left", show_lines=True
    )
    for heading in ("function", "its docstring", "model without prefix", "with our prefix"):
        table.add_column(heading, ratio=1, overflow="fold")
    for example in shown:
        cells = (f"{example.path}: {example.name}", example.real, example.before, example.after)
        table.add_row(*(escape(cell) for cell in cells))
    return table


def draw(findings: Findings) -> Figure:
    """Training and held-out losses of all ways, and below them their distance from PEFT's."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    losses, distance = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for name, way in findings.ways.items():
        steps = range(1, len(way.losses) + 1)
        losses.plot(steps, way.losses, label=f"{name}: training", alpha=0.9, **STYLES[name])
        marker, size = MARKS[name]
        losses.plot(
            list(way.held_out),
            list(way.held_out.values()),
            linestyle="none",
            marker=marker,
            markersize=size,
            markerfacecolor="none",
            markeredgewidth=1.8,
            color=STYLES[name]["color"],
            label=f"{name}: held-out files",
        )
    losses.axhline(
        findings.base_loss, color="0.45", linestyle="--", label="no prefix: held-out files"
    )
    losses.set_ylabel("loss (nats per token)")
    losses.set_title(
        f"Prefix-tuning a small Llama: stock PEFT and prefixattn from one start, "
        f"P = {findings.counts['prefix_tokens']}"
    )
    losses.legend(ncols=2, fontsize=9)
    losses.grid(alpha=0.25)
    _draw_distance(distance, findings)
    return figure


def _draw_distance(axes: Any, findings: Findings) -> None:
    """How far each training loss is from PEFT's; the same number lies on the zero line."""
    reference = findings.ways[PEFT].losses
    for name, way in findings.ways.items():
        if name == PEFT:
            continue
        gaps = [abs(a - b) for a, b in zip(way.losses, reference, strict=True)]
        style = {**STYLES[name], "linewidth": 1.4}
        axes.plot(range(1, len(gaps) + 1), gaps, **style)
    axes.set_yscale("symlog", linthresh=1e-6)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("distance from\nPEFT's loss")
    axes.set_xlabel("training step")
    axes.grid(alpha=0.25)
