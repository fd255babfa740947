"""The demo from start to end: text, base model, three tunings, and what they show."""

import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from prefixattn import Prefix
from prefixattn.bench.machine import facts
from prefixattn.checkpoints.peft import save_peft
from prefixattn.demo.base import cached_base, cached_tokenizer, load_base
from prefixattn.demo.memory import Memory, measure_together
from prefixattn.demo.report import CHECKPOINTED, OURS, PEFT, Findings, Shown, Way, save, show
from prefixattn.demo.settings import Settings
from prefixattn.demo.task import (
    Batch,
    Example,
    encode,
    prefix_text,
    training_batch,
    training_batches,
)
from prefixattn.demo.text import library_root, overlap, read_library, split_pairs
from prefixattn.demo.tune import (
    WAYS,
    Recipe,
    Run,
    answers,
    largest_difference,
    load_with_peft,
    mean_loss,
    peft_with_checkpointing,
    tune_together,
)


@dataclass
class Stage:
    """Where progress goes, and how long each part took."""

    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    def say(self, line: str) -> None:
        """Print a line above the bars."""
        self.progress.console.print(line, highlight=False, markup=False)

    @contextmanager
    def part(self, name: str, total: int | None) -> Iterator[Callable[..., None]]:
        """A bar for one part of the demo; yields what advances it by one, with an optional note."""
        task = self.progress.add_task(name, total=total, note="")
        started = time.perf_counter()

        def advance(note: str = "") -> None:
            self.progress.update(task, advance=1, note=note)

        yield advance
        self.progress.update(task, total=total or 1, completed=total or 1)
        self.seconds[name] = time.perf_counter() - started


@dataclass(frozen=True)
class Task:
    """The tokenized task: training examples, held-out ones in the seed's order, and batches."""

    tokenizer: PreTrainedTokenizerFast
    train: list[Example]
    held_out: list[Example]
    batches: list[Batch]
    held_out_batches: list[Batch]
    counts: dict[str, int]


def demonstrate(settings: Settings, console: Console | None = None) -> Findings:
    """See `prefixattn.demo.run.run`."""
    console = console or Console()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    with _quiet_transformers(), _progress(console) as progress:
        stage = Stage(progress)
        findings = _work(settings, stage)
        save(findings, settings.output)
    show(findings, console)
    total = sum(findings.seconds.values())
    console.print(f"{total:.0f} s in all. Adapter, curves and report: {settings.output}/")
    return findings


def _work(settings: Settings, stage: Stage) -> Findings:
    base, task = _prepare(settings, stage)
    settings.output.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="prefixattn-demo-") as temporary:
        start = Path(temporary) / "start"
        text = torch.tensor(prefix_text(task.train, settings.tune.prefix_tokens, settings.seed))
        save_peft(Prefix.from_text(load_base(base), text), start)
        recipe = Recipe(settings.tune.steps, settings.tune.lr)
        runs = {name: Run(build(base, start), recipe) for name, build in WAYS.items()}
        with stage.part("tuning in three ways", settings.tune.steps) as advance:
            tune_together(
                list(runs.values()),
                task.batches,
                task.held_out_batches,
                settings.tune.measure_every,
                lambda: advance("  ".join(f"{run.losses[-1]:.4f}" for run in runs.values())),
            )
        with stage.part("PEFT with checkpointing", None):
            outcome = peft_with_checkpointing(base, start, recipe, task.batches, runs[PEFT].losses)
        with stage.part("memory, own processes", None):
            longest = max(task.batches, key=lambda batch: batch["input_ids"].numel())
            memory = measure_together(list(WAYS), base, start, longest, Path(temporary))
    return _findings(settings, stage, base, task, runs, memory, outcome)


def _prepare(settings: Settings, stage: Stage) -> tuple[Path, Task]:
    """The base model's folder and the task, from the library's text and the cache."""
    with stage.part("reading the library", None):
        root = settings.text or library_root()
        library = read_library(root)
        train, held_out = library.split()
        pairs, held_out_pairs = split_pairs(train, held_out)
    stage.say(
        f"text: {len(train)} files to train on with {len(pairs)} documented functions, "
        f"{len(held_out)} files held out with {len(held_out_pairs)}; {root}"
    )
    for path in library.unreadable:
        stage.say(f"left out, not readable as Python: {path}")
    with stage.part("tokenizer", None):
        tokenizer = cached_tokenizer(settings.cache, train, settings.base, stage.say)
    with stage.part("base model", settings.base.steps) as advance:
        base = cached_base(
            settings.cache,
            train,
            tokenizer,
            settings.base,
            settings.seed,
            lambda loss: advance(f"{loss:.3f}"),
            stage.say,
        )
    return base, _task(settings, tokenizer, encode(pairs, tokenizer), held_out_pairs)


