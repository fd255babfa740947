"""Trainer scripts: interrupted and resumed, packed, accumulated, in half precision, seq2seq."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import prefixattn
from prefixattn import EncoderDecoderPrefix, GatedPrefix, Prefix

Build = Callable[[str], Any]
BESIDE: dict[str, Callable[..., Prefix]] = {
    "lora": Prefix.from_text,
    "lora, frozen tokens": partial(Prefix.from_text, num_frozen_tokens=2),
    "lora, gates": GatedPrefix.from_text,
    "lora, some layers": partial(Prefix.from_text, layers=[1]),
}
"""PEFT's format holds the first two."""


@pytest.fixture
def build(make_model: Any, text: torch.Tensor) -> Build:
    """The three models that people train: ours, PEFT's, and LoRA beside ours."""

    def make(kind: str) -> Any:
        model = make_model()
        torch.manual_seed(1)
        if kind == "peft":
            config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
            model = peft.get_peft_model(model, config)
            prefixattn.attach(model)
            return model
        prefix = BESIDE.get(kind, Prefix.from_text)(model, text)
        model.requires_grad_(False)
        if kind in BESIDE:
            model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2))
        prefixattn.attach(model, prefix)
        return model

    return make


@pytest.fixture
def trainer(rows: Any, tokenizer: Any) -> Callable[..., transformers.Trainer]:
    def make(
        model: Any,
        folder: Path,
        collator: Any = None,
        callbacks: Any = None,
        metrics: Any = None,
        **changes: Any,
    ) -> transformers.Trainer:
        options = {
            "per_device_train_batch_size": 4,
            "learning_rate": 0.05,
            "max_steps": 3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
        }
        return transformers.Trainer(
            model,
            transformers.TrainingArguments(output_dir=str(folder), **(options | changes)),
            train_dataset=rows,
            eval_dataset=rows[:8],
            data_collator=collator
            or transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
            callbacks=callbacks,
            compute_metrics=metrics,
        )

    return make


def trained_losses(trainer: transformers.Trainer) -> list[float]:
    """Of a whole run. Trainer takes its seed when it is made, so each is run at once."""
    trainer.train()
    return losses(trainer)


def losses(trained: transformers.Trainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trained.state.log_history if name in entry]


