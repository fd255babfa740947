"""Prefix-tuning one frozen model in three ways from the same start, side by side."""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from prefixattn import attach
from prefixattn.checkpoints.peft import TENSOR_NAME, TENSORS_FILE, load_peft
from prefixattn.demo.base import load_base, warm_then_fall
from prefixattn.demo.task import IGNORED, Batch, Example, prompt_batch

ANSWER_TOKENS = 32  # greedy answers are cut here
GENERATION_ROWS = 32


@dataclass(frozen=True)
class Recipe:
    """How a prefix is tuned: AdamW over `steps` steps, the rate rising, then falling to a tenth."""

    steps: int
    lr: float


def with_peft(base: Path, start: Path) -> PeftModel:
    """Stock PEFT on the model in `base`, with the adapter in `start` as its trainable prefix."""
    embeddings = load_file(start / TENSORS_FILE)[TENSOR_NAME]
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(embeddings))
    with _old_names_allowed():
        model = get_peft_model(load_base(base), config)
    model.prompt_encoder["default"].load_prompt_embeddings(embeddings)
    return model


def load_with_peft(base: Path, adapter: Path) -> PeftModel:
    """Stock PEFT on the model in `base`, with the saved adapter as PEFT loads it for inference."""
    with _old_names_allowed():
        return PeftModel.from_pretrained(load_base(base), str(adapter)).eval()


def with_ours(base: Path, start: Path) -> PreTrainedModel:
    """The plain model in `base`, with the adapter in `start` attached as our prefix."""
    model = load_base(base)
    attach(model, load_peft(start))
    return model


def with_ours_checkpointed(base: Path, start: Path) -> PreTrainedModel:
    """`with_ours`, every layer's activations computed again in the backward pass."""
    model = with_ours(base, start)
    with _old_names_allowed():
        model.gradient_checkpointing_enable()
    return model


def with_peft_checkpointed(base: Path, start: Path) -> PeftModel:
    """`with_peft`, with gradient checkpointing asked for in the same way."""
    model = with_peft(base, start)
    with _old_names_allowed():
        model.gradient_checkpointing_enable()
    return model


WAYS: dict[str, Callable[[Path, Path], nn.Module]] = {
    "PEFT": with_peft,
    "prefixattn": with_ours,
    "prefixattn, checkpointed": with_ours_checkpointed,
}


@contextmanager
def _old_names_allowed() -> Iterator[None]:
    """Without transformers' notes that it renames gradient checkpointing's names in version 6.

    PEFT still uses the old names, and so do all versions of transformers before 5.23.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
        yield


class Run:
    """One model being prefix-tuned, and what each step cost.

    Attributes:
        losses: the training loss of each step, in nats per token.
        seconds: the wall-clock time of each step: forward, backward, update.
        held_out: the held-out loss by number of steps taken.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.model = model
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.held_out: dict[int, float] = {}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=0.0)
        self._schedule = LambdaLR(self._optimizer, lambda step: warm_then_fall(step, recipe.steps))

    def step(self, batch: Batch) -> None:
        """One training step."""
        self.model.train()
        started = time.perf_counter()
        loss = self.model(**batch, use_cache=False).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._schedule.step()
        self.seconds.append(time.perf_counter() - started)
        self.losses.append(loss.item())

    def measure(self, batches: Sequence[Batch]) -> None:
        """Note the held-out loss after the steps taken so far."""
        self.held_out[len(self.losses)] = mean_loss(self.model, batches)


def tune_together(
    runs: Sequence[Run],
    batches: Sequence[Batch],
    held_out: Sequence[Batch],
    measure_every: int,
    report: Callable[[], None],
) -> None:
    """Give every run the same batches, step by step in turn, so that noise meets all alike."""
    for number, batch in enumerate(batches):
        first = number % len(runs)
        for run in [*runs[first:], *runs[:first]]:
            if number % measure_every == 0:
                run.measure(held_out)
            run.step(batch)
        report()
    for run in runs:
        run.measure(held_out)


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """The mean loss over the answers' tokens, in nats."""
    model.eval()
    total, tokens = 0.0, 0
    for batch in batches:
        count = int((batch["labels"] != IGNORED).sum())
        total += model(**batch).loss.item() * count
        tokens += count
    return total / tokens


@torch.no_grad()
def answers(
    model: PreTrainedModel | PeftModel,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerFast,
) -> list[str]:
    """The model's greedy answer to each prompt, up to the end token."""
    model.eval()
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    texts = []
    for first in range(0, len(examples), GENERATION_ROWS):
        batch = prompt_batch(examples[first : first + GENERATION_ROWS], pad)
        tokens = model.generate(
            **batch,
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=pad,
        )
        for row in tokens[:, batch["input_ids"].shape[1] :].tolist():
            ids = row[: row.index(end)] if end in row else row
            texts.append(tokenizer.decode(ids).strip())
    return texts


def peft_with_checkpointing(
    base: Path, start: Path, recipe: Recipe, batches: Sequence[Batch], expected: Sequence[float]
) -> str:
    """Train with stock PEFT under gradient checkpointing, and say in words what happens.

    `expected` are the losses without checkpointing.
    """
    run = Run(with_peft_checkpointed(base, start), recipe)
    try:
        for batch in batches:
            run.step(batch)
    except Exception as error:  # whatever it raises is the finding
        reason = str(error).strip().partition("\n")[0]
        return f"{type(error).__name__} in step {len(run.losses) + 1}: {reason}"
    return f"trains; losses differ by up to {largest_difference(run.losses, expected):.1e}"


def largest_difference(left: Sequence[float], right: Sequence[float]) -> float:
    """The largest absolute difference of two equally long series."""
    return max(abs(a - b) for a, b in zip(left, right, strict=True))
