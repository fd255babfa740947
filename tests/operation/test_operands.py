"""What a kernel is handed is what the tensor holds, in the forward and in the backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from prefixattn import prefix_attention
from prefixattn.operands import is_stored, overlaps
from prefixattn.problem import TENSORS
from prefixattn.testing import Case, make_inputs

IMPLEMENTATIONS = ("reference", "sdpa", "cpu", pytest.param("triton", marks=pytest.mark.triton))
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def _inputs(**sizes: Any) -> dict[str, Any]:
    return make_inputs(Case("operands", M=4, N=6, D=8, **sizes), torch.float32)


def _grads(inputs: dict[str, Any], implementation: str, upstream: Tensor) -> list[Tensor]:
    leaves = {name: inputs[name].detach().requires_grad_() for name in TENSORS}
    out = prefix_attention(**inputs | leaves, implementation=implementation)
    return list(torch.autograd.grad(out, list(leaves.values()), upstream))


def _negative(x: Tensor) -> Tensor:
    """The same numbers with a sign that is still to be applied."""
    return torch._neg_view(x.neg())


def _sliding(x: Tensor) -> Tensor:
    """Rows that are windows of one row of numbers."""
    flat = x.flatten()[: x.shape[2] + x.shape[3]].clone()
    return flat.as_strided(x.shape, (0, 0, 1, 1))


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "negative bit": _negative,
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "expanded": lambda x: x[..., :1].expand(x.shape),
    "sliding": _sliding,
    "zeros without memory": lambda x: torch._efficientzerotensor(x.shape),
    "float64": lambda x: x.double(),
}


@each_implementation
@pytest.mark.parametrize("view", VIEWS)
def test_upstream_gradients_in_any_memory(view: str, implementation: str) -> None:
    inputs = _inputs()
    lazy = VIEWS[view](torch.randn(2, 4, 4, 8))
    plain = lazy.clone().resolve_neg().contiguous().float()
    got, expected = (_grads(inputs, implementation, x) for x in (lazy, plain))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("implementation", ["sdpa", "cpu"])
@pytest.mark.parametrize("view", VIEWS)
def test_upstream_gradients_of_a_gated_prefix(view: str, implementation: str) -> None:
    inputs = _inputs(gate=True)
    lazy = VIEWS[view](torch.randn(2, 4, 4, 8))
    expected = _grads(inputs, "reference", lazy.clone().contiguous())
    got = _grads(inputs, implementation, lazy)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@each_implementation
def test_upstream_gradients_of_lse_with_a_negative_bit(implementation: str) -> None:
    inputs = _inputs()
    leaf = inputs["key"].clone().requires_grad_()
    found = []
    for upstream in (up := torch.randn(2, 4, 4), _negative(up)):
        arguments = inputs | {"key": leaf, "implementation": implementation}
        _, lse = prefix_attention(**arguments, return_lse=True)
        found.append(torch.autograd.grad(lse, leaf, upstream)[0])
    assert torch.equal(*found)


@each_implementation
@pytest.mark.parametrize("view", ["negative bit", "zeros without memory"])
@pytest.mark.parametrize("name", TENSORS)
def test_arguments_that_their_memory_does_not_say(
    name: str, view: str, implementation: str
) -> None:
    inputs = _inputs()
    lazy = VIEWS[view](inputs[name])
    plain = inputs | {name: lazy.clone().resolve_neg().contiguous()}
    got = prefix_attention(**inputs | {name: lazy}, implementation=implementation)
    assert torch.equal(got, prefix_attention(**plain, implementation=implementation))


@each_implementation
def test_overlapping_queries(implementation: str) -> None:
    inputs = _inputs()
    inputs["query"] = _sliding(inputs["query"])
    assert overlaps(inputs["query"])
    out = torch.randn(2, 4, 4, 8)
    expected = _grads(inputs | {"query": inputs["query"].contiguous()}, "reference", out)
    torch.testing.assert_close(_grads(inputs, implementation, out), expected)
    got = prefix_attention(**inputs, implementation=implementation)
    torch.testing.assert_close(got, prefix_attention(**inputs, implementation="reference"))


@each_implementation
@pytest.mark.parametrize("name", ["prefix_index", "attn_mask", "sinks", "prefix_gate"])
def test_other_arguments_with_a_negative_bit_or_strides(name: str, implementation: str) -> None:
    inputs = _inputs(R=2, index=(1, 0), mask=(4, 6), mask_dtype="float", sinks=True, gate=True)
    plain = prefix_attention(**inputs, implementation=implementation)
    for view in (_negative, VIEWS["strided"]):
        got = prefix_attention(**inputs | {name: view(inputs[name])}, implementation=implementation)
        assert torch.equal(got, plain)


SAVED: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "numpy, order F": (lambda x: x.detach().numpy().copy(order="F"), torch.from_numpy),
    "channels last": (
        lambda x: x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x,
        lambda x: x,
    ),
    "a copy in reversed strides": (
        lambda x: x.detach().permute(*reversed(range(x.ndim))).contiguous(),
        lambda x: x.permute(*reversed(range(x.ndim))),
    ),
    "a negative bit": (
        lambda x: x.detach(),
        lambda x: _negative(x) if x.is_floating_point() else x,
    ),
}


@each_implementation
@pytest.mark.parametrize("hooks", SAVED)
def test_saved_tensors_come_back_in_any_layout(hooks: str, implementation: str) -> None:
    inputs, upstream = _inputs(), torch.randn(2, 4, 4, 8)
    expected = _grads(inputs, implementation, upstream)
    with torch.autograd.graph.saved_tensors_hooks(*SAVED[hooks]):
        got = _grads(inputs, implementation, upstream)
    torch.testing.assert_close(got, expected)


def test_saved_tensors_that_come_back_as_others_are_refused() -> None:
    inputs = _inputs()
    for spoil in (lambda x: x.half(), lambda x: x[..., :1]):
        with (
            torch.autograd.graph.saved_tensors_hooks(
                lambda x: x, lambda x, spoil=spoil: spoil(x) if x.ndim == 4 else x
            ),
            pytest.raises(RuntimeError, match="saved_tensors_hooks: expected .*float32 .* got"),
        ):
            _grads(inputs, "cpu", torch.randn(2, 4, 4, 8))


@each_implementation
@pytest.mark.parametrize("size", [0, 20])
@pytest.mark.parametrize("name", TENSORS)
def test_freed_or_resized_storage_is_refused(name: str, size: int, implementation: str) -> None:
    inputs = _inputs()
    freed = inputs[name] = inputs[name].clone()
    prefix_attention(**inputs, implementation=implementation)
    freed.untyped_storage().resize_(size)
    assert not is_stored(freed)
    with pytest.raises(ValueError, match=f"^{name}: expected a storage .* {size} bytes"):
        prefix_attention(**inputs, implementation=implementation)


@each_implementation
def test_storage_that_is_freed_before_the_backward_is_refused(implementation: str) -> None:
    inputs = _inputs()
    inputs["prefix_key"] = torch.nn.Parameter(inputs["prefix_key"])
    out = prefix_attention(**inputs, implementation=implementation)
    inputs["prefix_key"].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="^prefix_key: expected a storage .* freed"):
        out.sum().backward()


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "layout torch.sparse_coo": lambda x: x.to_sparse(),
    "a nested tensor: pad it": lambda x: torch.nested.nested_tensor(list(x)),
    "a nested tensor: pad it, or": lambda x: torch.nested.nested_tensor(
        list(x[0]), layout=torch.jagged
    ),
    "a MaskedTensor: pass its data": lambda x: torch.masked.MaskedTensor(x, x > 0),
}


@pytest.mark.filterwarnings("ignore:.*prototype:UserWarning")
@pytest.mark.parametrize("implementation", ["auto", "reference", "sdpa", "cpu"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["query", "prefix_value"])
def test_tensors_that_are_not_dense_are_refused(name: str, kind: str, implementation: str) -> None:
    inputs = _inputs()
    inputs[name] = KINDS[kind](inputs[name])
    with pytest.raises(TypeError, match=f"^{name}: expected a dense tensor, got {kind}"):
        prefix_attention(**inputs, implementation=implementation)


def test_a_sparse_mask_and_a_sparse_gradient_are_refused() -> None:
    inputs = _inputs()
    with pytest.raises(TypeError, match="^attn_mask: expected a dense tensor"):
        prefix_attention(**inputs, attn_mask=torch.eye(4, 6).to_sparse())
    with pytest.raises(TypeError, match="gradient of the output: expected a dense tensor"):
        _grads(inputs, "cpu", torch.randn(2, 4, 4, 8).to_sparse())


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@each_implementation
def test_batched_gradients_are_those_of_one_at_a_time(implementation: str) -> None:
    inputs = _inputs()
    leaf = inputs["prefix_key"].requires_grad_()
    out = prefix_attention(**inputs, implementation=implementation)
    many = torch.randn(3, *out.shape)
    (batched,) = torch.autograd.grad(out, leaf, many, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(out, leaf, one, retain_graph=True)[0] for one in many]
    assert torch.equal(batched, torch.stack(single))
    (by_vmap,) = torch.func.vmap(
        lambda one: torch.autograd.grad(out, leaf, one, retain_graph=True)
    )(many)
    assert torch.equal(by_vmap, batched)
