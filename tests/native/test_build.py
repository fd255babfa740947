"""The library is built once and whole; where it cannot be, a message says why.

Each test starts fresh interpreters on small sources, with a compiler that keeps a log.
"""

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE, until

from prefixattn import build, compiler

REAL = shutil.which("c++") or shutil.which("g++")
pytestmark = pytest.mark.skipif(REAL is None, reason="needs a C++ compiler, and there is none here")

# The package without its __init__, which imports torch, and with the test's sources.
PREAMBLE = f"""
import ctypes, os, sys, types
from pathlib import Path
sys.modules["prefixattn"] = package = types.ModuleType("prefixattn")
package.__path__ = [{str(Path(build.__file__).parent)!r}]
from prefixattn import build, compiler
compiler.SOURCES, build.SHIPPED = Path.cwd() / "csrc", Path.cwd() / "none"
def answer(): return ctypes.CDLL(str(build.library())).answer()
"""
LIBRARY = "print(build.library())"
STATE = "print(build.state())"
SOURCES = {
    "answer.h": "#define ANSWER 41\n",
    "kernels.cpp": "namespace prefixattn::PREFIXATTN_ISA { int one() { return 1; } }\n",
    "binding.cpp": """
#include "answer.h"
namespace prefixattn::plain { int one(); }
#define API extern "C" __attribute__((visibility("default")))
API int answer() { return ANSWER + prefixattn::plain::one(); }
""",
}


