"""What the reference means, pinned by cases small enough to compute by hand.

With query = 0 every visible key has the same weight, so that an output is the mean of the visible
values and `lse` the log of their number. Values are powers of two: a mean names its members.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from prefixattn import prefix_attention

PREFIX = (1.0, 2.0)  # values of the two prefix tokens
TEXT = (4.0, 8.0, 16.0)  # values of the three sequence keys


def column(values: tuple[float, ...], rows: int = 1) -> Tensor:
    """Values as `[rows, 1, len, 1]`."""
    return torch.tensor(values, dtype=torch.float64).view(1, 1, -1, 1).expand(rows, -1, -1, -1)


def attend(queries: int, rows: int = 1, **options: Any) -> tuple[list[Any], list[Any]]:
    """Outputs and lse as lists `[rows][queries]`, all scores zero but for what `options` add."""
    prefix = options.pop("prefix", column(PREFIX))
    text = options.pop("text", column(TEXT, rows))
    zeros = torch.zeros_like
    query = torch.zeros(rows, 1, queries, 1, dtype=torch.float64)
    out, lse = prefix_attention(
        query,
        zeros(text),
        text,
        zeros(prefix),
        prefix,
        implementation="reference",
        return_lse=True,
        **options,
    )
    return out[:, 0, :, 0].tolist(), lse[:, 0].tolist()


def mean_of(*values: float) -> float:
    return sum(values) / len(values) if values else 0.0


def check(outputs: list[list[float]], *expected: tuple[float, ...]) -> None:
    """Each row's queries see exactly these values."""
    wanted = [mean_of(*seen) for seen in expected]
    assert [x for row in outputs for x in row] == pytest.approx(wanted)


def test_without_causality_everything_is_seen() -> None:
    out, lse = attend(1)
    check(out, (1, 2, 4, 8, 16))
    assert lse == [[pytest.approx(math.log(5))]]


def test_causal_is_bottom_right() -> None:
    out, _ = attend(2, is_causal=True)
    check(out, (1, 2, 4, 8), (1, 2, 4, 8, 16))


def test_more_queries_than_keys() -> None:
    out, _ = attend(4, is_causal=True)
    check(out, (1, 2), (1, 2, 4), (1, 2, 4, 8), (1, 2, 4, 8, 16))


def test_query_offset_places_the_queries() -> None:
    out, _ = attend(2, is_causal=True, query_offset=0)
    check(out, (1, 2, 4), (1, 2, 4, 8))
    out, _ = attend(1, rows=2, is_causal=True, query_offset=torch.tensor([0, -1]))
    check(out, (1, 2, 4), (1, 2))


def test_empty_prefix_and_empty_sequence() -> None:
    out, lse = attend(1, prefix=column(()))
    check(out, (4, 8, 16))
    out, lse = attend(1, text=column(()))
    check(out, (1, 2))
    assert lse == [[pytest.approx(math.log(2))]]


def test_a_row_that_sees_nothing_gives_zeros_and_minus_infinity() -> None:
    out, lse = attend(2, prefix=column(()), is_causal=True, query_offset=-1)
    assert out == [[0.0, 4.0]]
    assert lse == [[-math.inf, 0.0]]


def test_window_leaves_a_visible_prefix_alone() -> None:
    out, _ = attend(3, is_causal=True, window=2)
    check(out, (1, 2, 4), (1, 2, 4, 8), (1, 2, 8, 16))


def test_window_over_a_prefix_with_positions() -> None:
    """Prefix tokens sit at -2 and -1; a query at p sees positions above p - 3."""
    out, _ = attend(3, is_causal=True, window=3, prefix_in_window="positions")
    check(out, (1, 2, 4), (2, 4, 8), (4, 8, 16))


def test_positions_follow_left_padding_and_used_tokens() -> None:
    """With one pad and one used token, that token is at 0 and the text begins at 1."""
    out, _ = attend(
        3,
        is_causal=True,
        window=2,
        prefix_in_window="positions",
        key_start=torch.tensor([1]),
        prefix_lengths=torch.tensor([1]),
    )
    check(out, (1,), (1, 8), (8, 16))


def test_padding_on_both_sides() -> None:
    out, _ = attend(1, rows=2, key_start=torch.tensor([1, 0]), key_length=torch.tensor([3, 2]))
    check(out, (1, 2, 8, 16), (1, 2, 4, 8))


def test_slots_outside_padding_and_used_tokens_may_hold_anything() -> None:
    poisoned = column((4.0, math.nan, math.nan))
    prefix = column((1.0, math.nan))
    out, _ = attend(
        1,
        text=poisoned,
        prefix=prefix,
        key_length=torch.tensor([1]),
        prefix_lengths=torch.tensor([1]),
    )
    check(out, (1, 4))


def test_index_with_none_and_repeats_and_ragged_lengths() -> None:
    bank = torch.cat([column((1.0, 2.0)), column((32.0, 64.0))])
    out, _ = attend(
        1,
        rows=4,
        text=column((4.0,), rows=4),
        prefix=bank,
        prefix_index=torch.tensor([1, -1, 0, 1]),
        prefix_lengths=torch.tensor([2, 1]),
    )
    check(out, (32, 4), (4,), (1, 2, 4), (32, 4))


