"""A PeftModel taken over in place: the same object, API and files, and PEFT's numbers."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import prefixattn
from prefixattn.prefix import Prefix

P = 5
PREFIX = {"task_type": "CAUSAL_LM", "num_virtual_tokens": P}


def tuned(base: Any, **changes: Any) -> Any:
    """``base`` with prefix tuning, in float64 where it is."""
    config = peft.PrefixTuningConfig(**(PREFIX | changes))
    return peft.get_peft_model(base, config).to(base.dtype).eval()


def step(model: Any, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of the loss by name."""
    model.zero_grad()
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    out = model(input_ids=ids, attention_mask=mask, labels=labels)
    out.loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return out.logits.detach(), found


def assert_same(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]):
    torch.testing.assert_close(one[0], other[0], rtol=0, atol=2e-6 * float(other[0].abs().max()))
    assert one[1].keys() == other[1].keys()
    assert one[1]
    for name, gradient in other[1].items():
        bound = 1e-5 * float(gradient.abs().max())
        torch.testing.assert_close(one[1][name], gradient, rtol=0, atol=bound)


@pytest.fixture
def llama(case: Callable[..., Any]) -> Any:
    return case("llama")


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma2", "gpt2", "opt", "cohere2"])
def test_training_step(case: Callable[..., Any], attach: Any, name: str) -> None:
    given = case(name)
    ours = tuned(given.model)
    stock = copy.deepcopy(ours)
    attach(ours)
    assert_same(step(ours, given.input_ids), step(stock, given.input_ids))
    mask = torch.ones_like(given.input_ids)
    mask[1, 7:] = 0
    (logits, grads), (wanted, others) = (step(m, given.input_ids, mask) for m in (ours, stock))
    assert_same((logits[mask.bool()], grads), (wanted[mask.bool()], others))
    assert (wanted - given.plain).abs().max() > 0.05


@pytest.mark.parametrize("changes", [{}, {"prefix_projection": True, "encoder_hidden_size": 16}])
def test_checkpointing_and_encoder_calls(llama: Any, attach: Any, changes: dict) -> None:
    ours = tuned(llama.model, **changes)
    stock = copy.deepcopy(ours)
    attach(ours)
    expected = step(stock, llama.input_ids)
    ours.train().gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(step(ours, llama.input_ids), expected)
    ours.gradient_checkpointing_enable({"use_reentrant": True})
    if changes:
        with pytest.raises(RuntimeError, match="use_reentrant"):
            step(ours, llama.input_ids)
    else:
        assert_same(step(ours, llama.input_ids), expected)


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_generation(promised: Any, attach: Any, beams: int) -> None:
    ours = tuned(promised.model)
    with torch.no_grad():
        for parameter in ours.prompt_encoder.parameters():
            parameter.mul_(2)
    stock = copy.deepcopy(ours)
    attach(ours)
    ids = promised.input_ids
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    for inputs in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
        if "attention_mask" in inputs and promised.name == "gemma2":
            continue  # PEFT's window counts left padding as text
        arguments = inputs | {
            "max_new_tokens": 6,
            "do_sample": False,
            "num_beams": beams,
            "eos_token_id": None,
        }
        expected = stock.generate(**arguments)
        assert torch.equal(ours.generate(**arguments), expected)
        static = ours.generate(**arguments, cache_implementation="static")
        assert torch.equal(static, expected)
        with ours.disable_adapter():
            assert not torch.equal(ours.generate(**arguments), expected)


@torch.no_grad()
def test_left_padding_changes_nothing(llama: Any, attach: Any) -> None:
    ours = tuned(llama.model)
    attach(ours)
    whole = ours(input_ids=llama.input_ids).logits
    pad = torch.zeros(2, 3, dtype=torch.long)
    mask = torch.cat([pad, torch.ones_like(llama.input_ids)], 1)
    left = ours(input_ids=torch.cat([pad, llama.input_ids], 1), attention_mask=mask).logits
    torch.testing.assert_close(left[:, 3:], whole)


