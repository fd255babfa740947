"""The mask function: nothing where places say it all, a dense mask where they cannot."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import masking_utils as hf

from prefixattn.integrations.transformers import attention_mask

CONFIG = SimpleNamespace(sliding_window=4, attention_chunk_size=3)
WINDOW = {"mask_function": hf.sliding_window_causal_mask_function(4), "local_size": 4}


def mask(**changes: Any) -> torch.Tensor | None:
    arguments: dict[str, Any] = {"batch_size": 2, "q_length": 6, "kv_length": 6, "config": CONFIG}
    return attention_mask(**(arguments | changes))


def padding(*left: int, length: int = 6) -> torch.Tensor:
    return torch.arange(length) >= torch.tensor(left)[:, None]


@pytest.mark.parametrize("window", [{}, WINDOW], ids=["full", "window"])
def test_nothing_to_mask(window: dict[str, Any]) -> None:
    assert mask(**window) is None
    assert mask(**window, attention_mask=padding(0, 0)) is None
    assert mask(**window, q_length=1, allow_is_causal_skip=False) is None  # a static cache decodes


@pytest.mark.parametrize("window", [{}, WINDOW], ids=["full", "window"])
def test_padding_stays_two_dimensional(window: dict[str, Any]) -> None:
    rows = padding(0, 2)
    once = mask(**window, attention_mask=rows)
    assert once is not None
    assert torch.equal(once, rows)
    assert torch.equal(mask(**window, attention_mask=once), rows)


def test_a_static_cache_has_room_behind() -> None:
    rows = padding(0, 2)
    once = mask(kv_length=9, attention_mask=rows)
    assert once is not None
    assert torch.equal(once, torch.nn.functional.pad(rows, (0, 3)))
    assert torch.equal(mask(kv_length=9, attention_mask=once), once)


def test_a_sliding_cache_has_dropped_the_front() -> None:
    rows = padding(0, 5, length=10)
    sizes = {"q_length": 1, "kv_length": 4, "q_offset": 9, "kv_offset": 6}
    rows[1, 7] = False
    once = mask(**WINDOW, **sizes, attention_mask=rows)
    assert once is not None
    assert torch.equal(once, rows[:, 6:])
    assert torch.equal(mask(**WINDOW, **sizes, attention_mask=once), once)


def test_bidirectional() -> None:
    both = {"mask_function": hf.bidirectional_mask_function, "allow_is_causal_skip": False}
    assert mask(**both, allow_is_bidirectional_skip=True) is None
    assert torch.equal(mask(**both, attention_mask=padding(0, 2)), padding(0, 2))


DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1]] * 2)


def packed(inside: Any) -> Any:
    """A mask function that lets a query see its own document's keys, as ``inside`` says."""
    return hf.and_masks(inside, hf.packed_sequence_mask_function(DOCUMENTS))


@pytest.mark.parametrize(
    "special",
    [
        {
            "mask_function": packed(hf.causal_mask_function),
            "allow_is_causal_skip": False,
        },
        {
            "mask_function": packed(hf.sliding_window_causal_mask_function(4)),
            "allow_is_causal_skip": False,
            "local_size": 4,
        },
        {
            "mask_function": hf.or_masks(
                hf.causal_mask_function, lambda b, h, q, k: (q < 3) & (k < 3)
            ),
            "allow_is_causal_skip": False,
            "use_vmap": True,
        },
        {
            "mask_function": hf.sliding_window_bidirectional_mask_function(4),
            "local_size": 4,
            "allow_is_causal_skip": False,
            "allow_is_bidirectional_skip": True,
        },
    ],
    ids=["packed", "packed in windows", "image block", "two-sided window"],
)
def test_what_places_cannot_say(special: dict[str, Any]) -> None:
    for rows in (None, padding(0, 2)):
        got = mask(**special, attention_mask=rows)
        expected = hf.sdpa_mask(
            batch_size=2,
            q_length=6,
            kv_length=6,
            attention_mask=rows,
            **(special | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}),
        )
        assert got is not None
        assert got.dtype == torch.bool
        assert torch.equal(got, expected)