class Interrupt(transformers.TrainerCallback):
    """The user's Ctrl-C, in the fourth step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            raise KeyboardInterrupt


class Keep(transformers.TrainerCallback):
    """What trains, as it is at every checkpoint."""

    def __init__(self) -> None:
        self.at: dict[int, dict[str, torch.Tensor]] = {}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.at[state.global_step] = what_trains(kwargs["model"])


def what_trains(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


KINDS = ["prefix", "peft", "lora"]
SAVED = ["prefix", "peft", *BESIDE]


@pytest.mark.parametrize("kind", SAVED)
def test_interrupted_and_resumed(build: Build, trainer: Any, kind: str, tmp_path: Path) -> None:
    saving = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 2,
        "gradient_checkpointing": True,
    }
    whole = trainer(build(kind), tmp_path / "whole", **saving)
    whole.train()
    first = trainer(build(kind), tmp_path / "parts", callbacks=[Interrupt()], **saving)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    again = trainer(build(kind), tmp_path / "parts", **saving)
    again.train(resume_from_checkpoint=True)
    assert losses(again) == pytest.approx(losses(whole), rel=1e-6)
    assert losses(whole)[0] != pytest.approx(losses(whole)[-1], rel=1e-3)


@pytest.mark.parametrize("kind", SAVED)
def test_the_best_of_all_is_loaded(build: Build, trainer: Any, kind: str, tmp_path: Path) -> None:
    """It is the one before the last, so that what is loaded is another than what is there."""
    keep, scores = Keep(), iter([1.0, 3.0, 2.0])
    trained = trainer(
        build(kind),
        tmp_path,
        callbacks=[keep],
        metrics=lambda _: {"score": next(scores)},
        max_steps=6,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    trained.train()
    assert list(keep.at) == [2, 4, 6]
    found = what_trains(trained.model)
    assert found.keys() >= keep.at[4].keys()
    for name, tensor in keep.at[4].items():
        assert torch.equal(found[name], tensor), name
        assert not torch.equal(tensor, keep.at[6][name]), name


@pytest.mark.parametrize("name", ["default", "mine"])
def test_resumed_beside_several_adapters(
    build: Build, trainer: Any, name: str, tmp_path: Path
) -> None:
    """Those that are not called default have folders of their own, and the prefix one beside."""

    def two() -> Any:
        model = build("lora, gates")
        model.add_adapter("mine", peft.LoraConfig(task_type="CAUSAL_LM", r=2))
        model.set_adapter(name)
        return model

    keep, saving = Keep(), {"save_strategy": "steps", "save_steps": 2}
    trainer(two(), tmp_path, callbacks=[keep], max_steps=2, **saving).train()
    again = two()
    trainer(again, tmp_path, max_steps=2, **saving).train(resume_from_checkpoint=True)
    found, saved = what_trains(again), keep.at[2]
    ours = [parameter for parameter in saved if ".prefixattn." in parameter]
    assert ours
    for parameter in ours:
        assert torch.equal(found[parameter], saved[parameter]), parameter


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_gradients(build: Build, trainer: Any, kind: str, tmp_path: Path) -> None:
    expected = trained_losses(trainer(build(kind), tmp_path))
    parts = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    found = trained_losses(trainer(build(kind), tmp_path, **parts))
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(build: Build, trainer: Any, kind: str, tmp_path: Path) -> None:
    expected = trained_losses(trainer(build(kind), tmp_path))
    found = trained_losses(trainer(build(kind), tmp_path, bf16=True))
    assert found == pytest.approx(expected, rel=2e-3)
    assert found != expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [False, True], ids=["positions", "positions and lengths"])
def test_packed_rows(build: Build, trainer: Any, kind: str, lengths: bool, tmp_path: Path) -> None:
    packing = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=lengths)
    expected = trained_losses(trainer(build(kind), tmp_path))
    found = trained_losses(trainer(build(kind), tmp_path, packing))
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("count", [1, 3])
def test_a_packed_row_by_hand(build: Build, rows: Any, count: int) -> None:
    """The collator's batch as it is, in evaluation, where a cache would be made by default."""
    model, documents = build("prefix").eval(), [row["input_ids"] for row in rows[:count]]
    packing = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    with torch.no_grad():
        alone = [model(torch.tensor([ids])).logits for ids in documents]
        packed = model(**packing(rows[:count])).logits
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=0, atol=1e-5)


def test_seq2seq_evaluated_by_generating(tokenizer: Any, rows: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=300,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=1,
        pad_token_id=1,
        eos_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(config).requires_grad_(False)
    parts = {p: Prefix.random(model, 4, part=p) for p in ("encoder", "decoder", "cross")}
    before = {p: part.keys[0].detach().clone() for p, part in parts.items()}
    prefixattn.attach(model, EncoderDecoderPrefix(**parts))
    pairs = [{**row, "labels": row["input_ids"][::-1][:5]} for row in rows]
    seen: list[Any] = []

    def keep(result: transformers.EvalPrediction) -> dict[str, float]:
        seen.append(result.predictions)
        return {}

    arguments = transformers.Seq2SeqTrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        learning_rate=0.1,
        max_steps=4,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=4,
        save_strategy="no",
        predict_with_generate=True,
        generation_max_length=6,
        gradient_checkpointing=True,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trained = transformers.Seq2SeqTrainer(
        model,
        arguments,
        train_dataset=pairs,
        eval_dataset=pairs[:3],
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, model),
        processing_class=tokenizer,
        compute_metrics=keep,
    )
    trained.train()
    for name, part in parts.items():
        assert (part.keys[0] - before[name]).abs().max() > 0.01, name
    inputs = tokenizer.pad(
        {"input_ids": [row["input_ids"] for row in pairs[:3]]}, return_tensors="pt"
    )
    expected = model.generate(**inputs, max_length=6)
    assert seen[0][:, : expected.shape[1]].tolist() == expected.tolist()
