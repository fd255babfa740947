"""`prefixattn bench compare`: what counts as slower, between files and between commits."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import prefixattn
from prefixattn.bench import cli, refs
from prefixattn.bench.comparison import compare, summary
from prefixattn.bench.refs import Options

RUN = CliRunner()
Record = dict[str, Any]
Make = Callable[..., Record]
# Before, after (one list for each repeated run: milliseconds, spread), the floors of both, verdict.
NOISE = {
    "beyond its percentiles": ([(1.0, 0.01)], [(1.12, 0.01)], (1, 1), "slower"),
    "as much faster": ([(1.12, 0.01)], [(1.0, 0.01)], (1, 1), "faster"),
    "percentiles that overlap": ([(1.0, 0.1)], [(1.12, 0.1)], (1, 1), "same"),
    "less than two builds differ by": ([(1.0, 0.001)], [(1.015, 0.001)], (1, 1), "same"),
    "the machine became slower too": ([(1.0, 0.01)], [(1.12, 0.01)], (1, 1.15), "same"),
    "more than the machine did": ([(1.0, 0.01)], [(1.32, 0.01)], (1, 1.15), "slower"),
    "runs that differ as much": (
        [(1.0, 0.01), (1.15, 0.01), (1.05, 0.01)],
        [(1.12, 0.01)] * 3,
        (1, 1),
        "same",
    ),
    "noisy runs": ([(1.0, 0.4)], [(1.2, 0.4)], (1, 1), "cannot tell"),
    "a wide spread within runs, but not between them": (
        [(1.0, 0.3), (1.01, 0.3), (0.99, 0.3)],
        [(1.12, 0.3), (1.13, 0.3), (1.11, 0.3)],
        (1, 1),
        "slower",
    ),
    "each run again": ([(1.0, 0.01)] * 3, [(1.12, 0.01)] * 3, (1, 1), "slower"),
}


def runs(
    made: Make, header: Record, times: list[tuple[float, float]], floor: float
) -> list[list[Record]]:
    return [
        [header, made("ours-cpu", ms, spread), made("no-prefix", floor, 0.01)]
        for ms, spread in times
    ]


@pytest.mark.parametrize(("a", "b", "floors", "word"), NOISE.values(), ids=NOISE.keys())
def test_a_verdict_knows_the_noise(
    a: list[tuple[float, float]],
    b: list[tuple[float, float]],
    floors: tuple[float, float],
    word: str,
    made: Make,
    header: Record,
) -> None:
    before, after = (runs(made, header, t, floor) for t, floor in zip((a, b), floors, strict=True))
    found = {verdict.key[2]: verdict for verdict in compare(before, after)}
    assert found["ours-cpu"].word == word
    assert found["ours-cpu"].worse == (word == "slower")
    assert not found["no-prefix"].worse  # a slower machine is nobody's fault


def test_more_runs_see_less(made: Make, header: Record) -> None:
    """6 % between runs that differ by 2 %: repeats bring certainty, and cost none."""
    draw = random.Random(0)
    found = {}
    for repeats in (2, 3, 5, 10, 20):
        words = []
        for _ in range(200):
            sides = [
                runs(made, header, [(ms * draw.gauss(1, 0.02), 0.01) for _ in range(repeats)], 1)
                for ms in (1.0, 1.06)
            ]
            words += [v.word for v in compare(*sides) if v.key[2] == "ours-cpu"]
        found[repeats] = words.count("slower") / len(words)
    assert list(found.values()) == sorted(found.values())
    assert found[20] == 1 > found[2]


def test_the_floor_of_capped_scores_is_ours_and_says_nothing(made: Make, header: Record) -> None:
    before, after = (
        [[header, made("ours-cpu", ms, softcap=50.0), made("no-prefix", ms, softcap=50.0)]]
        for ms in (1.0, 1.5)
    )
    assert [verdict.word for verdict in compare(before, after)] == ["slower", "slower"]


def test_other_machines_are_named(tmp_path: Path, made: Make, header: Record) -> None:
    a = write(tmp_path / "a.jsonl", [header, made("ours-cpu")])
    b = write(tmp_path / "b.jsonl", [header | {"processor": "another"}, made("ours-cpu")])
    result = RUN.invoke(cli.app, ["compare", a, b], env={"COLUMNS": "250"})
    assert "not of one machine: processor is a processor in A and another in B" in result.output
    other = write(tmp_path / "c.jsonl", [header, made("merge")])
    apart = RUN.invoke(cli.app, ["compare", a, other], env={"COLUMNS": "250"})
    assert apart.exit_code == 2
    assert "no row in common" in apart.output


BROKEN = {
    "a row of something else": ([{"kind": "row", "method": "LoRA"}], "whose rows have suite"),
    "a header of something else": ([], "whose runs have date"),
}


@pytest.mark.parametrize("command", ["page", "markdown", "targets"])
@pytest.mark.parametrize(("rows", "said"), BROKEN.values(), ids=BROKEN.keys())
def test_files_of_something_else_are_named(
    tmp_path: Path, header: Record, rows: list[Record], said: str, command: str
) -> None:
    head = header if rows else {"kind": "run"}
    path = write(tmp_path / "a.jsonl", [head, *rows])
    result = RUN.invoke(cli.app, [command, path], env={"COLUMNS": "300"})
    assert result.exit_code == 2
    assert said in result.output


def test_the_words_name_the_change_and_the_noise(made: Make, header: Record) -> None:
    before, after = ([[header, made("merge", ms, 0.02)]] for ms in (1.0, 1.12))
    (verdict,) = compare(before, after)
    assert verdict.words == "slower by 12% (noise 4%)"
    assert summary([verdict]) == "1 slower"


def test_a_lost_time_is_worse_and_a_new_one_is_not(made: Make, header: Record) -> None:
    wrong = made("ours-cpu", state="wrong", reason="out: error 1, budget 0")
    right = made("ours-cpu")
    (lost,) = compare([[header, right]], [[header, wrong]])
    assert lost.worse
    assert lost.words == "lost: out: error 1, budget 0"
    (gained,) = compare([[header, wrong]], [[header, right]])
    assert (gained.word, gained.worse) == ("gained", False)
    only = compare([[header, right]], [[header, made("merge")]])
    assert [verdict.word for verdict in only] == ["only in A", "only in B"]
    (neither,) = compare([[header, wrong]], [[header, wrong]])
    assert (neither.word, neither.worse) == ("no time in either", False)


@pytest.mark.parametrize("ms", [None, 1.0, [1.0], [1.0, 0.0, 2.0], ["1", "1", "1"]])
def test_a_time_that_is_none_is_named(
    tmp_path: Path, made: Make, header: Record, ms: object
) -> None:
    path = write(tmp_path / "a.jsonl", [header, made("merge") | {"ms": ms}])
    result = RUN.invoke(cli.app, ["page", path], env={"COLUMNS": "300"})
    assert result.exit_code == 2
    assert "a.jsonl:2: ms must be three positive numbers, got" in result.output


def write(path: Path, records: list[Record]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_two_files_end_with_a_status(tmp_path: Path, made: Make, header: Record) -> None:
    a = write(tmp_path / "a.jsonl", [header, made("ours-cpu", 1.0)])
    b = write(tmp_path / "b.jsonl", [header, made("ours-cpu", 1.5)])
    wide = {"COLUMNS": "250"}
    slower = RUN.invoke(cli.app, ["compare", a, b], env=wide)
    assert slower.exit_code == 1
    assert "slower by 50%" in slower.output
    assert RUN.invoke(cli.app, ["compare", a, a], env=wide).exit_code == 0
    assert RUN.invoke(cli.app, ["compare", b, a], env=wide).exit_code == 0
    mixed = RUN.invoke(cli.app, ["compare", a, "HEAD"], env=wide)
    assert mixed.exit_code == 2
    assert "expected two results files or two git refs" in mixed.output
    neither = RUN.invoke(cli.app, ["compare", "nothing", "HEAD"], env=wide)
    assert neither.exit_code == 2
    assert "'nothing', which is neither" in neither.output


# Time, in a process that measures, is what its code says: each look at the clock takes a
# millisecond, and a forward those that `_takes` gives it. The machine's own pace has no say.
PACE = """

