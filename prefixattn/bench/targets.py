"""What the C++ kernels have to reach, and whether a results file shows that they do."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from prefixattn.bench.figures import by_case
from prefixattn.bench.records import Record, rows_of

OURS = "ours-cpu"
PEERS = ("transformers", "cat+flash", "ours-sdpa")


@dataclass(frozen=True)
class Target:
    """A figure that is wanted, and what was measured; None where ours was wrong."""

    words: str
    wanted: float
    measured: float | None
    at_most: bool = False

    @property
    def met(self) -> bool:
        """Whether the figure is reached."""
        if self.measured is None:
            return False
        return self.measured <= self.wanted if self.at_most else self.measured >= self.wanted


# (suite, dtype) -> how many times as long transformers takes, by geometric mean.
OVER_TRANSFORMERS = {
    ("prefill", "float32"): 1.5,
    ("prefill", "bfloat16"): 2.7,
    ("training", "float32"): 1.3,
    ("training", "bfloat16"): 2.2,
    ("shared-prefix", "float32"): 8.0,
    ("shared-prefix", "bfloat16"): 8.0,
}
# (suite, dtype) -> part of the rate of torch's square matrix product, in the best case.
OF_MATMUL = {
    ("prefill", "float32"): 0.65,
    ("prefill", "bfloat16"): 0.45,
    ("training", "float32"): 0.60,
    ("training", "bfloat16"): 0.35,
}
SUITES = ("prefill", "training", "decode", "shared-prefix")
OVERHEAD = "GPT-2:B1,M1,C15,P16,float32"


def verdicts(records: Sequence[Record]) -> list[Target]:
    """A line for each target that the records say something about."""
    rows = [row for suite in SUITES for row in rows_of(records, suite)]
    found = [*_over_transformers(rows), *_over_all(rows), *_of_matmul(rows)]
    tiny = [row for row in rows if row["case"] == OVERHEAD]
    if ratios := _ratios(tiny, "copied+sdpa"):
        words = f"a tiny call over plain SDPA's ({OVERHEAD})"
        measured = 1 / ratios[0] if ratios[0] else None
        found.append(Target(words, 2.0, measured, at_most=True))
    return found + list(_memory(rows_of(records, "memory")))


def _ratios(rows: Sequence[Record], peer: str) -> list[float]:
    """How many times as long the peer takes, by case; 0 where ours has no time."""
    found = []
    for suite in SUITES:
        for chosen in by_case([row for row in rows if row["suite"] == suite]).values():
            times = {row["provider"]: row["ms"][0] for row in chosen if row["state"] == "timed"}
            if peer in times and any(row["provider"] == OURS for row in chosen):
                found.append(times[peer] / times[OURS] if OURS in times else 0.0)
    return found


def _mean(ratios: Sequence[float]) -> float | None:
    """The geometric mean; None where one of ours has no time."""
    if not all(ratios):
        return None
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def _of(rows: Sequence[Record], suite: str, dtype: str) -> list[Record]:
    return [row for row in rows if (row["suite"], row["dtype"]) == (suite, dtype)]


def _over_transformers(rows: Sequence[Record]) -> Iterator[Target]:
    for (suite, dtype), wanted in OVER_TRANSFORMERS.items():
        if ratios := _ratios(_of(rows, suite, dtype), "transformers"):
            words = f"over transformers, {suite}, {dtype}, geometric mean"
            yield Target(words, wanted, _mean(ratios))


def _over_all(rows: Sequence[Record]) -> Iterator[Target]:
    """Nobody is faster anywhere; in bfloat16 the others are well behind."""
    for peer in PEERS:
        if ratios := _ratios(rows, peer):
            yield Target(f"over {peer}, every case, the least", 1.0, min(ratios) or None)
        for suite in SUITES:
            if ratios := _ratios(_of(rows, suite, "bfloat16"), peer):
                words = f"over {peer}, {suite}, bfloat16, geometric mean"
                yield Target(words, 1.4, _mean(ratios))


def _of_matmul(rows: Sequence[Record]) -> Iterator[Target]:
    for (suite, dtype), wanted in OF_MATMUL.items():
        mine = [row for row in _of(rows, suite, dtype) if row["provider"] == OURS]
        parts = [row["of_matmul"] for row in mine if row["state"] == "timed"]
        if mine:
            words = f"of torch's matrix product, {suite}, {dtype}, the best case"
            yield Target(words, wanted, max(parts, default=None))


def _memory(rows: Sequence[Record]) -> Iterator[Target]:
    """What a training step takes beyond its output and gradients grows less than copies would."""
    mine = sorted((row for row in rows if row["provider"] == OURS), key=lambda row: int(row["B"]))
    if len(mine) < 2:
        return
    words = "growth of a training step's memory over B, as a part of prefix copies"
    first, last = mine[0], mine[-1]
    measured = None
    if first["state"] == last["state"] == "timed" and None not in (first["peak"], last["peak"]):
        one = 2 * _size(last) * last["H_kv"] * last["P"] * last["D"]  # one row's copy
        grown = _extra(last) - _extra(first)
        measured = grown / (one * (last["B"] - first["B"]))
    yield Target(words, 0.1, measured, at_most=True)


def _extra(row: Record) -> float:
    """Bytes at the peak beyond the rows' output and gradients, which anybody has to hold."""
    queries = 2 * row["H"] * row["M"]  # the output, and the query's gradient
    keys = 2 * row["H_kv"] * (row["C"] + row["M"])
    return float(row["peak"] - _size(row) * row["D"] * row["B"] * (queries + keys))


def _size(row: Record) -> int:
    return 4 if row["dtype"] == "float32" else 2
