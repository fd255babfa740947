"""What only a GPU can show: compiled values at real sizes, races, graphs, streams, long offsets.

The listed cases run on a GPU in `tests/operation/test_implementations.py`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import PATIENCE
from torch import Tensor

from prefixattn import explain, prefix_attention
from prefixattn.testing import (
    Case,
    assert_within_budget,
    evaluate,
    make_inputs,
    poisoned_memory,
    run_implementation,
)

pytestmark = [pytest.mark.gpu, pytest.mark.triton]
DEVICE = "cuda"
TRAINED = ("query", "key", "value", "prefix_key", "prefix_value")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def meets_the_reference(case: Case, dtype: torch.dtype, device: str = DEVICE) -> None:
    inputs = make_inputs(case, dtype, device)
    with poisoned_memory():
        got = evaluate(inputs, run_implementation("triton"), frozen=("attn_mask", "prefix_bias"))
    assert_within_budget(got, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@pytest.mark.parametrize(
    ("queries", "keys"), [(1, 1), (799, 3), (113, 203), (1023, 1024), (64, 2048)]
)
@pytest.mark.parametrize("tokens", [1, 16, 130, 1000])
def test_odd_shapes(queries: int, keys: int, tokens: int, dtype: torch.dtype) -> None:
    case = Case("odd", B=2, H=4, H_kv=2, M=queries, N=keys, P=tokens, D=64)
    meets_the_reference(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@pytest.mark.parametrize(
    ("d", "d_v"),
    [(16, 16), (40, 40), (64, 128), (80, 80), (96, 64), (128, 128), (192, 128), (256, 256)],
)
def test_head_dims(d: int, d_v: int, dtype: torch.dtype) -> None:
    case = Case("dims", B=2, H=4, H_kv=2, M=200, N=200, P=70, D=d, D_v=d_v)
    meets_the_reference(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@pytest.mark.parametrize(
    "case",
    [
        Case("shared", B=16, H=32, H_kv=8, M=1, N=1500, P=1000, D=128),
        Case("index", B=9, H=8, H_kv=2, R=3, index=(2, -1, 0, 2, 2, 1, 0, 0, 2), M=1, N=700, P=500),
        Case("speculative", B=3, H=8, H_kv=2, M=5, N=900, P=300, offset=(800, 500, 895)),
        Case("gate", B=4, H=8, H_kv=8, M=1, N=600, P=200, gate=True, sinks=True),
    ],
    ids=lambda case: case.name,
)
def test_decode(case: Case, dtype: torch.dtype) -> None:
    meets_the_reference(case, dtype)


def leaves_of(inputs: dict[str, Any]) -> list[Tensor]:
    return [inputs[name].requires_grad_() for name in TRAINED]


def step(inputs: dict[str, Any], upstream: Tensor | None = None) -> list[Tensor]:
    """Output, lse and the gradients of all five tensors."""
    out, lse = prefix_attention(**inputs, implementation="triton", return_lse=True)
    upstream = torch.ones_like(out) if upstream is None else upstream
    grads = torch.autograd.grad(out, [inputs[name] for name in TRAINED], upstream)
    return [out.detach(), lse.detach(), *grads]


@pytest.mark.parametrize(
    "case",
    [
        Case("split-prefix", B=4, H=8, H_kv=2, M=300, N=300, P=40, D=64),
        Case("bank", B=6, H=4, H_kv=2, R=2, index=(1, 0, -1, 1, 1, 0), M=200, N=200, P=70, D=128),
        Case("decode", B=8, H=8, H_kv=2, M=1, N=1000, P=700, D=128),
        Case("everything", B=3, H=4, M=150, N=170, P=30, window=50, positions=True, gate=True),
    ],
    ids=lambda case: case.name,
)
def test_a_thousand_repeats_have_the_same_bits(case: Case) -> None:
    inputs = make_inputs(case, torch.bfloat16, DEVICE)
    leaves_of(inputs)
    upstream = torch.randn(case.B, case.H, case.M, case.D_v or case.D, device=DEVICE).bfloat16()
    first = step(inputs, upstream)
    for repeat in range(1000):
        for name, one, other in zip(
            ("out", "lse", *TRAINED), first, step(inputs, upstream), strict=True
        ):
            assert torch.equal(one, other), f"{name} differs in repeat {repeat}"


@pytest.mark.parametrize("queries", [1, 130], ids=["decode", "training"])
def test_a_graph_replays_with_other_numbers(queries: int) -> None:
    """Capture forbids host syncs; a replay reads the index, the lengths and the numbers anew."""
    case = Case("graph", B=4, H=8, H_kv=2, R=3, M=queries, N=600, P=300, index=(0, 1, 2, -1))
    static, other = (make_inputs(case, torch.bfloat16, DEVICE, seed=seed) for seed in (0, 1))
    other["prefix_index"] = torch.tensor([2, 2, -1, 0], device=DEVICE)
    leaves_of(static)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(static)
    with torch.no_grad():
        for name in (*TRAINED, "prefix_index"):
            static[name].copy_(other[name])
    graph.replay()
    leaves_of(other)
    for name, replayed, eager in zip(("out", "lse", *TRAINED), captured, step(other), strict=True):
        assert torch.equal(replayed, eager), name


def test_two_streams_at_once() -> None:
    inputs = [
        make_inputs(
            Case("s", B=4, H=8, H_kv=2, M=512, N=512, P=64, D=64), torch.bfloat16, DEVICE, i
        )
        for i in range(2)
    ]
    for mine in inputs:
        leaves_of(mine)
    alone = [step(mine) for mine in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(20):
        together = []
        for stream, mine in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                together.append(step(mine))
        torch.cuda.synchronize()
        for expected, got in zip(alone, together, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("far", ["row", "token"])
def test_offsets_past_two_to_the_31(far: str) -> None:
    """Two rows, or some hundred tokens, more than 2^31 numbers apart."""
    numbers = 2**31 + 2**20
    if torch.cuda.mem_get_info()[0] < 5 * numbers:
        pytest.skip(f"needs {5 * numbers / 2**30:.0f} GiB of free memory")
    room = torch.empty(numbers + 2**20, dtype=torch.bfloat16, device=DEVICE)
    case = Case("far", B=2, H=2, H_kv=2, M=300, N=300, P=300, R=2, D=64)
    inputs = make_inputs(case, torch.bfloat16, DEVICE)
    strides = (numbers, 64, 128, 1) if far == "row" else (64, 128, numbers // 300, 1)
    for name in ("key", "value", "prefix_key", "prefix_value"):
        near = {**inputs}
        spread = room.as_strided(near[name].shape, strides)
        spread.copy_(near[name])
        got = prefix_attention(**(near | {name: spread}), implementation="triton")
        expected = prefix_attention(**near, implementation="triton")
        assert torch.equal(got, expected), name


def test_nothing_grows_with_rows_times_prefix() -> None:
    """The peak of forward and backward: far less than one copy of the prefix for each row."""
    case = Case("memory", B=64, H=8, H_kv=8, M=64, N=64, P=2048, D=128)
    inputs = make_inputs(case, torch.bfloat16, DEVICE)
    leaves_of(inputs)
    step(inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(inputs)
    grown = torch.cuda.max_memory_allocated() - before
    copies = 2 * inputs["prefix_key"].nbytes * case.B
    assert grown < copies / 2, f"{grown / 2**20:.0f} MiB; copies would be {copies / 2**20:.0f} MiB"


def test_auto_takes_the_kernels_and_compiles() -> None:
    inputs = make_inputs(Case("auto", B=2, H=8, H_kv=2, M=200, N=200, P=50), torch.bfloat16, DEVICE)
    assert explain(**inputs).startswith("triton runs")

    def loss(**arguments: Any) -> Tensor:
        out, lse = prefix_attention(**arguments, return_lse=True)
        return out.float().square().sum() + lse.sum()

    leaves = leaves_of(inputs)
    eager = torch.autograd.grad(loss(**inputs), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(**inputs), leaves)
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(one, other)


def test_a_second_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    meets_the_reference(Case("second", M=100, N=100, P=20), torch.bfloat16, "cuda:1")


SANITIZED = """
import torch
from prefixattn.testing import Case, evaluate, make_inputs, run_implementation
for case in (Case("a", B=2, M=70, N=70, P=20, D=64), Case("b", B=5, M=1, N=300, P=150, D=64)):
    evaluate(make_inputs(case, torch.bfloat16, "cuda"), run_implementation("triton"))
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool: str, tmp_path: Path) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed here")
    script = tmp_path / "sanitized.py"
    script.write_text(SANITIZED)
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