import functools, time

_now = 0.0


def _look():
    global _now
    _now += 1e-3
    return _now


def _takes(milliseconds, function):
    @functools.wraps(function)
    def run(*arguments):
        global _now
        _now += 1e-3 * milliseconds
        return function(*arguments)

    return run


time.perf_counter = _look
_fast = forward
forward = _takes(1, _fast)
"""
SLOWER = "forward = _takes(20, _fast)\n"


def git(folder: Path, *words: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True)


def test_a_commit_that_dies_in_the_middle_is_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("what came before it died")
    ended = subprocess.CompletedProcess([], -11, "", "Segmentation fault")
    monkeypatch.setattr(refs.subprocess, "run", lambda *_, **__: ended)
    with pytest.raises(RuntimeError, match="ended with status -11 in the middle: Segmentation"):
        refs._measured(tmp_path, Options(("quick",), (), (), repeats=1), out)


def test_two_commits_of_which_one_is_slower(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    package = Path(prefixattn.__file__).parent
    shutil.copytree(
        package, repository / "prefixattn", ignore=shutil.ignore_patterns("__pycache__", "bench")
    )
    git(tmp_path, "init", "--quiet", "repository")
    for message, text in (("before", PACE), ("after", SLOWER)):
        with (repository / "prefixattn" / "sdpa.py").open("a") as file:
            file.write(text)
        git(repository, "add", "--all")
        git(repository, "commit", "--quiet", "--message", message)
    shape = "SmolLM2-135M:B8,M1,C255,P128,R4,bfloat16"
    options = Options(("quick",), (shape,), ("ours-sdpa",), repeats=1)
    said: list[str] = []
    sides = refs.sides("HEAD~1", "HEAD", options, said.append, repository)
    found = {verdict.key[2]: verdict for verdict in compare(*sides)}
    assert found["ours-sdpa"].word == "slower"
    assert found["ours-sdpa"].b > 20 > found["ours-sdpa"].a
    assert found["no-prefix"].b < 20
    assert said == ["measuring HEAD~1, run 1 of 1", "measuring HEAD, run 1 of 1"]
    listed = subprocess.run(
        ["git", "-C", str(repository), "worktree", "list"], capture_output=True, text=True
    ).stdout
    assert len(listed.splitlines()) == 1  # nothing of it stays
