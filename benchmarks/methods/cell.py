"""One cell of the comparison: a method on a task, from so many examples, with a seed and a rate."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerFast

from benchmarks.methods.ways import METHODS, Ready, Start
from prefixattn.bench.measure import peak_memory
from prefixattn.demo.base import warm_then_fall
from prefixattn.demo.task import Batch, Example, prefix_text, training_batch, training_batches
from prefixattn.demo.tasks import BUILDERS, Task, batches_of
from prefixattn.demo.text import read_library
from prefixattn.demo.tune import mean_loss

GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class Sizes:
    """What every cell has in common."""

    steps: int = 80
    batch: int = 8
    num_tokens: int = 32  # of a prefix or a soft prompt
    shots: int = 384  # tokens of solved examples that the base can have in context
    validation: int = 48  # examples
    held_out: int | None = None  # examples; None: all
    measure_every: int = 10  # steps between two validation losses


@dataclass(frozen=True)
class Cell:
    """What is trained. `rate` is 0 for a method that trains nothing."""

    method: str
    task: str
    examples: int
    seed: int
    rate: float
    purpose: str = "score"  # "rate": only to choose the rate by, so nothing held out is looked at


@dataclass(frozen=True)
class Place:
    """Where a worker finds the text, the tokenizer and the base."""

    text: Path
    tokenizer: Path
    base: Path
    sizes: Sizes


def run(cell: Cell, place: Place) -> dict[str, Any]:
    """Train and measure; the row that the results file keeps."""
    torch.manual_seed(cell.seed)
    sizes, tokenizer = place.sizes, _tokenizer(place.tokenizer)
    task = _task(cell.task, place.text, place.tokenizer)
    train, validation = task.draw(cell.examples, sizes.validation, cell.seed)
    ready = METHODS[cell.method].prepare(_start(train, place, cell.seed))
    row = asdict(cell) | {"kind": "row", "score_name": task.score}
    row |= {"parameters": sum(p.numel() for p in ready.parameters())}
    watched = batches_of(validation, tokenizer)
    if cell.rate:
        batches = training_batches(train, sizes.batch, sizes.steps, cell.seed, _pad(tokenizer))
        row |= fit(ready, cell.rate, batches, watched, sizes.measure_every)
    else:
        row |= {"validation": mean_loss(ready.model, watched)}
    if cell.purpose == "rate":
        return row
    held_out = task.held_out[: sizes.held_out]
    row |= task.measure(ready.model, tokenizer, held_out)
    row |= {"bytes": saved_bytes(ready)}
    return row | {"peak": _peak(ready, train, tokenizer, sizes)}


def peak_of(cell: Cell, place: Place) -> int | None:
    """The memory of a cell's row alone, without its training."""
    task = _task(cell.task, place.text, place.tokenizer)
    train, _ = task.draw(cell.examples, place.sizes.validation, cell.seed)
    ready = METHODS[cell.method].prepare(_start(train, place, cell.seed))
    return _peak(ready, train, _tokenizer(place.tokenizer), place.sizes)


def fit(
    ready: Ready, rate: float, batches: Sequence[Batch], watched: Sequence[Batch], every: int
) -> dict[str, Any]:
    """Train, and leave the model at its best validation loss.

    The curve holds steps, seconds of training alone, and the validation loss.
    """
    parameters = ready.parameters()
    optimizer = _optimizer(ready, rate)
    schedule = LambdaLR(optimizer, lambda step: warm_then_fall(step, len(batches)))
    best, kept = mean_loss(ready.model, watched), _copies(parameters)
    curve, seconds = [(0, 0.0, best)], []
    for number, batch in enumerate(batches, 1):
        ready.model.train()
        started = time.perf_counter()
        _step(ready, batch)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        seconds.append(time.perf_counter() - started)
        if number % every == 0 or number == len(batches):
            loss = mean_loss(ready.model, watched)
            curve.append((number, sum(seconds), loss))
            if loss < best:
                best, kept = loss, _copies(parameters)
    with torch.no_grad():
        for parameter, copy in zip(parameters, kept, strict=True):
            parameter.copy_(copy)
    return {"validation": best, "curve": curve, "step": median(seconds)}


def _optimizer(ready: Ready, rate: float) -> torch.optim.Optimizer:
    groups = [{"params": group, "lr": rate * share} for group, share in ready.groups]
    return torch.optim.AdamW(groups, weight_decay=0.0)


def _step(ready: Ready, batch: Batch) -> None:
    """Forward and backward."""
    loss = ready.loss(batch) if ready.loss else ready.model(**batch, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(ready.parameters(), GRADIENT_NORM)


def _copies(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def saved_bytes(ready: Ready) -> int:
    """What the task takes on disk beside the base."""
    with tempfile.TemporaryDirectory() as folder:
        ready.save(Path(folder))
        files = (Path(parent) / name for parent, _, names in os.walk(folder) for name in names)
        return sum(file.stat().st_size for file in files if file.name != "README.md")


def _peak(
    ready: Ready, train: Sequence[Example], tokenizer: PreTrainedTokenizerFast, sizes: Sizes
) -> int | None:
    """The peak of a step over the longest examples, beyond the model.

    Gradients and the optimizer's state are in it: they are what few parameters save.
    """
    if not ready.groups:
        return None
    longest = sorted(train, key=lambda example: example.num_tokens)[-sizes.batch :]
    batch = training_batch(longest, _pad(tokenizer))
    ready.model.train()
    _step(ready, batch)  # what libraries keep after their first call is no step's
    ready.model.zero_grad()

    def step() -> object:
        optimizer = _optimizer(ready, rate=1e-4)
        _step(ready, batch)
        optimizer.step()
        return optimizer

    return peak_memory(step, "cpu")


def _start(train: Sequence[Example], place: Place, seed: int) -> Start:
    sizes, shots = place.sizes, list[int]()
    for example in train:
        if len(shots) + example.num_tokens <= sizes.shots:
            shots += example.prompt + example.answer
    text = prefix_text(train, sizes.num_tokens, seed)
    return Start(place.base, text, shots, sizes.num_tokens, seed)


@cache
def _tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(folder)


@cache
def _task(name: str, text: Path, tokenizer: Path) -> Task:
    train, held = read_library(text).split()
    return BUILDERS[name](train, held, _tokenizer(tokenizer))


def _pad(tokenizer: PreTrainedTokenizerFast) -> int:
    pad: int = tokenizer.pad_token_id
    return pad
