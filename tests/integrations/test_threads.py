"""Two threads that run one model at once, in the families where more than a keyword travels."""

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from prefixattn import Prefix

ROUNDS = 60


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads take turns a thousand times as often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


def forwards(model: Any, rows: list[Tensor], expected: list[Tensor]) -> list[str]:
    """What goes wrong while each thread runs a row of its own."""
    wrong: list[str] = []

    def work(row: Tensor, wanted: Tensor) -> None:
        with torch.no_grad():
            for _ in range(ROUNDS):
                try:
                    error = float((model(row).logits - wanted).abs().max())
                except Exception as failed:
                    wrong.append(str(failed))
                else:
                    if error > 1e-4 * float(wanted.abs().max()):
                        wrong.append(f"off by {error}")

    pairs = zip(rows, expected, strict=True)
    threads = [threading.Thread(target=work, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong


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
