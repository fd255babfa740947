"""Two threads that run one model at once, in the families where more than a keyword travels."""

import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from patience import PATIENCE
from torch import Tensor

from prefixattn import Prefix
from prefixattn.kept import Kept, forward

ROUNDS = 60


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads take turns a thousand times as often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


def together(*works: Callable[[], object]) -> list[str]:
    """What goes wrong while each runs in a thread of its own; they say so by raising."""
    wrong: list[str] = []

    def run(work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as failed:
            wrong.append(f"{type(failed).__name__}: {failed}")

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    return wrong


def forwards(model: Any, rows: list[Tensor], expected: list[Tensor]) -> list[str]:
    """What goes wrong while each thread runs a row of its own."""

    @torch.no_grad()
    def work(row: Tensor, wanted: Tensor) -> None:
        for _ in range(ROUNDS):
            error = float((model(row).logits - wanted).abs().max())
            assert error <= 1e-4 * float(wanted.abs().max()), f"off by {error}"

    return together(*[partial(work, *pair) for pair in zip(rows, expected, strict=True)])


@pytest.mark.parametrize("name", ["llama", "opt", "nemotron", "bloom", "gptj"])
def test_families(case: Callable[..., Any], attach: Any, hasty: None, name: str) -> None:
    given = case(name)
    attach(given.model, given.prefix())
    rows = [given.input_ids[:1], given.input_ids[1:, :-3]]
    assert forwards(given.model, rows, [given.logits[:1], given.logits[1:, :-3]]) == []


def test_a_table_that_counts_for_itself(attach: Any, hasty: None) -> None:
    config = transformers.BartConfig(
        vocab_size=90,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        decoder_attention_heads=4,
        encoder_attention_heads=4,
        max_position_embeddings=64,
        is_decoder=True,
        is_encoder_decoder=False,
    )
    model = transformers.BartForCausalLM(config).eval()
    attach(model, Prefix.random(model, 5))
    rows = [torch.randint(4, 90, (1, length)) for length in (9, 7)]
    with torch.no_grad():
        expected = [model(row).logits for row in rows]
    assert forwards(model, rows, expected) == []


def test_what_is_kept_for_a_text(hasty: None) -> None:
    """Each thread finds the numbers of its own tensors, though others begin texts meanwhile."""
    kept: Kept[int] = Kept()

    @torch.no_grad()
    def work(number: int) -> None:
        tensors = [torch.zeros(number)] * 6
        for _ in range(2000):
            for continues in (False, True, True, True):
                with forward(continues):
                    found = kept.of(tensors, lambda: number, options=number)
                assert found == number

    assert together(*[partial(work, number) for number in (1, 2, 3)]) == []


def test_what_was_kept_for_other_options_is_not_used() -> None:
    kept: Kept[str] = Kept()
    with torch.no_grad(), forward(continues=True):
        found = [kept.of([], lambda name=name: name, options=name) for name in "aab"]  # type: ignore[misc]
    assert found == ["a", "a", "b"]


def test_a_text_that_goes_on_in_another_thread_trusts_nothing_of_a_third() -> None:
    """A chat's turns, each in a thread of its own, and numbers changed in between."""
    kept: Kept[float] = Kept()
    numbers = torch.ones(1)
    found: list[float] = []

    @torch.no_grad()
    def turn() -> None:
        with forward(continues=True):
            found.append(kept.of([numbers], numbers.item))

    assert together(turn) == []
    numbers.data.fill_(2.0)  # which no tensor counts
    assert together(turn) == []
    assert found == [1.0, 2.0]
