"""The tile table holds what it promises: compiled ahead of time, for chips that nobody here owns.

Some of it is compiled afresh; the reports of the whole table, on the oldest and the newest Triton,
are committed files, which must be those of the table as it is.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from prefixattn.kernels import config

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
KIB_OF_SHARED = {"sm80": 163, "sm86": 99, "sm90": 227, "sm100": 227, "gfx942": 64}
HEAD_DIMS = {"bf16": (64, 96, 128, 192, 256), "fp32": (64, 128, 256)}
BITS = {"bf16": 16, "fp32": 32}
ONLY_HELP = ("delta", "combine")  # kernels without a product or a row of their own

# The oldest and the newest Triton, which `make test-triton-matrix` runs.
SUPPORTED = re.findall(r"^triton>=(.+),<=(.+)$", (ROOT / "constraints.txt").read_text(), re.M)[0]

# Instructions that one kernel may spill. The oldest Triton spills up to a dozen in three rows; what
# would spare it them costs the newest one a third of the programs that run at a time.
SPILLED = dict(zip(SUPPORTED, (12, 0), strict=True))

Line = dict[str, Any]


def report(out: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the report in an interpreter of its own, which compiles and does not interpret."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compile_report", "--out", str(out), *options]
    return subprocess.run(
        command, cwd=ROOT, env=kept | environment, capture_output=True, text=True, check=False
    )


def direction(kernel: str) -> str:
    return "dkv" if kernel in ("dk", "dv") else kernel


def faults(line: Line, spilled: int) -> list[str]:
    """What a kernel of the plain problem promises and does not keep."""
    name = " ".join(str(line[key]) for key in ("target", "kernel", "D", "dtype"))
    if "error" in line:
        return [f"{name}: {line['error']}"]
    found = []
    if line["spills"] > spilled or (line["stack"] and not spilled):
        found.append(f"{name}: {line['spills']} spills, {line['stack']} bytes of stack")
    if line["shared"] > 1024 * KIB_OF_SHARED[line["target"]]:
        found.append(f"{name}: {line['shared']} bytes of shared memory")
    if line["kernel"] not in ONLY_HELP and line["target"] == "sm90" and line["dtype"] == "bf16":
        # wgmma multiplies 64 rows or more: a tile of 16 queries takes mma.
        wanted = "mma" if line["kernel"] == "decode16" else "wgmma"
        if set(line["products"]) != {wanted}:
            found.append(f"{name}: {line['products']}, expected {wanted}")
        if line["loops"] == 0 or line["fetched_ahead"] < 2:
            found.append(f"{name}: a loop is not pipelined")
    return found


def broken(lines: list[Line], version: str) -> list[str]:
    plain = [line for line in lines if line["variant"] == "causal"]
    return [fault for line in plain for fault in faults(line, SPILLED.get(version, 0))]


@pytest.mark.triton
def test_the_sm90_rows_keep_their_promises(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    dims = [option for D in ("64", "128", "256") for option in ("--head-dim", D)]
    done = report(out, "--plain", "--target", "sm90", "--dtype", "bf16", *dims)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = json.loads(out.read_text())["rows"]
    kernels = {(line["kernel"], line["D"]) for line in lines}
    assert {(name, D) for name in ("forward", "dq", "decode") for D in (64, 128, 256)} < kernels
    assert not broken(lines, version("triton"))


@pytest.mark.triton
def test_an_interpreter_compiles_nothing_and_the_report_says_so(tmp_path: Path) -> None:
    done = report(tmp_path / "report.json", TRITON_INTERPRET="1")
    assert done.returncode == 1
    assert "TRITON_INTERPRET is set" in done.stderr


@pytest.mark.parametrize("of", SUPPORTED)
def test_the_committed_report_is_that_of_the_table(of: str) -> None:
    path = RESULTS / f"compile-triton-{of}.json"
    found = json.loads(path.read_text())
    assert found["machine"]["triton"] == of
    lines = found["rows"]
    assert not broken(lines, of)
    plain = [line for line in lines if line["variant"] == "causal"]
    for line in plain:
        if line["kernel"] in ONLY_HELP:
            continue
        tiles, D = line["tiles"], line["D"]
        now = config.tiles(
            line["target"],
            direction(line["kernel"]),
            D,
            D,
            group=tiles["GROUP"],
            tokens=1024,
            bits=BITS[line["dtype"]],
        )
        assert now._asdict() == tiles, f"{path.name}: run python -m benchmarks.compile_report"
    got = {(x["target"], direction(x["kernel"]), x["D"], x["dtype"]) for x in plain}
    table = {
        (target, direction, D, dtype)
        for target in config.CHIPS
        if target != "interpreter"
        for direction in (*config.HALF[target], *ONLY_HELP)
        for dtype, dims in HEAD_DIMS.items()
        for D in dims
    }
    assert got == table
