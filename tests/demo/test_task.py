"""Token batches of the demo's task: where padding, labels and the marker lie."""

import pytest
import torch

from prefixattn.demo.base import train_tokenizer
from prefixattn.demo.task import (
    IGNORED,
    SOURCE_TOKENS,
    encode,
    prefix_text,
    prompt_batch,
    training_batch,
    training_batches,
)
from prefixattn.demo.text import MARKER, Pair, library_root, read_library


@pytest.fixture(scope="module")
def library():
    return read_library(library_root() / "logging")


@pytest.fixture(scope="module")
def tokenizer(library):
    return train_tokenizer(library.modules, 400)


@pytest.fixture(scope="module")
def examples(library, tokenizer):
    return encode([pair for module in library.modules for pair in module.pairs], tokenizer)


def test_an_example_is_source_marker_summary_end(tokenizer):
    pair = Pair("a.py", "f", "def f(x):\n    return x", "Return the argument.")
    (example,) = encode([pair], tokenizer)
    assert tokenizer.decode(example.prompt) == pair.source + MARKER
    assert tokenizer.decode(example.answer) == f" {pair.summary}{tokenizer.eos_token}"


def test_long_sources_are_cut_and_keep_their_marker(tokenizer):
    pair = Pair("a.py", "f", "def f(x):\n" + "    x += 1\n" * 200, "Count up a lot.")
    (example,) = encode([pair], tokenizer)
    marker = tokenizer(MARKER, add_special_tokens=False)["input_ids"]
    assert len(example.prompt) == SOURCE_TOKENS + len(marker)
    assert example.prompt[SOURCE_TOKENS:] == marker


def test_the_loss_falls_on_answers_alone(examples):
    pad = 1
    batch = training_batch(examples[:5], pad)
    for row, example in enumerate(examples[:5]):
        labels = batch["labels"][row]
        assert labels[labels != IGNORED].tolist() == example.answer
        real = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][real].tolist() == example.prompt + example.answer
        assert (batch["input_ids"][row][~real] == pad).all()
        assert real.tolist() == sorted(real.tolist(), reverse=True)


def test_prompts_end_at_the_right_edge_without_their_answers(examples):
    batch = prompt_batch(examples[:5], pad=1)
    for row, example in enumerate(examples[:5]):
        real = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][real].tolist() == example.prompt
        assert real.tolist() == sorted(real.tolist())


def test_batches_repeat_with_the_seed_and_not_without(examples):
    def rows(seed):
        return [batch["input_ids"] for batch in training_batches(examples, 4, 30, seed, 1)]

    first, again, other = rows(0), rows(0), rows(1)
    assert len(first) == 30
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, other, strict=True)
    )


def test_too_few_examples_are_refused(examples):
    with pytest.raises(ValueError, match="examples: got 3, expected at least 4"):
        training_batches(examples[:3], 4, 1, 0, 1)


def test_the_prefixs_text_has_exactly_its_length(examples):
    text = prefix_text(examples, 16, seed=0)
    assert len(text) == 16
    assert text == prefix_text(examples, 16, seed=0)
    with pytest.raises(ValueError, match="num_tokens"):
        prefix_text(examples, 10**6, seed=0)
