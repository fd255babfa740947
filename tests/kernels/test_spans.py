"""The tiles that are walked and the mask of an element agree, on some hundred random rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from prefixattn.kernels import config
from prefixattn.kernels.rows import Row, key_span, query_span, reach, used_slots, visible
from prefixattn.kernels.scores import How

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="Triton is not interpreted here"),
]
ROWS, BLOCK, SLOTS = 80, 16, 64
FIELDS = ("start", "stop", "offset", "tokens", "queries", "first", "in_prefix")


@triton.jit
def _ask(numbers, spans, seen, how, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """One row: the spans of a tile of queries and of a tile of slots, and the mask of all."""
    place = numbers + tl.program_id(0) * 7
    start, stop, offset = tl.load(place), tl.load(place + 1), tl.load(place + 2)
    tokens, queries, first = tl.load(place + 3), tl.load(place + 4), tl.load(place + 5)
    in_prefix = tl.load(place + 6) == 1
    offset, oldest, beyond = reach(offset, how)
    at = Row(0, 0, 0, queries, 0, start, stop, offset, oldest, beyond, tokens, 0, tokens)
    last = tl.minimum(first + BLOCK, queries) - 1
    keys = key_span(first, last, in_prefix, at, how, BLOCK)
    low, high = used_slots(in_prefix, at)
    first_slot, last_slot = tl.maximum(first, low), tl.minimum(first + BLOCK, high) - 1
    end = tl.where(first_slot <= last_slot, queries, 0)
    mine = query_span(first_slot, last_slot, 0, end, in_prefix, at, how, BLOCK)
    answer = spans + tl.program_id(0) * 8
    tl.store(answer, keys.first)
    tl.store(answer + 1, keys.full)
    tl.store(answer + 2, keys.rest)
    tl.store(answer + 3, keys.stop)
    tl.store(answer + 4, mine.first)
    tl.store(answer + 5, mine.full)
    tl.store(answer + 6, mine.rest)
    tl.store(answer + 7, mine.stop)
    query, slot = tl.arange(0, SLOTS)[:, None], tl.arange(0, SLOTS)[None, :]
    mask = visible(query, slot, in_prefix, at, how) & (query < queries)
    matrix = seen + tl.program_id(0) * SLOTS * SLOTS
    tl.store(matrix + query * SLOTS + slot, mask.to(tl.int8))


def check(span: list[int], whole: torch.Tensor, some: torch.Tensor) -> None:
    """`whole`, `some` `[tiles]`: whether a tile is seen wholly, and at all."""
    first, full, rest, stop = span
    assert first <= full <= rest <= stop
    for tile in range(len(some)):
        inside = first <= tile < stop
        assert inside or not some[tile], f"tile {tile} is seen and skipped: {span}"
        assert not (full <= tile < rest) or whole[tile], f"tile {tile} needs a mask: {span}"
    if some.any():
        edge = sum(1 for tile in range(first, stop) if not full <= tile < rest and whole[tile])
        assert edge <= 2, f"whole tiles pay for a mask: {span}"


@pytest.mark.parametrize("window", [None, 1, 9, 40])
@pytest.mark.parametrize("prefix_window", [None, 1], ids=["visible", "positions"])
@pytest.mark.parametrize("causal", [None, 1], ids=["bidirectional", "causal"])
def test_spans_agree_with_the_mask(
    causal: int | None, prefix_window: int | None, window: int | None
) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, (ROWS,), generator=generator)

    queries = draw(1, SLOTS + 1)
    drawn: dict[str, torch.Tensor] = {
        "start": draw(0, SLOTS // 2),
        "stop": draw(0, SLOTS + 1),
        "offset": draw(-20, 40),
        "tokens": draw(0, SLOTS + 1),
        "queries": queries,
        "first": draw(0, SLOTS // BLOCK) * BLOCK % ((queries + BLOCK - 1) // BLOCK * BLOCK),
        "in_prefix": draw(0, 2),
    }
    numbers = torch.stack([drawn[field] for field in FIELDS], 1).int()
    how: Any = How(*[None] * len(How._fields))._replace(
        causal=causal, window=window, prefix_window=prefix_window
    )
    spans = torch.full((ROWS, 8), -1, dtype=torch.int32)
    seen = torch.full((ROWS, SLOTS, SLOTS), -1, dtype=torch.int8)
    _ask[(ROWS,)](numbers, spans, seen, how, SLOTS=SLOTS, BLOCK=BLOCK)
    for row in range(ROWS):
        mask, first = seen[row].bool(), int(drawn["first"][row])
        used = (0, int(drawn["tokens"][row]))
        if not drawn["in_prefix"][row]:
            used = (int(drawn["start"][row]), int(drawn["stop"][row]))
        mine = mask[first : min(first + BLOCK, int(queries[row]))]  # a tile of queries
        tiles = mine.unflatten(1, (-1, BLOCK))
        check(spans[row, :4].tolist(), tiles.all(2).all(0), tiles.any(2).any(0))
        mine = mask[:, max(first, used[0]) : max(min(first + BLOCK, used[1]), 0)]  # of slots
        tiles = mine.unflatten(0, (-1, BLOCK))
        check(spans[row, 4:].tolist(), tiles.all(2).all(1), tiles.any(2).any(1))


def test_a_block_of_the_interpreter_is_that_of_the_table() -> None:
    assert config.INTERPRETED[:2] == (BLOCK, BLOCK)
