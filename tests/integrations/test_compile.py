"""torch.compile without graph breaks, and without a graph per length."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounter

import prefixattn
from prefixattn import Prefix, PrefixBank


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_one_graph_for_all_lengths(
    case: Callable[..., Any], attach: Any, name: str, padding: int
) -> None:
    given = case(name)
    attach(given.model, given.prefix())
    counter = CompileCounter()
    compiled = torch.compile(given.model, fullgraph=True, backend=counter)
    for length in (11, 13, 17, 8):
        ids = torch.randint(2, 90, (2, length))
        inputs = {"input_ids": ids, "use_cache": False}
        if padding:
            mask = torch.ones_like(ids)
            mask[0, :padding] = 0
            inputs["attention_mask"] = mask
        for value in inputs.values():
            if isinstance(value, torch.Tensor):
                torch._dynamo.mark_dynamic(value, 1)
        got, expected = compiled(**inputs).logits, given.model(**inputs).logits
        torch.testing.assert_close(got, expected)
    assert counter.frame_count == 1


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_no_mask_where_none_is_needed(case: Callable[..., Any], attach: Any, name: str) -> None:
    """transformers, while compiling, would take any batch with positions for packed documents."""
    given = case(name)
    attach(given.model, given.prefix())
    masks: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        operator = torch.ops.prefixattn.attention
        names = [argument.name for argument in operator.default._schema.arguments]
        for node in graph.graph.nodes:
            if node.target is operator:
                masks.append(node.args[names.index("attn_mask")])
        return graph.forward

    compiled = torch.compile(given.model, fullgraph=True, backend=backend)
    given.assert_close(compiled(given.input_ids, use_cache=False).logits)
    assert masks == [None, None]


def test_training(case: Callable[..., Any], attach: Any) -> None:
    llama = case("llama")
    llama.model.requires_grad_(False)
    prefix = llama.prefix()
    attach(llama.model, prefix)
    gradients = []
    for model in (llama.model, torch.compile(llama.model, fullgraph=True, backend="aot_eager")):
        prefix.zero_grad()
        model(llama.input_ids, labels=llama.input_ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in prefix.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
        assert one.abs().max() > 1e-4


@torch.no_grad()
def test_decoding_from_a_static_cache(case: Callable[..., Any], attach: Any) -> None:
    llama = case("llama")
    attach(llama.model, llama.prefix())
    counter = CompileCounter()
    compiled = torch.compile(llama.model, fullgraph=True, backend=counter)
    cache = transformers.StaticCache(config=llama.model.config, max_cache_len=32)
    parts = [llama.model(llama.input_ids[:, :5], past_key_values=cache).logits]
    for i in range(5, llama.input_ids.shape[1]):
        parts.append(compiled(llama.input_ids[:, i : i + 1], past_key_values=cache).logits)
    llama.assert_close(torch.cat(parts, dim=1))
    assert counter.frame_count == 1


@torch.no_grad()
def test_one_graph_for_all_members_of_a_bank(case: Callable[..., Any], attach: Any) -> None:
    given = case("llama")
    bank = PrefixBank([Prefix.random(given.model, length) for length in (4, 2, 7, 3)])
    attach(given.model, bank)
    counter = CompileCounter()
    compiled = torch.compile(given.model, fullgraph=True, backend=counter)
    for rows in ([0, -1], [2, 3], [1, 0]):
        with bank.use(rows):
            expected = given.model(given.input_ids).logits
            torch.testing.assert_close(compiled(given.input_ids).logits, expected)
    assert counter.frame_count == 1


def test_training_members_of_a_bank_makes_one_graph(case: Callable[..., Any], attach: Any) -> None:
    """For as many members at once, and as long ones; each gets its own gradient."""
    given = case("llama")
    given.model.requires_grad_(False)
    bank = PrefixBank([Prefix.random(given.model, 4) for _ in range(4)])
    attach(given.model, bank)
    counter = CompileCounter()
    compiled = torch.compile(given.model, fullgraph=True, backend=counter)
    inputs = {"labels": given.input_ids, "use_cache": False}
    for rows in ([0, 1], [2, 3], [1, 2]):
        gradients = []
        for model in (given.model, compiled):
            bank.zero_grad()
            with bank.use(rows):
                model(given.input_ids, **inputs).loss.backward()
            gradients.append([p.grad for p in bank.parameters()])
        trained = {
            place for place, member in bank.members.items() if member.keys[0].grad is not None
        }
        assert trained == {str(row) for row in rows}
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other)
    assert counter.frame_count == 1


@pytest.mark.parametrize("grad", [False, True])
def test_one_graph_for_all_adapters_of_a_peft_model(case: Callable[..., Any], grad: bool) -> None:
    model = case("llama").model.requires_grad_(False)
    names = ["first", "second", "third"]
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    whole = peft.get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        whole.add_adapter(name, config)
    prefixattn.attach(whole)
    counter = CompileCounter()
    compiled = torch.compile(whole, fullgraph=True, backend=counter)
    ids = torch.randint(2, 90, (2, 9))
    found = []
    with torch.set_grad_enabled(grad):
        for name in [*names, *names]:
            whole.set_adapter(name)
            expected = whole(input_ids=ids, use_cache=False).logits
            torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).logits, expected)
            found.append(expected)
    assert not torch.equal(found[0], found[1])
    assert counter.frame_count == 1
    with whole.disable_adapter():
        expected = whole(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).logits, expected)
    assert not torch.equal(found[0], expected)
    whole.delete_adapter("third")
    whole.set_adapter("second")
    torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).logits, found[1])


@torch.no_grad()
def test_a_text_that_grows_over_where_frequencies_change_is_refused(attach: Any) -> None:
    config = transformers.LlamaConfig(
        vocab_size=90,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    )
    model = transformers.LlamaForCausalLM(config).eval()
    text, ids = torch.arange(6)[None], torch.arange(30, 44)[None]
    expected = model(torch.cat([text, ids[:, :9]], 1)).logits[:, 6:]
    attach(model, Prefix.from_text(model, text))
    run = torch.compile(model, backend="eager")
    torch.testing.assert_close(run(ids[:, :9]).logits, expected)
    with pytest.raises(ValueError, match="other frequencies from 16 tokens on"):
        run(ids)


@torch.no_grad()
@torch._dynamo.config.patch(recompile_limit=2)
@pytest.mark.parametrize("part", ["a model", "its stack of layers"])
def test_kinds_of_models_have_their_own_limit(
    case: Callable[..., Any], attach: Any, part: str
) -> None:
    """One process may compile any number of kinds of models: each has its own recompilations."""
    for name in ("First", "Second", "Third", "Fourth"):
        given = case("llama")
        model = given.model if part == "a model" else given.model.model
        model.__class__ = type(name, (type(model),), {})
        attach(model, given.prefix())
        expected = model(given.input_ids)[0]
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(given.input_ids)[0], expected)