def test_same_object_and_class_back(llama: Any, attach: Any) -> None:
    ours = tuned(llama.model)
    old, before = type(ours), {n: t.clone() for n, t in ours.state_dict().items()}
    expected = step(ours, llama.input_ids)
    handle = attach(ours)
    assert isinstance(ours, old)
    assert type(ours).__name__ == old.__name__
    assert ours.state_dict().keys() == before.keys()
    handle.detach()
    assert type(ours) is old
    assert_same(step(ours, llama.input_ids), expected)
    after = ours.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@torch.no_grad()
def test_a_copy_has_a_prefix_of_its_own(llama: Any, attach: Any) -> None:
    ours = tuned(llama.model)
    attach(ours)
    expected = ours(input_ids=llama.input_ids).logits
    twin = copy.deepcopy(ours)
    for parameter in ours.prompt_encoder.parameters():
        parameter.zero_()
    assert torch.equal(twin(input_ids=llama.input_ids).logits, expected)
    assert (ours(input_ids=llama.input_ids).logits - expected).abs().max() > 0.05


@torch.no_grad()
def test_disable_adapter(llama: Any, attach: Any) -> None:
    ours = tuned(llama.model)
    attach(ours)
    assert (ours(input_ids=llama.input_ids).logits - llama.plain).abs().max() > 0.05
    with ours.disable_adapter():
        assert torch.equal(ours(input_ids=llama.input_ids).logits, llama.plain)
    assert (ours(input_ids=llama.input_ids).logits - llama.plain).abs().max() > 0.05


@torch.no_grad()
def test_two_adapters_of_different_lengths(llama: Any, attach: Any) -> None:
    ours = tuned(llama.model)
    ours.add_adapter("long", peft.PrefixTuningConfig(**(PREFIX | {"num_virtual_tokens": 9})))
    ours.double()
    expected = {}
    for name in ("default", "long"):
        ours.set_adapter(name)
        expected[name] = ours(input_ids=llama.input_ids).logits
    assert (expected["long"] - expected["default"]).abs().max() > 0.05
    attach(ours)
    for name in ("default", "long"):
        ours.set_adapter(name)
        got = ours(input_ids=llama.input_ids).logits
        torch.testing.assert_close(got, expected[name], rtol=0, atol=1e-5)


@torch.no_grad()
def test_cartridge(llama: Any, attach: Any) -> None:
    config = peft.CartridgeConfig(**PREFIX, num_frozen_tokens=1)
    ours = peft.get_peft_model(llama.model, config).double().eval()
    expected = ours(input_ids=llama.input_ids).logits
    attach(ours)
    got = ours(input_ids=llama.input_ids).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert (got - llama.plain).abs().max() > 0.05


