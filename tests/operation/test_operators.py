"""The operators as torch's compilers, autocast and function transforms meet them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from prefixattn import aten, prefix_attention
from prefixattn.api import make_problem
from prefixattn.testing import Case, assert_within_budget, evaluate, make_inputs, widest

IMPLEMENTATIONS = ("reference", "sdpa", "cpu", pytest.param("triton", marks=pytest.mark.triton))
CASES = (
    Case("plain"),
    Case("gated-packed", B=1, M=6, N=6, R=2, segments=((2, 2), (4, 4)), gate=True, sinks=True),
    Case("index", B=3, R=2, index=(1, -1, 0), lengths=(5, 3), mask=(7, 7), mask_dtype="float"),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_opcheck(case: Case, implementation: str) -> None:
    inputs = make_inputs(case, widest(implementation), poison=False)
    for name in ("query", "key", "prefix_key", "prefix_value"):
        inputs[name].requires_grad_()
    problem = make_problem(**inputs)
    arguments = (*problem.arguments, implementation)
    torch.library.opcheck(torch.ops.prefixattn.attention.default, arguments)
    with torch.no_grad():
        out, lse, lse_rest = torch.ops.prefixattn.attention(*arguments)
    upstream = (torch.randn_like(out), torch.randn_like(lse), out, lse, lse_rest)
    detached = (x.detach() if isinstance(x, Tensor) else x for x in arguments)
    wanted = ["query", "prefix_key", "prefix_value"]
    torch.library.opcheck(
        torch.ops.prefixattn.attention_backward.default, (*upstream, *detached, wanted)
    )


def _loss(**inputs: Any) -> Tensor:
    out, lse = prefix_attention(**inputs, return_lse=True)
    return out.square().sum() + lse.sum()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_forward_and_backward_match_eager(backend: str, implementation: str) -> None:
    compiled = torch.compile(_loss, fullgraph=True, backend=backend)
    for case in CASES:
        grads = []
        for run in (_loss, compiled):
            inputs = make_inputs(case, widest(implementation), poison=False)
            leaves = [inputs[name].requires_grad_() for name in ("query", "key", "prefix_key")]
            loss = run(**inputs, implementation=implementation)
            grads.append(torch.autograd.grad(loss, leaves))
        torch.testing.assert_close(grads[1], grads[0])


def test_no_recompilation_per_length() -> None:
    """Batch, queries, keys and prefix tokens are dynamic: one graph serves all lengths."""
    compiled = torch.compile(_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    sizes = ((3, 7, 9, 5), (5, 9, 9, 4), (4, 5, 12, 8), (2, 33, 33, 17))
    for number, (rows, queries, keys, tokens) in enumerate(sizes):
        inputs = make_inputs(Case("length", B=rows, M=queries, N=keys, P=tokens), torch.float32)
        inputs["query"].requires_grad_()
        with torch.compiler.set_stance("default" if number == 0 else "fail_on_recompile"):
            torch.testing.assert_close(compiled(**inputs), _loss(**inputs))


def test_a_length_that_changes_compiles_once_more_and_never_again() -> None:
    """Without `dynamic`, torch specialises first and generalises at the second length."""
    compiled = torch.compile(_loss, fullgraph=True, backend="eager")
    for number, length in enumerate((7, 8, 11, 19, 40)):
        inputs = make_inputs(Case("length", M=length, N=length), torch.float32)
        with torch.compiler.set_stance("default" if number < 2 else "fail_on_recompile"):
            torch.testing.assert_close(compiled(**inputs), _loss(**inputs))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast_casts_as_sdpa_does(implementation: str) -> None:
    inputs = make_inputs(Case("autocast"), torch.float32)
    inputs["prefix_key"].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = prefix_attention(**inputs, return_lse=True, implementation=implementation)
        out.float().sum().backward()
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert inputs["prefix_key"].grad.dtype == torch.float32
    names = ("query", "key", "value", "prefix_key", "prefix_value")
    cast = inputs | {name: inputs[name].detach().bfloat16() for name in names}
    cast["prefix_key"].requires_grad_()
    plain = prefix_attention(**cast, return_lse=True, implementation=implementation)
    plain[0].float().sum().backward()
    assert torch.equal(out, plain[0])  # the arithmetic inside is not cast again
    assert torch.equal(lse, plain[1])
    assert torch.equal(inputs["prefix_key"].grad.bfloat16(), cast["prefix_key"].grad)


TRANSFORMS = {
    "vmap": lambda f, x: torch.func.vmap(f)(x[None]),
    "grad": lambda f, x: torch.func.grad(lambda y: f(y).sum())(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_refused_with_the_way_out(name: str) -> None:
    inputs = make_inputs(Case("transform"), torch.float64)
    with pytest.raises(NotImplementedError, match="torch.func.*prefix_index"):
        TRANSFORMS[name](lambda q: prefix_attention(**{**inputs, "query": q}), inputs["query"])


def test_a_forward_mode_derivative_is_refused() -> None:
    inputs = make_inputs(Case("dual"), torch.float64)
    with forward_ad.dual_level():
        prefix_attention(**inputs)  # no dual tensor: fine
        inputs["key"] = forward_ad.make_dual(inputs["key"], torch.ones_like(inputs["key"]))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            prefix_attention(**inputs)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_output_changed_in_place_is_noticed(implementation: str) -> None:
    """The backward reads the output, as that of every flash attention does: torch must say so."""
    inputs = make_inputs(Case("in-place"), widest(implementation))
    inputs["query"].requires_grad_()
    out = prefix_attention(**inputs, implementation=implementation)
    changed = out.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        changed.sum().backward()


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded", "sliced"])
def test_any_strides_with_a_contiguous_last_dimension(layout: str) -> None:
    inputs = make_inputs(Case("strides"), torch.float64)
    for name in ("query", "key", "value", "prefix_key", "prefix_value"):
        x = inputs[name].contiguous()
        if layout == "transposed":
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        elif layout == "expanded":
            x = x[:, :1].expand(-1, x.shape[1], -1, -1)
        elif layout == "sliced":
            x = torch.cat([x, x], dim=-1)[..., 3 : 3 + x.shape[-1]]
        inputs[name] = x
    got = evaluate(inputs, lambda arguments: prefix_attention(**arguments, return_lse=True))
    assert_within_budget(got, inputs)


def test_the_output_is_laid_out_for_transformers() -> None:
    out = prefix_attention(**make_inputs(Case("layout", M=3, N=3), torch.float32))
    assert out.transpose(1, 2).is_contiguous()


def test_nothing_of_the_size_of_all_scores_is_allocated() -> None:
    """1,024 x 2,048 scores for 8 heads are 64 MiB; blocks and kernels stay far under."""
    case = Case("memory", B=1, H=8, H_kv=2, M=1024, N=1024, P=1024, D=16)
    for softcap in (None, 5.0):
        inputs = make_inputs(case, torch.float32)
        inputs |= {"softcap": softcap, "implementation": "sdpa"}
        leaf = inputs["prefix_key"].requires_grad_()
        with torch.profiler.profile(profile_memory=True) as profile:
            prefix_attention(**inputs).sum().backward()
        largest = max(event.cpu_memory_usage for event in profile.events())
        assert leaf.grad is not None
        assert largest < 24 * 2**20, f"softcap={softcap}: {largest / 2**20:.1f} MiB at once"


@pytest.mark.parametrize("kernels", [aten.CudaFlash(), aten.CudaEfficient()], ids=lambda k: k.name)
def test_cuda_kernels_are_called_as_their_schemas_want(kernels: aten.Kernels) -> None:
    """Shapes only, on meta tensors: there is no GPU here, but the signatures are checked."""
    q = torch.empty(2, 4, 7, 16, dtype=torch.float16, device="meta")
    call = aten.Call(q, q, q, None, True, 0.25)
    out, lse = kernels.forward(call)
    grads = kernels.backward(call, out, out, lse.contiguous())
    assert (out.shape, lse.shape) == (q.shape, q.shape[:3])
    assert [grad.shape for grad in grads] == [q.shape] * 3
