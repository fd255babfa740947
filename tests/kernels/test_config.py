"""The tile table and the plans: pure functions, testable without a GPU or Triton."""

from __future__ import annotations

import pytest

from prefixattn.kernels import config

TARGETS = [name for name in config.CHIPS if name != "interpreter"]
DIRECTIONS = ("forward", "dq", "dkv", "decode", "decode16")


def power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("target", TARGETS)
def test_every_head_dim_has_tiles(target: str, direction: str, bits: int) -> None:
    for d, d_v in (
        (1, 1),
        (16, 16),
        (40, 40),
        (64, 64),
        (80, 96),
        (128, 64),
        (192, 128),
        (256, 256),
    ):
        shape = config.tiles(target, direction, d, d_v, group=4, tokens=16, bits=bits)
        for size in (shape.BLOCK_M, shape.BLOCK_N, shape.BLOCK_D, shape.BLOCK_DV, shape.WARPS):
            assert power_of_two(size)
        assert min(shape.BLOCK_M, shape.BLOCK_N, shape.BLOCK_D, shape.BLOCK_DV) >= 16
        assert d <= shape.BLOCK_D
        assert d_v <= shape.BLOCK_DV
        split = bits == 32 and target != "gfx942" and max(d, d_v) <= 128
        expected = "tf32x3" if split else "ieee"
        assert expected == shape.PRECISION


@pytest.mark.parametrize("direction", ["forward", "dq"])
def test_a_small_prefix_does_not_cost_a_tile(direction: str) -> None:
    def block(tokens: int) -> int:
        return config.tiles("sm90", direction, 128, 128, 4, tokens, 16).BLOCK_P

    assert [block(tokens) for tokens in (1, 16, 17, 32)] == [16, 16, 32, 32]
    assert [block(tokens) for tokens in (0, 33, 64, 8192)] == [0, 0, 0, 0]  # in the loop


def dkv_plan(rows: int, queries: int, tokens: int, keys: int) -> config.Plan:
    """The plan of an sm90 with 8 key heads, a group of 4 and one shared prefix."""
    shape = config.tiles("sm90", "dkv", 128, 128, 4, tokens, 16)
    return config.plan(
        "sm90",
        shape,
        bank_tiles=8 * -(-tokens // shape.BLOCK_N),
        bank_rows=rows,
        row_queries=queries,
        key_tiles=rows * 8 * -(-keys // shape.BLOCK_N),
        bits=16,
    )


def test_the_parts_of_a_shared_prefix_do_not_grow_with_rows() -> None:
    limit = 3 * config.CHIPS["sm90"].processors
    for tokens in (16, 128, 1024, 8192):
        programs = [dkv_plan(rows, 512, tokens, 512).prefix_programs for rows in (1, 8, 64, 512)]
        tiles = 8 * -(-tokens // 128)
        assert all(count <= max(limit, tiles) for count in programs)


def test_a_small_prefix_is_split_enough_to_fill_the_chip() -> None:
    plan = dkv_plan(rows=8, queries=2048, tokens=16, keys=2048)
    assert plan.prefix_splits >= 8
    assert plan.prefix_programs >= config.CHIPS["sm90"].processors
    assert plan.chunks * plan.chunk >= 2048
    assert plan.key_splits == 1


def test_few_keys_split_their_sum_over_heads() -> None:
    assert dkv_plan(rows=1, queries=512, tokens=16, keys=256).key_splits > 1


def test_every_query_is_in_a_chunk() -> None:
    for rows in (1, 3, 64):
        for queries in (1, 63, 64, 65, 1000, 8192):
            for tokens in (1, 128, 5000):
                plan = dkv_plan(rows, queries, tokens, queries)
                assert plan.chunks * plan.chunk >= queries
                assert 1 <= plan.prefix_splits <= plan.chunks * rows * 4


def decode_plan(rows: int, tokens: int, keys: int, packed: bool) -> config.DecodePlan:
    direction = "decode" if packed and rows * 4 > 16 else "decode16"
    shape = config.tiles("sm90", direction, 128, 128, 4, tokens, 16)
    packed_rows = rows if packed else 1
    return config.decode_plan("sm90", shape, rows * 8, 4, packed_rows, tokens, keys, 16)


def test_a_shared_prefix_is_read_once_for_all_rows() -> None:
    shared, own = (decode_plan(16, 8192, 1024, packed) for packed in (True, False))
    assert shared.prefix_programs == shared.prefix_splits * 8
    assert own.prefix_programs == own.prefix_splits * 8 * 16


def test_one_row_is_split_over_the_chip_and_many_rows_are_not() -> None:
    alone, many = decode_plan(1, 0, 8192, True), decode_plan(512, 0, 8192, True)
    assert alone.key_programs >= config.CHIPS["sm90"].processors
    assert many.key_splits == 1
    assert alone.prefix_programs == many.prefix_programs == 0


def test_no_split_is_too_short_to_pay() -> None:
    plan = decode_plan(1, 100, 300, True)
    assert (plan.prefix_splits, plan.key_splits) == (1, 2)
