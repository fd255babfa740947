"""The demo's text: the standard library of the running Python, cut into source and summaries."""

import ast
import hashlib
import sysconfig
import tokenize
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

# Tests and vendored trees are no library code; encodings and pydoc_data are generated tables.
SKIPPED_FOLDERS = frozenset(
    "test tests idle_test lib2to3 idlelib turtledemo ensurepip encodings pydoc_data "
    "site-packages dist-packages __pycache__".split()
)
HELD_OUT_SHARE = 8  # one file in eight is held out
HELD_OUT_TURN = 1  # which: the demo's settings were chosen on those of turn 0, so not on these
MARKER = "\n# Summary:"  # stands between a function and its summary
SUMMARY_CHARACTERS = (8, 100)

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Pair:
    """A function's source without its docstring, and the docstring's first line."""

    path: str
    name: str
    source: str
    summary: str


@dataclass(frozen=True)
class Module:
    """One library file.

    Attributes:
        path: below the library's root, with forward slashes.
        text: the whole file.
        documented: the source of each function that has a docstring, in source order.
        pairs: of these, the functions with a usable summary and a body beside the docstring.
    """

    path: str
    text: str
    documented: tuple[str, ...]
    pairs: tuple[Pair, ...]

    @property
    def held_out(self) -> bool:
        """Whether the file is kept from all training; decided by its path alone."""
        return hashlib.sha256(self.path.encode()).digest()[0] % HELD_OUT_SHARE == HELD_OUT_TURN


@dataclass(frozen=True)
class Library:
    """The library's readable files in path order, and the paths that are not Python we can read."""

    modules: tuple[Module, ...]
    unreadable: tuple[str, ...]

    def split(self) -> tuple[list[Module], list[Module]]:
        """Training and held-out files: a file is in exactly one of them."""
        train = [module for module in self.modules if not module.held_out]
        return train, [module for module in self.modules if module.held_out]


def library_root() -> Path:
    """The folder of the running Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def read_library(root: Path) -> Library:
    """Read every library file under `root`, in path order. ValueError where there is none."""
    modules, unreadable = [], []
    for file in sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).as_posix()):
        relative = file.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        try:
            with tokenize.open(file) as stream:
                modules.append(parse(relative.as_posix(), stream.read()))
        except (OSError, SyntaxError, ValueError):
            unreadable.append(relative.as_posix())
    if not modules:
        raise ValueError(f"root: got {root}, which holds no readable Python source")
    return Library(tuple(modules), tuple(unreadable))


def parse(path: str, text: str) -> Module:
    """A file's functions and pairs. SyntaxError or ValueError where it is not Python."""
    lines = text.splitlines(keepends=True)
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, Function)]
    documented, pairs = [], []
    for function in sorted(functions, key=lambda function: function.lineno):
        if ast.get_docstring(function):
            whole = lines[function.lineno - 1 : function.end_lineno]
            documented.append(moved_left(whole, function.col_offset))
        summary = _summary(function)
        source = _without_docstring(function, lines)
        if summary and source:
            pairs.append(Pair(path, function.name, source, summary))
    return Module(path, text, tuple(documented), tuple(pairs))


def _summary(function: Function) -> str | None:
    """The docstring's first line, or None where there is none of a usable length."""
    docstring = (ast.get_docstring(function) or "").strip()
    first = docstring.partition("\n")[0].strip()
    shortest, longest = SUMMARY_CHARACTERS
    usable = shortest <= len(first) <= longest and first.isascii() and " " in first
    return first if usable else None


def _without_docstring(function: Function, lines: Sequence[str]) -> str | None:
    """The function's lines without its docstring's, dedented; None where no body is left."""
    if len(function.body) < 2 or function.end_lineno is None:
        return None
    docstring, following = function.body[:2]
    if docstring.end_lineno is None or docstring.end_lineno >= following.lineno:
        return None  # code on the docstring's own line
    header = lines[function.lineno - 1 : docstring.lineno - 1]
    body = lines[docstring.end_lineno : function.end_lineno]
    if not header:
        return None  # the docstring starts on the line of `def`
    return moved_left([*header, *body], function.col_offset)


def moved_left(lines: Sequence[str], columns: int) -> str:
    """The lines with up to `columns` columns of indentation taken off each, as one text."""
    moved = (line[min(columns, len(line) - len(line.lstrip(" \t"))) :] for line in lines)
    return "".join(moved).rstrip()


def split_pairs(train: Iterable[Module], held: Iterable[Module]) -> tuple[list[Pair], list[Pair]]:
    """Pairs of both halves; a held-out function whose source training also has is left out."""
    training = [pair for module in train for pair in module.pairs]
    seen = {pair.source for pair in training}
    return training, [p for module in held for p in module.pairs if p.source not in seen]


def overlap(candidate: str, reference: str) -> float:
    """ROUGE-L F1 (Lin 2004) in [0, 1] on lower-case words: the longest common subsequence."""
    left, right = _words(candidate), _words(reference)
    if not left or not right:
        return 0.0
    row = [0] * (len(right) + 1)
    for word in left:
        previous = row
        row = [0]
        for column, other in enumerate(right):
            longest = max(previous[column + 1], row[column])
            row.append(previous[column] + 1 if word == other else longest)
    return 2 * row[-1] / (len(left) + len(right))


def _words(text: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()
