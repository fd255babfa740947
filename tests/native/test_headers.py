"""Each header of csrc/ has a program in headers/ that checks it; here they are compiled and run.

`--native-flags` adds flags, a sanitizer say; `--native-runner` names what runs the programs, an
emulator or valgrind; CXX names the compiler, which may be one for another machine.
"""

import platform
import re
import shlex
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from patience import PATIENCE

from prefixattn import build, compiler, philox

PROGRAMS = Path(__file__).with_name("headers")
SOURCES = [*compiler.SOURCES.glob("*.h"), *compiler.SOURCES.glob("*.cpp")]
HEADERS = sorted(path.stem for path in SOURCES if path.suffix == ".h")
SETS = ("plain", "avx2", "avx512", "avx512bf16", "amx", "amx_emulated", "neon_bf16")
# The set whose processors a set for tests runs on.
NEEDS = {"amx_emulated": "avx512bf16"}
WHOLE = "kernels"  # its program loads the whole library
# What is chosen on a processor, by the emulator's name for it.
CHOICES = {"max": "neon_bf16", "cortex-a72": "plain"}
WITHOUT_VECTORS = {"arguments", "parallel", "rows", "schedule", WHOLE}
SLOW = set("backward block by_lanes by_rows forward gradients prefix_attention variant".split())
# GCC 12 finds fault with intrinsics of its own (in _mm256_undefined_si256 and its like).
WARNINGS = (
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-psabi",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
)

Compile = Callable[..., Path]


def run(*command: str | Path) -> str:
    """What a command prints; the message of the failure where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def found() -> compiler.Compiler:
    try:
        return compiler.find_compiler()
    except compiler.NoCompilerError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def compile_to(
    found: compiler.Compiler,
    tmp_path_factory: pytest.TempPathFactory,
    pytestconfig: pytest.Config,
) -> Compile:
    """A function from a name, an instruction set, sources and flags to what is compiled of them."""
    folder = tmp_path_factory.mktemp("native")
    flags = [*compiler.FLAGS, "-O1", *WARNINGS, f"-I{compiler.SOURCES}"]

    def compile_to(name: str, instructions: str, *sources: str | Path) -> Path:
        own = found.all_flags()[instructions]
        more = pytestconfig.getoption("native_flags").split()
        run(*found.command, *flags, *own, *more, *sources, "-o", folder / name, "-ldl")
        return folder / name

    return compile_to


@pytest.fixture(scope="session")
def shared(compile_to: Compile) -> list[Path]:
    """What every program is linked with."""
    names = ("parallel", "schedule")
    return [
        compile_to(f"{name}.o", "plain", "-c", compiler.SOURCES / f"{name}.cpp") for name in names
    ]


@pytest.fixture(scope="session")
def library(
    found: compiler.Compiler,
    tmp_path_factory: pytest.TempPathFactory,
    pytestconfig: pytest.Config,
) -> Path:
    """The library as it is installed, unless flags or a machine ask for another."""
    flags = pytestconfig.getoption("native_flags").split()
    if not flags and found.machine == platform.machine():
        return build.library()
    return compiler.build(tmp_path_factory.mktemp("library"), found, extra=flags)


@pytest.fixture(scope="session")
def runnable(
    found: compiler.Compiler, pytestconfig: pytest.Config, request: pytest.FixtureRequest
) -> list[str]:
    """The sets that run where the programs do, the best one last."""
    if found.machine == platform.machine():
        available: list[str] = request.getfixturevalue("available")
        return available
    names = request.getfixturevalue("names_of_sets")
    return list(names(pytestconfig.getoption("native_runner").split()))


@pytest.fixture(scope="session")
def names_of_sets(
    compile_to: Compile, shared: list[Path], library: Path
) -> Callable[[Sequence[str]], dict[str, bool]]:
    """A function from what runs a program to the sets that run there, and whether one is chosen."""
    define = "-DPREFIXATTN_ISA=plain"
    program = compile_to("names", "plain", define, "-O1", PROGRAMS / f"{WHOLE}.cpp", *shared)

    def names(runner: Sequence[str]) -> dict[str, bool]:
        lines = run(*runner, program, library, "names").splitlines()
        return {line.removesuffix(", chosen"): line.endswith(", chosen") for line in lines}

    return names


def programs() -> list[object]:
    return [
        pytest.param(header, instructions, id=f"{header}-{instructions}")
        for header in HEADERS
        for instructions in (SETS[:1] if header in WITHOUT_VECTORS else SETS)
    ]


@pytest.mark.parametrize(("header", "instructions"), programs())
def test_the_program_of_a_header_finds_no_fault(
    header: str, instructions: str, compile_to: Compile, request: pytest.FixtureRequest
) -> None:
    if instructions != "plain":
        skip_unless_compiled_here(header, instructions, request)
    program = compile_to(
        f"{header}-{instructions}",
        instructions,
        f"-DPREFIXATTN_ISA={instructions}",
        "-O1" if header in SLOW else "-O2",
        PROGRAMS / f"{header}.cpp",
        *request.getfixturevalue("shared"),
    )
    runner = request.config.getoption("native_runner").split()
    arguments = [request.getfixturevalue("library")] if header == WHOLE else []
    print(run(*runner, program, *arguments))


def skip_unless_compiled_here(
    header: str, instructions: str, request: pytest.FixtureRequest
) -> None:
    found = request.getfixturevalue("found")
    if instructions not in found.all_flags():
        pytest.skip(f"{instructions}: no instruction set of {found.machine}")
    runnable = request.getfixturevalue("runnable")
    if NEEDS.get(instructions, instructions) not in runnable:
        pytest.skip(f"{instructions}: this processor lacks it")
    if header in SLOW and instructions != runnable[-1]:
        pytest.skip(f"{instructions}: takes seconds to compile; {runnable[-1]} has to do")


@pytest.mark.parametrize(("processor", "chosen"), CHOICES.items(), ids=CHOICES.keys())
def test_the_program_of_kernels_finds_the_best_set_of_a_processor(
    processor: str, chosen: str, request: pytest.FixtureRequest
) -> None:
    """Both processors run one library, as it is installed."""
    runner = request.config.getoption("native_runner").split()
    if not any("qemu-aarch64" in word for word in runner):
        pytest.skip("needs an emulator that is told its processor: make test-arm")
    names = request.getfixturevalue("names_of_sets")([*runner, "-cpu", processor])
    assert [name for name, taken in names.items() if taken] == [chosen]
    assert list(names) == list(dict.fromkeys(["plain", chosen]))


def test_every_header_has_a_program_that_includes_it_first() -> None:
    assert sorted(path.stem for path in PROGRAMS.glob("*.cpp")) == HEADERS
    for header in HEADERS:
        included = re.findall(r'#include [<"](.+)[>"]', (PROGRAMS / f"{header}.cpp").read_text())
        assert included[0] == f"{header}.h"


def test_the_sources_include_nothing_of_torch_or_python() -> None:
    """Only each other and the system's headers, which lie in no folder but sys/."""
    names = {path.name for path in SOURCES}
    for path in SOURCES:
        text = path.read_text()
        assert {*re.findall(r'#include "(.+)"', text)} <= names
        system = set(re.findall(r"#include <(?:sys/)?(.+)>", text))
        assert not {name for name in system if "/" in name or name.lower() == "python.h"}


