"""What the C++ kernels have to reach, and whether a run's rows do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks.memory import COPIES

Row = dict[str, Any]
PEERS = {"stock": "transformers' way", "cat": "cat + SDPA", "sdpa": 'implementation="sdpa"'}
# (dtype, pass) -> the geometric mean over the prefill shapes, against "stock"
OVER_STOCK = {
    ("bfloat16", "fwd"): 2.7,
    ("bfloat16", "fwd+bwd"): 2.2,
    ("float32", "fwd"): 1.5,
    ("float32", "fwd+bwd"): 1.3,
}
OF_MATMUL = {
    ("float32", "fwd"): 0.65,
    ("float32", "bwd"): 0.60,
    ("bfloat16", "fwd"): 0.45,
    ("bfloat16", "bwd"): 0.35,
}
SHARED, LONG = 8, 512  # rows that share a prefix of so many tokens


def verdicts(rows: list[Row]) -> list[dict[str, Any]]:
    """One entry for each target that the rows say something about."""
    timed = [row for row in rows if row["suite"] in ("prefill", "decode")]
    found = [*_over_stock(timed), *_over_all(timed), *_shared_decode(timed)]
    for row in rows:
        if row["suite"] == "peak":
            words = f"of torch's square matmul, {row['dtype']} {row['pass']}, {row['shape']}"
            found.append(_verdict(words, OF_MATMUL[row["dtype"], row["pass"]], _part(row)))
        elif row["suite"] == "overhead":
            words = f"a tiny call over plain SDPA's, {row['shape']}"
            times = row["ms"]
            ratio = times["ours"].median / times["plain SDPA"].median if "ours" in times else None
            found.append(_verdict(words, 2.0, ratio, at_most=True))
    steps = [row for row in rows if row["suite"] == "memory"]
    if len(steps) > 1:
        words = "growth of a training step's memory over B, as a part of prefix copies"
        found.append(_verdict(words, 0.1, _growth(steps[0], steps[-1]), at_most=True))
    return found


def _part(row: Row) -> float | None:
    rate = row["GFLOP/s"]
    return rate["ours"] / rate["matmul"] if "ours" in rate else None


def _growth(few: Row, many: Row) -> float:
    ours, copies = (many["MiB"][name] - few["MiB"][name] for name in ("ours", COPIES))
    return float(ours / copies)


def _verdict(
    target: str, wanted: float, measured: float | None, at_most: bool = False
) -> dict[str, Any]:
    """`measured` is None where ours was wrong and has no time."""
    met = measured is not None and (measured <= wanted if at_most else measured >= wanted)
    return {
        "target": target,
        "wanted": wanted,
        "at_most": at_most,
        "measured": measured,
        "met": met,
    }


def _ratios(rows: Iterable[Row], peer: str) -> list[float]:
    """How many times as long the peer takes; 0 where ours was wrong and has no time."""
    return [
        row["ms"][peer].median / row["ms"]["ours"].median if "ours" in row["ms"] else 0.0
        for row in rows
        if peer in row["ms"]
    ]


def _mean(ratios: list[float]) -> float:
    """The geometric mean."""
    return math.exp(sum(math.log(max(r, 1e-9)) for r in ratios) / len(ratios))


def _over_stock(rows: list[Row]) -> Iterator[dict[str, Any]]:
    for (dtype, passes), wanted in OVER_STOCK.items():
        chosen = [
            row
            for row in rows
            if (row["suite"], row["dtype"], row["pass"]) == ("prefill", dtype, passes)
        ]
        if ratios := _ratios(chosen, "stock"):
            words = f"over transformers' way, {dtype} {passes}, geometric mean"
            yield _verdict(words, wanted, _mean(ratios))


def _over_all(rows: list[Row]) -> Iterator[dict[str, Any]]:
    for peer, words in PEERS.items():
        if ratios := _ratios(rows, peer):
            yield _verdict(f"over {words}, every row, the least", 1.0, min(ratios))
        for suite in ("prefill", "decode"):  # apart: decode's large ratios would hide the others
            chosen = [row for row in rows if (row["suite"], row["dtype"]) == (suite, "bfloat16")]
            if peer != "stock" and (ratios := _ratios(chosen, peer)):
                target = f"over {words}, {suite}, bfloat16, geometric mean"
                yield _verdict(target, 1.4, _mean(ratios))


def _shared_decode(rows: list[Row]) -> Iterator[dict[str, Any]]:
    shared = [
        row for row in rows if row["suite"] == "decode" and row["B"] >= SHARED and row["P"] >= LONG
    ]
    for dtype in ("float32", "bfloat16"):
        chosen = [row for row in shared if row["dtype"] == dtype]
        if ratios := _ratios(chosen, "stock"):
            words = f"decode, {SHARED} rows and more share {LONG} tokens and more, {dtype}"
            words += ", over transformers' way"
            yield _verdict(f"{words}, geometric mean", 8.0, _mean(ratios))
            yield _verdict(f"{words}, the least", 8.0, min(ratios))
