"""Hugging Face's Trainer, whose gradient checkpointing is what prefixes usually fail at."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from prefixattn.prefix import Prefix

STEPS = 4


class Rows(torch.utils.data.Dataset):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randint(2, 90, (16, 12), generator=generator)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def train(model: Any, folder: Path, resume: bool = False, **changes: Any) -> list[float]:
    """The loss of every step."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        learning_rate=0.05,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        **({"max_steps": STEPS, "save_strategy": "no"} | changes),
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=Rows())
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def llama(case: Callable[..., Any]) -> Any:
    given = case("llama")
    given.model.requires_grad_(False)
    return given


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_same_losses_with_checkpointing(
    llama: Any, attach: Any, tmp_path: Path, use_reentrant: bool
) -> None:
    text = llama.text
    losses = {}
    for checkpointing in (False, True):
        model = copy.deepcopy(llama.model)
        prefix = Prefix.from_text(model, text)
        before = [parameter.detach().clone() for parameter in prefix.parameters()]
        attach(model, prefix)
        kinds = {"gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
        losses[checkpointing] = train(
            model,
            tmp_path,
            gradient_checkpointing=checkpointing,
            **(kinds if checkpointing else {}),
        )
        for parameter, old in zip(prefix.parameters(), before, strict=True):
            assert (parameter - old).abs().max() > 0.01
        for name, parameter in llama.model.named_parameters():
            assert torch.equal(model.get_parameter(name), parameter)
    assert losses[True] == pytest.approx(losses[False], rel=1e-9)
    assert losses[False][-1] < losses[False][0]


def test_a_peft_model_trains_as_under_peft(llama: Any, attach: Any, tmp_path: Path) -> None:
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    start = peft.get_peft_model(llama.model, config).double()
    runs = {}
    for name, ours, checkpointing in (("stock", 0, False), ("ours", 1, False), ("gc", 1, True)):
        model = copy.deepcopy(start)
        if ours:
            attach(model)
        runs[name] = train(model, tmp_path / name, gradient_checkpointing=checkpointing)
        weight, before = (m.prompt_encoder["default"].embedding.weight for m in (model, start))
        assert (weight - before).abs().max() > 0.01
    assert runs["ours"] == pytest.approx(runs["stock"], rel=1e-9)
    assert runs["gc"] == pytest.approx(runs["ours"], rel=1e-9)


def test_resuming_a_peft_model(llama: Any, attach: Any, tmp_path: Path) -> None:
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    start = peft.get_peft_model(llama.model, config).double()
    saving = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    whole, first = copy.deepcopy(start), copy.deepcopy(start)
    attach(whole)
    attach(first)
    expected = train(whole, tmp_path / "whole", **saving)
    train(first, tmp_path / "parts", max_steps=2, **saving)
    second = copy.deepcopy(start)
    attach(second)
    resumed = train(second, tmp_path / "parts", resume=True, **saving)
    assert resumed == pytest.approx(expected, abs=1e-6)


def test_saving_an_attached_model(llama: Any, attach: Any, tmp_path: Path) -> None:
    """The prefix is part of what Trainer saves; the base loads from it as ever."""
    prefix = llama.prefix()
    attach(llama.model, prefix)
    llama.model.save_pretrained(tmp_path)
    back = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    with torch.no_grad():
        torch.testing.assert_close(back(llama.input_ids).logits, llama.plain)
