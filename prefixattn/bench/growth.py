"""What the growth curves say, in sentences made from the rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prefixattn.bench.figures import MEBIBYTE
from prefixattn.bench.providers import FLOOR, OURS, PROVIDERS
from prefixattn.bench.records import Record, timed

AXES = {"P": "prefix tokens", "M": "tokens a row", "B": "rows", "R": "different prefixes"}
PASSES = {"fwd+bwd": "training step", "fwd": "decoding"}
# One point of a curve by provider: its row.
Point = dict[str, Record]


def curve(rows: Sequence[Record], axis: str, passes: str) -> dict[int, Point]:
    """The timed rows over one letter, by its value in ascending order, then by provider."""
    found: dict[int, Point] = {}
    for row in timed(rows):
        if (row["axis"], row["passes"]) == (axis, passes):
            found.setdefault(row[axis], {})[row["provider"]] = row
    return dict(sorted(found.items()))


def sentences(rows: Sequence[Record]) -> Iterator[tuple[str, str, list[str]]]:
    """For each curve its pass, its letter, and where each implementation of ours wins or loses."""
    for passes in PASSES:
        for axis in AXES:
            points = curve(rows, axis, passes)
            said = [_of_one(name, axis, points) for name in OURS]
            said += [_of_faults(name, axis, passes, rows) for name in OURS]
            said.append(_of_memory(axis, points))
            if found := [sentence for sentence in said if sentence]:
                yield passes, axis, found


def _of_one(name: str, axis: str, points: dict[int, Point]) -> str:
    """Where one implementation beats every peer; peers are all that is not ours."""
    ratios: dict[int, tuple[float, str]] = {}
    for value, point in points.items():
        peers = {n: row["ms"][0] for n, row in point.items() if n not in (*OURS, FLOOR)}
        if name in point and peers:
            best = min(peers, key=lambda n: peers[n])
            ratios[value] = peers[best] / point[name]["ms"][0], best
    if not ratios:
        return ""
    won = [value for value, (ratio, _) in ratios.items() if ratio >= 1]
    lost = [value for value in ratios if value not in won]
    span = _range([ratio for ratio, _ in ratios.values()])
    every = f"every {axis} measured ({min(ratios)} to {max(ratios)})"
    if not lost:
        return f"{name} wins at {every}: the best peer takes {span} times as long."
    beaten = ", ".join(dict.fromkeys(ratios[value][1] for value in lost))
    if not won:
        return f"{name} loses at {every}: the best peer ({beaten}) takes {span} times as long."
    where = f"{name} wins at {axis} = {_listing(won)} ({_range([ratios[v][0] for v in won])}×)"
    slower = _range([ratios[value][0] for value in lost])
    stop = f"and loses at {axis} = {_listing(lost)}, where {beaten} takes {slower} times as long"
    return f"{where} {stop}."


def _of_faults(name: str, axis: str, passes: str, rows: Sequence[Record]) -> str:
    """Where one implementation has no time because it is wrong."""
    of_it = [
        row
        for row in rows
        if (row["provider"], row["axis"], row["passes"]) == (name, axis, passes)
        and row["state"] in ("wrong", "failed")
    ]
    if not of_it:
        return ""
    where = _listing(sorted(row[axis] for row in of_it))
    return f"{name} has no time at {axis} = {where}: {of_it[0]['state']}, {of_it[0]['reason']}."


def _of_memory(axis: str, points: dict[int, Point]) -> str:
    """How peak memory grew from the first to the last point, the least grown first."""
    if len(points) < 2:
        return ""
    (_, first), *_, (_, last) = points.items()
    grown = {
        name: (last[name]["peak"] - first[name]["peak"]) / MEBIBYTE
        for name in PROVIDERS
        if name in first and name in last and first[name]["peak"] is not None
    }
    if not grown:
        return ""
    words = [
        f"{name} {round(mib, 1) + 0.0:.1f}"
        for name, mib in sorted(grown.items(), key=lambda item: item[1])
    ]
    return f"MiB that peak memory grows by, {axis} = {min(points)} to {max(points)}: " + (
        ", ".join(words) + "."
    )


def _range(ratios: Sequence[float]) -> str:
    low, high = f"{min(ratios):.2g}", f"{max(ratios):.2g}"
    return low if low == high else f"{low} to {high}"


def _listing(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))