class Sandbox:
    """A home, temporary files, sources and a compiler in a folder whose name needs quoting."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home, self.tmp, self.sources = folder / "home", folder / "tmp", folder / "csrc"
        self.cache = self.home / ".cache" / "prefixattn"
        self.temporary_cache = self.tmp / f"prefixattn-{os.getuid()}"
        self.log, self.go = folder / "log", folder / "go"
        self.started: list[subprocess.Popen[str]] = []
        for each in (self.home, self.tmp, self.sources, folder / "bin"):
            each.mkdir(parents=True)
        for name, text in SOURCES.items():
            (self.sources / name).write_text(text)
        self.compile_by("")

    def compile_by(self, before: str, always: str = "") -> None:
        """The compiler does `before` whatever it compiles, and `always` even before its version."""
        script = self.folder / "bin" / "c++"
        note = f"""case " $* " in *" -c "*) echo "$$ $*" >> '{self.log}'; {before} :;; esac"""
        script.write_text(f'#!/bin/sh\n{always}\n{note}\nexec {REAL} "$@"\n')
        script.chmod(0o755)

    def compile_on_go(self) -> None:
        """The compiler waits until the file `go` exists."""
        looks = PATIENCE * 20
        self.compile_by(
            f"n=0; while [ ! -e '{self.go}' ] && [ $n -lt {looks} ];"
            " do sleep 0.05; n=$((n+1)); done;"
        )

    def start(self, code: str, **env: str) -> "subprocess.Popen[str]":
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", PREAMBLE + code],
            cwd=self.folder,
            env={"PATH": path, "HOME": str(self.home), "TMPDIR": str(self.tmp), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def run(self, code: str, **env: str) -> tuple[str, str]:
        """What `code` prints to stdout and to stderr."""
        return end(self.start(code, **env))

    def compiled(self) -> int:
        """How many times something was compiled."""
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0


def end(process: "subprocess.Popen[str]") -> tuple[str, str]:
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    return out.strip(), err.strip()


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[Sandbox]:
    made = Sandbox(tmp_path / "a b$c")
    yield made
    made.go.touch()
    for process in made.started:
        process.kill()
        process.communicate(timeout=PATIENCE)


def test_it_is_built_once_with_a_line_and_found_by_the_next_process(sandbox: Sandbox) -> None:
    built, line = sandbox.run(LIBRARY)
    assert line.startswith("prefixattn: building its C++ kernels with ")
    assert "\n" not in line
    assert " done in " in line
    compiled = sandbox.compiled()
    assert compiled >= 2
    assert Path(built).parent.parent == sandbox.cache
    found = f"built: {built}\n{built}\n42"
    assert sandbox.run(f"{STATE}; {LIBRARY}; print(answer())") == (found, "")
    assert sandbox.compiled() == compiled
    assert sorted(path.name for path in sandbox.cache.iterdir() if path.name != "cpu.lock") == [
        Path(built).parent.name
    ]


def test_the_state_is_told_without_building(sandbox: Sandbox) -> None:
    assert "would build it at first use" in sandbox.run(STATE)[0]
    assert sandbox.compiled() == 0
    assert not sandbox.cache.exists()


CHANGES = {
    "a header's content": "Path('csrc/answer.h').write_text('#define ANSWER 1')",
    "another source": "Path('csrc/more.cpp').touch()",
    "a flag": "compiler.FLAGS = (*compiler.FLAGS, '-g')",
    "a set's flag": "compiler.SETS[build.find_compiler().machine] = {'new': ('-g',)}",
    "the compiler's version": "Path('bin/c++').write_text('#!/bin/sh\\necho c++ 99')",
    "the C library": "compiler.platform.libc_ver = lambda: ('musl', '2')",
    "the cache's format": "build.FORMAT += 1",
}


def test_what_the_library_depends_on_is_in_its_name(sandbox: Sandbox) -> None:
    sandbox.run(LIBRARY)
    assert sandbox.run(STATE)[0].startswith("built")
    for what, change in CHANGES.items():
        kept = shutil.copytree(sandbox.folder / "csrc", sandbox.folder / "kept")
        assert "would build" in sandbox.run(f"{change}; {STATE}")[0], what
        shutil.rmtree(sandbox.sources)
        kept.rename(sandbox.sources)
        sandbox.compile_by("")


def test_without_a_compiler_there_is_a_reason_and_no_warning(sandbox: Sandbox) -> None:
    out, err = sandbox.run(f"print(build.obstacle()); {STATE}", PATH="")
    reason = "no C++ compiler: looked for c++, g++, clang++ on the PATH"
    assert (out, err) == (f"{reason}\n{reason}", "")


# What Python has on POSIX systems alone; Windows lacks all of it.
LACKING = {"users": ("getuid",), "file systems": ("statvfs",), "both": ("getuid", "statvfs")}


@pytest.mark.parametrize("names", LACKING.values(), ids=LACKING.keys())
def test_a_system_that_is_not_posix_is_a_reason_although_it_has_a_compiler(
    sandbox: Sandbox, names: tuple[str, ...]
) -> None:
    missing = "".join(f"del os.{name}\n" for name in names)
    out, err = sandbox.run(f"{missing}print(build.obstacle()); {STATE}")
    reason, state = out.splitlines()
    assert reason == state
    assert "the C++ kernels need a POSIX system such as Linux, macOS or Windows' WSL" in reason
    assert all(f"os.{name}" in reason for name in names)
    assert err == ""  # nobody can repair it
    assert sandbox.compiled() == 0


def test_what_cannot_be_read_is_a_reason(sandbox: Sandbox) -> None:
    (sandbox.sources / "folder.h").mkdir()
    out, err = sandbox.run(f"print(build.obstacle()); {STATE}")
    assert out.count("Is a directory") == 2
    assert "UserWarning: prefixattn runs without its C++ kernels: " in err


def test_a_shipped_library_needs_no_compiler(sandbox: Sandbox) -> None:
    built, _ = sandbox.run(LIBRARY)
    code = f"build.SHIPPED = Path({built!r}); {STATE}; print(build.obstacle(), answer())"
    assert sandbox.run(code, PATH="", HOME=str(sandbox.tmp)) == (f"built: {built}\nNone 42", "")


def test_a_compiler_named_by_CXX_is_taken_or_missed(sandbox: Sandbox) -> None:
    code = "print(build.find_compiler().command)"
    assert sandbox.run(code, CXX=f"{REAL} -g")[0] == str((REAL, "-g"))
    assert sandbox.run("print(build.obstacle())", CXX="icpx -g")[0] == (
        "CXX=icpx -g: no such compiler"
    )


@pytest.mark.parametrize("always", [False, True], ids=["where it compiles", "always"])
def test_a_broken_compiler_is_tried_and_warned_of_once(sandbox: Sandbox, always: bool) -> None:
    broken = "echo the licence ran out; exit 1;"
    sandbox.compile_by(broken, always=broken if always else "")
    code = "print(build.obstacle() is build.obstacle()); print(build.obstacle())"
    out, err = sandbox.run(code)
    assert out.startswith("True\n")
    assert "c++" in out
    assert "failed (exit status 1)" in out
    assert "the licence ran out" in out
    assert err.count("UserWarning: prefixattn runs without its C++ kernels: ") == 1
    assert err.count("building its C++ kernels") == (not always)
    assert list(sandbox.cache.glob("*cpu-*")) == []
    attempts = sandbox.log.read_text().count("binding.cpp ") if sandbox.log.exists() else 0
    assert attempts <= 1


def test_what_the_linker_lets_pass_is_found_when_loaded(sandbox: Sandbox) -> None:
    (sandbox.sources / "binding.cpp").write_text("int elsewhere(); int f() { return elsewhere(); }")
    out, _ = sandbox.run("print(build.obstacle())")
    assert out.startswith("the library cannot be loaded: ")
    assert "elsewhere" in out


def test_two_processes_build_once(sandbox: Sandbox) -> None:
    sandbox.compile_on_go()
    first = sandbox.start(LIBRARY)
    until(sandbox.compiled)
    second = sandbox.start(LIBRARY)
    assert second.stderr is not None
    said = second.stderr.readline()  # while the first is at work
    sandbox.go.touch()
    (built, line), (found, more) = end(first), end(second)
    assert built == found
    assert said == "prefixattn: waiting for another process that builds the C++ kernels\n"
    assert " done in " in line
    assert more == ""
    assert sandbox.log.read_text().count("binding.cpp ") == 1


def test_the_next_process_starts_clean_after_one_that_was_killed(sandbox: Sandbox) -> None:
    sandbox.compile_on_go()
    killed = sandbox.start(LIBRARY)
    until(sandbox.compiled)
    killed.send_signal(signal.SIGKILL)
    killed.wait(timeout=PATIENCE)
    assert len(list(sandbox.cache.glob(".cpu-*"))) == 1
    sandbox.go.touch()
    out, err = sandbox.run("print(answer())")
    assert out == "42"
    assert err.startswith("prefixattn: building")
    assert list(sandbox.cache.glob(".cpu-*")) == []


def test_what_an_orphaned_compiler_still_writes_into_goes_too(sandbox: Sandbox) -> None:
    left = sandbox.home / ".cpu-killed"
    left.mkdir()
    code = f"import itertools\nfor n in itertools.count(): open(f'{left}/{{n}}', 'x')"
    orphan = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    until(lambda: len(os.listdir(left)) > 50)
    tidy = sandbox.start(f"build._tidy(Path({str(sandbox.home)!r}), 'cpu-key')")
    tidy.communicate(timeout=PATIENCE)
    assert "No such file or directory" in orphan.communicate(timeout=PATIENCE)[1]
    assert list(sandbox.home.iterdir()) == []


def test_an_interrupt_ends_the_compilers_and_leaves_nothing(sandbox: Sandbox) -> None:
    sandbox.compile_on_go()
    process = sandbox.start(LIBRARY)
    until(sandbox.compiled)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert "... failed" in err
    assert err.strip().endswith("KeyboardInterrupt")
    compilers = [line.split()[0] for line in sandbox.log.read_text().splitlines()]
    until(lambda: not any(Path("/proc", process).exists() for process in compilers))
    assert list(sandbox.cache.glob("*cpu-*")) == []


def test_an_interrupt_while_a_compiler_is_started_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may start a program long before it tells who asked for it."""
    started: list[subprocess.Popen[str]] = []

    class Interrupted(subprocess.Popen[str]):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            started.append(self)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        compiler._run(["sleep", "1000000"], limit=PATIENCE)
    assert [process.poll() for process in started] == [-signal.SIGTERM]


