"""Models that torch.compile was given, whole or in pieces, before they have a prefix."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from accelerate.utils import compile_regions
from torch import nn

import prefixattn
from prefixattn import Prefix
from prefixattn.integrations.uncompiled import uncompiled

EAGER = {"backend": "eager"}


def layers(model: Any) -> nn.ModuleList:
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def in_place(model: Any) -> Any:
    model.compile(**EAGER)
    return model


def each_layer_in_place(model: Any) -> Any:
    for layer in layers(model):
        layer.compile(**EAGER)
    return model


def the_stack(model: Any) -> Any:
    stack = torch.compile(model.base_model, **EAGER)
    setattr(model, model.base_model_prefix, stack)
    return model


def the_stack_in_place(model: Any) -> Any:
    model.base_model.compile(**EAGER)
    return model


def an_attention_module(model: Any) -> Any:
    layer = layers(model)[0]
    layer.self_attn = torch.compile(layer.self_attn, **EAGER)
    return model


def an_attention_in_place(model: Any) -> Any:
    layers(model)[1].self_attn.compile(**EAGER)
    return model


def a_forward(model: Any) -> Any:
    layer = layers(model)[0]
    layer.forward = torch.compile(layer.forward, **EAGER)
    return model


WAYS: dict[str, Callable[[Any], Any]] = {
    "torch.compile(model)": lambda model: torch.compile(model, **EAGER),
    "model.compile()": in_place,
    "regions": lambda model: compile_regions(model, **EAGER),  # what accelerate does
    "layer.compile()": each_layer_in_place,
    "torch.compile(stack)": the_stack,
    "stack.compile()": the_stack_in_place,
    "torch.compile(attention)": an_attention_module,
    "attention.compile()": an_attention_in_place,
    "a method of a layer": a_forward,
}


@pytest.mark.parametrize("way", WAYS)
def test_compiled_before_the_prefix_is_made(
    case: Callable[..., Any], attach: Any, way: str
) -> None:
    """The stock model runs first, so that its graphs are there when the prefix comes."""
    given = case("llama")
    model = WAYS[way](given.model)
    with torch.no_grad():
        torch.testing.assert_close(model(given.input_ids).logits, given.plain)
    prefix = Prefix.from_text(model, given.text)
    handle = attach(model, prefix)
    logits = model(given.input_ids).logits
    given.assert_close(logits.detach())
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in prefix.parameters())
    handle.detach()
    with torch.no_grad():
        torch.testing.assert_close(model(given.input_ids).logits, given.plain)
        attach(model, Prefix.zeros(model, 3))  # other graphs than those of the first prefix
        with_zeros = model(given.input_ids).logits
        assert (with_zeros - given.plain).abs().max() > 1e-3
        assert (with_zeros - given.logits).abs().max() > 1e-3
        prefixattn.detach(model)
        torch.testing.assert_close(model(given.input_ids).logits, given.plain)


@torch.no_grad()
def test_regions_compiled_while_attached(case: Callable[..., Any], attach: Any) -> None:
    """accelerate's regions are a copy that shares its layers with the model."""
    given = case("llama")
    handle = attach(given.model, given.prefix())
    regions = compile_regions(given.model, **EAGER)
    for run in (regions, regions.forward, given.model):
        given.assert_close(run(given.input_ids).logits)
    handle.detach()
    for run in (regions, regions.forward, given.model):
        torch.testing.assert_close(run(given.input_ids).logits, given.plain)


@torch.no_grad()
def test_a_compiled_peft_model(case: Callable[..., Any], attach: Any) -> None:
    given = case("llama")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    tuned = peft.get_peft_model(given.model, config).double().eval()
    nn.init.normal_(tuned.prompt_encoder["default"].embedding.weight)
    expected = tuned(input_ids=given.input_ids).logits
    compiled = torch.compile(tuned, **EAGER)
    handle = attach(compiled)
    found = compiled(input_ids=given.input_ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    handle.detach()
    torch.testing.assert_close(tuned(input_ids=given.input_ids).logits, expected)


@torch.no_grad()
def test_moving_a_prefix_by_a_compiled_model(case: Callable[..., Any]) -> None:
    given = case("llama")
    prefix = Prefix.from_text(given.model, given.text)
    expected = prefixattn.move_prefix(prefix, given.model, by=3)
    found = prefixattn.move_prefix(prefix, compile_regions(given.model, **EAGER), by=3)
    for one, other in zip(found.keys, expected.keys, strict=True):
        torch.testing.assert_close(one, other)


RELAYED = {
    "a layer that gets no keywords": ("bloom", lambda model: compile_regions(model, **EAGER)),
    "an attention that gets none": ("nemotron", an_attention_module),
    "the same, in place": ("nemotron", an_attention_in_place),
}


@pytest.mark.parametrize(("name", "compiled"), RELAYED.values(), ids=RELAYED.keys())
def test_pieces_that_cannot_see_the_prefix_are_refused(
    case: Callable[..., Any], attach: Any, name: str, compiled: Callable[[Any], Any]
) -> None:
    given = case(name)
    model = compiled(given.model)
    with pytest.raises(NotImplementedError, match=r"outside of what torch.compile was given"):
        attach(model, Prefix.from_text(model, given.text))
    with torch.no_grad():
        torch.testing.assert_close(model(given.input_ids).logits, given.plain)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bloom", "nemotron"])
def test_layers_compiled_in_place_relay_it(
    case: Callable[..., Any], attach: Any, name: str
) -> None:
    given = case(name)
    model = each_layer_in_place(given.model)
    attach(model, Prefix.from_text(model, given.text))
    given.assert_close(model(given.input_ids).logits)


def test_the_compiler_is_set_back_by_the_last_of_several() -> None:
    """Two threads may each survey a model; the first to end must not end it for the other."""
    stance = torch._dynamo.eval_frame
    before = stance._stance.stance
    first, second = uncompiled(), uncompiled()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert stance._stance.stance == "force_eager"
    second.__exit__(None, None, None)
    assert stance._stance.stance == before
