"""Two commits measured side by side: a checkout and a process for each, taking turns.

Both are measured by the benchmark that is running, which is laid over the checkouts: one ruler, for
commits that have what it measures by.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from prefixattn.bench.providers import OURS
from prefixattn.bench.records import FIELDS, Record, read

RULER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Options:
    """What is measured of each ref; empty `shapes` mean all, empty `providers` ours."""

    suites: tuple[str, ...]
    shapes: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    device: str = "cpu"
    repeats: int = 3
    threads: int = 1

    def arguments(self, out: Path) -> list[str]:
        """The command's arguments."""
        pairs = [("--suite", name) for name in self.suites]
        pairs += [("--shape", name) for name in self.shapes]
        pairs += [("--provider", name) for name in self.providers or OURS]
        pairs += [("--device", self.device), ("--threads", str(self.threads)), ("--out", str(out))]
        return [word for pair in pairs for word in pair]


def sides(
    a: str, b: str, options: Options, say: Callable[[str], None], repository: Path | None = None
) -> tuple[list[list[Record]], list[list[Record]]]:
    """The records of both, read from files or measured now.

    Args:
        a, b: two results files, or two git refs.
        options: what is measured of refs.
        say: is told what happens, in words.
        repository: where the refs are; None: the working folder's.

    Raises:
        ValueError: one is neither a file nor a ref, or one is a file and the other a ref.
        RuntimeError: a checkout could not be measured; what it said is in the message.
    """
    files = [Path(name).is_file() for name in (a, b)]
    if all(files):
        return [read(Path(a), FIELDS)], [read(Path(b), FIELDS)]
    if any(files):
        raise ValueError(f"A and B: expected two results files or two git refs, got {a} and {b}")
    repository = repository or Path.cwd()
    commits = [_commit(name, repository) for name in (a, b)]
    found: tuple[list[list[Record]], list[list[Record]]] = ([], [])
    with (
        TemporaryDirectory(prefix="prefixattn-compare-") as folder,
        checkouts(repository, commits, Path(folder)) as places,
    ):
        for repeat in range(options.repeats):
            for side, (name, place) in enumerate(zip((a, b), places, strict=True)):
                say(f"measuring {name}, run {repeat + 1} of {options.repeats}")
                out = Path(folder) / f"{side}-{repeat}.jsonl"
                try:
                    found[side].append(_measured(place, options, out))
                except RuntimeError as error:
                    raise RuntimeError(f"{name} cannot be measured: {error}") from None
    return found


def _commit(name: str, repository: Path) -> str:
    result = subprocess.run(
        ["git", "-C", str(repository), "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise ValueError(f"expected a results file or a git ref, got {name!r}, which is neither")
    return result.stdout.strip()


@contextmanager
def checkouts(repository: Path, commits: Sequence[str], folder: Path) -> Iterator[list[Path]]:
    """A checkout of each commit, with the running benchmark laid over it."""
    git = ["git", "-C", str(repository), "worktree"]
    places: list[Path] = []
    try:
        for number, commit in enumerate(commits):
            place = folder / f"checkout-{number}"
            command = [*git, "add", "--quiet", "--detach", str(place), commit]
            subprocess.run(command, check=True, capture_output=True)
            places.append(place)
            bench = place / "prefixattn" / "bench"
            shutil.rmtree(bench, ignore_errors=True)
            shutil.copytree(RULER, bench, ignore=shutil.ignore_patterns("__pycache__"))
        yield places
    finally:
        for place in places:
            command = [*git, "remove", "--force", str(place)]
            subprocess.run(command, check=False, capture_output=True)


def _measured(place: Path, options: Options, out: Path) -> list[Record]:
    """One run of a checkout, in a process that starts there and so finds its package first."""
    result = subprocess.run(
        [sys.executable, "-m", "prefixattn.bench", *options.arguments(out)],
        cwd=place,
        env={k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
        | {"PYTHONPATH": str(place)},
        capture_output=True,
        text=True,
        check=False,
    )
    # A wrong implementation ends with 1 as well, and its rows say so.
    if not out.exists():
        last = (result.stderr.strip().splitlines() or ["it said nothing"])[-1]
        if last.startswith(("ImportError", "ModuleNotFoundError")):
            raise RuntimeError(f"it lacks what this benchmark measures by: {last}")
        raise RuntimeError(result.stderr.strip()[-2000:])
    if result.returncode not in (0, 1):
        said = result.stderr.strip()[-2000:] or "it said nothing"
        raise RuntimeError(f"its run ended with status {result.returncode} in the middle: {said}")
    return read(out)
