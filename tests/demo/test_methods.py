"""`python -m benchmarks.methods --quick`: what it writes, resumes and shows."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE, until

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("untrained base", "in context", "prompt tuning", "prefix, from text", "LoRA + prefix")


def run(*arguments, expect=0):
    command = [sys.executable, "-m", "benchmarks.methods", *map(str, arguments)]
    # an error's frame would break its sentence where the terminal ends
    wide = {**os.environ, "COLUMNS": "4000"}
    done = subprocess.run(
        command, cwd=ROOT, env=wide, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == expect, done.stderr + done.stdout
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("methods")


@pytest.fixture(scope="module")
def results(folder):
    options = [x for name in METHODS for x in ("--method", name)]
    options += ["--quick", "--task", "package", "--out", folder / "quick.jsonl"]
    options += ["--cache", folder / "cache"]
    run(*options)
    return options, folder / "quick.jsonl"


def rows(path):
    return [row for row in map(json.loads, path.read_text().splitlines()) if row["kind"] == "row"]


def assert_searched(losses):
    """The search for a learning rate ended between two that are no better, or at its own ends."""
    assert len(losses) >= 3
    lowest, *_, highest = sorted(losses)
    for end in (lowest, highest):
        others = min(loss for rate, loss in losses.items() if rate != end)
        assert losses[end] >= others or end in (1e-5, 10.0)


def test_the_committed_results_searched_every_rate():
    results = ROOT / "benchmarks" / "results" / "methods-zen4-2cores.jsonl"
    searches = {}
    for row in rows(results):
        if row["purpose"] == "rate":
            found = searches.setdefault((row["method"], row["task"]), {})
            found[row["rate"]] = row["validation"]
    assert len(searches) == 3 * 13  # tasks, and methods that train
    for losses in searches.values():
        assert_searched(losses)


def test_a_quick_run_measures_every_method(results):
    found = {row["method"]: row for row in rows(results[1]) if row["purpose"] == "score"}
    assert set(found) == set(METHODS)
    for row in found.values():
        assert 0 <= row["score"] <= 1
        assert row["loss"] > 0
    for name in METHODS[2:]:
        row = found[name]
        assert row["validation"] == min(loss for *_, loss in row["curve"])
        assert min(row["parameters"], row["bytes"], row["peak"], row["step"]) > 0
        tried = [r for r in rows(results[1]) if (r["method"], r["purpose"]) == (name, "rate")]
        assert row["rate"] == min(tried, key=lambda r: r["validation"])["rate"]
        assert_searched({r["rate"]: r["validation"] for r in tried})
    assert (found["untrained base"]["parameters"], found["untrained base"]["bytes"]) == (0, 0)
    # 2 layers, 2 key heads of 16, keys and values of 8 tokens
    assert found["prefix, from text"]["parameters"] == 2 * 2 * 8 * 32


def test_a_run_goes_on_with_what_is_there(results):
    options, path = results
    before = rows(path)
    run(*options)
    assert rows(path) == before


def test_memory_alone_is_measured_anew(results, folder):
    _, path = results
    copy = folder / "copy.jsonl"
    spoilt = [json.loads(line) for line in path.read_text().splitlines()]
    for record in spoilt:
        record |= {"peak": -1} if record.get("purpose") == "score" else {}
    copy.write_text("".join(json.dumps(record) + "\n" for record in spoilt))
    run("--quick", "--peaks", "--out", copy, "--cache", folder / "cache")
    for row, before in zip(rows(copy), rows(path), strict=True):
        assert row | {"peak": None} == before | {"peak": None}
        assert row.get("peak") is None or row["peak"] > 0


def test_an_interruption_is_heard(results, folder):
    command = [sys.executable, "-m", "benchmarks.methods", "--quick", "--out", folder / "cut.jsonl"]
    process = subprocess.Popen(
        [*command, "--cache", folder / "cache"], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    file = folder / "cut.jsonl"
    until(lambda: process.poll() is not None or (file.exists() and "run" in file.read_text()))
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, said
    assert "interrupted" in said


def test_other_sizes_are_refused_in_one_file(results, folder):
    said = run("--out", results[1], "--cache", folder / "cache", expect=2).stderr
    assert "holds a run of other sizes" in said


def test_the_tables_and_pictures_of_a_file(results, folder):
    shown = run("--show", results[1], "--pictures", folder / "pictures").stdout
    for name in METHODS:
        assert shown.count(f"| {name} |") == 2
    names = {f"methods-{what}.{kind}" for what in ("scores", "size") for kind in ("png", "svg")}
    assert {path.name for path in (folder / "pictures").iterdir()} == names


def test_an_unknown_method_is_named():
    assert "expected some of" in run("--method", "telepathy", expect=2).stderr
