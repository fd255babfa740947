"""Methods that other libraries leave on the object itself, where they would hide its class's."""

import copy
from collections.abc import Callable
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers
from torch import Tensor

from prefixattn import Prefix

P = 5


def tuned(base: Any) -> Any:
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    model = peft.get_peft_model(base, config).to(base.dtype).eval()
    torch.nn.init.normal_(model.prompt_encoder["default"].embedding.weight)
    return model


def left_padded(model: Any, ids: Tensor) -> Tensor:
    """Logits of ``ids`` behind padding, which stock PEFT gets wrong."""
    padded = torch.nn.functional.pad(ids, (3, 0))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (3, 0))
    return model(input_ids=padded, attention_mask=mask).logits[:, 3:]


def test_disable_adapter_before_attaching(case: Callable[..., Any], attach: Any) -> None:
    given = case("llama")
    model = tuned(given.model)
    expected = model(input_ids=given.input_ids).logits
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids=given.input_ids).logits, given.plain)
    assert "forward" in vars(model)  # what PEFT leaves
    handle = attach(model)
    with torch.no_grad():
        assert (left_padded(model, given.input_ids) - expected).abs().max() < 1e-6
        with model.disable_adapter():
            torch.testing.assert_close(model(input_ids=given.input_ids).logits, given.plain)
        handle.detach()
        torch.testing.assert_close(model(input_ids=given.input_ids).logits, expected)
        attach(model)
        assert (left_padded(model, given.input_ids) - expected).abs().max() < 1e-6


def prepared(model: Any) -> Any:
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    loop = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    return loop.prepare_model(model)


def test_mixed_precision_while_attached(case: Callable[..., Any], attach: Any) -> None:
    given = case("llama")
    model = tuned(given.model)
    expected = model(input_ids=given.input_ids).logits
    handle = attach(model)
    assert prepared(model) is model
    handle.detach()
    for again in (False, True):
        if again:
            attach(model)
        found = model(input_ids=given.input_ids).logits
        assert (found - expected).abs().max() < 0.1 * expected.abs().max()  # of bfloat16


def test_mixed_precision_before_attaching(case: Callable[..., Any], attach: Any) -> None:
    given = case("llama")
    model = prepared(tuned(given.model))
    with pytest.raises(RuntimeError, match="forward was replaced on the object.*attach first"):
        attach(model)
    accelerate.utils.extract_model_from_parallel(model, keep_fp32_wrapper=False)
    attach(model)
    with torch.no_grad():
        found, expected = left_padded(model, given.input_ids), model(input_ids=given.input_ids)
        torch.testing.assert_close(found, expected.logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("late", [False, True], ids=["attached, moved", "moved, attached"])
@pytest.mark.parametrize("name", ["nemotron", "bloom", "falcon", "gptj"])
def test_hooks_of_accelerate_on_every_layer(
    case: Callable[..., Any], attach: Any, name: str, late: bool
) -> None:
    given = case(name)
    model = copy.deepcopy(given.model)
    if not late:
        handle = attach(model, given.prefix())
    hook = accelerate.hooks.ModelHook()
    for module in list(model.modules()):
        accelerate.hooks.add_hook_to_module(module, hook)
    if late:
        handle = attach(model, given.prefix())
    with torch.no_grad():
        given.assert_close(model(given.input_ids).logits)
        handle.detach()
        torch.testing.assert_close(model(given.input_ids).logits, given.plain)


def test_a_decoder_with_fewer_layers_than_the_encoder_it_has_not(attach: Any) -> None:
    sizes = {"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.BartConfig(
        **sizes,
        vocab_size=50,
        encoder_layers=4,
        decoder_layers=2,
        max_position_embeddings=32,
        is_encoder_decoder=False,
        is_decoder=True,
    )
    model = transformers.BartForCausalLM(config).eval()
    prefix = Prefix.random(model, 3)
    assert len(prefix.keys) == 2
    handle = attach(model, prefix)
    ids = torch.arange(8)[None]
    found = model(ids).logits
    handle.detach()
    assert not torch.equal(found, model(ids).logits)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "nemotron", "bloom"])
def test_weights_are_refused_by_every_family(
    case: Callable[..., Any], attach: Any, name: str
) -> None:
    given = case(name)
    attach(given.model, given.prefix())
    with pytest.raises(NotImplementedError, match="output_attentions"):
        given.model(given.input_ids, output_attentions=True)
    with pytest.raises(NotImplementedError, match="output_attentions"):
        given.model.generate(
            given.input_ids, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True
        )
