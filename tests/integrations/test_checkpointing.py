"""Gradient checkpointing of both kinds computes what training without it computes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from prefixattn.prefix import Prefix
from prefixattn.projected import ProjectedPrefix


def gradients(model: Any, prefix: Prefix, **inputs: Any) -> list[Tensor]:
    """Of the loss on ``inputs`` with respect to the prefix, which must all be there."""
    prefix.zero_grad()
    model(**inputs).loss.backward()
    found = [parameter.grad for parameter in prefix.parameters()]
    assert all(gradient is not None and gradient.abs().max() > 1e-4 for gradient in found)
    return [gradient.clone() for gradient in found if gradient is not None]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-6 * other.abs().max()


@pytest.fixture(params=[False, True], ids=["non-reentrant", "reentrant"])
def kind(request: pytest.FixtureRequest) -> dict[str, bool]:
    return {"use_reentrant": request.param}


def trained(case: Any) -> dict[str, Tensor]:
    case.model.requires_grad_(False)
    return {"input_ids": case.input_ids, "labels": case.input_ids}


def test_gradients_equal(promised: Any, attach: Any, kind: dict[str, bool]) -> None:
    inputs, prefix = trained(promised), promised.prefix()
    attach(promised.model, prefix)
    expected = gradients(promised.model.train(), prefix, **inputs)
    promised.model.gradient_checkpointing_enable(kind)
    assert_equal(gradients(promised.model, prefix, **inputs), expected)


@pytest.mark.parametrize("name", ["nemotron", "bloom", "falcon"])
def test_where_keywords_do_not_reach_the_attention(
    case: Callable[..., Any], attach: Any, name: str, kind: dict[str, bool]
) -> None:
    """Another forward in between, with another prefix, leaves the recomputation alone."""
    found = case(name)
    inputs, prefix = trained(found), found.prefix()
    other = Prefix.random(found.model, 3)
    attach(found.model, prefix)
    expected = gradients(found.model.train(), prefix, **inputs)
    found.model.gradient_checkpointing_enable(kind)
    prefix.zero_grad()
    loss = found.model(**inputs).loss
    found.model.prefixattn = other
    found.model(**inputs)
    found.model.prefixattn = prefix
    loss.backward()
    assert_equal([p.grad for p in prefix.parameters() if p.grad is not None], expected)


def test_enabled_before_attaching(
    case: Callable[..., Any], attach: Any, kind: dict[str, bool]
) -> None:
    llama = case("llama")
    inputs, prefix = trained(llama), llama.prefix()
    handle = attach(llama.model, prefix)
    expected = gradients(llama.model.train(), prefix, **inputs)
    handle.detach()
    llama.model.gradient_checkpointing_enable(kind)
    attach(llama.model, prefix)
    assert_equal(gradients(llama.model, prefix, **inputs), expected)


def test_embeddings_as_input(case: Callable[..., Any], attach: Any, kind: dict[str, bool]) -> None:
    llama = case("llama")
    inputs, prefix = trained(llama), llama.prefix()
    inputs["inputs_embeds"] = llama.model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    attach(llama.model, prefix)
    expected = gradients(llama.model.train(), prefix, **inputs)
    llama.model.gradient_checkpointing_enable(kind)
    assert_equal(gradients(llama.model, prefix, **inputs), expected)
    assert not inputs["inputs_embeds"].requires_grad  # the caller's tensor is left alone


def test_inputs_that_transformers_leaves_without_a_gradient(
    case: Callable[..., Any], attach: Any
) -> None:
    llama = case("llama")
    inputs, prefix = trained(llama), llama.prefix()
    attach(llama.model, prefix)
    expected = gradients(llama.model.train(), prefix, **inputs)
    llama.model.gradient_checkpointing_enable({"use_reentrant": True})
    llama.model.disable_input_require_grads()
    assert_equal(gradients(llama.model, prefix, **inputs), expected)


def test_another_forward_before_backward(
    case: Callable[..., Any], attach: Any, kind: dict[str, bool]
) -> None:
    llama = case("llama")
    inputs, prefix = trained(llama), llama.prefix()
    attach(llama.model, prefix)
    expected = gradients(llama.model.train(), prefix, **inputs)
    llama.model.gradient_checkpointing_enable(kind)
    prefix.zero_grad()
    loss = llama.model(**inputs).loss
    with torch.no_grad():
        llama.model(llama.input_ids.flip(1)[:, :5])
    loss.backward()
    assert_equal([parameter.grad for parameter in prefix.parameters()], expected)


def test_projection(case: Callable[..., Any], attach: Any) -> None:
    llama = case("llama")
    inputs = trained(llama)
    prefix = ProjectedPrefix.for_model(llama.model, 5, hidden_dim=16)
    attach(llama.model, prefix)
    expected = gradients(llama.model.train(), prefix, **inputs)
    enable = llama.model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    assert_equal(gradients(llama.model, prefix, **inputs), expected)
    enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="use_reentrant"):
        llama.model(**inputs)
    with torch.no_grad():  # nothing is trained here, so nothing is in the way
        assert llama.model(**inputs).loss.isfinite()


def test_a_cache_that_checkpointing_drops_is_an_error(
    case: Callable[..., Any], attach: Any
) -> None:
    llama = case("llama")
    inputs, prefix = trained(llama), llama.prefix()
    attach(llama.model, prefix)
    with torch.no_grad():
        cache = llama.model(llama.input_ids, use_cache=True).past_key_values
    llama.model.train().gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match="drops a cache"):
        llama.model(**inputs, past_key_values=cache)
