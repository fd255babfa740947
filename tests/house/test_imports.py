"""Who may import whom: ARCHITECTURE.md's table, and a walk over every module that holds it."""

import ast
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Row:
    """What a module may import: anywhere, and besides that only inside functions."""

    anywhere: frozenset[str]
    inside: frozenset[str] = frozenset()


PUBLIC = "prefixattn"
FRAMEWORKS = "transformers peft"
IMPLEMENTATIONS = "reference sdpa cpu kernels.forward kernels.backward kernels.decode"
JIT = "kernels.rows kernels.scores kernels.tile"
LAUNCH = f"torch triton problem {JIT} kernels.config kernels.arguments"
# Module: (what it may import anywhere, what besides that inside functions). `.` is the public
# package; a trailing `.*` means a package and everything below it; `=vllm` is the engine, beside
# our own package of that name. A module that is not here has no rule, and fails.
WRITTEN: dict[str, tuple[str, str]] = {
    ".": (
        "api bank encoder_decoder external gated positions prefix projected integrations",
        "",
    ),
    "problem": ("torch", ""),
    "rules": ("torch problem operands", ""),
    "scalars": ("torch numpy", ""),
    "philox": ("torch", ""),
    "operands": ("torch", ""),
    "reference": ("torch problem philox gradients", ""),
    "aten": ("torch", ""),
    "blocks": ("torch problem philox gradients", ""),
    "gradients": ("torch", ""),
    "parts": ("torch problem aten blocks gradients operands", ""),
    "sdpa": ("torch problem aten parts gradients", ""),
    "compiler": ("", "ninja"),
    "build": ("compiler", "filelock"),
    "cpu": ("torch problem build gradients operands", ""),
    "quick": ("torch problem", ""),
    "ops": ("torch problem quick choose operands rules", f"{IMPLEMENTATIONS} distributed.sharding"),
    "choose": ("torch problem", f"{IMPLEMENTATIONS} build"),
    "api": ("torch scalars problem operands rules philox quick choose ops", "cpu"),
    "files": ("torch safetensors", ""),
    "layers": ("torch scalars", ""),
    "kept": ("torch", ""),
    "in_use": ("torch kept", ""),
    "stored": ("torch safetensors files layers", ""),
    "initialise": ("torch layers", "integrations.*"),
    "ranks": ("torch", "deepspeed"),
    "prefix": (
        "torch scalars files initialise kept layers ranks stored",
        "deepspeed checkpoints.*",
    ),
    "projected": ("torch files initialise layers prefix stored", ""),
    "gated": ("torch files initialise layers prefix stored", ""),
    "external": ("torch in_use initialise kept layers", ""),
    "positions": ("torch scalars initialise prefix projected", "integrations.*"),
    "tables": ("torch kept layers", ""),
    "bank": ("torch scalars gated in_use kept layers prefix ranks stored tables", ""),
    "encoder_decoder": ("torch bank files layers prefix stored", "checkpoints.*"),
    "distill": ("torch scalars", ""),
    "distributed": ("distributed.layout distributed.ring", ""),
    "distributed.layout": ("torch", ""),
    "distributed.agreement": ("torch distributed.layout", ""),
    "distributed.blocks": ("torch problem gradients ops api choose", ""),
    "distributed.ring": (
        "torch problem scalars api choose distributed.agreement distributed.blocks "
        "distributed.layout",
        "",
    ),
    "distributed.sharding": ("torch problem", ""),
    "checkpoints.*": (
        "torch safetensors files layers stored initialise prefix projected gated encoder_decoder "
        "positions ranks checkpoints.*",
        "",
    ),
    "vllm": ("vllm.versions", "vllm.*"),
    "vllm.versions": ("", ""),
    "vllm.claim": ("", ""),
    "vllm.cache": ("torch", ""),
    "vllm.folder": ("torch prefix checkpoints.* vllm.claim", ""),
    "vllm.endpoints": ("vllm.versions", ""),
    "vllm.served": ("", "=vllm"),
    "vllm.reading": ("vllm.claim vllm.folder", ""),
    "vllm.waiting": ("vllm.claim", ""),
    "vllm.middleware": ("vllm.claim vllm.endpoints vllm.served", "fastapi vllm.*"),
    "vllm.*": ("torch =vllm vllm.*", ""),
    "testing": ("torch problem reference api ops", ""),
    "bench.*": (
        "torch filelock matplotlib rich typer . aten api build choose cpu files problem reference "
        "testing bench.*",
        "transformers flash_attn flashinfer xformers",
    ),
    "cli": (
        "torch typer rich bench.* build choose layers vllm",
        "cpu demo.* checkpoints.* transformers vllm.folder",
    ),
    "__main__": ("cli", ""),
    "integrations": ("", "integrations.*"),
    "integrations.*": (
        f"torch {FRAMEWORKS} . api choose encoder_decoder kept layers prefix ranks stored "
        "checkpoints.* integrations.*",
        "",
    ),
    "demo.*": (
        f"torch {FRAMEWORKS} matplotlib psutil rich safetensors tokenizers . files "
        "bench.* checkpoints.* demo.*",
        "",
    ),
    "kernels.config": ("", ""),
    "kernels.tile": ("triton", ""),
    "kernels.rows": ("triton kernels.tile", ""),
    "kernels.scores": ("triton kernels.rows kernels.tile", ""),
    "kernels.upstream": ("triton kernels.scores kernels.tile", ""),
    "kernels.arguments": (f"torch triton problem {JIT} kernels.config", ""),
    "kernels.decode": (LAUNCH, ""),
    "kernels.forward": (f"{LAUNCH} kernels.decode", ""),
    "kernels.dkv": (f"{LAUNCH} kernels.upstream", ""),
    "kernels.backward": (f"{LAUNCH} kernels.forward kernels.dkv kernels.upstream", ""),
}


