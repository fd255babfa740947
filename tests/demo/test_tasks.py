"""The three tasks: held out by file, drawn by seed, scored as their names say."""

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from prefixattn.demo.base import train_tokenizer
from prefixattn.demo.tasks import (
    BUILDERS,
    CONTINUATION_TOKENS,
    OPENING_TOKENS,
    PACKAGE_MARKER,
    PACKAGES,
    batches_of,
)
from prefixattn.demo.text import library_root, read_library


@pytest.fixture(scope="module")
def halves():
    return read_library(library_root()).split()


@pytest.fixture(scope="module")
def tokenizer(halves):
    return train_tokenizer(halves[0][:60], 1500)


@pytest.fixture(scope="module")
def tasks(halves, tokenizer):
    return {name: build(*halves, tokenizer) for name, build in BUILDERS.items()}


@pytest.mark.parametrize("name", BUILDERS)
def test_no_file_is_in_both_halves(tasks, name):
    pool, held_out = (
        {e.pair.path for e in half} for half in (tasks[name].pool, tasks[name].held_out)
    )
    assert pool
    assert held_out
    assert not pool & held_out


@pytest.mark.parametrize("name", BUILDERS)
def test_a_draw_is_of_its_seed_and_keeps_validation_apart(tasks, name):
    draw = tasks[name].draw
    train, validation = draw(16, 8, seed=3)
    assert (len(train), len(validation)) == (16, 8)
    assert draw(16, 8, seed=3) == (train, validation)
    assert draw(16, 8, seed=4)[0] != train
    assert not {id(e) for e in train} & {id(e) for e in validation}


def test_a_draw_of_more_than_there_is_is_refused(tasks):
    with pytest.raises(ValueError, match="prose has .* examples, got 10000"):
        tasks["prose"].draw(10_000, 1, seed=0)


def test_packages_come_in_turn_and_end_in_their_names(tasks, tokenizer):
    train, _ = tasks["package"].draw(12, 0, seed=0)
    assert sorted(e.pair.summary for e in train) == sorted(PACKAGES * 2)
    for example in train:
        assert example.pair.path.startswith(f"{example.pair.summary}/")
        assert tokenizer.decode(example.prompt).endswith(PACKAGE_MARKER)
        assert tokenizer.decode(example.answer).startswith(f" {example.pair.summary}")


def test_prose_goes_on_where_its_opening_ends(tasks, tokenizer, halves):
    example = tasks["prose"].held_out[0]
    assert (len(example.prompt), len(example.answer)) == (OPENING_TOKENS, CONTINUATION_TOKENS)
    (module,) = (m for m in halves[1] if m.path == example.pair.path)
    assert tokenizer.decode(example.prompt).split("\n")[0] in module.text


class Says(nn.Module):
    """A model that is sure of a few tokens, whatever it reads."""

    def __init__(self, tokens, vocabulary):
        super().__init__()
        self.tokens, self.vocabulary = tokens, vocabulary

    def forward(self, input_ids, attention_mask, labels=None):
        logits = torch.zeros(*input_ids.shape, self.vocabulary)
        logits[..., list(self.tokens)] = 10.0
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            )
        return CausalLMOutput(loss=loss, logits=logits)


def test_accuracy_is_the_share_of_the_class_that_is_always_said(tasks, tokenizer):
    task = tasks["package"]
    model = Says(task.labels[1], len(tokenizer))
    examples, _ = task.draw(18, 0, seed=0)
    assert task.measure(model, tokenizer, examples)["score"] == pytest.approx(1 / len(PACKAGES))
    mine = [e for e in task.pool if e.answer == [*task.labels[1]]][:5]
    assert task.measure(model, tokenizer, mine)["score"] == 1


def test_the_score_of_prose_is_its_loss(tasks, tokenizer):
    task = tasks["prose"]
    found = task.measure(Says([0], len(tokenizer)), tokenizer, task.held_out[:4])
    assert found["score"] == found["loss"] > 0


def test_batches_keep_the_order(tasks, tokenizer):
    examples = tasks["package"].held_out[:20]
    batches = batches_of(examples, tokenizer)
    assert [len(batch["input_ids"]) for batch in batches] == [16, 4]
    assert batches[1]["input_ids"][0, : len(examples[16].prompt)].tolist() == examples[16].prompt
