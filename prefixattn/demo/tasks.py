"""Three tasks made from the library's text, held out by file: what tuning methods are compared on.

`summaries` is the demo's task. All are of tokens after tokens, so that one loss serves them; each
has a score of its own beside it.
"""

import ast
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from prefixattn.demo.task import IGNORED, Example, encode, training_batch
from prefixattn.demo.text import Function, Module, Pair, moved_left, overlap, split_pairs
from prefixattn.demo.tune import answers, mean_loss

PACKAGES = ("asyncio", "email", "importlib", "tkinter", "unittest", "xml")
PACKAGE_MARKER = "\n# Package:"
SNIPPET_LINES = 4  # shorter functions say little of their package
OPENING_TOKENS, CONTINUATION_TOKENS = 24, 48
HELD_OUT = 96  # examples
SCORED_ROWS = 16
LOSS = "loss"  # the score of a task that has no other
T = TypeVar("T")


@dataclass(frozen=True)
class Task:
    """Examples of one task.

    Attributes:
        name: what it is called.
        score: "ROUGE-L F1", "accuracy" or `LOSS`, of which less is better.
        pool: from training files, in an order that `draw` shuffles.
        held_out: from files that no training saw.
        labels: the tokens of each class's answer; empty where there are no classes.
    """

    name: str
    score: str
    pool: list[Example]
    held_out: list[Example]
    labels: tuple[tuple[int, ...], ...] = ()

    def draw(self, count: int, validation: int, seed: int) -> tuple[list[Example], list[Example]]:
        """``count`` examples to train on and ``validation`` others, the same ones for a seed.

        With classes there are as many of each as can be.

        Raises:
            ValueError: the pool holds fewer than both together.
        """
        if len(self.pool) < count + validation:
            raise ValueError(
                f"count + validation: {self.name} has {len(self.pool)} examples, "
                f"got {count} + {validation}"
            )
        drawn = random.Random(seed).sample(self.pool, len(self.pool))
        if self.labels:
            drawn = list(_in_turn([[e for e in drawn if e.answer == [*x]] for x in self.labels]))
        return drawn[:count], drawn[count : count + validation]

    def measure(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]
    ) -> dict[str, float]:
        """The mean loss over the answers' tokens, in nats, and the task's score."""
        loss = mean_loss(model, batches_of(examples, tokenizer))
        if self.score == LOSS:
            return {"loss": loss, "score": loss}
        return {"loss": loss, "score": SCORES[self.score](self, model, tokenizer, examples)}


def batches_of(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast
) -> list[dict[str, Tensor]]:
    """The examples as training batches, in their order."""
    pad = tokenizer.pad_token_id
    starts = range(0, len(examples), SCORED_ROWS)
    return [training_batch(examples[start : start + SCORED_ROWS], pad) for start in starts]


def _overlap(
    task: Task,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    examples: Sequence[Example],
) -> float:
    """ROUGE-L F1 of the greedy answers."""
    said = answers(model, examples, tokenizer)
    scores = [overlap(a, e.pair.summary) for a, e in zip(said, examples, strict=True)]
    return sum(scores) / len(scores)


@torch.no_grad()
def _accuracy(
    task: Task,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    examples: Sequence[Example],
) -> float:
    """How often the likeliest of the classes' answers is the right one."""
    model.eval()
    columns = []
    for label in task.labels:
        asked = [replace(example, answer=[*label]) for example in examples]
        parts = [_log_probs(model, batch) for batch in batches_of(asked, tokenizer)]
        columns.append(torch.cat(parts))
    guesses = torch.stack(columns, dim=1).argmax(dim=1).tolist()
    said = [[*task.labels[guess]] for guess in guesses]
    return sum(a == e.answer for a, e in zip(said, examples, strict=True)) / len(examples)


def _log_probs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The log-probability of each row's answer, `[rows]`."""
    labels = batch["labels"]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**inputs).logits[:, -labels.shape[1] :]  # PEFT's have those of a prompt before
    each = cross_entropy(logits[:, :-1].mT, labels[:, 1:], ignore_index=IGNORED, reduction="none")
    return -each.sum(dim=1)


SCORES = {"ROUGE-L F1": _overlap, "accuracy": _accuracy}


def summaries(
    train: Sequence[Module], held: Sequence[Module], tokenizer: PreTrainedTokenizerFast
) -> Task:
    """From a function to its docstring's first line."""
    pool, held_out = split_pairs(train, held)
    chosen = random.Random(0).sample(held_out, min(HELD_OUT, len(held_out)))
    return Task("summarise", "ROUGE-L F1", encode(pool, tokenizer), encode(chosen, tokenizer))


def packages(
    train: Sequence[Module], held: Sequence[Module], tokenizer: PreTrainedTokenizerFast
) -> Task:
    """From a function to the package that it is from, one of `PACKAGES`."""
    names = encode([Pair("", "", "", name) for name in PACKAGES], tokenizer)
    labels = tuple(tuple(name.answer) for name in names)
    pool, held_out = (
        list(_in_turn([_snippets(half, name) for name in PACKAGES])) for half in (train, held)
    )
    seen = {pair.source for pair in pool}
    new = [pair for pair in held_out if pair.source not in seen][:HELD_OUT]
    first, second = (encode(pairs, tokenizer, PACKAGE_MARKER) for pairs in (pool, new))
    return Task("package", "accuracy", first, second, labels)


def _snippets(modules: Sequence[Module], package: str) -> list[Pair]:
    """The package's functions of some length, in an order drawn once."""
    found = []
    for module in modules:
        if not module.path.startswith(f"{package}/"):
            continue
        lines = module.text.splitlines(keepends=True)
        for node in ast.walk(ast.parse(module.text)):
            if isinstance(node, Function) and node.end_lineno is not None:
                whole = lines[node.lineno - 1 : node.end_lineno]
                if len(whole) >= SNIPPET_LINES:
                    source = moved_left(whole, node.col_offset)
                    found.append(Pair(module.path, node.name, source, package))
    return random.Random(0).sample(found, len(found))


def prose(
    train: Sequence[Module], held: Sequence[Module], tokenizer: PreTrainedTokenizerFast
) -> Task:
    """From the opening of a module's or class's docstring to its next words.

    The base was trained on functions: running prose is a style that it knows little of.
    """
    halves = [[e for m in half for e in _openings(m, tokenizer)] for half in (train, held)]
    held_out = random.Random(0).sample(halves[1], min(HELD_OUT, len(halves[1])))
    return Task("prose", LOSS, halves[0], held_out)


def _openings(module: Module, tokenizer: PreTrainedTokenizerFast) -> Iterator[Example]:
    for node in ast.walk(ast.parse(module.text)):
        text = ast.get_docstring(node) if isinstance(node, ast.Module | ast.ClassDef) else None
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        end = OPENING_TOKENS + CONTINUATION_TOKENS
        if len(ids) >= end:
            opening, following = ids[:OPENING_TOKENS], ids[OPENING_TOKENS:end]
            words = [tokenizer.decode(part) for part in (opening, following)]
            yield Example(Pair(module.path, "", *words), opening, following)


def _in_turn(groups: Sequence[Sequence[T]]) -> Iterator[T]:
    """One of each group, then the next of each, until all are used up."""
    nothing = object()
    rounds = chain.from_iterable(zip_longest(*groups, fillvalue=nothing))
    return (item for item in rounds if item is not nothing)  # type: ignore[misc]


BUILDERS: dict[
    str, Callable[[Sequence[Module], Sequence[Module], PreTrainedTokenizerFast], Task]
] = {"summarise": summaries, "package": packages, "prose": prose}
