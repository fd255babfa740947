"""What ``cartridge.py`` found: as JSON, as tables, and as a picture."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prefixattn.files import write_json

WITHOUT, START, TRAINED, WHOLE = "no context", "start", "cartridge", "document"
WAYS = (WITHOUT, START, TRAINED, WHOLE)


@dataclass(frozen=True)
class Score:
    """Answers held against those of the model with the whole document in context.

    Attributes:
        divergence: KL divergence from the latter's next-token distribution, nats per token.
        agreement: share of the tokens where both hold the same one likeliest.
        loss: on the real text, nats per token.
    """

    divergence: float
    agreement: float
    loss: float


@dataclass
class Findings:
    """Everything that was measured.

    Attributes:
        settings: the run's.
        conversations: number of those studied.
        layer_bytes: of one token's key and value, by layer.
        asked_tokens: answer tokens that are scored, by what is asked.
        scores: by way, and what is asked.
        shorter: by number of the document's first tokens in context, and what is asked.
        curve: of the cartridge, by training step, and what is asked.
        questions, answers: a few questions, and the greedy answers to them, by way.
        seconds: from the document to the last score, without the reader's training.
    """

    settings: dict[str, Any]
    conversations: int
    layer_bytes: list[int]
    asked_tokens: dict[str, int]
    scores: dict[str, dict[str, Score]]
    shorter: dict[int, dict[str, Score]]
    curve: dict[int, dict[str, Score]]
    questions: list[str]
    answers: dict[str, list[str]]
    seconds: float = 0.0

    def tokens(self, way: str) -> int:
        """Tokens that the model has in context before the question."""
        whole: int = self.settings["document_tokens"]
        short: int = self.settings["tokens"]
        return {WITHOUT: 0, START: short, TRAINED: short, WHOLE: whole}[way]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values, all layers together."""
        return sum(self.layer_bytes)


def save(findings: Findings, folder: Path) -> None:
    """Write ``report.json`` and ``cartridge.png`` into ``folder``, each whole or not at all."""
    content = asdict(findings)
    content["settings"] = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in findings.settings.items()
    }
    write_json(folder / "report.json", content)
    temporary = folder / f".cartridge-{os.getpid()}.png"
    try:
        draw(findings).savefig(temporary, dpi=150)
        os.replace(temporary, folder / "cartridge.png")
    finally:
        temporary.unlink(missing_ok=True)


def show(findings: Findings, console: Console) -> None:
    """Print the tables."""
    console.print(_comparison(findings))
    console.print(_answers(findings))


def _comparison(findings: Findings) -> Table:
    settings = findings.settings
    table = Table(
        title=f"{settings['document']}: {settings['document_tokens']} tokens in a cartridge of "
        f"{settings['tokens']}\n{findings.conversations} conversations, {settings['steps']} steps, "
        f"{findings.seconds:.0f} s",
        title_justify="left",
    )
    table.add_column("")
    for way in WAYS:
        table.add_column(way, justify="right")
    table.add_row("tokens in context", *(f"{findings.tokens(way)}" for way in WAYS))
    sizes = [findings.tokens(way) * findings.token_bytes for way in WAYS]
    table.add_row("keys and values, KiB", *(f"{size / 1024:,.0f}" for size in sizes))
    per_token = [size / settings["document_tokens"] for size in sizes]
    table.add_row("  bytes per document token", *(f"{size:,.0f}" for size in per_token))
    for asked in findings.scores[WHOLE]:
        scores = [findings.scores[way][asked] for way in WAYS]
        table.add_section()
        table.add_row(f"{asked}: {findings.asked_tokens[asked]} answer tokens")
        table.add_row("  KL from the document's", *(f"{s.divergence:.3f}" for s in scores))
        table.add_row("  same likeliest token", *(f"{s.agreement:.1%}" for s in scores))
        table.add_row("  loss on the real text", *(f"{s.loss:.3f}" for s in scores))
    return table


def _answers(findings: Findings) -> Table:
    table = Table(
        title="Questions that the study did not ask",
        title_justify="left",
        show_lines=True,
    )
    for heading in ("question", *WAYS):
        table.add_column(heading, ratio=1, overflow="fold")
    for i, question in enumerate(findings.questions):
        cells = (question, *(findings.answers[way][i] for way in WAYS))
        table.add_row(*(escape(cell.strip()) for cell in cells))
    return table


def draw(findings: Findings) -> Figure:
    """Divergence over training, and against memory beside the document's first tokens."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    training, memory = figure.subplots(1, 2, sharey=True)
    kibibytes = findings.token_bytes / 1024
    for asked, color in zip(findings.scores[WHOLE], ("#1f4e79", "#c2185b"), strict=True):
        steps = list(findings.curve)
        values = [findings.curve[step][asked].divergence for step in steps]
        training.plot(steps, values, color=color, marker="o", label=asked)
        by_length = {
            findings.tokens(WITHOUT): findings.scores[WITHOUT],
            **findings.shorter,
            findings.tokens(WHOLE): findings.scores[WHOLE],
        }
        memory.plot(
            [length * kibibytes for length in by_length],
            [scores[asked].divergence for scores in by_length.values()],
            color=color,
            marker=".",
            label=f"the document's first tokens: {asked}",
        )
        memory.plot(
            [findings.tokens(TRAINED) * kibibytes],
            [findings.scores[TRAINED][asked].divergence],
            color=color,
            linestyle="none",
            marker="*",
            markersize=14,
            label=f"cartridge: {asked}",
        )
    training.set_xlabel("training step")
    training.set_ylabel("KL from the whole document in context\n(nats per token)")
    training.set_title(f"A cartridge of {findings.tokens(TRAINED)} tokens, learning")
    memory.set_xlabel("keys and values in context (KiB)")
    memory.set_title(f"{findings.settings['document']}: what memory buys")
    for axes in (training, memory):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    return figure
