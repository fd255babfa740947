"""A results file as the markdown that README and docs show."""

from __future__ import annotations

from collections.abc import Sequence

from prefixattn.bench.providers import FLOOR, OURS, PROVIDERS
from prefixattn.bench.records import Record, rows_of, timed

MEBIBYTE = 2**20
BY_PEAK = ("memory",)  # suites whose point is what calls take, and not how long
PEAK_WORDS = "MiB at the peak of a call, beyond its inputs"


def caption(records: Sequence[Record]) -> str:
    """The machine of most rows, with its last run's versions and commit, and other machines."""
    counts: dict[str, int] = {}
    last: dict[str, Record] = {}
    device = ""
    for record in records:  # rows follow the header of their run
        if record["kind"] == "run":
            device = _device(record)
            last[device] = record
        counts[device] = counts.get(device, 0) + (record["kind"] == "row")
    first, *others = sorted(counts, key=lambda name: -counts[name])
    run = last[first]
    commit = f", commit {run['commit']}" if run["commit"] else ""
    line = f"{first}, torch {run['torch']}, prefixattn {run['prefixattn']}{commit}, {run['date']}"
    return line + "".join(f"; {counts[n]} of {sum(counts.values())} rows: {n}" for n in others)


def _device(run: Record) -> str:
    threads = f"{run['threads']} thread{'s' if run['threads'] > 1 else ''}"
    return run["gpu"] or f"{run['processor']} ({run['instructions']}), {threads}"


def best_of_ours(rows: Sequence[Record]) -> Record | None:
    """The fastest timed row of our implementations, None where none has a time."""
    mine = [row for row in timed(rows) if row["provider"] in OURS]
    return min(mine, key=lambda row: row["ms"][0], default=None)


def tried(rows: Sequence[Record]) -> list[str]:
    """The providers that took at least one case; a wrong one too, which has no time to show."""
    found = {row["provider"] for row in rows if row["state"] != "unsupported"}
    return [name for name in PROVIDERS if name in found]


def by_case(rows: Sequence[Record]) -> dict[str, list[Record]]:
    """The rows of each case of one suite, in the order of the file; warm ones are named so."""
    found: dict[str, list[Record]] = {}
    for row in rows:
        found.setdefault(f"{row['case']}{' warm' if row['warm'] else ''}", []).append(row)
    return found


def table(records: Sequence[Record], suites: Sequence[str]) -> str:
    """A table for each suite that has rows: milliseconds of the best of ours, and the others.

    These are how many times as long they take. The columns are the providers that took any case of
    the suite; a wrong one is named so, and a blank has its reason in the file. A suite of `BY_PEAK`
    has a second table, of what each call takes at its peak.
    """
    found = {suite: rows_of(records, suite) for suite in suites}
    parts = []
    for suite, rows in found.items():
        parts += [_suite(suite, rows)] if rows else []
        parts += [_peaks(suite, rows)] if rows and suite in BY_PEAK else []
    return "\n\n".join([caption(records), *parts, f"{FLOOR}: the same without a prefix."])


def _suite(suite: str, rows: Sequence[Record]) -> str:
    cases = by_case(rows)
    fastest = {case: best_of_ours(chosen) for case, chosen in cases.items()}
    ours = sorted({mine["provider"] for mine in fastest.values() if mine})
    others = [name for name in tried(rows) if name not in OURS]
    heading = ours[0] if len(ours) == 1 else "ours"
    lines = [
        f"**{suite}**",
        "",
        f"| shape | pass | {heading}, ms | {' | '.join(others)} |",
        "|---|---|--:|" + "--:|" * len(others),
    ]
    for case, chosen in cases.items():
        mine = fastest[case]
        cells = {row["provider"]: _cell(row, mine) for row in chosen}
        time = "" if mine is None else f"{mine['ms'][0]:.3g}"
        if mine is not None and len(ours) > 1:
            time += f" ({mine['provider'].removeprefix('ours-')})"
        shown = [case, chosen[0]["passes"], time, *(cells.get(name, "") for name in others)]
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)


def _peaks(suite: str, rows: Sequence[Record]) -> str:
    """MiB beyond the inputs, of every provider that took a case."""
    names = tried(rows)
    lines = [
        f"**{suite}**, {PEAK_WORDS}",
        "",
        f"| shape | pass | {' | '.join(names)} |",
        "|---|---|" + "--:|" * len(names),
    ]
    for case, chosen in by_case(rows).items():
        cells = {row["provider"]: peak_words(row) for row in chosen}
        shown = [case, chosen[0]["passes"], *(cells.get(name, "") for name in names)]
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)


def peak_words(row: Record) -> str:
    """A timed row's peak in MiB; the state of one that is wrong or failed; else nothing."""
    if row["state"] != "timed":
        return "" if row["state"] == "unsupported" else str(row["state"])
    return "" if row["peak"] is None else f"{row['peak'] / MEBIBYTE:.1f}"


def _cell(row: Record, mine: Record | None) -> str:
    if row["state"] == "unsupported":
        return ""
    if row["state"] != "timed":
        return str(row["state"])
    if mine is None:
        return f"{row['ms'][0]:.3g} ms"
    return f"{row['ms'][0] / mine['ms'][0]:.2f}×"