def row(anywhere: str, inside: str) -> Row:
    """A row with the full names of our own modules."""

    def full(name: str) -> str:
        if name == ".":
            return PUBLIC
        return f"{PUBLIC}.{name}" if name in WRITTEN else name.removeprefix("=")

    return Row(frozenset(map(full, anywhere.split())), frozenset(map(full, inside.split())))


TABLE = {name: row(*lists) for name, lists in WRITTEN.items()}


def covers(pattern: str, name: str) -> bool:
    """Whether `pattern` (a name, or a package with `.*`) covers the dotted `name`."""
    if pattern.endswith(".*"):
        package = pattern.removesuffix(".*")
        return name == package or name.startswith(f"{package}.")
    return name == pattern


def rule_of(module: str) -> Row | None:
    """The row of a dotted module name, or None where the table has none."""
    for name, found in TABLE.items():
        if covers(PUBLIC if name == "." else f"{PUBLIC}.{name}", module):
            return found
    return None


@dataclass(frozen=True)
class Import:
    """One import: the module it names, and where it stands."""

    target: str
    line: int
    inside: bool
    for_types: bool


class Imports(ast.NodeVisitor):
    """Collects every import of a module, relative ones and `import_module("…")` included."""

    def __init__(self, module: str, is_package: bool) -> None:
        """`module` is its dotted name; a package resolves `.` to itself."""
        self.package = module.split(".") if is_package else module.split(".")[:-1]
        self.depth = 0
        self.for_types = False
        self.tables: dict[str, list[str]] = {}
        self.found: list[Import] = []

    def visit_Module(self, node: ast.Module) -> None:
        for statement in node.body:
            if not isinstance(statement, ast.Assign | ast.AnnAssign):
                continue
            values = getattr(statement.value, "values", None)  # a dict literal has them
            if values and all(isinstance(value, ast.Constant) for value in values):
                named = statement.target if isinstance(statement, ast.AnnAssign) else None
                name = ast.unparse(named or statement.targets[0])
                self.tables[name] = [str(value.value) for value in values]
        self.generic_visit(node)

    def add(self, target: str, node: ast.AST) -> None:
        line = getattr(node, "lineno", 0)
        self.found.append(Import(target, line, self.depth > 0, self.for_types))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.add(alias.name, node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            parents = self.package[: len(self.package) - node.level + 1]
            base = ".".join([*parents, *([base] if base else [])])
        for alias in node.names:
            whole = f"{base}.{alias.name}"
            self.add(whole if is_module(whole) else base, node)

    def visit_Call(self, node: ast.Call) -> None:
        name = ast.unparse(node.func)
        if name in {"__import__", "import_module", "importlib.import_module"} and node.args:
            for target in self.targets(node.args[0]):
                self.add(target, node)
        self.generic_visit(node)

    def targets(self, node: ast.expr) -> list[str]:
        """What `import_module(node)` may import: a string, or the values of a TABLE[…] of them."""
        if isinstance(node, ast.Constant):
            return [str(node.value)]
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) in self.tables:
            return self.tables[ast.unparse(node.value)]
        return [f"<{ast.unparse(node)}>"]

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) not in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            return self.generic_visit(node)
        self.for_types = True
        for child in node.body:
            self.visit(child)
        self.for_types = False
        for child in node.orelse:
            self.visit(child)
        return None

    def visit_function(self, node: ast.AST) -> None:
        self.depth += 1
        self.generic_visit(node)
        self.depth -= 1

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = visit_function


