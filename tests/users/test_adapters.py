"""What people do with PEFT models beside training them."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

import prefixattn
from prefixattn import Prefix

LORA = {"task_type": "CAUSAL_LM", "r": 2, "init_lora_weights": False}


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(2, 300, (2, 9))


@pytest.fixture
def tuned(make_model: Any) -> Callable[..., Any]:
    """A model that PEFT tunes a prefix for."""

    def make(model: Any = None) -> Any:
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
        return peft.get_peft_model(make_model() if model is None else model, config).eval()

    return make


@torch.no_grad()
def says(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids).logits
    return logits


def close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() < 1e-4)


def test_lora_beside_a_prefix_is_merged(make_model: Any, text: Tensor, ids: Tensor) -> None:
    model = make_model()
    prefix = Prefix.from_text(model, text)
    tuned = peft.get_peft_model(model, peft.LoraConfig(**LORA)).eval()
    alone = says(tuned, ids)
    handle = prefixattn.attach(tuned, prefix)
    both = says(tuned, ids)
    merged = tuned.merge_and_unload()
    assert close(says(merged, ids), both)
    handle.detach()
    assert close(says(merged, ids), alone)
    assert not close(both, alone)


def test_lora_added_later_freezes_the_prefix(make_model: Any, text: Tensor, ids: Tensor) -> None:
    model = make_model()
    prefixattn.attach(model, Prefix.from_text(model, text))
    tuned = peft.get_peft_model(model, peft.LoraConfig(**LORA)).train()
    with pytest.warns(UserWarning, match="frozen"):
        tuned(input_ids=ids, labels=ids)


def test_a_cache_of_the_users(tuned: Any, ids: Tensor) -> None:
    model = tuned()
    expected = says(model, ids)
    prefixattn.attach(model)
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        parts = [model(input_ids=part, past_key_values=cache).logits for part in ids.split(4, 1)]
    assert close(torch.cat(parts, dim=1), expected)


def test_a_saved_adapter_on_the_base_of_another(tuned: Any, ids: Tensor, tmp_path: Any) -> None:
    first = tuned()
    first.save_pretrained(tmp_path)
    expected = says(first, ids)
    handle = prefixattn.attach(first)
    handle.detach()
    second = peft.PeftModel.from_pretrained(first.get_base_model(), tmp_path).eval()
    assert close(says(second, ids), expected)
    prefixattn.attach(second)
    assert close(says(second, ids), expected)


def test_the_base_has_no_prefix(tuned: Any, ids: Tensor) -> None:
    """As in PEFT, where people take reference logits from it."""
    model = tuned()
    expected = says(model.get_base_model(), ids)
    prefixattn.attach(model)
    assert not close(says(model, ids), expected)
    assert close(says(model.base_model, ids), expected)  # get_base_model asks for an adapter


def test_a_second_model_of_pefts_on_one_base(make_model: Any, tuned: Any, ids: Tensor) -> None:
    base = make_model()
    first, second = tuned(base), tuned(base)
    expected = says(second, ids)
    prefixattn.attach(first)
    assert close(says(second, ids), expected)


def test_the_last_adapter_is_deleted(tuned: Any, ids: Tensor) -> None:
    model = tuned()
    expected = says(model.get_base_model(), ids)
    prefixattn.attach(model)
    model.delete_adapter("default")
    assert close(says(model.base_model, ids), expected)  # get_base_model asks for an adapter


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"a list of a name for each row, got \[\]"),
        ("default", "a list of a name for each row, got 'default'"),
        (["default"] * 2, "chosen for 2 rows, but the input has 4"),
    ],
    ids=["none", "a string", "too few"],
)
def test_not_a_name_for_each_row(tuned: Any, ids: Tensor, names: Any, message: str) -> None:
    model, four = tuned(), torch.cat([ids, ids])
    prefixattn.attach(model)
    with pytest.raises(ValueError, match=f"adapter_names must .*{message}"):
        model(input_ids=four, adapter_names=names)
    with pytest.raises(ValueError, match=f"adapter_names must .*{message}"):
        model.generate(four, adapter_names=names, max_new_tokens=2)