def test_one_prefix_for_each_row() -> None:
    bank = torch.cat([column((1.0, 2.0)), column((32.0, 64.0))])
    out, _ = attend(1, rows=2, text=column((4.0,), rows=2), prefix=bank)
    check(out, (1, 2, 4), (32, 64, 4))


def test_packed_segments_see_the_prefix_and_themselves() -> None:
    cu = torch.tensor([0, 1, 3], dtype=torch.int32)
    out, lse = attend(4, is_causal=True, cu_seqlens_q=cu, cu_seqlens_k=cu)
    check(out, (1, 2, 4), (1, 2, 8), (1, 2, 8, 16), ())
    assert lse[0][3] == -math.inf  # the query beyond the last segment


def test_packed_segments_have_positions_and_prefixes_of_their_own() -> None:
    bank = torch.cat([column((1.0, 2.0)), column((32.0, 64.0))])
    cu = torch.tensor([0, 1, 3], dtype=torch.int32)
    out, _ = attend(
        3,
        prefix=bank,
        prefix_index=torch.tensor([1, 0]),
        is_causal=True,
        window=2,
        prefix_in_window="positions",
        cu_seqlens_q=cu,
        cu_seqlens_k=cu,
    )
    check(out, (64, 4), (2, 8), (8, 16))


def test_sinks_enter_the_denominator_once() -> None:
    out, lse = attend(1, sinks=torch.tensor([math.log(5.0)], dtype=torch.float64))
    assert out == [[pytest.approx((1 + 2 + 4 + 8 + 16) / 10)]]
    assert lse == [[pytest.approx(math.log(10))]]


def test_a_row_that_sees_only_its_sink() -> None:
    sinks = torch.tensor([0.5], dtype=torch.float64)
    out, lse = attend(1, prefix=column(()), text=column(()), sinks=sinks)
    assert (out, lse) == ([[0.0]], [[0.5]])


def test_masks_concern_the_sequence_only() -> None:
    mask = torch.tensor([True, False, False])
    out, _ = attend(1, attn_mask=mask)
    check(out, (1, 2, 4))
    additive = torch.tensor([0.0, math.log(2.0), -math.inf], dtype=torch.float64)
    out, _ = attend(1, attn_mask=additive)
    assert out == [[pytest.approx((1 + 2 + 4 + 2 * 8) / 5)]]


def test_prefix_bias_concerns_the_prefix_only() -> None:
    bias = torch.tensor([math.log(3.0), -math.inf], dtype=torch.float64)
    out, _ = attend(1, prefix_bias=bias)
    assert out == [[pytest.approx((3 * 1 + 4 + 8 + 16) / 6)]]


def test_alibi_by_distance() -> None:
    """One query at 2, slope log 2: keys weigh 1/4, 1/2, 1; under positions the prefix 1/16, 1/8."""
    slopes = torch.tensor([math.log(2.0)], dtype=torch.float64)
    out, _ = attend(1, alibi_slopes=slopes)
    assert out == [[pytest.approx((1 + 2 + 4 / 4 + 8 / 2 + 16) / (2 + 1.75))]]
    out, _ = attend(1, alibi_slopes=slopes, prefix_in_window="positions")
    total = 1 / 16 + 1 / 8 + 1.75
    assert out == [[pytest.approx((1 / 16 + 2 / 8 + 4 / 4 + 8 / 2 + 16) / total)]]


def test_gate_adds_a_softmax_of_its_own() -> None:
    out, lse = attend(1, prefix_gate=torch.tensor([0.5], dtype=torch.float64))
    assert out == [[pytest.approx(mean_of(*TEXT) + 0.5 * mean_of(*PREFIX))]]
    assert lse == [[pytest.approx(math.log(3))]]


def test_scale_then_softcap() -> None:
    query = torch.full((1, 1, 1, 1), 3.0, dtype=torch.float64)
    key = torch.tensor([2.0, -1.0], dtype=torch.float64).view(1, 1, 2, 1)
    prefix_key = torch.tensor([4.0], dtype=torch.float64).view(1, 1, 1, 1)
    _, lse = prefix_attention(
        query,
        key,
        key,
        prefix_key,
        prefix_key,
        scale=0.5,
        softcap=2.0,
        return_lse=True,
        implementation="reference",
    )
    scores = [2 * math.tanh(0.5 * 3 * k / 2) for k in (2.0, -1.0, 4.0)]
    assert lse.item() == pytest.approx(math.log(sum(math.exp(score) for score in scores)))


def test_grouped_heads_share_key_heads_in_order() -> None:
    """Query heads 0 and 1 read key head 0, heads 2 and 3 read key head 1."""
    value = torch.tensor([4.0, 8.0], dtype=torch.float64).view(1, 2, 1, 1)
    empty = value[:, :, :0]
    query = torch.zeros(1, 4, 1, 1, dtype=torch.float64)
    out = prefix_attention(query, value, value, empty, empty, implementation="reference")
    assert out.flatten().tolist() == [4.0, 4.0, 8.0, 8.0]
