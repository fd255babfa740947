"""The numbers of csrc/tuning.h, and the command that measures them again."""

import re

import pytest
from typer.testing import CliRunner

from benchmarks import tune_cpu
from prefixattn import compiler


def test_every_number_of_the_file_can_be_measured_again() -> None:
    text = (compiler.SOURCES / "tuning.h").read_text()
    names = set(re.findall(r"^constexpr \w+ (\w+) = ", text, re.M))
    assert names == set(tune_cpu.VALUES)
    for name, values in tune_cpu.VALUES.items():
        standing = tune_cpu.standing(name)
        assert standing
        assert set(standing) <= set(values), name


def test_an_unknown_number_is_refused() -> None:
    app = tune_cpu.typer.Typer()
    app.command()(tune_cpu.main)
    result = CliRunner().invoke(app, ["--number", "kNothing"])
    assert result.exit_code == 2
    assert "expected some of kBlock" in result.output.replace("\n", " ")


def test_a_number_is_changed_in_a_copy_alone(
    tmp_path: tune_cpu.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each value's library is built from sources in which that number has that value."""
    seen = {}

    def build(folder: tune_cpu.Path, sets: list[str]) -> tune_cpu.Path:
        seen[folder.parent.name] = tune_cpu.standing("kTasksEach"), sets
        return folder

    tune_cpu.cpu.instructions()  # loads the library that is in use
    monkeypatch.setattr(compiler, "build", build)
    monkeypatch.setattr(tune_cpu.cpu, "load", lambda path: path)
    before = compiler.SOURCES
    console = tune_cpu.Console(quiet=True)
    assert len(dict(tune_cpu.built("kTasksEach", tmp_path, console))) == 3
    assert {value: now for value, (now, _) in seen.items()} == {v: [v] for v in ("1", "2", "4")}
    assert all("plain" in sets for _, sets in seen.values())
    assert before == compiler.SOURCES
    assert tune_cpu.standing("kTasksEach") == ["2"]


def test_the_table_says_how_many_times_as_fast() -> None:
    found = {"a": {"1": 2.0, "2": 1.0}, "b": {"1": 1.0, "2": 2.0}}
    shown = tune_cpu.table("kTasksEach", found, ["2"])
    columns = [list(column.cells) for column in shown.columns]
    assert columns[1] == ["0.50", "2.00", "1.000"]
    assert [column.header for column in shown.columns] == ["case", "1", "2 (now)"]
