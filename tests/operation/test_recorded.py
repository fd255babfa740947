"""A recorded call runs elsewhere: "auto" is chosen there, a name stays the name that was given."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import PATIENCE
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from prefixattn import choose, ops, prefix_attention
from prefixattn.api import make_problem
from prefixattn.testing import Case, make_inputs

Recorder = Callable[[nn.Module, tuple[Tensor, ...]], Callable[..., Tensor]]


class Attention(nn.Module):
    """A model with a trained bias, or with one that stays as it is."""

    def __init__(self, implementation: str = "auto", bias: str | None = None) -> None:
        super().__init__()
        self.implementation = implementation
        self.bias = None if bias is None else nn.Parameter(torch.randn(5, 3), bias == "trained")

    def forward(self, query: Tensor, prefix: Tensor) -> Tensor:
        out = prefix_attention(
            *(query, query, query, prefix, prefix),
            prefix_bias=self.bias,
            is_causal=True,
            implementation=self.implementation,
        )
        assert isinstance(out, Tensor)
        return out


def arguments() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((1, 2, 5, 8), (1, 2, 3, 8))
    query, prefix = (torch.randn(size, generator=generator).requires_grad_() for size in sizes)
    return query, prefix


def exported(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    return torch.export.export(module, inputs).module()


def exported_strictly(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    return torch.export.export(module, inputs, strict=True).module()


def through_make_fx(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    return make_fx(module)(*inputs)


def jit_traced(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes that it takes for constants
        return torch.jit.trace(module, inputs, check_trace=False)


def compiled(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    return torch.compile(module, fullgraph=True, backend="aot_eager")


RECORDERS = (exported, exported_strictly, through_make_fx, jit_traced, compiled)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Which implementations the operators run, forward and backward."""
    found: list[tuple[str, str]] = []
    forward, backward = ops._run_forward, ops._run_backward

    def run_forward(problem: Any, implementation: str) -> Any:
        found.append(("forward", implementation))
        return forward(problem, implementation)

    def run_backward(*given: Any) -> Any:
        found.append(("backward", given[-2]))
        return backward(*given)

    monkeypatch.setattr(ops, "_run_forward", run_forward)
    monkeypatch.setattr(ops, "_run_backward", run_backward)
    return found


def pretend(monkeypatch: pytest.MonkeyPatch, **obstacles: str | None) -> None:
    """Another machine: implementations that cannot run there, for the reason given, or can."""
    changed = tuple(
        found._replace(obstacle=lambda by_name, why=obstacles[found.name]: why)
        if found.name in obstacles
        else found
        for found in choose.IMPLEMENTATIONS
    )
    monkeypatch.setattr(choose, "IMPLEMENTATIONS", changed)


def run(program: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    """The output and the gradients of both arguments."""
    inputs = arguments()
    out = program(*inputs)
    return (out.detach(), *torch.autograd.grad(out.square().sum(), inputs))


@pytest.mark.parametrize("record", RECORDERS, ids=lambda f: f.__name__)
def test_auto_is_chosen_where_the_program_runs(
    record: Recorder, ran: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(Attention("sdpa"))
    program = record(Attention(), arguments())
    here = choose.choose("auto")
    ran.clear()
    run(program)
    assert ran == [("forward", here), ("backward", here)]
    pretend(monkeypatch, cpu="no compiler there", triton="no GPU there")
    ran.clear()
    torch.testing.assert_close(run(program), expected)
    assert ran == [("forward", "sdpa"), ("backward", "sdpa")]


@pytest.mark.parametrize("record", RECORDERS, ids=lambda f: f.__name__)
def test_a_name_is_kept_and_never_falls_back(
    record: Recorder, ran: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    if choose.choose("auto") != "cpu":
        pytest.skip("the C++ kernels do not run here")
    program = record(Attention("cpu"), arguments())
    ran.clear()
    run(program)
    assert ran == [("forward", "cpu"), ("backward", "cpu")]
    pretend(monkeypatch, cpu="no compiler there")
    with pytest.raises(Exception, match="'cpu' cannot run here: no compiler there"):
        run(program)


@pytest.mark.triton
@pytest.mark.parametrize("record", [exported, compiled], ids=lambda f: f.__name__)
@pytest.mark.parametrize("bias", ["trained", "constant"])
def test_an_implementation_without_the_gradient_is_not_taken_for_the_forward_alone(
    bias: str, record: Recorder, ran: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operators run below autograd, where nothing says any more that a gradient is wanted."""
    program = record(Attention(bias=bias), arguments())
    pretend(monkeypatch, triton=None, cpu=None)
    ran.clear()
    run(program)
    name = "cpu" if bias == "trained" else "triton"
    assert ran == [("forward", name), ("backward", name)]


def test_the_operator_hands_no_address_of_a_device_to_the_cpu_kernels() -> None:
    """A program of implementation="cpu" that was moved to another device after its export."""
    inputs = {
        name: x.to("meta") if isinstance(x, Tensor) else x
        for name, x in make_inputs(Case("moved"), torch.float32).items()
    }
    with pytest.raises(NotImplementedError, match="tensors on the CPU, not on meta|C\\+\\+"):
        ops._forward(*make_problem(**inputs).arguments, "cpu")


ELSEWHERE = """
import sys, torch, prefixattn
program = torch.export.load(sys.argv[1]).module()
query, prefix = torch.load(sys.argv[2])
out = program(query, prefix)
out.sum().backward()
wanted = prefixattn.prefix_attention(*[query] * 3, prefix, prefix, is_causal=True)
print(torch.equal(out, wanted), query.grad is not None, prefixattn.choose.choose("auto"))
"""


@pytest.mark.parametrize("implementation", ["auto", "cpu"])
def test_an_exported_program_runs_where_there_is_no_compiler(
    implementation: str, tmp_path: Path
) -> None:
    if implementation == "cpu" and choose.choose("auto") != "cpu":
        pytest.skip("the C++ kernels do not run here")
    program = torch.export.export(Attention(implementation), arguments())
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save(arguments(), tmp_path / "inputs.pt")
    # No compiler, and no library that was built before.
    bare = {"PATH": "", "CXX": "", "XDG_CACHE_HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    files = [str(tmp_path / name) for name in ("program.pt2", "inputs.pt")]
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *files],
        env=os.environ | bare,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    if implementation == "auto":
        assert done.stdout.strip() == "True True sdpa", done.stderr
    else:
        assert "'cpu' cannot run here: no C++ compiler" in done.stderr
