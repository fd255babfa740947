"""`python -m benchmarks.cpu`: what it writes, and that a wrong implementation costs its time."""

import json
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == expect, result.stderr + result.stdout
    return result


def test_a_quick_run_writes_what_it_measured(tmp_path: Path) -> None:
    out = tmp_path / "cpu.json"
    arguments = ("--suite", "decode", "--suite", "overhead", "--dtype", "float32", "--quick")
    printed = run("-m", "benchmarks.cpu", *arguments, "--rounds", "9", "--out", str(out)).stdout
    content = json.loads(out.read_text())
    assert content["machine"]["command"].startswith("python -m benchmarks.cpu --suite decode")
    decode = [row for row in content["rows"] if row["suite"] == "decode"]
    assert len(decode) == 2
    for row in decode:
        assert content["machine"]["kernels"]
        assert set(row["ms"]) == {"ours", "sdpa", "cat", "stock", "floor"}
        for median, low, high in row["ms"].values():
            assert 0 < low <= median <= high
        assert all(error < 1e-4 for errors in row["error"].values() for error in errors)
    assert "targets" in printed
    assert any("every row, the least" in target["target"] for target in content["targets"])


@pytest.mark.parametrize("suite", ["decode", "overhead"])
def test_a_wrong_implementation_has_no_time(suite: str) -> None:
    code = f"""
        import json
        from benchmarks import cpu, cpu_shapes, providers, targets
        found = providers.providers("cpu")
        right = found["ours"]
        found["ours"] = lambda t: right(t) * 1.001
        job = cpu.Job("{suite}", cpu_shapes.SHAPES["{suite}"][0], "float32")
        rows = cpu.run_job(job, found, "cpu", 9)
        print(json.dumps([list(rows[0]["ms"]), targets.verdicts(rows)]))
    """
    timed, found = json.loads(run("-c", textwrap.dedent(code)).stdout)
    assert timed
    assert "ours" not in timed
    assert found
    assert not any(target["met"] for target in found)


def test_an_interrupted_run_keeps_what_it_measured(tmp_path: Path) -> None:
    out = tmp_path / "cpu.json"
    command = [sys.executable, "-m", "benchmarks.cpu", "--suite", "decode", "--out", str(out)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for _ in range(600):
            if out.exists():
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        printed, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "interrupted: what is below was measured before" in said
    assert "decode" in printed
    assert json.loads(out.read_text())["rows"]


@pytest.mark.parametrize("option", ["--suite", "--dtype"])
def test_unknown_words_are_refused(option: str) -> None:
    printed: Any = run("-m", "benchmarks.cpu", option, "everything", expect=2)
    assert f"{option}: expected" in printed.stderr
    assert "got everything" in printed.stderr
