"""Which rows of two measurements differ by more than the noise of both."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from prefixattn.bench.machine import SAME
from prefixattn.bench.providers import FLOOR
from prefixattn.bench.records import Key, Record, key_of, rows_of, runs_of

LEAST = 0.02  # two builds of the same code may differ by as much, by where their code lies
UNSURE = 0.25  # a row that is noisier than this does not say that nothing has changed
NORMAL = statistics.NormalDist().inv_cdf(0.975)
WORSE = ("slower", "lost")


@dataclass(frozen=True)
class Verdict:
    """What became of a row: `change` and `noise` are parts of the time before.

    `word` is "slower", "faster", "same", "cannot tell", "lost" (a time before and none after),
    "gained", or "only in A", "only in B"; `a` and `b` are milliseconds, NaN where there is no time.
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
        if self.word in ("same", "cannot tell"):
            words = "the same within noise" if self.word == "same" else self.word
            return f"{words} ({self.change:+.0%}, noise {self.noise:.0%})"
        return f"{self.word}{f': {self.reason}' if self.reason else ''}"


@dataclass(frozen=True)
class Level:
    """Repeated measurements of a row: medians of their medians and percentiles, in ms."""

    median: float
    low: float
    high: float
    medians: tuple[float, ...]


def level(rows: Sequence[Record]) -> Level:
    """The level of one row's repeated measurements."""
    medians, lows, highs = zip(*(row["ms"] for row in rows), strict=True)
    middle, low, high = map(statistics.median, (medians, lows, highs))
    return Level(middle, low, high, medians)


def compare(a: Sequence[list[Record]], b: Sequence[list[Record]]) -> list[Verdict]:
    """A verdict for each row of either side; each side is the records of its runs.

    A change of repeated runs counts where it lies outside of a 95 % interval (Student's t) that
    their medians give; one of single runs where the 20 to 80 % ranges do not overlap. It has to be
    larger than the change of the same case's floor, too: that is the machine. Under a softcap the
    floor is ours, and says nothing.
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
        ours = key == floor or before[key][0].get("softcap") is not None
        drift = 0.0 if ours else _drift(before.get(floor, []), after.get(floor, []))
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
    noise = max(_uncertainty(x, y) / x.median, drift, LEAST)
    if abs(change) <= noise:
        word = "same" if noise <= UNSURE else "cannot tell"
    else:
        word = "slower" if change > 0 else "faster"
    return Verdict(key, word, *times, change, noise)


def _uncertainty(x: Level, y: Level) -> float:
    """What two levels may differ by when nothing has changed, in ms."""
    counts = len(x.medians), len(y.medians)
    if min(counts) < 2:
        up = y.median > x.median
        return x.high - x.median + y.median - y.low if up else x.median - x.low + y.high - y.median
    freedom = sum(counts) - 2
    squares = sum(n * statistics.pvariance(s.medians) for n, s in zip(counts, (x, y), strict=True))
    return _students_t(freedom) * math.sqrt(squares / freedom * sum(1 / n for n in counts))


def _students_t(freedom: int) -> float:
    """The two-sided 95 % quantile, by its expansion (Abramowitz & Stegun 26.7.5)."""
    z = NORMAL
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def strangers(a: Sequence[list[Record]], b: Sequence[list[Record]]) -> list[str]:
    """What of the two sides' machines differs, so that times say nothing of the code."""
    one, other = (runs_of(side[-1])[-1] for side in (a, b))
    return [
        f"{fact} is {one.get(fact)} in A and {other.get(fact)} in B"
        for fact in SAME
        if one.get(fact) != other.get(fact)
    ]


def summary(found: Sequence[Verdict]) -> str:
    """The verdicts counted, in one sentence."""
    counts: dict[str, int] = {}
    for verdict in found:
        counts[verdict.word] = counts.get(verdict.word, 0) + 1
    return ", ".join(f"{count} {word}" for word, count in counts.items()) or "nothing in common"
