"""What a compiled kernel takes of a chip, read from its assembly."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
PRODUCTS = {  # what the tensor cores are told, by the name it has in the report
    "wgmma": r"\bwgmma\.mma_async\b",
    "mma": r"\bmma\.sync\b",
    "tcgen05": r"\btcgen05\.mma\b",
    "mfma": r"\bv_mfma_",
}
DOT = re.compile(r"\b(tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma) ")
# A tile on its way to a buffer. NVIDIA's copies are asynchronous; AMD's go through registers.
FETCH = {
    "cuda": re.compile(r"\bttg\.async_copy_global_to_local .*tensor<\d+x\d+x!tt\.ptr"),
    "hip": re.compile(r"\bttg\.local_store .*: tensor<\d+x\d+x"),
}


class Usage(NamedTuple):
    """What a kernel takes.

    Registers of a thread (on AMD vector registers, of which `accumulators` are AGPRs), bytes of
    stack of a thread, instructions that spill to memory or fill from it, registers that AMD's
    compiler spilled, which without a stack lie in AGPRs and in lanes, bytes of shared memory,
    instructions of the tensor cores, and loops that multiply tiles: how many, and the fewest tiles
    that one fetches ahead.
    """

    registers: int
    accumulators: int
    stack: int
    spills: int
    parked: int
    shared: int
    products: dict[str, int]
    loops: int
    fetched_ahead: int


def usage(kernel: Any) -> Usage:
    """Read a Triton `CompiledKernel`.

    A loop is pipelined if in its body a tile is written into a buffer that outlives the round: it
    is for a later one, since this round's product reads what an earlier one wrote. Triton makes
    such buffers for the loads that it pipelines, and for no others; a load that it does not is a
    plain `tt.load` in front of its product.
    """
    backend = kernel.metadata.target.backend
    text = kernel.asm["ptx" if backend == "cuda" else "amdgcn"]
    products = {name: len(re.findall(pattern, text)) for name, pattern in PRODUCTS.items()}
    loops = [body for body in _loops(kernel.asm["ttgir"]) if DOT.search(body)]
    fetches = [sum(map(bool, map(FETCH[backend].search, body.split("\n")))) for body in loops]
    read = _of_cubin(kernel.asm["cubin"]) if backend == "cuda" else _of_amdgcn(text)
    return Usage(
        **read,
        shared=kernel.metadata.shared,
        products={name: count for name, count in products.items() if count},
        loops=len(loops),
        fetched_ahead=min(fetches, default=0),
    )


def _of_cubin(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) ", text)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage: expected REG and STACK, got {text[:200]!r}")
    return {
        "registers": int(found[1]),
        "accumulators": 0,
        "stack": int(found[2]),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", text)),
        "parked": 0,
    }


def _of_amdgcn(text: str) -> dict[str, int]:
    def number(name: str) -> int:
        found = re.search(rf"^[ -]+\.{name}:\s+(\d+)$", text, re.MULTILINE)
        if found is None:
            raise RuntimeError(f"the AMD kernel's metadata has no .{name}")
        return int(found[1])

    return {
        "registers": number("vgpr_count"),
        "accumulators": number("agpr_count"),
        "stack": number("private_segment_fixed_size"),
        "spills": len(re.findall(r"\bscratch_(?:load|store)_", text)),
        "parked": number("vgpr_spill_count") + number("sgpr_spill_count"),
    }


def _loops(ttgir: str) -> list[str]:
    """The bodies of the innermost loops; a loop ends where its indentation closes."""
    lines, found = ttgir.split("\n"), []
    for start, line in enumerate(lines):
        if re.match(r"\s*(%\S+ = )?scf\.for ", line):
            closing = line[: len(line) - len(line.lstrip())] + "}"
            stop = next(n for n in range(start + 1, len(lines)) if lines[n].startswith(closing))
            found.append((start, stop))
    return [
        "\n".join(lines[start + 1 : stop])
        for start, stop in found
        if not any(start < other < stop for other, _ in found)
    ]