def _task(
    settings: Settings, tokenizer: PreTrainedTokenizerFast, train: list[Example], held_out: Any
) -> Task:
    sizes, pad = settings.tune, tokenizer.pad_token_id
    examples = encode(held_out, tokenizer)
    random.Random(settings.seed).shuffle(examples)
    examples = examples[: sizes.held_out]
    by_length = sorted(examples, key=lambda example: example.num_tokens)
    return Task(
        tokenizer=tokenizer,
        train=train,
        held_out=examples,
        batches=training_batches(train, sizes.batch, sizes.steps, settings.seed, pad),
        held_out_batches=[
            training_batch(by_length[first : first + sizes.batch], pad)
            for first in range(0, len(by_length), sizes.batch)
        ],
        counts={"training_functions": len(train), "held_out_functions": len(held_out)},
    )


def _findings(
    settings: Settings,
    stage: Stage,
    base: Path,
    task: Task,
    runs: dict[str, Run],
    memory: dict[str, Memory],
    peft_checkpointing: str,
) -> Findings:
    plain = load_base(base)
    answered = task.held_out[: settings.tune.answered]
    models = {"no prefix": plain, **{name: run.model for name, run in runs.items()}}
    texts = _answer(models, answered, task, stage)
    scores = {
        name: mean(overlap(text, e.pair.summary) for text, e in zip(given, answered, strict=True))
        for name, given in texts.items()
    }
    with stage.part("our adapter in PEFT", None):
        gap, size = _reload(runs[OURS].model, base, settings.output, task.held_out_batches[0])
    return Findings(
        machine=facts("cpu", f"prefixattn demo --seed {settings.seed}"),
        settings=json.loads(json.dumps(asdict(settings), default=str)),
        counts={**_counts(plain, runs[OURS].model), **task.counts, "answered": len(answered)},
        base_loss=mean_loss(plain, task.held_out_batches),
        base_overlap=scores["no prefix"],
        ways={name: _way(run, memory[name], scores[name]) for name, run in runs.items()},
        loss_difference={
            name: largest_difference(run.losses, runs[PEFT].losses) for name, run in runs.items()
        },
        checkpointing_difference=largest_difference(runs[CHECKPOINTED].losses, runs[OURS].losses),
        same_answers={
            name: mean(a == b for a, b in zip(texts[name], texts[PEFT], strict=True))
            for name in runs
        },
        peft_checkpointing=peft_checkpointing,
        logits_difference=gap,
        logits_size=size,
        shown=[
            Shown(e.pair.path, e.pair.name, e.pair.summary, before, after)
            for e, before, after in zip(answered, texts["no prefix"], texts[OURS], strict=True)
        ][: settings.tune.shown],
        seconds=dict(stage.seconds),
    )


def _answer(
    models: dict[str, Any], examples: list[Example], task: Task, stage: Stage
) -> dict[str, list[str]]:
    texts = {}
    with stage.part("held-out answers", len(models)) as advance:
        for name, model in models.items():
            texts[name] = answers(model, examples, task.tokenizer)
            advance(name)
    return texts


def _counts(plain: PreTrainedModel, ours: nn.Module) -> dict[str, int]:
    prefix = _prefix_of(ours)
    return {
        "base_parameters": plain.num_parameters(),
        "prefix_tokens": prefix.num_tokens,
        "prefix_parameters": sum(parameter.numel() for parameter in prefix.parameters()),
        "threads": torch.get_num_threads(),
    }


def _prefix_of(model: nn.Module) -> Prefix:
    prefix = model.get_submodule("prefixattn")
    if not isinstance(prefix, Prefix):
        raise TypeError(f"model.prefixattn must be a Prefix, got a {type(prefix).__name__}")
    return prefix


def _way(run: Run, memory: Memory, score: float) -> Way:
    return Way(
        losses=run.losses,
        held_out=run.held_out,
        seconds=median(run.seconds),
        peak_memory=memory.peak,
        memory_growth=memory.growth,
        overlap=score,
    )


@torch.no_grad()
def _reload(model: nn.Module, base: Path, output: Path, batch: Batch) -> tuple[float, float]:
    """Save our prefix for PEFT, load it with PEFT: the largest logit difference, the largest logit.

    Padded positions are left out.
    """
    folder = output / "adapter"
    save_peft(_prefix_of(model), folder, str(base))
    stock = load_with_peft(base, folder)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    real = inputs["attention_mask"].bool()
    ours = model.eval()(**inputs).logits[real]
    theirs = stock(**inputs).logits[real]
    return (ours - theirs).abs().max().item(), theirs.abs().max().item()


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bars and notes among ours; errors are exceptions anyway."""
    bars, verbosity = (
        transformers_logging.is_progress_bar_enabled(),
        transformers_logging.get_verbosity(),
    )
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
