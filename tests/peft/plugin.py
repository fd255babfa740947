"""pytest's part in running PEFT's own tests: no network, and prefixes attached if so asked.

Options: ``--prefixattn`` attaches to every PeftModel with a prefix as soon as it is made, and
``--outcomes FILE`` writes what came of each test. `run.py` starts pytest with this plugin.
"""

import dataclasses
import functools
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
from peft import PeftType

import prefixattn

NOT_NEEDED: dict[str, tuple[str, Any]] = {
    "attr": ("dataclass", dataclasses.dataclass),
    "datasets": ("load_dataset", None),
    "diffusers": ("StableDiffusionPipeline", type("StableDiffusionPipeline", (), {})),
    "scipy": ("stats", None),
}

QUOTES = [
    "The way out of a small room is a small door.",
    "Whoever counts the waves forgets the sea.",
    "A borrowed lamp lights the lender's wall as well.",
    "Rain asks nobody which field is theirs.",
] * 8


class Quotes:
    """What PEFT's tests use of a `datasets.Dataset`, with sentences of ours."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def map(self, function: Callable[[dict[str, Any]], Any], batched: bool) -> "Quotes":
        columns = dict(function({name: [r[name] for r in self.rows] for name in self.rows[0]}))
        rows = zip(*columns.values(), strict=True)
        return Quotes([dict(zip(columns, row, strict=True)) for row in rows])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


class Splits(dict[str, Quotes]):
    def map(self, function: Callable[[dict[str, Any]], Any], batched: bool) -> "Splits":
        return Splits({name: rows.map(function, batched) for name, rows in self.items()})


def load_quotes() -> Splits:
    return Splits(train=Quotes([{"quote": text} for text in QUOTES]))


@contextmanager
def at_home(model_id: str) -> Iterator[None]:
    """In the place of PEFT's switch between on line and off: everything lies in the cache."""
    yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--prefixattn", action="store_true", help="attach to every prefix")
    parser.addoption("--outcomes", type=Path, help="where to write what came of each test")


def pytest_configure(config: pytest.Config) -> None:
    importlib.import_module("transformers.trainer")  # it asks which packages there are
    with stand_ins():
        utilities: Any = import_file("tests/testing_utils.py")
        utilities.hub_online_once = at_home
        utilities.load_dataset_english_quotes = load_quotes
        for path in config.args:
            import_file(path)
    if config.getoption("prefixattn"):
        for kind in [peft.PeftModel, *peft.PeftModel.__subclasses__()]:
            attach_on_creation(kind)


def import_file(path: str) -> ModuleType:
    """One of PEFT's tests, by its path from the folder that pytest runs in."""
    return importlib.import_module(path.removesuffix(".py").replace("/", "."))


@contextmanager
def stand_ins() -> Iterator[None]:
    """What PEFT's test files import for tests that are not among ours, where it is missing."""
    made = []
    for name, (member, value) in NOT_NEEDED.items():
        if importlib.util.find_spec(name) is None:
            module = ModuleType(name)
            setattr(module, member, value)
            sys.modules[name] = module
            made.append(name)
    yield
    for name in made:
        del sys.modules[name]


def attach_on_creation(kind: type[peft.PeftModel]) -> None:
    create = kind.__init__

    @functools.wraps(create)
    def __init__(self: peft.PeftModel, *args: Any, **kwargs: Any) -> None:
        create(self, *args, **kwargs)
        prefixes = (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE)
        # A subclass calls this on its way: its own creation attaches.
        if type(self) is kind and self.active_peft_config.peft_type in prefixes:
            prefixattn.attach(self)

    kind.__init__ = __init__


OUTCOMES: dict[str, str] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        lines = str(report.longrepr).splitlines()
        OUTCOMES[report.nodeid] = f"failed: {[x for x in lines if x.startswith('E ')][-1:]}"
    elif report.skipped:
        OUTCOMES[report.nodeid] = "skipped"
    elif report.when == "call":
        OUTCOMES[report.nodeid] = "passed"


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("outcomes")
    if path is not None and not hasattr(session.config, "workerinput"):
        path.write_text(json.dumps(OUTCOMES, indent=1))
