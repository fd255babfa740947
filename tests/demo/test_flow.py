"""The whole demo with minuscule sizes: what it claims about us and PEFT holds here too."""

import io
import json
import shutil
from shutil import ignore_patterns

import pytest
from rich.console import Console

from prefixattn.demo.memory import Memory
from prefixattn.demo.run import run
from prefixattn.demo.settings import BaseSizes, Settings, TuneSizes
from prefixattn.demo.text import library_root

BASE = BaseSizes(
    vocab_size=320,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_key_value_heads=2,
    steps=4,
    batch=2,
    context=64,
)
TUNE = TuneSizes(
    prefix_tokens=8, steps=4, batch=3, measure_every=2, held_out=6, answered=4, shown=3
)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    text = folder / "text"
    for name in ("asyncio", "email", "logging"):
        shutil.copytree(library_root() / name, text / name, ignore=ignore_patterns("__pycache__"))
    return Settings(
        seed=3,
        output=folder / "out",
        cache=folder / "cache",
        text=text,
        threads=1,
        base=BASE,
        tune=TUNE,
    )


@pytest.fixture(scope="module")
def printed():
    return io.StringIO()


@pytest.fixture(scope="module")
def findings(settings, printed):
    return run(settings, Console(file=printed, width=160))


def test_losses_equal_pefts_step_by_step(findings):
    # float32 losses near 5.8 have a spacing of 4.8e-7; a few of them may gather in four steps
    assert findings.ways["PEFT"].losses != [findings.ways["PEFT"].losses[0]] * TUNE.steps
    assert max(findings.loss_difference.values()) < 1e-5
    assert findings.checkpointing_difference < 1e-5
    for way in findings.ways.values():
        assert len(way.losses) == TUNE.steps
        assert sorted(way.held_out) == [0, 2, 4]


def test_the_adapter_gives_peft_the_same_logits(findings):
    assert findings.logits_difference < 1e-5
    assert findings.logits_size > 0.1


def test_what_peft_does_under_checkpointing_is_its_own_outcome(findings):
    outcome = findings.peft_checkpointing
    assert outcome.startswith("trains;") or "Error in step" in outcome


def test_memory_and_time_are_measured(findings):
    for way in findings.ways.values():
        assert way.seconds > 0
        assert way.peak_memory > 100
        assert 0 <= way.memory_growth < way.peak_memory


def test_the_output_is_whole(findings, settings, printed):
    names = {file.relative_to(settings.output).as_posix() for file in settings.output.rglob("*")}
    assert names == {
        "adapter",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "curves.png",
        "report.json",
    }
    report = json.loads((settings.output / "report.json").read_text())
    assert report["ways"]["PEFT"]["losses"] == findings.ways["PEFT"].losses
    assert len(findings.shown) == TUNE.shown
    for heading in ("stock PEFT", "held-out ROUGE-L F1", "peak memory", "loaded by stock PEFT"):
        assert heading in printed.getvalue()


def test_a_second_run_takes_the_base_from_the_cache_and_repeats_the_numbers(
    findings, settings, monkeypatch
):
    monkeypatch.setattr(  # the processes that measure memory take most of the time
        "prefixattn.demo.flow.measure_together", lambda ways, *_: dict.fromkeys(ways, Memory(2, 1))
    )
    printed = io.StringIO()
    again = run(settings, Console(file=printed, width=160))
    assert "base: taken from" in printed.getvalue()
    for name, way in findings.ways.items():
        assert again.ways[name].losses == way.losses
        assert again.ways[name].held_out == way.held_out
    assert again.shown == findings.shown


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"threads": 0}, "threads must be at least 1, got 0"), ({"seed": -1}, "seed must be in")],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Settings(**wrong)


def test_a_file_in_the_outputs_place_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="output must be a folder, got the file"):
        Settings(output=tmp_path / "file")
