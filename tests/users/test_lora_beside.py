"""LoRA and a prefix on one model, in files: both are there, or it is said what is not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import prefixattn
from prefixattn import Prefix
from prefixattn.checkpoints import load

LORA = {"task_type": "CAUSAL_LM", "r": 2, "init_lora_weights": False}
Beside = Callable[..., tuple[Any, Prefix]]


@pytest.fixture
def beside(make_model: Any, text: Tensor) -> Beside:
    """A model with LoRA, and the prefix that is attached to it."""

    def make(**options: Any) -> tuple[Any, Prefix]:
        model = make_model()
        prefix = Prefix.from_text(model, text, **options)
        tuned = peft.get_peft_model(model, peft.LoraConfig(**LORA))
        prefixattn.attach(tuned, prefix)
        return tuned, prefix

    return make


def same(one: Any, other: Any) -> bool:
    return all(
        torch.equal(mine, theirs)
        for left, right in zip(one(), other(), strict=True)
        for mine, theirs in zip(left, right, strict=True)
    )


def test_frozen_tokens_are_a_cartridge_to_peft(beside: Beside, tmp_path: Path) -> None:
    tuned, prefix = beside(num_frozen_tokens=2)
    tuned.save_pretrained(tmp_path)
    assert same(load(tmp_path / "prefix", "peft-cartridge"), prefix)


@pytest.mark.parametrize("options", [{"num_frozen_tokens": 2}, {"layers": [1]}], ids=str)
def test_no_file_of_an_earlier_prefix_stays(
    beside: Beside, options: dict[str, Any], tmp_path: Path
) -> None:
    earlier, _ = beside()
    earlier.save_pretrained(tmp_path)
    tuned, prefix = beside(**options)
    with torch.no_grad():
        prefix.keys[0].add_(1)
    tuned.save_pretrained(tmp_path)
    assert same(Prefix.from_pretrained(tmp_path / "prefix"), prefix)
    if "layers" in options:  # PEFT's format cannot hold it
        assert not list((tmp_path / "prefix").glob("adapter_*"))
    else:
        assert same(load(tmp_path / "prefix", "peft-cartridge"), prefix)


def test_an_adapter_that_is_called_prefix(beside: Beside, tmp_path: Path) -> None:
    tuned, _ = beside()
    tuned.add_adapter("prefix", peft.LoraConfig(**LORA))
    with pytest.raises(ValueError, match="model has an adapter named 'prefix'"):
        tuned.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_folder_with_an_adapter_that_is_called_prefix(
    beside: Beside, make_model: Any, tmp_path: Path
) -> None:
    other = peft.get_peft_model(make_model(), peft.LoraConfig(**LORA), adapter_name="prefix")
    other.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "prefix" / "adapter_model.safetensors")
    tuned, _ = beside()
    with pytest.raises(FileExistsError, match="prefix is the place of .* an adapter that is none"):
        tuned.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    with pytest.raises(ValueError, match="adapter_name 'prefix' is the attached prefix's"):
        tuned.load_adapter(str(tmp_path / "prefix"), "prefix")
    found = load_file(tmp_path / "prefix" / "adapter_model.safetensors")
    assert found.keys() == tensors.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [0]}, r"layers must be \[0\] like the attached prefix's, got \[1\]"),
        ({"layers": [1], "num_frozen_tokens": 1}, "num_frozen_tokens must be 1 .*, got 0"),
    ],
    ids=["other layers", "frozen tokens"],
)
def test_another_kind_of_prefix_in_the_file(
    beside: Beside, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    saved, _ = beside(layers=[1])
    saved.save_pretrained(tmp_path)
    tuned, _ = beside(**options)
    with pytest.raises(ValueError, match=message):
        tuned.load_adapter(str(tmp_path), "default")


def test_a_new_adapter_leaves_the_prefix(beside: Beside, tmp_path: Path) -> None:
    saved, theirs = beside()
    with torch.no_grad():
        theirs.keys[0].add_(1)
    saved.save_pretrained(tmp_path)
    tuned, prefix = beside()
    with pytest.warns(UserWarning, match="'other' was read without the prefix in"):
        tuned.load_adapter(str(tmp_path), "other")
    assert not same(prefix, theirs)
    tuned.load_adapter(str(tmp_path / "prefix"), "prefix")
    assert same(prefix, theirs)


def wrapped(model: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(**LORA))


def added(model: Any) -> Any:
    """As transformers does it by itself."""
    model.add_adapter(peft.LoraConfig(**LORA))
    return model


@pytest.mark.parametrize("add", [wrapped, added])
def test_lora_added_later_is_saved_alone_and_says_so(
    make_model: Any, text: Tensor, add: Callable[[Any], Any], tmp_path: Path, recwarn: Any
) -> None:
    model = make_model()
    prefix = Prefix.from_text(model, text)
    prefixattn.attach(model, prefix)
    model.state_dict()
    tuned = add(model)
    tuned.save_pretrained(tmp_path)  # PEFT froze the prefix: it is as it was
    assert not [w for w in recwarn if "hold its adapters" in str(w.message)]
    prefix.requires_grad_(True)
    with pytest.warns(UserWarning, match="hold its adapters, and not the prefix"):
        tuned.save_pretrained(tmp_path)


def test_lora_added_first_is_saved_in_silence(beside: Beside, tmp_path: Path, recwarn: Any) -> None:
    tuned, _ = beside()
    tuned.save_pretrained(tmp_path)
    assert not [w for w in recwarn if "hold its adapters" in str(w.message)]


def test_lora_on_all_linear_layers_leaves_a_prefixs_network(make_model: Any) -> None:
    model = make_model()
    network = prefixattn.ProjectedPrefix.for_model(model, 3, hidden_dim=8)
    prefixattn.attach(model, network)
    lora = peft.LoraConfig(**LORA | {"target_modules": "all-linear"})
    tuned = peft.get_peft_model(model, lora)
    names = [name for name, _ in tuned.named_parameters() if "lora_" in name]
    assert any("q_proj" in name for name in names)
    assert not [name for name in names if "prefixattn" in name]