@torch.no_grad()
def test_files_are_pefts(llama: Any, attach: Any, model_of: Any, tmp_path: Path) -> None:
    ours = tuned(llama.model)
    ours.save_pretrained(tmp_path / "stock")
    attach(ours)
    ours.save_pretrained(tmp_path / "ours")
    files = [load_file(tmp_path / kind / "adapter_model.safetensors") for kind in ("stock", "ours")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    back = peft.PeftModel.from_pretrained(model_of("llama"), tmp_path / "ours").double().eval()
    expected = ours(input_ids=llama.input_ids).logits
    torch.testing.assert_close(back(input_ids=llama.input_ids).logits, expected, rtol=0, atol=1e-5)
    attach(back)  # a loaded adapter is in inference mode
    torch.testing.assert_close(back(input_ids=llama.input_ids).logits, expected)


def test_lora_added_later_is_said_to_freeze_the_prefix(llama: Any, attach: Any) -> None:
    prefix = Prefix.from_text(llama.model, llama.text)
    attach(llama.model, prefix)
    inputs = {"input_ids": llama.input_ids, "labels": llama.input_ids}
    llama.model.train()(**inputs).loss.backward()
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    lora = peft.get_peft_model(llama.model, config).double().train()
    with pytest.warns(UserWarning, match="the prefix was frozen after it was attached"):
        lora(**inputs)
    prefix.requires_grad_(True)
    prefix.zero_grad()
    lora(**inputs).loss.backward()
    assert prefix.keys[0].grad.abs().max() > 0


@torch.no_grad()
def test_lora_beside_a_prefix(llama: Any, attach: Any, model_of: Any) -> None:
    prefix = Prefix.from_text(llama.model, llama.text)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    lora = peft.get_peft_model(llama.model, config).double().eval()
    kind = type(lora)
    handle = attach(lora, prefix)
    llama.assert_close(lora(input_ids=llama.input_ids).logits)  # LoRA starts at nothing
    assert prefix.keys[0].requires_grad
    handle.detach()
    torch.testing.assert_close(lora(input_ids=llama.input_ids).logits, llama.plain)
    assert type(lora) is kind


def test_lora_and_prefix_train_and_are_saved_in_one_folder(
    llama: Any, attach: Any, model_of: Any, tmp_path: Path
) -> None:
    """PEFT reads the folder as a LoRA adapter, and its subfolder as one of prefix tuning."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    lora = peft.get_peft_model(llama.model, config).double().train()
    prefix = Prefix.from_text(model_of("llama"), llama.text)
    attach(lora, prefix)
    trained = [p for p in lora.parameters() if p.requires_grad]
    assert {id(p) for p in prefix.parameters()} < {id(p) for p in trained}
    optimizer = torch.optim.SGD(trained, lr=0.05)
    inputs = {"input_ids": llama.input_ids, "labels": llama.input_ids}
    for _ in range(2):  # LoRA's A matrices have a gradient from the second step on
        optimizer.zero_grad()
        lora(**inputs).loss.backward()
        assert all(parameter.grad is not None for parameter in trained)
        optimizer.step()
    expected = lora.eval()(**inputs).logits
    lora.save_pretrained(str(tmp_path))

    again = peft.PeftModel.from_pretrained(model_of("llama"), str(tmp_path)).double().eval()
    handle = attach(again, Prefix.from_pretrained(tmp_path / "prefix"))
    torch.testing.assert_close(again(**inputs).logits, expected, rtol=1e-6, atol=1e-6)
    handle.detach()
    nested = peft.PeftModel.from_pretrained(again, str(tmp_path / "prefix")).double().eval()
    stock = nested(**inputs).logits  # PEFT alone, one adapter around the other
    torch.testing.assert_close(stock, expected, rtol=0, atol=1e-4)

    resumed = peft.get_peft_model(model_of("llama"), config).double()
    attach(resumed, Prefix.zeros(model_of("llama"), prefix.num_tokens))
    resumed.load_adapter(str(tmp_path), "default", is_trainable=True)  # as Trainer does
    resumed.load_adapter(str(tmp_path / "prefix"), "prefix")
    torch.testing.assert_close(
        resumed.double().eval()(**inputs).logits, expected, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16
        ),
    ],
    ids=["prompt tuning", "p-tuning"],
)
def test_prompt_learning_of_peft_with_a_prefix(
    llama: Any, attach: Any, model_of: Any, config: Any
) -> None:
    """PEFT's virtual tokens are text to us: they stand behind the prefix, and all of it trains."""
    prefix = Prefix.from_text(llama.model, llama.text)
    attach(llama.model, prefix)
    prompted = peft.get_peft_model(llama.model, config).double()
    prefix.requires_grad_(True)  # PEFT freezes all that it finds
    out = prompted(input_ids=llama.input_ids, labels=llama.input_ids)
    out.loss.backward()
    learned = [p for p in prompted.prompt_encoder.parameters() if p.requires_grad]
    for parameter in [*learned, *prefix.parameters()]:
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0
    plain, embed = model_of("llama"), llama.model.get_input_embeddings()
    text = [embed(llama.text.expand(2, -1)), prompted.get_prompt(2), embed(llama.input_ids)]
    expected = plain(inputs_embeds=torch.cat(text, dim=1)).logits[:, llama.text.shape[1] :]
    torch.testing.assert_close(out.logits, expected, rtol=1e-8, atol=1e-8)


def test_a_warning_of_tokens_out_of_reach(case: Callable[..., Any], attach: Any) -> None:
    mistral = tuned(case("mistral").model, num_virtual_tokens=12)
    with pytest.warns(UserWarning, match="4 of 12 in") as caught:
        attach(mistral)
    assert caught[0].filename == __file__


def test_what_is_refused(llama: Any, attach: Any, model_of: Any) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    prompt = peft.get_peft_model(model_of("llama"), config)
    with pytest.raises(NotImplementedError, match="PROMPT_TUNING"):
        attach(prompt)
    ours = tuned(llama.model)
    with pytest.raises(ValueError, match="prefix must be None"):
        attach(ours, Prefix([torch.zeros(2, 3, 8)] * 2, [torch.zeros(2, 3, 8)] * 2))
    attach(ours)
    with pytest.raises(ValueError, match=r"adapter_names must be of .*'default'.*, got 'other'"):
        ours(input_ids=llama.input_ids, adapter_names=["default", "other"])
    with pytest.raises(ValueError, match="chosen for 3 rows, but the input has 2"):
        ours(input_ids=llama.input_ids, adapter_names=["default"] * 3)
    with pytest.raises(ValueError, match="detach"):
        attach(ours)


@torch.no_grad()
def test_a_base_that_generate_compiles(llama: Any, attach: Any) -> None:
    """As transformers does by itself on a GPU, with a static cache: the base's forward alone."""
    model = tuned(llama.model)
    torch.nn.init.normal_(model.prompt_encoder["default"].embedding.weight)
    greedy = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    plain = model.base_model.generate(input_ids=llama.input_ids, **greedy)
    expected = model.generate(input_ids=llama.input_ids, **greedy)
    attach(model)
    base = model.base_model
    base.forward = torch.compile(base.forward, backend="eager")
    assert torch.equal(model.generate(input_ids=llama.input_ids, **greedy), expected)
    assert not torch.equal(plain, expected)
    assert torch.equal(base.generate(input_ids=llama.input_ids, **greedy), plain)


LORA = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}


