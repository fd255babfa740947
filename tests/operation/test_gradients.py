"""The reference's gradients against finite differences; who gets a gradient, and who does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from prefixattn import ops, prefix_attention
from prefixattn.problem import DIFFERENTIABLE
from prefixattn.testing import Case, make_inputs, widest

IMPLEMENTATIONS = ("reference", "sdpa", "cpu", pytest.param("triton", marks=pytest.mark.triton))
CASES = (
    Case(
        "joint",
        M=3,
        N=4,
        P=2,
        D=3,
        sinks=True,
        mask=(1, 4, 3, 4),
        mask_dtype="float",
        softcap=2.0,
        bias=(2, 1, 3, 2),
        alibi=True,
        positions=True,
    ),
    Case(
        "gated",
        M=3,
        N=3,
        P=3,
        D=3,
        R=2,
        index=(1, -1),
        lengths=(2, 3),
        gate=True,
        sinks=True,
        window=2,
        positions=True,
        starts=(0, 1),
        mask=(3,),
        mask_dtype="float",
        bias=(3,),
    ),
    Case("packed", B=1, M=5, N=5, P=2, D=3, segments=((2, 2), (2, 3)), sinks=True),
    Case("blind", M=3, N=2, P=0, D=3, offset=-2, sinks=False),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("implementation", ["reference", "sdpa", "cpu"])
def test_gradcheck(case: Case, implementation: str) -> None:
    inputs = make_inputs(case, torch.float64, poison=False)
    names = [
        name
        for name in DIFFERENTIABLE
        if isinstance(inputs.get(name), Tensor) and inputs[name].is_floating_point()
    ]
    leaves = [inputs[name].detach().requires_grad_() for name in names]

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        arguments = {**inputs, **dict(zip(names, tensors, strict=True))}
        out, lse = prefix_attention(**arguments, return_lse=True, implementation=implementation)
        return out, lse.masked_fill(lse == -torch.inf, 0)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=False)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("wanted", [("prefix_value",), ("query", "prefix_key"), ("sinks",)])
def test_only_the_gradients_asked_for(
    implementation: str, wanted: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs(Case("frozen", sinks=True), widest(implementation))
    for name in wanted:
        inputs[name].requires_grad_()
    asked: list[list[str]] = []
    original = ops._run_backward

    def watched(*arguments: Any) -> list[Tensor]:
        asked.append(list(arguments[-1]))
        return original(*arguments)

    monkeypatch.setattr(ops, "_run_backward", watched)
    prefix_attention(**inputs, implementation=implementation).sum().backward()
    assert asked == [[name for name in DIFFERENTIABLE if name in wanted]]
    for name in DIFFERENTIABLE:
        if isinstance(inputs.get(name), Tensor):
            assert (inputs[name].grad is not None) == (name in wanted)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_gradient_of_lse_alone(implementation: str) -> None:
    inputs = make_inputs(Case("lse"), widest(implementation))
    inputs["prefix_key"].requires_grad_()
    _, lse = prefix_attention(**inputs, return_lse=True, implementation=implementation)
    lse.sum().backward()
    assert inputs["prefix_key"].grad.abs().sum() > 0


def test_a_shared_prefix_sums_over_rows_in_float32() -> None:
    """512 rows in bfloat16: the error is that of a few roundings, not of 512."""
    case = Case("many-rows", B=512, M=4, N=4, P=3, H=2, H_kv=1)
    inputs = make_inputs(case, torch.bfloat16)
    grads = {}
    for dtype in (torch.bfloat16, torch.float64):
        wide = {
            name: value.detach().to(dtype) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }
        wide["prefix_value"].requires_grad_()
        implementation = "sdpa" if dtype == torch.bfloat16 else "reference"
        prefix_attention(**wide, implementation=implementation).sum().backward()
        grads[dtype] = wide["prefix_value"].grad.double()
    error = (grads[torch.bfloat16] - grads[torch.float64]).abs().max()
    assert error <= 2 * torch.finfo(torch.bfloat16).eps * grads[torch.float64].abs().max()


def test_no_second_derivative_is_said_clearly() -> None:
    inputs = make_inputs(Case("twice"), torch.float64)
    inputs["query"].requires_grad_()
    (grad,) = torch.autograd.grad(
        prefix_attention(**inputs).sum(), inputs["query"], create_graph=True
    )
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_deterministic_gives_the_same_bits(implementation: str) -> None:
    case = Case("again", B=5, R=3, index=(2, -1, 0, 2, 2), M=40, N=40, P=9)
    runs = []
    for _ in range(3):
        inputs = make_inputs(case, torch.float32)
        for name in ("prefix_key", "prefix_value", "query"):
            inputs[name].requires_grad_()
        out = prefix_attention(**inputs, implementation=implementation, deterministic=True)
        out.square().sum().backward()
        runs.append([out.detach(), *(inputs[name].grad for name in ("prefix_key", "query"))])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))
