"""The results file as the tables that the docs show."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import mean, median

from benchmarks.methods.grid import chosen_rate
from benchmarks.methods.ways import METHODS
from prefixattn.bench.figures import caption
from prefixattn.bench.records import Record, rows_of
from prefixattn.demo.tasks import LOSS

KIB, MIB = 2**10, 2**20
NEVER = "never"


def scored(records: Iterable[Record]) -> list[Record]:
    """The rows that count: those at the rate that was chosen, without those that chose it."""
    rows = rows_of(records)
    pairs = {(row["method"], row["task"]) for row in rows}
    rates = {pair: chosen_rate(rows, *pair) for pair in pairs}
    return [
        row
        for row in rows
        if row["purpose"] == "score" and row["rate"] == rates[row["method"], row["task"]]
    ]


def of(rows: Iterable[Record], **wanted: object) -> list[Record]:
    """The rows whose fields are these."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def names(rows: Sequence[Record], field: str) -> list[str]:
    """The values of a field in the order in which they first come; methods in their own."""
    found = dict.fromkeys(row[field] for row in rows)
    return [name for name in METHODS if name in found] if field == "method" else list(found)


def sizes(rows: Sequence[Record]) -> list[int]:
    """The numbers of training examples, ascending."""
    return sorted({row["examples"] for row in rows})


def better(score_name: str) -> Callable[[Iterable[float]], float]:
    """Which of several scores is the best one."""
    return min if score_name == LOSS else max


def target_loss(rows: Sequence[Record]) -> float:
    """Halfway from the untrained base's validation loss to the best method's, one task's rows."""
    most = of(rows, examples=sizes(rows)[-1])
    means = {m: mean(x["validation"] for x in of(most, method=m)) for m in names(most, "method")}
    return (means.get("untrained base", max(means.values())) + min(means.values())) / 2


def seconds_to(loss: float, rows: Sequence[Record]) -> float | None:
    """The median over seeds of the training seconds to this validation loss; None: one never is."""
    found = []
    for row in rows:
        there = [seconds for _, seconds, reached in row.get("curve", ()) if reached <= loss]
        if not there:
            return None
        found.append(there[0])
    return median(found) if found else None


def table(records: Sequence[Record]) -> str:
    """A table of each task, best scores in bold, and one of what every method costs."""
    rows = scored(records)
    parts = [caption(records), *(_task(of(rows, task=t)) for t in names(rows, "task"))]
    return "\n\n".join([*parts, _costs(rows)])


def _task(rows: Sequence[Record]) -> str:
    counts, score_name = sizes(rows), rows[0]["score_name"]
    best = better(score_name)
    leading = {
        n: best(
            mean(r["score"] for r in of(rows, method=m, examples=n)) for m in names(rows, "method")
        )
        for n in counts
    }
    target = target_loss(rows)
    unit = "nats a token" if score_name == LOSS else score_name
    lines = [
        f"**{rows[0]['task']}** ({unit} on held-out files, the mean and the range over seeds)",
        "",
        f"| method | {' | '.join(f'{n} examples' for n in counts)} | s to loss {target:.2f} |",
        "|---|" + "--:|" * (len(counts) + 1),
    ]
    for method in names(rows, "method"):
        cells = [_spread(of(rows, method=method, examples=n), leading[n]) for n in counts]
        chosen = of(rows, method=method, examples=counts[-1])
        seconds = seconds_to(target, chosen)
        time = NEVER if seconds is None else f"{seconds:.1f}"
        cells.append(time if "curve" in chosen[0] else "")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(rows: Sequence[Record], leading: float) -> str:
    scores = [row["score"] for row in rows]
    middle = mean(scores)
    percent = rows[0]["score_name"] != LOSS
    words = [
        f"{100 * x:.0f}" if percent else f"{x:.2f}" for x in (middle, min(scores), max(scores))
    ]
    shown = f"**{words[0]}**" if middle == leading else words[0]
    unit = " %" if percent else ""
    return f"{shown}{unit} ({words[1]} to {words[2]})"


def _costs(rows: Sequence[Record]) -> str:
    """Medians over all tasks and numbers of examples."""
    lines = [
        "| method | trained parameters | KiB on disk a task | ms a step | MiB at a step's peak |",
        "|---|--:|--:|--:|--:|",
    ]
    for method in names(rows, "method"):
        chosen = of(rows, method=method)
        steps, peaks = ([r[f] for r in chosen if r.get(f) is not None] for f in ("step", "peak"))
        cells = [
            f"{round(median(row['parameters'] for row in chosen)):,}",
            f"{median(row['bytes'] for row in chosen) / KIB:,.0f}",
            f"{1e3 * median(steps):.0f}" if steps else "",
            f"{median(peaks) / MIB:.0f}" if peaks else "",
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)
