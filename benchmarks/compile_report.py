"""Compile every row of the tile table ahead of time: `python -m benchmarks.compile_report`.

Shows what each kernel takes of each chip: registers, stack, spills, shared memory, instructions of
the tensor cores, and whether its loops are pipelined. It needs no GPU; `TRITON_INTERPRET` must be
unset. The plain causal problem is what the rows of the table are held to; other variants show what
features cost.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import triton
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.ahead_of_time import TARGETS, compiled
from benchmarks.binaries import usage
from prefixattn.api import make_problem
from prefixattn.bench import machine
from prefixattn.kernels import backward, decode, dkv, forward
from prefixattn.kernels.config import CHIPS, Tiles
from prefixattn.problem import Problem
from prefixattn.testing import Case, make_inputs

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # fp16 compiles as bf16 does
# Padded head dims have the tiles of the next power of two, and a mask more.
HEAD_DIMS = {"bf16": (64, 96, 128, 192, 256), "fp32": (64, 128, 256)}
PLAIN = "causal"
FEATURES_AT = ("bf16", 128)  # other variants than the plain one are compiled for these alone
LEGEND = """\
tiles: BLOCK_M×BLOCK_N, warps, stages. regs: registers of a thread, +n of them AMD's AGPRs. stack:
bytes of a thread. spills: instructions that write to the stack or read it. KiB: shared memory.
loops: those that multiply tiles. ahead: the fewest tiles that one of them fetches ahead of the
round that multiplies them; a pipelined loop fetches both of its tiles so. *: a spill, or too much
shared memory."""
TRAINED = ("query", "key", "value", "prefix_key", "prefix_value")
KERNELS = {
    "forward": (forward._forward,),
    "backward": (backward._dq, dkv._dkv, backward._delta_kernel),
    "decode": (decode._decode, decode._combine),
}


@dataclass(frozen=True)
class Variant:
    """Features of a problem, by the names of `Case`; the arguments that take a gradient."""

    features: dict[str, Any] = field(default_factory=dict)
    dropout: float = 0.0
    wanted: tuple[str, ...] = TRAINED
    decodes: bool = True


VARIANTS = {
    PLAIN: Variant(),
    "gate": Variant({"gate": True}),
    "biased": Variant({"softcap": 30.0, "alibi": True, "mask": (2, 1, 256, 256)}, decodes=False),
    "indexed": Variant({"R": 2, "index": (1, 0), "lengths": (256, 200)}),
    "packed": Variant({"B": 1, "segments": ((100, 100), (156, 156))}, decodes=False),
    "window": Variant({"window": 128, "positions": True}),
    "dropout": Variant(dropout=0.1, decodes=False),
    "small prefix": Variant({"P": 16}),
    "long": Variant({"B": 1, "H": 2, "H_kv": 1, "M": 33024, "N": 33024}, decodes=False),
    "prefix tuning": Variant(wanted=("prefix_key", "prefix_value"), decodes=False),
}
# Many queries; few; and so few that a tile of 16 holds those of all rows. Sizes that are divisible
# by 16, as real ones mostly are: Triton asks for that where it vectorises.
SIZES = {
    "training": {"B": 2, "H": 4, "H_kv": 2, "M": 256, "N": 256, "P": 256},
    "decode": {"B": 2, "H": 32, "H_kv": 2, "M": 1, "N": 1024, "P": 1024},
    "decode16": {"B": 2, "H": 8, "H_kv": 2, "M": 1, "N": 1024, "P": 1024},
}


@dataclass(frozen=True)
class Row:
    """One problem on one target: all kernels that it launches are compiled."""

    target: str
    D: int
    dtype: str
    variant: str
    sizes: str

    def problem(self) -> Problem:
        case = Case("", **{**SIZES[self.sizes], "D": self.D, **VARIANTS[self.variant].features})
        problem = make_problem(**make_inputs(case, DTYPES[self.dtype]))
        dropout = VARIANTS[self.variant].dropout
        if dropout:
            seed = torch.zeros(2, dtype=torch.int64)
            problem = replace(problem, dropout_p=dropout, dropout_seed=seed)
        return problem

    def compile(self) -> Iterator[tuple[str, Any]]:
        """Each kernel by its name in the report."""
        problem = self.problem()
        if self.sizes != "training":
            parts, merge = self._run("decode", lambda: forward.forward(problem))
            yield self.sizes, parts[0]
            if self.sizes == "decode" and self.variant == PLAIN:
                yield "combine", merge[0]
            return
        (kernels,) = self._run("forward", lambda: forward.forward(problem))
        yield "forward", kernels[0]
        out, lse, lse_rest = (torch.zeros_like(result) for result in problem.empty_output())
        wanted = VARIANTS[self.variant].wanted
        dq, slots, delta = self._run(
            "backward", lambda: backward.backward(problem, out, None, out, lse, lse_rest, wanted)
        )
        yield from (("dq", kernel) for kernel in dq)
        # Wide heads have two launches, first for keys.
        yield from zip(("dkv",) if len(slots) == 1 else ("dk", "dv"), slots, strict=True)
        if self.variant == PLAIN:
            yield "delta", delta[0]

    def _run(self, name: str, launch: Any) -> list[list[Any]]:
        return compiled(self.target, KERNELS[name], launch)


def main(
    target: Annotated[list[str] | None, typer.Option(help="A chip; all by default.")] = None,
    head_dim: Annotated[list[int] | None, typer.Option(help="All by default.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="bf16 or fp32; both by default.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="No variants with features.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the rows here, as JSON.")] = None,
) -> None:
    """Compile the kernels for each target and show what they take."""
    if triton.knobs.runtime.interpret:
        raise SystemExit("TRITON_INTERPRET is set: Triton would compile nothing. Unset it.")
    targets = _checked("--target", target, list(TARGETS))
    head_dims = _checked("--head-dim", head_dim, list(HEAD_DIMS["bf16"]))
    dtypes = _checked("--dtype", dtype, list(DTYPES))
    console = Console(width=None if sys.stdout.isatty() else 132)
    rows = [row for row in rows_of(targets, head_dims, dtypes) if row.variant == PLAIN or not plain]
    found: list[dict[str, Any]] = []
    for row in track(rows, "compiling", console=console, transient=True):
        found.extend(measure(row))
        if out is not None:
            _write(out, found)  # a run that is stopped keeps what it has
    for name in targets:
        console.print(_table(name, [line for line in found if line["target"] == name]))
    console.print(LEGEND)
    if out is not None:
        console.print(f"wrote {out}")
    failed = sum("error" in line for line in found)
    if failed:
        raise SystemExit(f"{failed} of {len(rows)} problems do not compile")


def rows_of(targets: list[str], head_dims: list[int], dtypes: list[str]) -> Iterator[Row]:
    """The plain problem of each target, head dim and dtype; then the variants."""
    for name, variant in VARIANTS.items():
        for target, dtype, D in product(targets, dtypes, head_dims):
            if D not in HEAD_DIMS[dtype] or (name != PLAIN and (dtype, D) != FEATURES_AT):
                continue
            for sizes in SIZES:
                if sizes == "training" or variant.decodes:
                    yield Row(target, D, dtype, name, sizes)


def measure(row: Row) -> Iterator[dict[str, Any]]:
    """What each kernel of a row takes, and the tiles it was compiled for; or why it fails."""
    about = {"target": row.target, "D": row.D, "dtype": row.dtype, "variant": row.variant}
    try:
        for name, kernel in row.compile():
            (tiles,) = (x for x in kernel.src.constants.values() if isinstance(x, Tiles))
            yield {
                "kernel": name,
                **about,
                "tiles": tiles._asdict(),
                **usage(kernel)._asdict(),
                "shared_limit": CHIPS[row.target].shared,
            }
    except Exception as error:  # the compiler's, of any kind: the other rows are still wanted
        yield {"kernel": row.sizes, **about, "error": f"{type(error).__name__}: {error}"}


def _write(out: Path, found: list[dict[str, Any]]) -> None:
    about = machine.facts(
        "cpu", shlex.join(["python", "-m", "benchmarks.compile_report", *sys.argv[1:]])
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"  {json.dumps(line)}" for line in found)
    out.write_text(f'{{\n "machine": {json.dumps(about)},\n "rows": [\n{lines}\n ]\n}}\n')


def _checked(option: str, given: list[Any] | None, known: list[Any]) -> list[Any]:
    for value in given or []:
        if value not in known:
            expected = ", ".join(map(str, known))
            raise typer.BadParameter(f"{option}: expected one of {expected}, got {value}")
    return given or known


def _table(target: str, lines: list[dict[str, Any]]) -> Table:
    limit = CHIPS[target].shared // 1024
    title = f"{target}, Triton {triton.__version__}, {limit} KiB of shared memory"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("kernel", "D", "dtype", "variant", "tiles", "tensor cores"):
        table.add_column(heading, no_wrap=True)
    for heading in ("regs", "stack", "spills", "KiB", "loops", "ahead", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for line in lines:
        named = (line["kernel"], str(line["D"]), line["dtype"], line["variant"])
        if "error" in line:
            table.add_row(*named, line["error"].splitlines()[-1])
            continue
        agprs = line["accumulators"]
        table.add_row(
            *named,
            "{BLOCK_M}×{BLOCK_N} w{WARPS} s{STAGES}".format(**line["tiles"]),
            ", ".join(f"{count} {name}" for name, count in line["products"].items()),
            f"{line['registers']}+{agprs}" if agprs else str(line["registers"]),
            str(line["stack"]),
            str(line["spills"]),
            f"{line['shared'] / 1024:.0f}",
            str(line["loops"]),
            str(line["fetched_ahead"]) if line["loops"] else "",
            "" if _fits(line) else "*",
        )
    return table


def _fits(line: dict[str, Any]) -> bool:
    return not line["spills"] and not line["stack"] and line["shared"] <= line["shared_limit"]


if __name__ == "__main__":
    typer.run(main)
