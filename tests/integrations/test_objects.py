"""An attached model as an object: replaced, pickled, on a device without numbers."""

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from patience import PATIENCE
from torch import Tensor

from prefixattn import Prefix, PrefixBank


@pytest.fixture
def llama(case: Callable[..., Any]) -> Any:
    return case("llama")


@torch.no_grad()
def test_a_submodule_that_is_replaced_is_followed(llama: Any, attach: Any) -> None:
    attach(llama.model, Prefix.zeros(llama.model, 5))
    ones = [torch.ones(2, 5, 8, dtype=torch.float64)] * 2
    llama.model.prefixattn = Prefix(ones, ones)
    replaced = llama.model(llama.input_ids).logits
    assert not torch.equal(replaced, llama.plain)
    torch.nn.init.zeros_(llama.model.prefixattn.values[0])
    assert not torch.equal(llama.model(llama.input_ids).logits, replaced)


def test_a_pickled_model_works_in_a_new_process(llama: Any, attach: Any, tmp_path: Path) -> None:
    attach(llama.model, llama.prefix())
    torch.save((llama.model, llama.input_ids, llama.logits), tmp_path / "model.pt")
    program = (
        "import sys, torch\n"
        "model, ids, logits = torch.load(sys.argv[1], weights_only=False)\n"
        "with torch.no_grad():\n"
        "    assert (model(ids).logits - logits).abs().max() < 1e-9\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "model.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr


@torch.no_grad()
def test_two_models_of_one_config(llama: Any, attach: Any) -> None:
    other = type(llama.model)(llama.model.config).double().eval()
    before = llama.model.config._attn_implementation
    first = attach(llama.model, llama.prefix())
    second = attach(other, Prefix.from_text(copy.deepcopy(other), llama.text))
    expected = other(llama.input_ids).logits
    first.detach()
    assert torch.equal(llama.model(llama.input_ids).logits, llama.plain)
    assert torch.equal(other(llama.input_ids).logits, expected)
    second.detach()
    assert llama.model.config._attn_implementation == before


def test_a_model_without_weights_is_refused(attach: Any) -> None:
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4)
        )
    with pytest.raises(NotImplementedError, match="GPT2LMHeadModel.*meta device"):
        attach(model, Prefix([torch.zeros(4, 5, 8)] * 2, [torch.zeros(4, 5, 8)] * 2))
    with pytest.raises(NotImplementedError, match="meta device"):
        Prefix.random(model, 5)


def test_positions_counted_in_an_unknown_way_are_refused(attach: Any) -> None:
    config = transformers.EsmConfig(
        vocab_size=33,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        position_embedding_type="absolute",
        pad_token_id=1,
    )
    model = transformers.EsmForMaskedLM(config)
    with pytest.raises(NotImplementedError, match="counts positions in a way"):
        attach(model, Prefix.zeros(model, 5))
    assert not hasattr(model, "prefixattn")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["peft", "bloom", "falcon", "nemotron", "bank"])
def test_copies_and_pickles(
    case: Callable[..., Any], attach: Any, kind: str, tmp_path: Path
) -> None:
    """Objects whose class we replaced, and those that hold our hooks, are made again whole."""
    found = case(kind if kind in ("bloom", "falcon", "nemotron") else "llama")
    model = found.model
    if kind == "peft":
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
        model = peft.get_peft_model(model, config).double().eval()
        torch.nn.init.normal_(model.prompt_encoder["default"].embedding.weight)
        handle = attach(model)
    elif kind == "bank":
        handle = attach(model, PrefixBank([found.prefix()]))
    else:
        handle = attach(model, found.prefix())

    def logits(some: Any) -> Tensor:
        if kind != "bank":
            return some(input_ids=found.input_ids).logits
        with some.prefixattn.use([0, 0]):
            return some(input_ids=found.input_ids).logits

    expected = logits(model)
    assert (expected - found.plain).abs().max() > 1e-3
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (copy.deepcopy(model), again):
        assert type(other).__name__ == type(model).__name__
        torch.testing.assert_close(logits(other), expected)
    handle.detach()
    torch.testing.assert_close(logits(again), expected)


def other_positions(model: Any) -> Any:
    zeros = [torch.zeros(2, 3, 8)] * 2
    prefix = Prefix(zeros, zeros)
    prefix.positions = "keep"
    return prefix


SWAPS: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "nothing of ours": (lambda model: torch.nn.Linear(2, 2), TypeError, "got a Linear"),
    "another policy": (other_positions, ValueError, "positions='shift', .* 'keep': attach"),
    "fewer layers": (
        lambda model: Prefix([torch.zeros(2, 3, 8)], [torch.zeros(2, 3, 8)]),
        ValueError,
        "must have 2 layers like the model, got 1",
    ),
}


@pytest.mark.parametrize(("make", "error", "words"), SWAPS.values(), ids=SWAPS.keys())
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_what_is_put_in_a_prefixs_place_is_checked(
    case: Callable[..., Any],
    attach: Any,
    make: Callable[[Any], Any],
    error: type[Exception],
    words: str,
    compiled: bool,
) -> None:
    llama = case("llama")
    whole = llama.prefix()
    attach(llama.model, whole)
    run = torch.compile(llama.model, backend="eager") if compiled else llama.model
    with torch.no_grad():
        llama.assert_close(run(llama.input_ids).logits)
        llama.model.prefixattn = make(llama.model)
        with pytest.raises(error, match=words):
            run(llama.input_ids)
        llama.model.prefixattn = whole
        llama.assert_close(run(llama.input_ids).logits)