def is_module(name: str) -> bool:
    """Whether a dotted name below prefixattn is a module: one on disk or one the design names."""
    parts = name.split(".")
    if parts[0] != PUBLIC or len(parts) == 1:
        return False
    path = ROOT.joinpath(*parts)
    named = f"{PUBLIC}.{{}}".format
    return path.with_suffix(".py").exists() or path.is_dir() or name in map(named, TABLE)


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """Each import of `source` that the row of `module` does not allow, in words."""
    rule = rule_of(module)
    if rule is None:
        return [f"{module}: no row in TABLE; say there what it may import"]
    visitor = Imports(module, is_package)
    visitor.visit(ast.parse(source))
    found = []
    for entry in visitor.found:
        ours = entry.target.split(".")[0] == PUBLIC
        target = entry.target if ours else entry.target.split(".")[0]
        if target in sys.stdlib_module_names or (entry.for_types and not ours):
            continue
        if ours and rule_of(target) is None:
            found.append(f"{module}:{entry.line}: imports {target}, which has no row in TABLE")
        elif any(covers(pattern, target) for pattern in rule.anywhere):
            continue
        elif not any(covers(pattern, target) for pattern in rule.inside):
            found.append(f"{module}:{entry.line}: may not import {target}")
        elif not (entry.inside or entry.for_types):
            found.append(f"{module}:{entry.line}: may import {target} only inside a function")
    return found


def modules(folder: Path) -> list[Path]:
    """Every Python file below `folder`, through the `kernels` symlink too."""
    below = [path for path in folder.rglob("*.py") if "__pycache__" not in path.parts]
    if folder.name == PUBLIC:  # rglob follows no symlinks
        below += (folder / "kernels").glob("*.py")
    return sorted(set(below))


@pytest.mark.parametrize(
    "path", modules(ROOT / PUBLIC), ids=lambda path: str(path.relative_to(ROOT))
)
def test_a_module_imports_only_what_its_row_allows(path: Path) -> None:
    is_package = path.name == "__init__.py"
    relative = path.relative_to(ROOT).with_suffix("")
    parts = relative.parts[:-1] if is_package else relative.parts
    assert violations(path.read_text(), ".".join(parts), is_package) == []


def outside_violations(source: str, room: str, forbidden: set[str]) -> list[str]:
    """The imports of `source`, a file outside the package, whose top-level name is forbidden."""
    visitor = Imports(room, is_package=True)
    visitor.visit(ast.parse(source))
    tops = ((entry.target.split(".")[0], entry.line) for entry in visitor.found)
    return [f"{room}:{line}: may not import {top}" for top, line in tops if top in forbidden]


@pytest.mark.parametrize("room", ["tests", "benchmarks"])
def test_tests_and_benchmarks_keep_apart_and_leave_the_name_kernels_alone(room: str) -> None:
    forbidden = {"kernels", "tests", "benchmarks"} - ({room} if room == "benchmarks" else set())
    for path in modules(ROOT / room):
        name = str(path.relative_to(ROOT))
        assert outside_violations(path.read_text(), name, forbidden) == []


