"""Tiles in memory, and their product.

Any strides with a contiguous last dimension; offsets in 64 bits; whatever overruns is masked.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
INFINITY = tl.constexpr(float("inf"))


class View(NamedTuple):
    """A `[row, head, token, *]` tensor: pointer and strides. The last dimension is contiguous."""

    data: Any
    row: Any
    head: Any
    token: Any


class Long(NamedTuple):
    """Where rows are long: a float32 tensor, zeros at first, and the tiles of a stretch.

    A sum of millions of numbers in one accumulator loses what is smaller than its last place, as
    they all are in the end. So an accumulator sums one stretch, and the stretches' sums are added
    in memory, which takes no register of the loop.
    """

    sums: Any
    stretch: Any


class Source(NamedTuple):
    """One head's keys and values in a row or bank entry: tensors, offsets, strides of slots.

    Pointers are not added up here: Triton 3.6 for AMD selects between sums of them wrongly.
    """

    key: Any
    key_start: Any
    key_stride: Any
    value: Any
    value_start: Any
    value_stride: Any


@triton.jit
def wide(x):
    """In 64 bits: offsets pass 2^31."""
    return tl.cast(x, tl.int64)


@triton.jit
def offset(view, batch, head, token):
    """Where a token's numbers lie in its tensor."""
    return wide(batch) * view.row + wide(head) * view.head + wide(token) * view.token


@triton.jit
def place(view, batch, head, token):
    """Pointer to a token's numbers."""
    return view.data + offset(view, batch, head, token)


@triton.jit
def number_of(batch, head, query, M, heads):
    """Where a query's number lies in a contiguous `[B, H, M]`."""
    return (wide(batch) * heads + head) * M + query


@triton.jit
def tile_pointers(start, stride, BLOCK: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Pointers `[BLOCK, BLOCK_WIDTH]` of `BLOCK` tokens from `start` on.

    Within a tile offsets have 32 bits, which saves registers: `choose` refuses longer strides.
    """
    token = tl.arange(0, BLOCK)[:, None]
    return start + token * stride + tl.arange(0, BLOCK_WIDTH)[None, :]


@triton.jit
def inner(inside, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """The mask `inside [BLOCK, 1]`, and the padding of the last dimension where there is any."""
    if WIDTH != BLOCK_WIDTH:
        inside = inside & (tl.arange(0, BLOCK_WIDTH)[None, :] < WIDTH)
    return inside


@triton.jit
def load_tile(
    start,
    stride,
    first,
    low,
    high,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
):
    """`[BLOCK, BLOCK_WIDTH]`: tokens from number `first` on, zeros but for `low <= token < high`.

    Unmasked, all of them are known to be inside.
    """
    pointers = tile_pointers(start, stride, BLOCK, BLOCK_WIDTH)
    if MASKED:
        token = first + tl.arange(0, BLOCK)[:, None]
        inside = inner((token >= low) & (token < high), WIDTH, BLOCK_WIDTH)
        tile = tl.load(pointers, mask=inside, other=0)
    elif WIDTH != BLOCK_WIDTH:
        inside = tl.arange(0, BLOCK_WIDTH)[None, :] < WIDTH
        tile = tl.load(pointers, mask=inside, other=0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_tile(
    tile,
    start,
    stride,
    first,
    high,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Write tokens from number `first` on, those below `high`, in the destination's dtype."""
    token = first + tl.arange(0, BLOCK)[:, None]
    pointers = tile_pointers(start, stride, BLOCK, BLOCK_WIDTH)
    inside = inner(token < high, WIDTH, BLOCK_WIDTH)
    tl.store(pointers, tile.to(start.dtype.element_ty), mask=inside)


@triton.jit
def add_tile(
    tile,
    start,
    stride,
    first,
    high,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Add to tokens from number `first` on, those below `high`, in float32.

    No other program adds to them. Atomic all the same: the tile in memory then takes no registers.
    """
    token = first + tl.arange(0, BLOCK)[:, None]
    pointers = tile_pointers(start, stride, BLOCK, BLOCK_WIDTH)
    tl.atomic_add(pointers, tile, mask=inner(token < high, WIDTH, BLOCK_WIDTH), sem="relaxed")


@triton.jit
def source(key, value, number, kv_head, first):
    """The `Source` of a batch row or bank entry, from a slot on."""
    return Source(
        key.data,
        offset(key, number, kv_head, first),
        key.token,
        value.data,
        offset(value, number, kv_head, first),
        value.token,
    )


@triton.jit
def load_slots(
    prefix,
    sequence,
    in_prefix,
    first,
    low,
    high,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    shape: tl.constexpr,
):
    """Keys `[BLOCK, BLOCK_D]` and values `[BLOCK, BLOCK_DV]` of the slots from number `first` on.

    Only pointers tell the two sources apart, so that the loads of a loop over both are pipelined.
    Zeros but for `low <= slot < high`: what lies elsewhere, NaN even, would reach sums as 0 * NaN.
    """
    stride = tl.where(in_prefix, prefix.key_stride, sequence.key_stride)
    start = tl.where(in_prefix, prefix.key_start, sequence.key_start) + wide(first) * stride
    start = tl.where(in_prefix, prefix.key, sequence.key) + start
    k = load_tile(start, stride, first, low, high, BLOCK, shape.D, shape.BLOCK_D, MASKED)
    stride = tl.where(in_prefix, prefix.value_stride, sequence.value_stride)
    start = tl.where(in_prefix, prefix.value_start, sequence.value_start) + wide(first) * stride
    start = tl.where(in_prefix, prefix.value, sequence.value) + start
    v = load_tile(start, stride, first, low, high, BLOCK, shape.D_V, shape.BLOCK_DV, MASKED)
    return k, v


@triton.jit
def dot(a, b, c, shape: tl.constexpr):
    """`a @ b + c` in float32; the interpreter would multiply bfloat16's bit patterns."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, c, input_precision=shape.PRECISION)
