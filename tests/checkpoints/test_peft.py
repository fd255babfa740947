"""PEFT's files: ours load in stock PEFT, stock PEFT's load here."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from prefixattn.checkpoints import load_peft, save_peft
from prefixattn.integrations import attach
from prefixattn.layers import LayerShape
from prefixattn.prefix import Prefix
from prefixattn.projected import ProjectedPrefix

P = 5


def base(auto: Any = transformers.AutoModelForCausalLM, kind: str = "llama") -> Any:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_labels": 3,
        "pad_token_id": 0,
    }
    if kind == "llama":
        config: Any = transformers.LlamaConfig(**sizes, num_key_value_heads=2)
    else:
        config = transformers.BertConfig(**sizes)
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model


@torch.no_grad()
def test_out_to_stock_peft(tmp_path: Path) -> None:
    model, ids = base(), torch.randint(2, 90, (2, 11))
    plain = model(ids).logits
    prefix = Prefix.from_text(model, torch.randint(2, 90, (P,)))
    save_peft(prefix, tmp_path, model)
    handle = attach(model, prefix)
    ours = model(ids).logits
    handle.detach()
    stock = peft.PeftModel.from_pretrained(model, tmp_path).eval()
    torch.testing.assert_close(stock(input_ids=ids).logits, ours, rtol=1e-4, atol=1e-4)
    assert (ours - plain).abs().max() > 1


@torch.no_grad()
@pytest.mark.parametrize("projection", [False, True])
def test_in_from_stock_peft(tmp_path: Path, projection: bool) -> None:
    ids = torch.randint(2, 90, (2, 11))
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=P,
        prefix_projection=projection,
        encoder_hidden_size=16,
    )
    stock = peft.get_peft_model(base(), config).eval()
    stock.save_pretrained(tmp_path)
    prefix, model = load_peft(tmp_path), base()
    plain = model(ids).logits
    attach(model, prefix)
    got, expected = model(ids).logits, stock(input_ids=ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert (got - plain).abs().max() > 0.05
    assert prefix.keys[0].requires_grad


def test_bits_survive_the_round_trip(tmp_path: Path) -> None:
    first = ProjectedPrefix([LayerShape(2, 8, 8)] * 3, P, 6, 7)
    save_peft(first, tmp_path / "a", "some/name", task_type="SEQ_2_SEQ_LM")
    second = load_peft(tmp_path / "a")
    for one, other in zip(first(), second(), strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/name"
    (flat,) = load_file(tmp_path / "a" / "adapter_model.safetensors").values()
    assert flat.shape == (P, 2 * 3 * 2 * 8)
    assert flat.dtype == torch.float32


def test_cartridge_and_pickled_file(tmp_path: Path) -> None:
    config = peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, num_frozen_tokens=1)
    stock = peft.get_peft_model(base(), config)
    stock.save_pretrained(tmp_path)
    flat = stock.get_prompt_embedding_to_save("default").view(P, 4, 2, 8)
    prefix = load_peft(tmp_path)
    assert prefix.num_frozen_tokens == 1
    assert torch.equal(prefix()[1][1], flat[:, 3].transpose(0, 1))
    file = tmp_path / "adapter_model.safetensors"
    torch.save(load_file(file), tmp_path / "adapter_model.bin")
    file.unlink()
    assert torch.equal(load_peft(tmp_path).values[1], prefix.values[1])
    pickled = (tmp_path / "adapter_model.bin").read_bytes()
    for broken in (pickled[:-30], b"", b"text"):
        (tmp_path / "adapter_model.bin").write_bytes(broken)
        with pytest.raises(ValueError, match="adapter_model.bin is damaged"):
            load_peft(tmp_path)


@torch.no_grad()
def test_a_head_travels_with_the_adapter(tmp_path: Path) -> None:
    auto, ids = transformers.AutoModelForSequenceClassification, torch.randint(2, 90, (2, 7))
    config = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=P)
    stock = peft.get_peft_model(base(auto, "bert"), config).eval()
    trained = torch.randn(3, 32)
    stock.base_model.classifier.modules_to_save["default"].weight.copy_(trained)
    expected = stock(input_ids=ids).logits
    stock.save_pretrained(tmp_path / "in")

    model = base(auto, "bert")
    with pytest.warns(UserWarning, match="base_model.classifier"):
        load_peft(tmp_path / "in")
    prefix = load_peft(tmp_path / "in", model)
    assert torch.equal(model.classifier.weight, trained)
    with pytest.raises(ValueError, match="model must be the base model for SEQ_CLS"):
        save_peft(prefix, tmp_path / "out", "a/name", task_type="SEQ_CLS")
    save_peft(prefix, tmp_path / "out", model, task_type="SEQ_CLS")
    attach(model, prefix)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    back = peft.PeftModel.from_pretrained(base(auto, "bert"), tmp_path / "out").eval()
    torch.testing.assert_close(back(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_layers_that_pefts_format_cannot_hold(tmp_path: Path) -> None:
    wide = Prefix([torch.zeros(2, P, 8)], [torch.zeros(2, P, 6)])
    unlike = Prefix(*[[torch.zeros(2, P, 8), torch.zeros(1, P, 8)]] * 2)
    for prefix in (wide, unlike):
        with pytest.raises(ValueError, match="same heads and head dims"):
            save_peft(prefix, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LORA"}, "'PREFIX_TUNING', 'CARTRIDGE'.*got 'LORA'"),
        ({"num_layers": 3}, r"must be \[P, 2 \* L \* H_kv \* D\] = \(5, 96\), got \(5, 64\)"),
        ({"num_virtual_tokens": None}, "num_virtual_tokens must be a positive integer, got None"),
        ({"num_attention_heads": 3}, "token_dim 16 is not a multiple of 3"),
        ({"num_transformer_submodules": 3}, "encoder-decoder"),
        ({"num_frozen_tokens": 9}, "num_frozen_tokens must be in"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save_peft(Prefix([torch.zeros(2, P, 8)] * 2, [torch.zeros(2, P, 8)] * 2), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        load_peft(tmp_path)


def test_damaged_tensors(tmp_path: Path) -> None:
    prefix = Prefix([torch.zeros(2, P, 8)] * 2, [torch.zeros(2, P, 8)] * 2)
    save_peft(prefix, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="truncated"):
        load_peft(tmp_path)
    save_file({"other": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="expected the tensor prompt_embeddings"):
        load_peft(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors"):
        load_peft(tmp_path)
