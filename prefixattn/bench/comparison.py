"""Which rows of two measurements differ by more than the noise of both."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from prefixattn.bench.providers import FLOOR
from prefixattn.bench.records import Key, Record, key_of, rows_of

LEAST = 0.02  # two builds of the same code may differ by as much, by where their code lies
WORSE = ("slower", "lost")


@dataclass(frozen=True)
class Verdict:
    """What became of a row: `change` and `noise` are parts of the time before.

    `word` is "slower", "faster", "same", "lost" (a time before and none after), "gained", or
    "only in A", "only in B"; `a` and `b` are milliseconds, NaN where there is no time.
    """

    key: Key
    word: str
    a: float
    b: float
    change: float = 0.0
    noise: float = 0.0
    reason: str = ""

    @property
    def worse(self) -> bool:
        """Whether this is what a check should stop at; the floor is no code of ours."""
        return self.word in WORSE and self.key[2] != FLOOR

    @property
    def words(self) -> str:
        """`slower by 12 % (noise 4 %)`, or why there is no figure."""
        if self.word in ("slower", "faster"):
            return f"{self.word} by {abs(self.change):.0%} (noise {self.noise:.0%})"
        if self.word == "same":
            return f"the same within noise ({self.change:+.0%}, noise {self.noise:.0%})"
        return f"{self.word}{f': {self.reason}' if self.reason else ''}"


@dataclass(frozen=True)
class Level:
    """Repeated measurements of a row: medians of their medians and percentiles, in ms.

    `between` is the range of the medians as a part of their median: 0 for a single measurement.
    """

    median: float
    low: float
    high: float
    between: float


def level(rows: Sequence[Record]) -> Level:
    """The level of one row's repeated measurements."""
    medians, lows, highs = zip(*(row["ms"] for row in rows), strict=True)
    middle = statistics.median(medians)
    between = (max(medians) - min(medians)) / middle
    return Level(middle, statistics.median(lows), statistics.median(highs), between)


def compare(a: Sequence[list[Record]], b: Sequence[list[Record]]) -> list[Verdict]:
    """A verdict for each row of either side; each side is the records of its runs.

    A change counts where the 20 to 80 % ranges do not overlap, where it is larger than what the
    medians of repeated runs differ by, and larger than the change of the same case's floor, which
    is no code of ours: that is the machine.
    """
    before, after = _by_key(a), _by_key(b)
    found = []
    for key in dict.fromkeys([*before, *after]):
        if key not in before or key not in after:
            word = "only in A" if key in before else "only in B"
            a_ms, b_ms = (_median(side.get(key, [])) for side in (before, after))
            found.append(Verdict(key, word, a_ms, b_ms))
            continue
        floor = (key[0], key[1], FLOOR, key[3])
        drift = 0.0 if key == floor else _drift(before.get(floor, []), after.get(floor, []))
        found.append(_verdict(key, before[key], after[key], drift))
    return found


def _by_key(runs: Sequence[list[Record]]) -> dict[Key, list[Record]]:
    found: dict[Key, list[Record]] = {}
    for records in runs:
        for row in rows_of(records):
            found.setdefault(key_of(row), []).append(row)
    return found


def _untimed(rows: Sequence[Record]) -> list[Record]:
    return [row for row in rows if row["state"] != "timed"]


def _median(rows: Sequence[Record]) -> float:
    return level(rows).median if rows and not _untimed(rows) else float("nan")


def _drift(a: Sequence[Record], b: Sequence[Record]) -> float:
    """How far the floor of a case moved, as a part of the smaller time."""
    x, y = _median(a), _median(b)
    return abs(max(x, y) / min(x, y) - 1) if x == x and y == y else 0.0


def _verdict(key: Key, a: Sequence[Record], b: Sequence[Record], drift: float) -> Verdict:
    times = _median(a), _median(b)
    if _untimed(a) or _untimed(b):
        reason = (_untimed(b) or _untimed(a))[0]["reason"]
        if _untimed(a) and _untimed(b):
            return Verdict(key, "no time in either", *times, reason=reason)
        return Verdict(key, "lost" if _untimed(b) else "gained", *times, reason=reason)
    x, y = level(a), level(b)
    change = y.median / x.median - 1
    if change > 0:
        apart = (x.high - x.median) + (y.median - y.low)
    else:
        apart = (x.median - x.low) + (y.high - y.median)
    noise = max(apart / x.median, x.between, y.between, drift, LEAST)
    word = "same" if abs(change) <= noise else "slower" if change > 0 else "faster"
    return Verdict(key, word, *times, change, noise)


def summary(found: Sequence[Verdict]) -> str:
    """The verdicts counted, in one sentence."""
    counts: dict[str, int] = {}
    for verdict in found:
        counts[verdict.word] = counts.get(verdict.word, 0) + 1
    return ", ".join(f"{count} {word}" for word, count in counts.items()) or "nothing in common"
