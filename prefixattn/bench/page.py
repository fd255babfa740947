"""One HTML page of a results file, with everything inside: no script, no network."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from prefixattn.bench import growth, plots
from prefixattn.bench.figures import best_of_ours, by_case, caption, peak_words, tried
from prefixattn.bench.providers import FLOOR, OURS
from prefixattn.bench.records import Record, rows_of, runs_of, timed
from prefixattn.bench.shapes import SUITES, UNITS

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1917; max-width: 1200px;
       margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.7rem; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #d6d3d1; }
figure, .wide { margin: 1rem 0; overflow-x: auto; } figure img { width: 100%; min-width: 760px; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #e7e5e4; }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td.best { font-weight: 700; } td.bad { color: #b91c1c; font-weight: 700; }
code { font-size: .85em; overflow-wrap: anywhere; } details { margin: .5rem 0; }
summary { cursor: pointer; color: #1f6fc2; } .quiet { color: #57534e; }
"""


def pictures(records: Sequence[Record]) -> Iterator[tuple[str, str, Figure]]:
    """Every picture: its name, what it shows in words, and itself."""
    rows = rows_of(records)
    for suite in SUITES:
        chosen = rows_of(records, suite)
        if suite != "growth" and timed(chosen):
            words = f"milliseconds a call, suite {suite}; dotted: the same without a prefix"
            yield f"bars-{suite}", words, plots.bars(chosen)
    for passes, figure in plots.growth(rows):
        name = f"growth-{'training' if passes == 'fwd+bwd' else 'decoding'}"
        yield name, f"time and memory as one size grows, {growth.PASSES[passes]}", figure
    if timed(rows):
        words = (
            "operations a second of every timed row; the lines are what torch's own matrix product "
            "and copy reached in the same run"
        )
        yield "roofline", words, plots.roofline(rows)


