"""What is shown of a results file: the page, the sentences, the markdown."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from prefixattn.bench import cli, growth, records, tables
from prefixattn.bench.figures import table
from prefixattn.bench.page import html, pictures
from prefixattn.bench.plots import COLOURS, MARKERS
from prefixattn.bench.providers import PROVIDERS
from prefixattn.bench.targets import verdicts

Record = dict[str, Any]
Make = Callable[..., Record]


def curve(made: Make, provider: str, times: dict[int, float], **others: Any) -> list[Record]:
    """Rows of a curve over P."""
    about = {"suite": "growth", "axis": "P", **others}
    return [
        made(provider, ms, P=P, case=f"m:P{P}", peak=P * 2**20, **about) for P, ms in times.items()
    ]


@pytest.fixture
def results(made: Make, header: Record) -> list[Record]:
    return [
        header,
        made("ours-cpu", 1.0),
        made("transformers", 2.5),
        made("cat+flash", state="wrong", reason="out: error 1, <budget> 0"),
        made("cat+cudnn", state="unsupported", reason="no such kernel"),
        made("no-prefix", 0.8),
        *curve(made, "ours-cpu", {16: 1.0, 64: 2.0, 256: 4.0}),
        *curve(made, "transformers", {16: 0.5, 64: 3.0, 256: 16.0}),
    ]


def test_the_page_has_everything_inside(results: list[Record]) -> None:
    page = html(results)
    assert [name for name, _, _ in pictures(results)] == [
        "bars-decode",
        "growth-decoding",
        "roofline",
    ]
    sources = re.findall(r"src='([^']{,25})", page)
    assert sources == ["data:image/svg+xml;base64"] * 3
    assert not re.search(r"https?://|<script|<link", page)
    assert "out: error 1, &lt;budget&gt; 0" in page
    assert "<budget>" not in page
    assert "no such kernel" in page
    assert ">wrong</td>" in page
    assert "a processor (AVX512), 2 threads" in page
    assert "prefixattn bench --provider ours-cpu" in page


CURVES = {
    "it stops winning": (
        {16: 1.0, 64: 2.0, 256: 4.0},
        {16: 2.0, 64: 3.0, 256: 3.0},
        "ours-cpu wins at P = 16, 64 (1.5 to 2×) and loses at P = 256, where merge takes 0.75 "
        "times as long.",
    ),
    "it always wins": (
        {16: 1.0, 64: 2.0},
        {16: 2.0, 64: 3.0},
        "ours-cpu wins at every P measured (16 to 64): the best peer takes 1.5 to 2 times as long.",
    ),
    "it never wins": (
        {16: 4.0, 64: 8.0},
        {16: 2.0, 64: 3.0},
        "ours-cpu loses at every P measured (16 to 64): the best peer (merge) takes 0.38 to 0.5 "
        "times as long.",
    ),
}


@pytest.mark.parametrize(("ours", "peer", "wanted"), CURVES.values(), ids=CURVES.keys())
def test_a_sentence_says_where_it_stops(
    ours: dict[int, float], peer: dict[int, float], wanted: str, made: Make
) -> None:
    slow_peer = dict.fromkeys(peer, 100.0)
    floor = dict.fromkeys(peer, 0.01)
    rows = [*curve(made, "ours-cpu", ours), *curve(made, "merge", peer)]
    rows += [*curve(made, "transformers", slow_peer), *curve(made, "no-prefix", floor)]
    ((passes, axis, said),) = growth.sentences(rows)
    assert (passes, axis) == ("fwd", "P")
    assert said[0] == wanted


def test_a_wrong_point_of_a_curve_is_named(made: Make) -> None:
    rows = [*curve(made, "ours-cpu", {16: 1.0}), *curve(made, "merge", {16: 2.0, 64: 2.0})]
    rows += curve(made, "ours-cpu", {64: 0.0}, state="wrong", reason="out: error 1, budget 0")
    ((_, _, said),) = growth.sentences(rows)
    assert said[1] == "ours-cpu has no time at P = 64: wrong, out: error 1, budget 0."


def test_memory_is_said_from_the_first_to_the_last_point(results: list[Record]) -> None:
    ((_, _, said),) = growth.sentences(records.rows_of(results))
    assert said[-1].startswith("MiB that peak memory grows by, P = 16 to 256: ours-cpu 240.0")


def test_the_memory_suite_shows_memory(header: Record, made: Callable[..., Record]) -> None:
    rows = [
        made("ours-cpu", suite="memory", peak=3 * 2**20),
        made("merge", suite="memory", state="wrong", reason="a scale"),
        made("cat+math", suite="memory", peak=None),
    ]
    *_, heads, _, cells = table([header, *rows], ("memory",)).split("\n\n")[-2].split("\n")
    assert heads == "| shape | pass | ours-cpu | cat+math | merge |"
    assert cells.endswith("| 3.0 |  | wrong |")
    console = Console(width=200, record=True, file=io.StringIO())
    for shown in tables.of_rows(rows, ("memory",)):
        console.print(shown)
    assert "MiB at the peak" in (text := console.export_text())
    assert "3.0" in text


def test_the_markdown_is_the_file(results: list[Record]) -> None:
    caption, *lines = table(results, ("decode",)).split("\n")
    assert caption.startswith("a processor (AVX512), 2 threads, torch ")
    assert "commit abc123" in caption
    assert lines[1:6] == [
        "**decode**",
        "",
        "| shape | pass | ours-cpu, ms | transformers | cat+flash | no-prefix |",
        "|---|---|--:|--:|--:|--:|",
        "| m:B2,M1,P8,float32 | fwd | 1 | 2.50× | wrong | 0.80× |",
    ]


def test_a_target_is_met_or_missed_or_wrong(made: Make, header: Record, tmp_path: Path) -> None:
    def of(ours: Record, peer: float) -> list[Record]:
        others = {"suite": "prefill", "dtype": "bfloat16"}
        return [header, ours | others, made("transformers", peer, **others)]

    words = "over transformers, prefill, bfloat16, geometric mean"
    right, wrong = made("ours-cpu", 1.0), made("ours-cpu", state="wrong", reason="out")
    for ours, peer, wanted in ((right, 3.0, (3.0, True)), (right, 2.0, (2.0, False))):
        (found, *_) = [t for t in verdicts(of(ours, peer)) if t.words == words]
        assert (pytest.approx(found.measured), found.met) == wanted
    assert not any(target.met for target in verdicts(of(wrong, 3.0)))
    path = tmp_path / "results.jsonl"
    records.Writer(path).add(of(right, 2.0))
    result = CliRunner().invoke(cli.app, ["targets", str(path)], env={"COLUMNS": "200"})
    assert result.exit_code == 1
    assert "MISSED" in result.output


def test_memory_that_grows_by_copies_misses_its_target(made: Make, header: Record) -> None:
    needed = {B: 4 * 16 * B * (2 * 4 + 2 * 2) for B in (1, 9)}  # output and gradients
    copy = 2 * 4 * 2 * 8 * 16  # keys and values of one row, bytes
    for part, met in ((0.05, True), (1.0, False)):
        rows = [
            made("ours-cpu", suite="memory", B=B, peak=size + round(part * copy * B))
            for B, size in needed.items()
        ]
        (found,) = verdicts([header, *rows])
        assert found.measured == pytest.approx(part, abs=0.01)
        assert found.met == met


def test_the_page_is_written_with_its_pictures(tmp_path: Path, results: list[Record]) -> None:
    path = tmp_path / "results.jsonl"
    records.Writer(path).add(results)
    words = ["page", str(path), "--out", str(tmp_path / "p.html")]
    result = CliRunner().invoke(cli.app, [*words, "--pictures", str(tmp_path / "pictures")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "p.html").read_text().startswith("<!doctype html>")
    names = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert {"roofline.png", "roofline.svg", "bars-decode.svg", "growth-decoding.png"} <= names


def test_each_provider_has_a_look_of_its_own() -> None:
    for looks in (COLOURS, MARKERS):
        assert set(looks) == set(PROVIDERS)
        assert len(set(looks.values())) == len(PROVIDERS)
