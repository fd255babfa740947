"""The numbers of csrc/tuning.h, and the command that measures them again."""

import os
import re
import subprocess
import sys
from pathlib import Path

from patience import PATIENCE

from prefixattn import compiler

ROOT = Path(__file__).resolve().parents[2]


def test_every_number_of_the_file_can_be_measured_again() -> None:
    """What it says of an unknown number lists those that it knows."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.tune_cpu", "--number", "kNothing"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "500"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 2
    listed = re.search(r"expected some of (.+), got kNothing", done.stderr)
    assert listed, done.stderr
    text = (compiler.SOURCES / "tuning.h").read_text()
    names = set(re.findall(r"^constexpr \w+ (\w+) = ", text, re.M))
    assert set(listed[1].split(", ")) == names