def save_pictures(records: Sequence[Record], folder: Path) -> list[Path]:
    """Write each picture into `folder` as SVG and PNG; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, _, figure in pictures(records):
        for kind in ("svg", "png"):
            path = folder / f"{name}.{kind}"
            figure.savefig(path, dpi=110)
            written.append(path)
    return written


def html(records: Sequence[Record]) -> str:
    """The whole page."""
    shown = {name: _picture(words, figure) for name, words, figure in pictures(records)}
    parts = [_head(records), *(_suite(records, suite, shown) for suite in SUITES)]
    parts.append(_growth(records, shown))
    if "roofline" in shown:
        parts.append(f"<h2 id='roofline'>Roofline</h2>{shown['roofline']}")
    body = "\n".join(parts)
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'>"
        f"<title>prefixattn bench</title><style>{STYLE}</style><body>{body}</body></html>\n"
    )


def _head(records: Sequence[Record]) -> str:
    run, rows = runs_of(records)[-1], rows_of(records)
    suites = [suite for suite in SUITES if rows_of(records, suite)]
    sections = [*sorted(suites, key=lambda suite: suite == "growth"), "roofline"]
    links = " · ".join(f"<a href='#{name}'>{name}</a>" for name in sections)
    letters = "; ".join(f"<b>{letter}</b> {meaning}" for letter, meaning in UNITS.items())
    warm = "warm" if any(row["warm"] for row in rows) else "cold"
    return (
        f"<h1>prefixattn bench</h1><p>{escape(caption(records))}.</p><p>{links}</p>"
        f"<p class='quiet'>{letters}. Medians of interleaved rounds, {warm} caches; the thin line "
        "on a bar is the 20 to 80 % range. Each time was allowed only after the numbers had met "
        "the float64 reference, gradients too where they are timed. Peak memory is what a call "
        "takes beyond its inputs, with the copies of the prefix that copied+sdpa, and transformers "
        "over a cache, hold ready for each row. "
        f"Measured by <code>{escape(run['command'])}</code>.</p>"
    )


def _picture(words: str, figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    image = f"<img alt='{escape(words)}' src='data:image/svg+xml;base64,{data}'>"
    return f"<figure>{image}<figcaption class='quiet'>{escape(words)}</figcaption></figure>"


def _suite(records: Sequence[Record], suite: str, shown: dict[str, str]) -> str:
    rows = rows_of(records, suite)
    if not rows or suite == "growth":
        return ""
    picture = shown.get(f"bars-{suite}", "")
    return f"<h2 id='{suite}'>{suite}</h2>{picture}{_table(rows)}{_reasons(rows)}"


def _growth(records: Sequence[Record], shown: dict[str, str]) -> str:
    rows = rows_of(records, "growth")
    if not rows:
        return ""
    parts = ["<h2 id='growth'>growth: where each implementation stops winning</h2>"]
    for passes, axis, said in growth.sentences(rows):
        items = "".join(f"<li>{escape(sentence)}</li>" for sentence in said)
        parts.append(f"<h3>{growth.PASSES[passes]} over {axis}, {growth.AXES[axis]}</h3>")
        parts.append(f"<ul>{items}</ul>")
    parts += [picture for name, picture in shown.items() if name.startswith("growth-")]
    return "".join([*parts, _reasons(rows)])


def _table(rows: Sequence[Record]) -> str:
    """Times as multiples of the floor, and how near the best of ours comes to the machine's."""
    names = tried(rows)
    heads = ["shape", "pass", "floor, ms", *(n for n in names if n != FLOOR)]
    heads += ["ours: % of matmul", "% of copy", "peak MiB"]
    lines = ["<tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"]
    for case, chosen in by_case(rows).items():
        found = {row["provider"]: row for row in chosen}
        mine, floor = best_of_ours(chosen), found.get(FLOOR)
        cells = [f"<td>{escape(case)}</td><td>{chosen[0]['passes']}</td>"]
        has_floor = floor is not None and floor["state"] == "timed"
        cells.append(f"<td>{floor['ms'][0]:.3g}</td>" if has_floor and floor else "<td></td>")
        best = min((row["ms"][0] for row in timed(chosen) if row is not floor), default=0.0)
        cells += [_cell(found.get(name), best) for name in names if name != FLOOR]
        cells.append(_ours(mine))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    words = "Time as a percentage of the same attention without a prefix."
    return f"<p class='quiet'>{words}</p><div class='wide'><table>{''.join(lines)}</table></div>"


def _cell(row: Record | None, best: float) -> str:
    if row is None or row["state"] == "unsupported":
        return f"<td title='{escape(row['reason'] if row else 'not measured')}'></td>"
    if row["state"] != "timed":
        return f"<td class='bad' title='{escape(row['reason'])}'>{row['state']}</td>"
    found = row["ms"][0]
    text = f"{100 * row['of_floor']:.0f} %" if row["of_floor"] else f"{found:.3g} ms"
    return f"<td{' class=best' if found == best else ''}>{text}</td>"


def _ours(mine: Record | None) -> str:
    if mine is None:
        return "<td></td>" * 3
    parts = (f"{100 * mine['of_matmul']:.0f}", f"{100 * mine['of_copy']:.0f}")
    peak = peak_words(mine)
    return "".join(f"<td>{part}</td>" for part in (*parts, peak))


def _reasons(rows: Sequence[Record]) -> str:
    """Why cells are blank, and the command that repeats a row."""
    reasons: dict[tuple[str, str], int] = {}
    for row in rows:
        if row["state"] != "timed":
            key = (row["provider"], f"{row['state']}: {row['reason']}")
            reasons[key] = reasons.get(key, 0) + 1
    items = "".join(
        f"<li><b>{escape(name)}</b>, {count} of the cases: {escape(reason)}</li>"
        for (name, reason), count in reasons.items()
    )
    example = next((row for row in timed(rows) if row["provider"] in OURS), rows[0])
    repeat = f"<p>A row is repeated by <code>{escape(example['command'])}</code></p>"
    summary = "<summary>blank cells, and how to repeat a row</summary>"
    return f"<details>{summary}<ul>{items}</ul>{repeat}</details>"
