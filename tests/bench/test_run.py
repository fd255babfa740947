"""A run: who gets a time, what the file keeps, and how it is told to stop."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch import Tensor
from typer.testing import CliRunner

from prefixattn.bench import cli, machine, measure, providers, records, run
from prefixattn.bench.inputs import Tensors
from prefixattn.bench.measure import FEWEST, WARM_UP, Plan, interleaved, peak_memory
from prefixattn.bench.records import Writer, rows_of, runs_of
from prefixattn.bench.run import Selection
from prefixattn.bench.run import measure as measured
from prefixattn.bench.shapes import DTYPES, SUITES, Shape, cases
from prefixattn.bench.support import Attention

RUN = CliRunner()
WIDE = {"COLUMNS": "250"}
FAST = ("--rounds", str(FEWEST), "--seconds", "0", "--device", "cpu")


def selection(*names: str, **others: object) -> Selection:
    chosen = names or ("ours-sdpa",)
    return Selection(("tiny",), providers=chosen, plan=Plan(FEWEST, 0), **others)  # type: ignore[arg-type]


def run_all(chosen: Selection, writer: Writer) -> None:
    for _ in measured(chosen, writer, "the command"):
        pass


def test_a_timed_row_has_its_figures() -> None:
    writer = Writer(None)
    run_all(selection(), writer)
    (header,) = runs_of(writer.records)
    assert header["threads"] == torch.get_num_threads()
    assert header["torch"] == torch.__version__
    rows = rows_of(writer.records)
    assert [row["provider"] for row in rows] == ["ours-sdpa", "no-prefix"] * 2
    for row in rows:
        median, low, high = row["ms"]
        assert 0 < low <= median <= high
        assert row["verified"] == "whole"
        assert row["of_matmul"] == pytest.approx(row["flops"] / median * 1e3 / 1e12)
        assert row["of_copy"] == pytest.approx(row["bytes"] / median * 1e3 / 1e10)
    assert rows[0]["of_floor"] == pytest.approx(rows[0]["ms"][0] / rows[1]["ms"][0])
    words = shlex.split(rows[0]["command"])
    assert words[:2] == ["prefixattn", "bench"]
    assert [words[words.index(option) + 1] for option in ("--suite", "--shape", "--provider")] == [
        "tiny",
        "tiny:B2,M5,P3,float32",
        "ours-sdpa",
    ]


def test_copies_made_beforehand_count_as_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "peak_memory", lambda call, device: 100)
    writer = Writer(None)
    run_all(selection("transformers", "copied+sdpa", "cat+flash"), writer)
    peaks = {row["provider"]: row["peak"] for row in rows_of(writer.records) if row["C"]}
    copies = 2 * 2 * 2 * 3 * 16 * 4  # keys and values, rows, heads, tokens, head dim, bytes
    assert peaks["transformers"] == peaks["copied+sdpa"] == 100 + copies
    assert peaks["cat+flash"] == 100  # it makes them in the call


def corrupted(shape: Shape, t: Tensors, passes: str) -> Attention:
    """Ours with a scale that is 1 % off."""
    from prefixattn import prefix_attention

    def run() -> Tensor:
        scale = 1.01 * shape.D**-0.5
        out = prefix_attention(**t.leaves, is_causal=True, scale=scale)  # type: ignore[arg-type]
        assert isinstance(out, Tensor)
        return out

    return run


def crashing(shape: Shape, t: Tensors, passes: str) -> Attention:
    raise RuntimeError("no such kernel\nand a long story")


def test_a_wrong_one_has_no_time_and_the_command_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    known = {
        "ours-sdpa": corrupted,
        "merge": crashing,
        "cat+flash": providers.PROVIDERS["cat+flash"],
    }
    for name, provider in known.items():
        monkeypatch.setitem(providers.PROVIDERS, name, provider)
    out = tmp_path / "out.jsonl"
    names = [word for name in known for word in ("--provider", name)]
    result = RUN.invoke(cli.app, ["--suite", "tiny", *names, *FAST, "--out", str(out)], env=WIDE)
    assert result.exit_code == 1
    assert "wrong: ours-sdpa" in result.output
    states = {row["provider"]: row for row in rows_of(records.read(out))}
    assert states["ours-sdpa"]["state"] == "wrong"
    assert "budget" in states["ours-sdpa"]["reason"]
    assert "ms" not in states["ours-sdpa"]
    assert states["merge"]["reason"] == "RuntimeError: no such kernel"
    assert states["cat+flash"]["state"] == "timed"


def test_a_run_goes_on_where_another_stopped(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    run_all(selection(), Writer(path))
    with path.open("a") as file:
        file.write('{"kind": "row", "sui')  # cut short
    run_all(selection(), Writer(path))
    assert len(records.read(path)) == 5
    assert path.read_text().endswith("}\n")
    run_all(selection("ours-sdpa", "cat+flash"), Writer(path))
    found = records.read(path)
    assert [row["provider"] for row in rows_of(found)[4:]] == ["cat+flash"] * 2
    assert [run["run"] for run in runs_of(found)] == [0, 1]
    run_all(selection(warm=True), Writer(path))  # another measurement
    assert len(rows_of(records.read(path))) == 10
    run_all(selection(), Writer(path, fresh=True))
    assert len(records.read(path)) == 5


def test_two_processes_have_no_place_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    run_all(selection(), Writer(path))
    before = path.read_text()
    with FileLock(tmp_path / ".out.jsonl.lock"), pytest.raises(ValueError, match="is writing it"):
        Writer(path, fresh=True)
    assert path.read_text() == before


def test_a_link_stays_and_a_device_is_not_locked(tmp_path: Path) -> None:
    path, link = tmp_path / "out.jsonl", tmp_path / "link"
    link.symlink_to(path)
    run_all(selection(), Writer(path))
    run_all(selection("merge"), Writer(link))
    assert link.is_symlink()
    assert len(runs_of(records.read(path))) == 2
    Writer(Path("/dev/null"))
    assert not Path("/dev/.null.lock").exists()
    assert Path("/dev/null").is_char_device()


def test_two_machines_have_no_place_in_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.jsonl"
    run_all(selection(), Writer(path))
    monkeypatch.setattr(machine, "_processor", lambda: "another")
    with pytest.raises(ValueError, match="--fresh starts anew"):
        run_all(selection("merge"), Writer(path))


def test_two_states_of_the_code_have_no_place_in_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.jsonl"
    run_all(selection(), Writer(path))
    monkeypatch.setattr(machine, "code", lambda: "mended")
    with pytest.raises(ValueError, match="was measured with code .*, here it is mended"):
        run_all(selection("merge"), Writer(path))


def test_the_code_is_known_by_its_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bench").mkdir()
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "bench" / "machine.py"))
    (tmp_path / "sdpa.py").write_text("scale = 1")
    before = machine.code()
    assert machine.code() == before
    (tmp_path / "sdpa.py").write_text("scale = 2")
    assert machine.code() != before


def test_a_row_s_command_repeats_its_rounds(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    words = ["--suite", "tiny", "--provider", "merge", *FAST, "--out", str(out)]
    assert RUN.invoke(cli.app, words, env=WIDE).exit_code == 0
    row = rows_of(records.read(out))[0]
    assert row["command"].endswith("--rounds 7 --seconds 0")


def test_an_interruption_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops_at_the_second(shape: Shape, t: Tensors, passes: str) -> Attention:
        if shape.C:
            raise KeyboardInterrupt
        return providers.ours(shape, t, passes, "sdpa")

    monkeypatch.setitem(providers.PROVIDERS, "merge", stops_at_the_second)
    out = tmp_path / "out.jsonl"
    arguments = ["--suite", "tiny", "--provider", "merge", *FAST, "--out", str(out)]
    result = RUN.invoke(cli.app, arguments, env=WIDE)
    assert result.exit_code == 130
    assert "what is shown was measured before" in result.output
    assert [row["provider"] for row in rows_of(records.read(out))] == ["merge", "no-prefix"]


WRONG_WORDS = {
    "a suite": (["--suite", "all"], "expected one of prefill, training"),
    "a shape": (["--suite", "tiny", "--shape", "big"], "expected some of tiny:B2,M5,P3,float32"),
    "a provider": (["--suite", "tiny", "--provider", "x"], "expected some of ours-triton"),
    "a device": (["--suite", "tiny", "--device", "tpu"], "expected cpu or cuda, got tpu"),
    "no seconds": (["--suite", "tiny", "--seconds", "inf"], "--seconds: expected a number"),
    "a table of no suite": (["markdown", "f.jsonl", "--suite", "all"], "expected one of prefill"),
    "a page of nothing": (["page", "nothing.jsonl"], "nothing.jsonl"),
}


@pytest.mark.parametrize(("words", "message"), WRONG_WORDS.values(), ids=WRONG_WORDS.keys())
def test_an_unknown_name_is_refused_with_the_known(words: list[str], message: str) -> None:
    result = RUN.invoke(cli.app, words, env={"COLUMNS": "4000"})
    assert result.exit_code == 2
    assert message in result.output


def test_a_shape_may_be_named_by_its_model() -> None:
    assert len(selection(shapes=("tiny",)).cases()) == 2
    assert len(selection(shapes=("tiny:B2,M5,P3,float32",)).cases()) == 1


def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text('{"kind": "note"}\n')
    result = RUN.invoke(cli.app, ["--suite", "tiny", "--out", str(path)], env={"COLUMNS": "4000"})
    assert result.exit_code == 2
    assert "notes.txt:1: expected kind" in result.output
    assert path.read_text() == '{"kind": "note"}\n'


@pytest.mark.parametrize(("load", "said"), [(2.0, True), (0.1, False), (None, False)])
def test_other_work_is_warned_of(
    load: float | None, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "load", lambda: load)
    words = ["--suite", "tiny", "--provider", "merge", *FAST]
    result = RUN.invoke(cli.app, words, env=WIDE)
    assert result.exit_code == 0
    assert ("other work runs here (load 2.0)" in result.output) == said


def test_every_suite_has_cases_of_distinct_names_on_each_device() -> None:
    for device in DTYPES:
        for suite in SUITES:
            names = [case.name for case in cases(suite, device)]
            assert len(names) == len(set(names)) > 0, suite


def test_the_names_are_listed() -> None:
    result = RUN.invoke(cli.app, ["list", "--suite", "tiny", "--device", "cpu"], env=WIDE)
    assert result.exit_code == 0
    assert "tiny:B2,M5,P3,float32  (fwd+bwd)" in result.output
    assert "ours-triton" in result.output


def test_rounds_are_interleaved_and_begin_cold(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(measure, "_flusher", lambda device: lambda: calls.append("flush"))
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    found = interleaved(runs, "cpu", Plan(rounds=FEWEST, seconds=9))
    assert calls == ["flush", "a", "flush", "b"] * (WARM_UP + FEWEST)
    assert found["a"].rounds == FEWEST
    calls.clear()
    interleaved(runs, "cpu", Plan(rounds=FEWEST, seconds=9, warm=True))
    assert "flush" not in calls


def test_a_slow_run_takes_fewer_rounds_spread_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def fake_round(runs: dict[str, object], flush: object) -> dict[str, float]:
        asked.append(list(runs))
        return {name: {"slow": 1000.0, "fast": 1.0}[name] for name in runs}

    monkeypatch.setattr(measure, "_cpu_round", fake_round)
    runs = {"slow": lambda: None, "fast": lambda: None}
    found = interleaved(runs, "cpu", Plan(rounds=21, seconds=1))
    assert (found["slow"].rounds, found["fast"].rounds) == (FEWEST, 21)
    assert ["slow" in names for names in asked[WARM_UP:]] == [False, False, True] * FEWEST


def test_a_gpu_is_timed_by_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def elapsed_time(self, end: Event) -> float:
            assert log[-1] == "synchronize"
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    monkeypatch.setattr(measure, "_flusher", lambda device: lambda: log.append("flush"))
    found = interleaved({"a": lambda: log.append("a")}, "cuda", Plan(FEWEST, 9))
    assert log[:5] == ["flush", "record", "a", "record", "synchronize"]
    assert found["a"] == (2.0, 2.0, 2.0, FEWEST)


def test_peak_memory_sees_what_is_freed_again() -> None:
    kept: list[Tensor] = []

    def run() -> None:
        large = torch.ones(2 * 2**20)  # 8 MiB, which the system takes back at once
        small = [torch.ones(2**14) for _ in range(128)]  # 8 MiB, which the allocator keeps
        kept.append(torch.ones(2**10))  # lies above them
        del large, small

    for _ in range(3):  # what was freed before must not hide it
        found = peak_memory(run, "cpu")
        assert found is None or abs(found / 2**20 - 16) < 1


def test_a_commit_is_that_of_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert machine.commit()
    stray = tmp_path / "package" / "bench" / "machine.py"  # untracked, as in a virtual environment
    monkeypatch.setattr(machine, "__file__", str(stray))
    stray.parent.mkdir(parents=True)
    assert machine.commit() == ""


def test_a_commit_is_dirty_where_its_code_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "package"
    (package / "bench").mkdir(parents=True)
    (package / "__init__.py").touch()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(machine, "__file__", str(package / "bench" / "machine.py"))
    clean = machine.commit()
    assert clean
    assert not clean.endswith("-dirty")
    (tmp_path / "results.jsonl").touch()
    assert machine.commit() == clean
    (package / "api.py").touch()
    assert machine.commit() == f"{clean}-dirty"


def test_records_are_json(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    run_all(selection("merge"), Writer(path))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["run", "row", "row", "row", "row"]
    assert lines[1]["state"] == "unsupported"
    assert "no gradient" in lines[1]["reason"]
