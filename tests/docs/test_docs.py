"""The site's pages: their code runs, their commands exist, and they name all that is public."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from patience import until_others_sleep
from typer.testing import CliRunner

import prefixattn
from prefixattn.bench.cli import app as bench
from prefixattn.cli import app

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
COMMANDS: Any = typer.main.get_command(app)
BENCH: Any = typer.main.get_command(bench)
USAGE_ERROR: Any = typer.BadParameter.__base__  # typer brings a click of its own
RUN = ("info", "convert", "vllm")  # the others take minutes: their options are checked


@dataclass(frozen=True)
class Block:
    """A fenced block, or the code in a comment that readers do not see, and its first line."""

    language: str
    text: str
    line: int


def blocks_of(text: str) -> list[Block]:
    """The blocks of a page in their order; ``<!-- python`` opens one that is not shown."""
    pattern = r"^(?:```(\w*)[^\n]*\n(.*?)^```$|<!-- (python)\n(.*?)^-->$)"
    return [
        Block(m[1] or m[3] or "", m[2] or m[4] or "", text.count("\n", 0, m.start()) + 2)
        for m in re.finditer(pattern, text, re.DOTALL | re.MULTILINE)
    ]


def commands_in(block: Block) -> list[str]:
    """What a reader would type: what follows each ``$``, with the indented lines that go on."""
    typed = re.split(r"^\$ ", block.text, flags=re.MULTILINE)
    return [command.replace("\\\n", " ").strip() for command in typed if command]


def commands_of(page: Path) -> list[str]:
    """What a reader of this page would type."""
    shown = [block for block in blocks_of(page.read_text()) if block.language == "console"]
    return [command for block in shown for command in commands_in(block)]


def fault_in(command: str) -> str | None:
    """Why a command cannot be typed in a checkout, None where it can."""
    name, *words = shlex.split(command)
    if name == "prefixattn":
        return fault_in_options(words)
    if name == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return None if words[0] in targets else f"no target {words[0]}"
    if name == "curl" or words[:2] == ["-m", "vllm.entrypoints.openai.api_server"]:
        return None  # tests/vllm/test_guide.py runs them
    if name == "python":
        file = ROOT / (words[1].replace(".", "/") if words[0] == "-m" else words[0])
        found = (
            file.is_file() or file.with_suffix(".py").is_file() or (file / "__main__.py").is_file()
        )
        return None if found else f"no {file}"
    if name == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = re.findall(r"[\w-]+", "".join(re.findall(r"\[(.*?)\]", words[-1])))
        unknown = set(extras) - set(project["optional-dependencies"])
        return f"no extras {sorted(unknown)}" if unknown or words[0] != "install" else None
    return "nothing here checks it"


def fault_in_options(words: list[str]) -> str | None:
    """Why `prefixattn` would not take these words; `bench` has an app of its own."""
    command, context = COMMANDS, None
    if words[0] == "bench":
        command, words = BENCH, words[1:]
    try:
        while hasattr(command, "resolve_command") and words and not words[0].startswith("-"):
            context = command.context_class(command, parent=context)
            _, command, words = command.resolve_command(context, words)
        command.make_context(command.name, list(words))
    except USAGE_ERROR as error:
        return str(error)
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs_from_its_top_to_its_end(page: Path, reader: Path) -> None:
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks_of(page.read_text()):
        if block.language == "python":
            code = "\n" * (block.line - 1) + block.text  # tracebacks name the page's own lines
            exec(compile(code, str(page), "exec"), names)
        elif block.language == "console":
            for command in commands_in(block):
                words = shlex.split(command)
                if words[0] == "prefixattn" and words[1] in RUN:
                    result = CliRunner().invoke(app, words[1:])
                    assert result.exit_code == 0, f"{command}: {result.output}"
    # gloo's threads free a message's tensors when they come to it, which needs the interpreter; a
    # process group that is destroyed before waits for them, and does not let go of it.
    until_others_sleep()


COMMANDS_SHOWN = {
    f"{page.stem}: {command}": command for page in PAGES for command in commands_of(page)
}


@pytest.mark.parametrize("command", COMMANDS_SHOWN.values(), ids=COMMANDS_SHOWN.keys())
def test_a_command_can_be_typed(command: str) -> None:
    assert fault_in(command) is None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_is_of_a_language_that_is_checked(page: Path) -> None:
    blocks = blocks_of(page.read_text())
    assert {block.language for block in blocks} <= {"python", "console", "text"}
    for block in blocks:
        if block.language == "console":  # output would go stale
            assert all(line.startswith(("$ ", "    ")) for line in block.text.splitlines()), block


WRONG = {
    "an option that is not there": "prefixattn demo --sede 1",
    "a command that is not there": "prefixattn dmeo",
    "an option without its value": "prefixattn demo --seed",
    "a suite's option that is not there": "prefixattn bench --suit quick",
    "a target that is not there": "make dem",
    "a module that is not there": "python -m benchmarks.speed",
    "a file that is not there": "python examples/cartridges.py",
    "an extra that is not there": "pip install '.[petf]'",
    "a program that nobody checks": "rm -rf /",
}


@pytest.mark.parametrize("command", WRONG.values(), ids=WRONG.keys())
def test_a_command_that_cannot_be_typed_is_found(command: str) -> None:
    assert fault_in(command) is not None


def test_a_command_goes_on_over_indented_lines() -> None:
    block = Block("console", "$ make test \\\n    ARGS=-x\n$ make lint\n", 1)
    first, second = commands_in(block)
    assert shlex.split(first) == ["make", "test", "ARGS=-x"]
    assert second == "make lint"


def test_blocks_are_found_in_their_order() -> None:
    page = "a\n<!-- python\nx = 1\n-->\n\n```console\n$ make test\n```\n\n```python\ny = x\n```\n"
    assert blocks_of(page) == [
        Block("python", "x = 1\n", 3),
        Block("console", "$ make test\n", 7),
        Block("python", "y = x\n", 11),
    ]


def test_the_pages_show_what_their_files_say() -> None:
    command = [sys.executable, "docs/generate.py", "--check"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, ""), found.stdout + found.stderr


def test_the_api_page_names_all_that_is_public() -> None:
    shown = re.findall(r"^::: ([\w.]+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert {f"prefixattn.{name}" for name in prefixattn.__all__} <= set(shown)


NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?")
# What the words on methods say beside the numbers of the tables: differences of these, settings,
# and what the rows in the file say.
DERIVED = {
    "0.14": "text less random, prose, 256",
    "0.06": "text less MLP",
    "0.03": "MLP less the better of text and random",
    "0.13": "LoRA + prefix less LoRA, prose, 256",
    "5.3": "validation loss at the start, package",
    "0.04": "percent between two rates of full fine-tuning, summarise",
    "38": "searches that ended between two worse rates",
    "39": "searches",
}


def test_the_words_on_methods_use_the_numbers_of_their_tables() -> None:
    """A run anew changes tables by itself, and words only by hand: here they are held together."""
    page = (DOCS / "methods.md").read_text()
    setting, _, rest = page.partition("## Results")
    tables, _, words = rest.partition("## What they say")
    known = {number.rstrip(",") for number in NUMBER.findall(setting + tables)} | {"1"}
    said = {number.rstrip(",") for number in NUMBER.findall(words)}
    assert said - known == set(DERIVED)
