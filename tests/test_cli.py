"""The command line as a user types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from patience import PATIENCE
from typer.testing import CliRunner

from prefixattn import Prefix, build, cli
from prefixattn.choose import NAMES

RUN = CliRunner()


def test_info_names_every_implementation_and_why() -> None:
    result = RUN.invoke(cli.app, ["info"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert all(name in result.output for name in NAMES)
    assert "C++ kernels" in result.output
    assert build.state() in result.output
    assert 'what implementation="auto" takes' in result.output


ON_WINDOWS = """
import os
del os.getuid, os.statvfs  # which Windows lacks
import torch, typer.testing
from prefixattn import cli, explain, prefix_attention
q, p = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 2, 8)
print(prefix_attention(q, q, q, p, p).shape)
print(explain(q, q, q, p, p))
print(typer.testing.CliRunner().invoke(cli.app, ["info"], env={"COLUMNS": "400"}).output)
try:
    prefix_attention(q, q, q, p, p, implementation="cpu")
except NotImplementedError as error:
    print(error)
"""


def test_a_system_without_posix_computes_by_sdpa_and_says_why(tmp_path: Path) -> None:
    """A compiler on the PATH, as Git, conda and Perl bring one to Windows, is of no use there."""
    done = subprocess.run(
        [sys.executable, "-W", "error:::prefixattn", "-c", ON_WINDOWS],
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},  # nothing was built before
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shape, *said = done.stdout.splitlines()
    assert shape == "torch.Size([1, 2, 3, 8])"
    assert said[0] == "sdpa runs (implementation='auto')"
    why = "the C++ kernels need a POSIX system such as Linux, macOS or Windows' WSL"
    assert f"  cpu cannot: {why}" in done.stdout
    assert f"'cpu' cannot run here: {why}" in said[-1]
    assert any(line.startswith("│ C++ kernels") and why in line for line in said)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--seed", "-1"], "seed must be in"), (["--threads", "0"], "threads must be at least 1")],
)
def test_the_demo_refuses_bad_options(arguments: list[str], message: str) -> None:
    result = RUN.invoke(cli.app, ["demo", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert message in result.output


def test_the_demo_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda package: None if package == "peft" else package)
    result = RUN.invoke(cli.app, ["demo", "--output", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "the demo needs peft: pip install 'prefixattn[demo]'" in result.output
    assert not (tmp_path / "out").exists()


def test_vllm_prints_a_configuration_and_says_what_does_not_load(tmp_path: Path) -> None:
    Prefix(*torch.randn(2, 3, 2, 5, 8)).save_pretrained(tmp_path / "good")
    done = RUN.invoke(cli.app, ["vllm", str(tmp_path), "--cache-mib", "3"])
    assert done.exit_code == 0, done.output
    config = json.loads(done.stdout)
    extra = {"adapters": str(tmp_path), "cache_bytes": 3 * 2**20}
    assert config["kv_connector_extra_config"] == extra
    assert config["kv_load_failure_policy"] == "fail"
    assert "good: 5 prefix tokens" in done.stderr
    (tmp_path / "empty").mkdir()
    done = RUN.invoke(cli.app, ["vllm", str(tmp_path)])
    assert done.exit_code == 1
    assert f"empty: {tmp_path / 'empty'} is in none of the formats" in done.stderr
    assert json.loads(done.stdout)["kv_connector"] == "PrefixConnector"
    missing = RUN.invoke(cli.app, ["vllm", str(tmp_path / "none")], env={"COLUMNS": "300"})
    assert missing.exit_code == 2
    assert "is not a folder" in missing.stderr


def test_an_interruption_is_no_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("prefixattn.demo.run.run", interrupted)
    result = RUN.invoke(cli.app, ["demo", "--output", str(tmp_path / "out")])
    assert result.exit_code == 130
    assert "Interrupted" in result.output
