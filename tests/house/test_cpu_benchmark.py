"""`python -m benchmarks.cpu`: what it writes, and that a wrong implementation costs its time."""

import json
import subprocess
import sys
import textwrap
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
        assert set(row["ms"]) == {"ours", "sdpa", "cat", "stock", "floor"}
        for median, low, high in row["ms"].values():
            assert 0 < low <= median <= high
        assert all(error < 1e-4 for errors in row["error"].values() for error in errors)
    assert "targets" in printed
    assert any("every row, the least" in target["target"] for target in content["targets"])


def test_a_wrong_implementation_has_no_time() -> None:
    code = """
        import json
        from benchmarks import cpu, providers, targets
        right = providers.ours
        providers.PROVIDERS["ours"] = lambda t: right(t) * 1.001
        job = cpu.Job("decode", cpu.DECODE[0], "float32", "fwd")
        row = cpu.run_job(job, 9)
        print(json.dumps([list(row["ms"]), targets.verdicts([row])]))
    """
    timed, found = json.loads(run("-c", textwrap.dedent(code)).stdout)
    assert timed == ["sdpa", "cat", "stock", "floor"]
    assert found
    assert not any(target["met"] for target in found)


@pytest.mark.parametrize("option", ["--suite", "--dtype"])
def test_unknown_words_are_refused(option: str) -> None:
    printed: Any = run("-m", "benchmarks.cpu", option, "everything", expect=2)
    assert f"{option}: expected" in printed.stderr
    assert "got everything" in printed.stderr