@pytest.mark.parametrize("instructions", SETS[1:])
def test_code_of_an_instruction_set_keeps_to_its_namespace(
    instructions: str, found: compiler.Compiler, compile_to: Compile
) -> None:
    """Else the linker would keep one copy of an inline function for all, with AVX-512 perhaps.

    Compiled with less optimisation more functions stay out of line, so that this finds more.
    """
    if instructions not in found.all_flags():
        pytest.skip(f"{instructions}: no instruction set of {found.machine}")
    define = f"-DPREFIXATTN_ISA={instructions}"
    source = compiler.SOURCES / compiler.PER_SET
    compiled = compile_to(f"{instructions}.o", instructions, "-c", define, source)
    symbols = run("nm", "--demangle", "--defined-only", compiled)
    exported = re.findall(r"^[0-9a-f]+ ([A-Zvwu]) (.+)$", symbols, re.M)
    own = re.compile(rf"\bprefixattn::{instructions}::")
    # The address of the runtime's own handler of exceptions is a datum, the same for all.
    outside = [name for _, name in exported if not own.search(name) and "personality" not in name]
    assert outside == []
    assert any(name.endswith("kKernels") for _, name in exported)


def test_philox_in_python_has_the_same_known_answers() -> None:
    for key, counter, word in (
        (0, (0, 0, 0, 0), 0x6627E8D5),
        (-1, (2**32 - 1,) * 4, 0x408F276D),
        (
            0x299F31D0A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0xD16CFE09,
        ),
    ):
        column, query, head, row = (torch.tensor([number]) for number in counter)
        found = philox.random_words(torch.tensor([key, 0]), row, head, query, column)
        assert found.item() == word
