"""TRL's trainers on an attached model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import prefixattn
from prefixattn import Prefix

trl = pytest.importorskip("trl", reason="needs the package trl")
datasets = pytest.importorskip("datasets", reason="needs the package datasets")

OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "learning_rate": 0.05,
    "max_steps": 3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


@pytest.fixture
def model(make_model: Any, text: Tensor) -> Any:
    """A frozen model with a prefix that trains."""
    model = make_model()
    prefix = Prefix.from_text(model, text)
    prefixattn.attach(model.requires_grad_(False), prefix)
    return model


@pytest.fixture
def sft(rows: Any, tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    def make(model: Any, peft_config: Any = None, **changes: Any) -> Any:
        options = OPTIONS | {"max_length": 32, "gradient_checkpointing": False} | changes
        return trl.SFTTrainer(
            model,
            trl.SFTConfig(output_dir=str(tmp_path), **options),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=peft_config,
        )

    return make


def losses(trained: Any) -> list[float]:
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


PADDING_FREE = {"padding_free": True, "max_length": None}
WAYS: dict[str, dict[str, Any]] = {
    "checkpointed": {"gradient_checkpointing": True},
    "padding-free": PADDING_FREE,
    "padding-free, checkpointed": PADDING_FREE | {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("changes", WAYS.values(), ids=WAYS.keys())
def test_the_same_losses(make_model: Any, text: Tensor, sft: Any, changes: dict[str, Any]) -> None:
    found = []
    for options in ({}, changes):
        model = make_model()
        prefix = Prefix.from_text(model, text)
        prefixattn.attach(model.requires_grad_(False), prefix)
        trained = sft(model, **options)
        trained.train()
        found.append(losses(trained))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_packed_documents_do_not_see_each_other(model: Any, sft: Any) -> None:
    trained = sft(model, packing=True, per_device_train_batch_size=1)
    model.eval()
    seen = 0
    for batch in trained.get_train_dataloader():
        starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
        if len(starts) == 1:
            continue  # the next test's
        parts = batch["input_ids"][0].tensor_split(starts[1:])
        with torch.no_grad():
            alone = [(model(part[None], labels=part[None]).loss, len(part) - 1) for part in parts]
            found = model(**batch).loss
        expected = sum(loss * count for loss, count in alone) / sum(n for _, n in alone)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
        seen += 1
    assert seen > 2


def test_packing_trains(model: Any, sft: Any) -> None:
    trained = sft(model, packing=True, per_device_train_batch_size=1, max_steps=12)
    trained.train()
    assert len(losses(trained)) == 12


def test_a_peft_model_that_the_trainer_made(make_model: Any, sft: Any) -> None:
    found = []
    for ours in (False, True):
        torch.manual_seed(1)
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
        trained = sft(make_model(), peft_config=config)
        if ours:
            prefixattn.attach(trained.model)
        trained.train()
        found.append(losses(trained))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_preferences(model: Any, make_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "A frame", "chosen": " is a record.", "rejected": " is."}] * 8
    options = OPTIONS | {"max_steps": 4}
    trained = trl.DPOTrainer(
        model,
        make_model(),
        trl.DPOConfig(output_dir=str(tmp_path), **options),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trained.train()
    assert losses(trained)[-1] < losses(trained)[0]


def test_rewards(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """Generates, scores and trains in turn: the new numbers are generated from."""
    before = model.prefixattn.keys[0].detach().clone()
    trained = trl.GRPOTrainer(
        model,
        lambda completions, **others: [float(len(set(text))) for text in completions],
        trl.GRPOConfig(
            output_dir=str(tmp_path), num_generations=4, max_completion_length=6, **OPTIONS
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": "A frame"}] * 8),
        processing_class=tokenizer,
    )
    trained.train()
    assert (model.prefixattn.keys[0] - before).abs().max() > 0.01