def test_a_damaged_library_is_built_again(sandbox: Sandbox) -> None:
    built, _ = sandbox.run(LIBRARY)
    whole, said = Path(built).read_bytes(), Path(f"{built}.sha256")
    for file, content in ((Path(built), whole[:5000]), (said, b"\xff\xfe")):
        file.write_bytes(content)
        assert "would build" in sandbox.run(STATE)[0]
        assert sandbox.run("print(answer())")[0] == "42"


def test_libraries_long_out_of_use_go(sandbox: Sandbox) -> None:
    built, _ = sandbox.run(LIBRARY)
    old, recent, other = (sandbox.cache / name for name in ("cpu-old", "cpu-recent", "demo"))
    for folder in (old, recent, other, Path(built).parent):
        folder.mkdir(exist_ok=True)
        age = 1 if folder == recent else build.UNUSED + 10
        os.utime(folder, (time.time() - age,) * 2)
    sandbox.run(LIBRARY)  # a use
    sandbox.run(f"compiler.FLAGS += ('-g',); {LIBRARY}")
    assert not old.exists()
    assert recent.exists()
    assert other.exists()
    assert Path(built).exists()


def read_only(home: Path) -> None:
    if os.getuid() == 0:
        pytest.skip("root may write anywhere")
    home.chmod(0o500)


UNUSABLE = {
    "read-only": read_only,
    "missing": lambda home: [home.rmdir(), home.touch()],
    "a link to nowhere": lambda home: (home / ".cache").symlink_to("/proc/1/nothing"),
}


