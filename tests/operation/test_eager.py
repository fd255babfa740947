"""Eager calls go past the dispatcher: what it used to see to has to hold all the same."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from prefixattn import build, choose, explain, prefix_attention
from prefixattn.api import make_problem
from prefixattn.testing import Case, make_inputs

IMPLEMENTATIONS = ("reference", "sdpa", "cpu")
NAMES = ("query", "key", "value", "prefix_key", "prefix_value")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["key", "prefix_index", "query_offset", "key_length"])
def test_a_change_before_the_backward_is_noticed(name: str, implementation: str) -> None:
    case = Case("changed", B=2, R=2, index=(0, 1), offset=(3, 4), stops=(6, 7))
    inputs = make_inputs(case, torch.float32, poison=False)
    inputs["query"].requires_grad_()
    out = prefix_attention(**inputs, implementation=implementation)
    inputs[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_nothing_keeps_tensors_alive() -> None:
    inputs = make_inputs(Case("alive", B=2, R=2, index=(0, 1)), torch.float32, poison=False)
    inputs["key"].requires_grad_()
    out = prefix_attention(**inputs, implementation="cpu")
    out.sum().backward()
    # The graph of `out` itself holds on to the leaf.
    alive = [weakref.ref(inputs[name]) for name in (*NAMES, "prefix_index") if name != "key"]
    del inputs
    gc.collect()
    assert [found for found in alive if found() is not None] == []
    assert out.isfinite().all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
def test_keys_that_overlap_themselves(implementation: str) -> None:
    """`empty_like` of a sliding view has another last stride than the view."""
    sequence = torch.randn(1, 2, 5, 40)
    query = torch.randn(1, 2, 5, 16)
    grads = []
    for found in (implementation, "reference"):
        leaf = sequence.clone().requires_grad_()
        key = leaf.as_strided((1, 2, 5, 16), (400, 200, 40, 1)).unfold(-1, 16, 1)[..., 0, :]
        sliding = leaf.as_strided((1, 2, 5, 16), (400, 200, 1, 1))
        none = query[:, :, :0]
        out = prefix_attention(query, sliding, key, none, none, implementation=found)
        grads.append(torch.autograd.grad(out.square().sum(), leaf)[0])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_signs_that_are_still_to_be_applied(implementation: str) -> None:
    inputs = make_inputs(Case("sign", mask=(7, 7), mask_dtype="float"), torch.float32)
    negated = {name: torch._neg_view(inputs[name]) for name in ("query", "attn_mask")}
    plain = {name: -inputs[name] for name in negated}
    got = prefix_attention(**(inputs | negated), implementation=implementation)
    assert torch.equal(got, prefix_attention(**(inputs | plain), implementation=implementation))
    five = {name: inputs[name] for name in NAMES}
    got = prefix_attention(**(five | {"query": negated["query"]}), implementation=implementation)
    same = prefix_attention(**(five | {"query": plain["query"]}), implementation=implementation)
    assert torch.equal(got, same)


def test_checkpointing_under_a_mode_that_comes_late() -> None:
    """Forward and recomputation may take different ways, and must save the same tensors."""
    inputs = make_inputs(Case("late", stops=(5, 6)), torch.float32, poison=False)
    inputs["query"].requires_grad_()

    def run(query: Tensor) -> Tensor:
        return prefix_attention(**(inputs | {"query": query}), implementation="cpu")

    expected = torch.autograd.grad(run(inputs["query"]).sum(), inputs["query"])[0]
    out = checkpoint(run, inputs["query"], use_reentrant=False)
    with FlopCounterMode(display=False):
        out.sum().backward()
    assert torch.equal(inputs["query"].grad, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_backward_takes_results_of_ring_attention(implementation: str) -> None:
    """Merged in float32, in a layout of their own."""
    inputs = make_inputs(Case("ring"), torch.bfloat16, poison=False)
    for name in NAMES:
        inputs[name].requires_grad_()
    out, lse = prefix_attention(**inputs, return_lse=True, implementation=implementation)
    dout = torch.randn_like(out)
    expected = torch.autograd.grad(out, [inputs[name] for name in NAMES], dout)
    problem = prefix_attention.__globals__["make_problem"](**inputs)
    merged = out.detach().float().transpose(-1, -2).contiguous().transpose(-1, -2)
    got = torch.ops.prefixattn.attention_backward(
        dout.float(),
        None,
        merged,
        lse.detach(),
        torch.zeros_like(lse),
        *problem.arguments,
        implementation,
        list(NAMES),
    )
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "implementation", [*IMPLEMENTATIONS, pytest.param("triton", marks=pytest.mark.triton)]
)
def test_the_backward_of_some_keys_takes_results_of_all_keys(implementation: str) -> None:
    """What a ring does: the gradients of each part, for the output and lse of all of them."""
    inputs = make_inputs(Case("split", M=5, N=9, causal=False), torch.float32, poison=False)
    inputs = {name: inputs[name].requires_grad_() for name in NAMES}
    out, lse = prefix_attention(**inputs, return_lse=True, implementation="reference")
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    expected = torch.autograd.grad([out, lse], list(inputs.values()), [dout, dlse])
    found = {name: torch.zeros_like(x) for name, x in inputs.items()}
    for part, prefix in ((slice(0, 4), slice(None)), (slice(4, 9), slice(0, 0))):
        cuts = dict.fromkeys(("key", "value"), part)
        cuts |= dict.fromkeys(("prefix_key", "prefix_value"), prefix)
        own = {n: x.detach()[:, :, cuts.get(n, slice(None))] for n, x in inputs.items()}
        problem = make_problem(**own)
        upstream = (dout, dlse, out.detach(), lse.detach(), torch.zeros_like(lse))
        grads = torch.ops.prefixattn.attention_backward(
            *upstream, *problem.arguments, implementation, list(NAMES)
        )
        for name, grad in zip(NAMES, grads, strict=True):
            found[name][:, :, cuts.get(name, slice(None))] += grad
    for name, grad in zip(NAMES, expected, strict=True):
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("offset", [2**62 - 1, 1 - 2**62])
def test_windows_as_far_away_as_can_be_said(offset: int) -> None:
    inputs = make_inputs(Case("far", M=90, N=120, positions=True), torch.float32)
    inputs |= {"query_offset": offset, "window": 2**62 - 1}
    results = [
        prefix_attention(**inputs, return_lse=True, implementation=found)
        for found in ("cpu", "reference")
    ]
    torch.testing.assert_close(*results)


def test_nothing_is_built_for_tensors_that_the_kernels_refuse(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def built() -> None:
        raise AssertionError("asked for the library")

    monkeypatch.setattr(build, "obstacle", built)
    inputs = make_inputs(Case("meta"), torch.float32)
    inputs |= {name: x.to("meta") for name, x in inputs.items() if isinstance(x, Tensor)}
    assert explain(**inputs).startswith("sdpa runs")
    with pytest.raises(AssertionError, match="asked for the library"):
        choose.choose("auto")
