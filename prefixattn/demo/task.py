"""The demo's task: from a function's source to its docstring's first line, as token batches."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from prefixattn.demo.text import MARKER, Pair

SOURCE_TOKENS = 112  # longer functions are cut here
IGNORED = -100  # the label of tokens that carry no loss

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Example:
    """A pair as tokens: the prompt ends with the marker, the answer with the end token."""

    pair: Pair
    prompt: list[int]
    answer: list[int]

    @property
    def num_tokens(self) -> int:
        """Prompt and answer together."""
        return len(self.prompt) + len(self.answer)


def encode(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerFast, marker: str = MARKER
) -> list[Example]:
    """Each pair as tokens, in the same order; `marker` stands between source and answer."""

    def ids_of(texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids

    between = ids_of([marker])[0]
    sources = ids_of([pair.source for pair in pairs])
    answers = ids_of([" " + pair.summary for pair in pairs])
    return [
        Example(pair, source[:SOURCE_TOKENS] + between, [*answer, tokenizer.eos_token_id])
        for pair, source, answer in zip(pairs, sources, answers, strict=True)
    ]


def training_batch(examples: Sequence[Example], pad: int) -> Batch:
    """Padded on the right; the loss falls on the answers. `[len(examples), longest]` each."""
    longest = max(example.num_tokens for example in examples)
    batch = _empty(len(examples), longest, pad)
    batch["labels"] = torch.full_like(batch["input_ids"], IGNORED)
    for row, example in enumerate(examples):
        start, end = len(example.prompt), example.num_tokens
        batch["input_ids"][row, :end] = torch.tensor(example.prompt + example.answer)
        batch["attention_mask"][row, :end] = 1
        batch["labels"][row, start:end] = torch.tensor(example.answer)
    return batch


def prompt_batch(examples: Sequence[Example], pad: int) -> Batch:
    """The prompts alone, padded on the left, for generation. `[len(examples), longest]` each."""
    longest = max(len(example.prompt) for example in examples)
    batch = _empty(len(examples), longest, pad)
    for row, example in enumerate(examples):
        batch["input_ids"][row, longest - len(example.prompt) :] = torch.tensor(example.prompt)
        batch["attention_mask"][row, longest - len(example.prompt) :] = 1
    return batch


def training_batches(
    examples: Sequence[Example], size: int, steps: int, seed: int, pad: int
) -> list[Batch]:
    """`steps` batches of `size` in a shuffled order that starts again when it is used up.

    Examples of like length share a batch, which spares a third of the padding's work. What does
    not fill a batch waits for the next round.
    """
    if len(examples) < size:
        raise ValueError(f"examples: got {len(examples)}, expected at least {size}, one batch")
    order = random.Random(seed)
    batches: list[Batch] = []
    while len(batches) < steps:
        shuffled = order.sample(list(examples), len(examples) // size * size)
        shuffled.sort(key=lambda example: example.num_tokens)
        groups = [shuffled[first : first + size] for first in range(0, len(shuffled), size)]
        order.shuffle(groups)
        batches.extend(training_batch(group, pad) for group in groups[: steps - len(batches)])
    return batches


def prefix_text(examples: Sequence[Example], num_tokens: int, seed: int) -> list[int]:
    """Exactly `num_tokens` tokens of real text to start a prefix from: solved short examples."""
    short = sorted(examples, key=lambda example: example.num_tokens)
    candidates = short[len(short) // 8 : len(short) // 2]
    random.Random(seed).shuffle(candidates)
    text: list[int] = []
    for example in candidates:
        text = example.prompt + example.answer + text
        if len(text) >= num_tokens:
            return text[-num_tokens:]
    raise ValueError(f"num_tokens: the examples hold {len(text)} tokens, got {num_tokens}")


def _empty(rows: int, columns: int, pad: int) -> Batch:
    return {
        "input_ids": torch.full((rows, columns), pad),
        "attention_mask": torch.zeros(rows, columns, dtype=torch.long),
    }