WRONG = {
    "a framework in the core": ("prefixattn.api", "import transformers", "import transformers"),
    "an outside package nobody listed": ("prefixattn.problem", "import numpy", "import numpy"),
    "another implementation": (
        "prefixattn.sdpa",
        "def f():\n    from prefixattn import reference",
        "import prefixattn.reference",
    ),
    "a relative import": ("prefixattn.problem", "from .api import x", "import prefixattn.api"),
    "a relative import of a module": ("prefixattn.aten", "from . import ops", "prefixattn.ops"),
    "an implementation at module level": (
        "prefixattn.ops",
        "from prefixattn.sdpa import forward",
        "only inside a function",
    ),
    "at module level, below try": (
        "prefixattn.ops",
        "try:\n    import prefixattn.sdpa\nexcept ImportError:\n    raise",
        "only inside a function",
    ),
    "in a class body, which runs on import": (
        "prefixattn.choose",
        "class A:\n    import prefixattn.sdpa",
        "only inside a function",
    ),
    "by import_module": (
        "prefixattn.api",
        "import importlib\nimportlib.import_module('peft')",
        "import peft",
    ),
    "by a name the walk cannot read": (
        "prefixattn.api",
        "import importlib\nimportlib.import_module(name)",
        "import <name>",
    ),
    "by a table of names": (
        "prefixattn.api",
        "T = {'a': 'torch', 'b': 'peft'}\ndef f(): importlib.import_module(T['a'])",
        "import peft",
    ),
    "the bare name kernels": ("prefixattn.ops", "def f():\n    import kernels", "import kernels"),
    "the core behind the public name": ("prefixattn.blocks", "import prefixattn", "prefixattn"),
    "our modules for their types alone": (
        "prefixattn.problem",
        "if TYPE_CHECKING:\n    from prefixattn.api import x",
        "import prefixattn.api",
    ),
    "after a TYPE_CHECKING block": (
        "prefixattn.api",
        "if TYPE_CHECKING:\n    pass\nelse:\n    import peft",
        "import peft",
    ),
    "a module with no row": ("prefixattn.newcomer", "", "no row in TABLE"),
    "the tests' own room": ("prefixattn.testing", "import tests.house", "import tests"),
}


@pytest.mark.parametrize(("module", "source", "wanted"), WRONG.values(), ids=WRONG.keys())
def test_the_walk_finds(module: str, source: str, wanted: str) -> None:
    (found,) = violations(source, module)
    assert found.startswith(module)
    assert wanted in found


ALLOWED = {
    "the standard library": ("prefixattn.problem", "import math, collections.abc"),
    "a submodule of a listed package": ("prefixattn.stored", "from safetensors.torch import x"),
    "an implementation inside a function": (
        "prefixattn.ops",
        "def f():\n    from prefixattn import sdpa",
    ),
    "a framework for its types alone": (
        "prefixattn.prefix",
        "if TYPE_CHECKING:\n    from transformers import PreTrainedModel",
    ),
    "the public package from an integration": (
        "prefixattn.integrations.transformers",
        "import transformers\nfrom prefixattn import prefix_attention\nfrom . import hooks",
    ),
}


@pytest.mark.parametrize(("module", "source"), ALLOWED.values(), ids=ALLOWED.keys())
def test_the_walk_allows(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_an_import_of_a_module_without_a_row_is_named() -> None:
    source = "def f():\n    from prefixattn.newcomer import x"
    (found,) = violations(source, "prefixattn.ops")
    assert "imports prefixattn.newcomer, which has no row" in found


def test_the_walk_of_tests_finds_benchmarks_and_the_bare_name() -> None:
    source = "from benchmarks.dropin import main\ndef f():\n    import kernels.tile"
    found = outside_violations(source, "tests", {"benchmarks", "kernels"})
    assert [text.split()[-1] for text in found] == ["benchmarks", "kernels"]