@pytest.mark.parametrize("spoil", UNUSABLE.values(), ids=UNUSABLE.keys())
def test_without_a_usable_home_it_goes_to_temporary_files(
    sandbox: Sandbox, spoil: Callable[[Path], object]
) -> None:
    spoil(sandbox.home)
    built, err = sandbox.run(LIBRARY)
    where, built_line = err.splitlines()
    assert where.startswith("prefixattn: the cache cannot be used (")
    assert where.endswith(f"; taking {sandbox.temporary_cache}")
    assert built_line.startswith("prefixattn: building")
    assert Path(built).parent.parent == sandbox.temporary_cache
    assert stat.S_IMODE(sandbox.temporary_cache.stat().st_mode) == 0o700
    assert sandbox.run(LIBRARY) == (built, "")


def open_to_others(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


def a_link(folder: Path) -> None:
    elsewhere = folder.with_name("elsewhere")
    elsewhere.mkdir(mode=0o700)
    folder.symlink_to(elsewhere)


@pytest.mark.parametrize("spoil", [open_to_others, a_link, Path.touch])
def test_a_temporary_folder_that_others_may_have_filled_is_left_alone(
    sandbox: Sandbox, spoil: Callable[[Path], None]
) -> None:
    sandbox.home.rmdir()
    sandbox.home.touch()
    spoil(sandbox.temporary_cache)
    out, err = sandbox.run("print(build.obstacle())")
    assert out.startswith("no folder to keep the built library in: ")
    assert "Not a directory" in out
    assert f"{sandbox.temporary_cache} is not a folder that this user alone can open" in out
    assert "UserWarning" in err
    assert sandbox.compiled() == 0


@pytest.mark.parametrize("unusable", ["missing", "log"])
def test_an_unusable_TMPDIR_does_not_matter(sandbox: Sandbox, unusable: str) -> None:
    sandbox.compile_by('[ -d "$TMPDIR" ] || exit 1;')  # as clang does
    sandbox.log.touch()
    out, err = sandbox.run("print(answer())", TMPDIR=str(sandbox.folder / unusable))
    assert out == "42"
    assert len(err.splitlines()) == 1


def test_a_cache_that_loads_nothing_is_passed_over(sandbox: Sandbox) -> None:
    code = """
real = os.statvfs
def mounted_noexec(folder):
    found = real(folder)
    return types.SimpleNamespace(f_flag=os.ST_NOEXEC if ".cache" in str(folder) else found.f_flag)
os.statvfs = mounted_noexec
"""
    built, err = sandbox.run(code + LIBRARY)
    assert "mounted noexec); taking " in err
    assert Path(built).parent.parent == sandbox.temporary_cache


def test_a_forked_child_keeps_the_library(sandbox: Sandbox) -> None:
    code = """
import shutil
path = build.library()
shutil.rmtree(path.parent)
child = os.fork()
if child == 0: os._exit(0 if build.library() == path and build.obstacle() is None else 1)
print(os.waitpid(child, 0)[1])
"""
    assert sandbox.run(code)[0] == "0"


def test_sets_and_flags_can_be_chosen(sandbox: Sandbox) -> None:
    code = "print(build.build(Path('own'), sets=['plain'], extra=['-DEXTRA=\"$x y\"']))"
    assert sandbox.run(code)[0] == str(sandbox.folder / "own" / build.NAME)
    lines = sandbox.log.read_text().splitlines()
    assert len(lines) == 2
    assert all('-DEXTRA="$x y"' in line for line in lines)
    (binding,) = (line for line in lines if "binding.cpp" in line)
    assert "-DPREFIXATTN_HAS_PLAIN" in binding
    sandbox.run(code)
    assert sandbox.compiled() == 2  # nothing has changed
    (sandbox.sources / "answer.h").write_text("#define ANSWER 1\n")
    sandbox.run(code)
    assert sandbox.compiled() == 3  # the one that includes it


def test_a_set_that_the_machine_lacks_is_named(sandbox: Sandbox) -> None:
    process = sandbox.start("build.build(Path('own'), sets=['plain', 'sse9'])")
    _, err = process.communicate(timeout=PATIENCE)
    assert "BuildError: sets: expected some of plain" in err
    assert err.strip().endswith("got sse9")


def test_every_source_is_where_the_package_and_its_wheels_look() -> None:
    root = Path(__file__).resolve().parents[2]
    settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = settings["package-data"]["prefixattn"]
    packed = {path.name for pattern in patterns for path in (root / "prefixattn").glob(pattern)}
    sources = {path.name for path in (root / "csrc").iterdir()} - {"README.md"}
    assert packed - {"py.typed"} == sources
    assert (root / "prefixattn" / "csrc").readlink() == Path("../csrc")


def test_it_runs_as_a_module_without_a_warning() -> None:
    command = [sys.executable, "-P", "-W", "error", "-m", "prefixattn.build", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert result.stderr == ""
    assert "--into FOLDER" in result.stdout