@pytest.mark.parametrize("outer", ["lora", "prefix"])
@pytest.mark.parametrize("inner", ["lora", "prefix"])
@pytest.mark.filterwarnings("ignore:.*peft_config.*:UserWarning")
def test_nested_models_are_refused_with_what_to_do(llama: Any, inner: str, outer: str) -> None:
    configs = {"lora": peft.LoraConfig(**LORA), "prefix": peft.PrefixTuningConfig(**PREFIX)}
    prefix, model = Prefix.zeros(llama.model, 2), llama.model
    for name in (inner, outer):
        model = peft.PeftModelForCausalLM(model, copy.deepcopy(configs[name]))
    uses: list[Callable[[], object]] = [
        lambda: prefixattn.attach(model),
        lambda: prefixattn.attach(model, prefix),
        lambda: Prefix.zeros(model, 2),
        lambda: prefixattn.move_prefix(prefix, model, 1),
    ]
    for use in uses:
        with pytest.raises(TypeError, match=r"one PeftModel, got a .* around a .*add_adapter"):
            use()


@torch.no_grad()
def test_an_adapter_for_each_row(llama: Any, attach: Any) -> None:
    """Prefixes of different lengths, and none, in one batch and for every beam of a row."""
    model = tuned(llama.model)
    model.add_adapter("long", peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=9))
    model.double().eval()
    for encoder in model.prompt_encoder.values():
        torch.nn.init.normal_(encoder.embedding.weight)
    names = ["long", "__base__", "default"]
    ids = torch.cat([llama.input_ids, llama.input_ids[:1]])
    greedy = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    attach(model)
    logits, tokens, beams = [], [], []
    for name, row in zip(names, ids, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                logits.append(model(input_ids=row[None]).logits)
                tokens.append(model.generate(input_ids=row[None], **greedy))
                beams.append(model.generate(input_ids=row[None], num_beams=3, **greedy))
        else:
            model.set_adapter(name)
            logits.append(model(input_ids=row[None]).logits)
            tokens.append(model.generate(input_ids=row[None], **greedy))
            beams.append(model.generate(input_ids=row[None], num_beams=3, **greedy))
    found = model(input_ids=ids, adapter_names=names).logits
    torch.testing.assert_close(found, torch.cat(logits), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(found[0], found[2])
    assert torch.equal(
        model.generate(input_ids=ids, adapter_names=names, **greedy), torch.cat(tokens)
    )
    got = model.generate(input_ids=ids, adapter_names=names, num_beams=3, **greedy)
    assert torch.equal(got, torch.cat(beams))
    model.set_adapter("long")
    torch.testing.assert_close(model(input_ids=ids[:1]).logits, logits[0])  # the choice is over
