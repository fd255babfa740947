"""Random attention problems: what one is like (a `Spec`, drawn from a seed), and its tensors.

A spec is plain numbers and words, so that a failure can be printed, repeated and made smaller by
giving single fields other values.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FIVE = ("query", "key", "value", "prefix_key", "prefix_value")
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# How one of the five tensors can lie in memory; the last four share numbers between elements.
LAYOUTS = ("whole", "bshd", "padded", "steps", "fused", "negative", "odd last stride",
           "one row", "one head", "one token", "overlap")  # fmt: skip


@dataclass
class Spec:
    """One problem in plain numbers. Sizes are those of `prefix_attention`; H = group * H_kv."""

    seed: int
    dtype: str = "float32"
    B: int = 1
    H_kv: int = 1
    group: int = 1
    M: int = 3
    N: int = 4
    P: int = 2
    R: int = 1
    D: int = 8
    D_v: int = 8
    causal: bool = False
    offset: int | list[int] | None = None
    offset_kind: str = "int"  # or "scalar tensor", "by row"
    index: list[int] | None = None
    lengths: list[int] | None = None
    starts: list[int] | None = None
    stops: list[int] | None = None
    segments: list[tuple[int, int]] | None = None
    index_dtype: str = "int64"
    scale: float | None = None
    softcap: float | None = None
    window: int | None = None
    positions: bool = False
    gate: str | None = None  # the dtype, as of the next ones
    sinks: str | None = None
    sinks_kind: str = "normal"
    alibi: str | None = None
    alibi_kind: str = "usual"
    mask: list[int] | None = None  # the shape
    mask_dtype: str = "bool"
    mask_kind: str = "some"
    mask_layout: str = "whole"
    bias: list[int] | None = None
    bias_dtype: str = "float32"
    bias_kind: str = "normal"
    bias_layout: str = "whole"
    values: str = "normal"
    layouts: tuple[str, ...] = ("whole",) * 5  # of query, key, value, prefix_key, prefix_value
    vectors: str = "whole"  # layout of all that is one-dimensional
    nan: str = "nowhere"  # "unused": in every slot that nobody may read; "hidden": keys unseen too
    through: str = "both"  # which results a gradient comes through
    dout: str = "whole"
    dout_size: float = 1.0
    frozen: tuple[str, ...] = ()
    deterministic: bool | None = None
    threads: int = 1

    def __str__(self) -> str:
        """What is not as by default."""
        plain = Spec(self.seed)
        changed = {n: v for n, v in vars(self).items() if n == "seed" or v != getattr(plain, n)}
        return "Spec(" + ", ".join(f"{name}={value!r}" for name, value in changed.items()) + ")"

    @property
    def H(self) -> int:
        return self.H_kv * self.group

    @property
    def rows(self) -> int:
        return self.B if self.segments is None else len(self.segments)


SMALL = (1, 2, 3, 5, 7, 11, 13)
EDGES = (15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 95, 96, 97, 101)
FAR = (2**31 - 2, 2**31, 2**31 + 1, 2**32 + 3, 2**40, 2**61, 2**62 - 1)


def draw(seed: int, most: int = 12_000) -> Spec:
    """The problem of a seed.

    Args:
        seed: any int.
        most: scores (rows, heads, queries, keys) it may have, about.
    """
    r = random.Random(seed)

    def chance(p: float) -> bool:
        return r.random() < p

    s = Spec(seed)
    s.dtype = r.choice(("float32", "float32", "bfloat16", "float16", "float64"))
    sizes = SMALL if chance(0.5) else SMALL + EDGES
    s.M, s.N, s.P = (0 if chance(0.04) else r.choice(sizes) for _ in range(3))
    s.M = 1 if chance(0.15) else s.M
    s.B, s.H_kv, s.group = r.choice((1, 1, 2, 3, 4)), r.choice((1, 1, 2, 3)), r.choice((1, 1, 2, 4))
    s.D = r.choice((1, 2, 5, 8, 16, 17, 31, 32, 40, 64, 72))
    s.D_v = s.D if chance(0.6) else r.choice((1, 3, 8, 16, 24, 33, 64))
    while most < s.B * s.H * s.M * (s.N + s.P):
        name = max("B H_kv group M N P".split(), key=lambda n: getattr(s, n))
        setattr(s, name, max(1, getattr(s, name) * 2 // 3))
    s.B = 0 if chance(0.01) else s.B
    if chance(0.25):
        _draw_segments(s, r)
    _draw_rows(s, r)
    _draw_numbers(s, r)
    _draw_biases(s, r)
    s.values = r.choice(("normal",) * 8 + VALUES)
    if chance(0.4):
        s.layouts = tuple(r.choice(LAYOUTS) for _ in FIVE)
    s.vectors = r.choice(("whole", "whole", "steps"))
    s.nan = r.choice(("nowhere", "unused", "unused", "hidden"))
    s.through = r.choice(("both", "both", "out", "lse"))
    s.dout = r.choice(("whole", "whole", "one number", "bshd", "padded", "negative", "overlap"))
    if chance(0.3):
        arguments = (*FIVE, "prefix_gate", "prefix_bias", "attn_mask", "sinks")
        s.frozen = tuple(r.sample(arguments, r.randint(1, 7)))
    s.deterministic = r.choice((None, None, True, False))
    s.threads = r.choice((1, 1, 2, 3))
    return s


def _draw_segments(s: Spec, r: random.Random) -> None:
    s.segments = [(0 if r.random() < 0.2 else r.randint(0, 9), r.randint(0, 9)) for _ in range(4)]
    s.segments = s.segments[: r.randint(1, 4)]
    if s.M > 13 or s.N > 13:
        s.segments[0] = (s.M, s.N)
    queries, keys = (sum(segment[side] for segment in s.segments) for side in (0, 1))
    s.B, s.M, s.N = 1, queries + r.choice((0, 0, 1, 3)), keys + r.choice((0, 0, 1, 3))


def _draw_rows(s: Spec, r: random.Random) -> None:
    """Which keys a row has, and where."""

    def many(low: int, high: int, count: int) -> list[int]:
        return [r.choice((low, high, r.randint(low, high))) for _ in range(count)]

    def place() -> int:
        if r.random() < 0.1:
            return r.choice((-1, 1)) * r.choice(FAR)
        return r.randint(-5, s.N + 5)

    if r.random() < 0.4:
        s.R = r.choice((1, 1, 2, 3, 5))
        s.R = 0 if r.random() < 0.03 else s.R
        s.index = many(-1, s.R - 1, s.rows)
    elif r.random() < 0.3:
        s.R = s.rows
    if r.random() < 0.4:
        s.lengths = many(0, s.P, s.R)
    if s.segments is None and r.random() < 0.3:
        s.starts = many(0, s.N, s.B)
    if s.segments is None and r.random() < 0.3:
        s.stops = many(0, s.N, s.B)
    s.causal = r.random() < 0.5
    if r.random() < 0.5:
        s.offset_kind = r.choice(("int", "scalar tensor", "by row"))
        s.offset = [place() for _ in range(s.rows)] if s.offset_kind == "by row" else place()
    s.index_dtype = r.choice(("int64", "int64", "int32"))
    widest = s.offset if isinstance(s.offset, list) else [s.offset or 0]
    if any(abs(number) >= 2**31 - 200 for number in widest):
        s.index_dtype = "int64"
    if r.random() < 0.3:
        s.window = r.choice((1, 2, 3, 7, 16, 31, r.randint(1, s.N + s.P + 3), r.choice(FAR)))
    s.positions = r.random() < 0.4


def _draw_numbers(s: Spec, r: random.Random) -> None:
    if r.random() < 0.25:
        s.scale = r.choice((0.0, -0.5, 0.7, 1.0, 1e-3, 30.0, 1e4, -1e4, 1e-30, 1e20, 1e-38))
    if r.random() < 0.2:
        s.softcap = r.choice((3.0, 50.0, 1e-2, 1e-8, 1e-30, 1e-40, 1e4, 1e10, 1e30, 1e38))
    if r.random() < 0.2:
        s.gate = r.choice(("float32", "bfloat16", "float64"))
    if r.random() < 0.25:
        s.sinks = r.choice(("float32", "float32", "bfloat16", "float64"))
        s.sinks_kind = r.choice(SINKS)
    if r.random() < 0.2:
        s.alibi = r.choice(("float32", "float32", "bfloat16", "float64"))
        s.alibi_kind = r.choice(("usual", "usual", "zero", "negative", "steep"))


def _draw_biases(s: Spec, r: random.Random) -> None:
    for name, keys in (("mask", s.N), ("bias", s.P)):
        if r.random() > (0.45 if name == "mask" else 0.2):
            continue
        shape = [size if r.random() < 0.6 else 1 for size in (s.B, s.H, s.M)]
        shape.append(keys if r.random() < 0.85 else 1)
        while len(shape) > 1 and shape[0] == 1 and r.random() < 0.3:
            shape = shape[1:]
        setattr(s, name, shape)
        floats = ("float32", "float32", s.dtype, "float64", "bfloat16")
        of = r.choice(("bool", "bool", *floats) if name == "mask" else floats)
        setattr(s, f"{name}_dtype", of)
        setattr(s, f"{name}_kind", r.choice(BOOLS if of == "bool" else FLOATS))
        layouts = ("whole", "whole", "transposed", "padded", "expanded", "steps")
        setattr(s, f"{name}_layout", r.choice(layouts))


Normal = Callable[..., Tensor]


def build(s: Spec) -> dict[str, Any]:
    """The arguments of `prefix_attention` for a spec; without the gradients' upstream."""
    generator = torch.Generator().manual_seed(s.seed % 2**63)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    dtype = DTYPES[s.dtype]
    numbers = {
        "query": normal(s.B, s.H, s.M, s.D),
        "key": normal(s.B, s.H_kv, s.N, s.D),
        "value": normal(s.B, s.H_kv, s.N, s.D_v),
        "prefix_key": normal(s.R, s.H_kv, s.P, s.D),
        "prefix_value": normal(s.R, s.H_kv, s.P, s.D_v),
    }
    _set_values(s, numbers, generator)
    a: dict[str, Any] = {name: x.to(dtype) for name, x in numbers.items()}
    a |= {"is_causal": s.causal, "scale": s.scale, "softcap": s.softcap, "window": s.window}
    a |= {"prefix_in_window": "positions" if s.positions else "visible"}
    a |= {"deterministic": s.deterministic}
    integers = {"prefix_index": s.index, "prefix_lengths": s.lengths}
    integers |= {"key_start": s.starts, "key_length": s.stops}
    if s.segments is not None:
        for side, name in enumerate(("cu_seqlens_q", "cu_seqlens_k")):
            bounds = [0]
            for segment in s.segments:
                bounds.append(bounds[-1] + segment[side])
            integers[name] = bounds
    if s.offset_kind != "int":
        integers["query_offset"] = s.offset  # type: ignore[assignment]
    else:
        a["query_offset"] = s.offset
    of_index = {"int64": torch.int64, "int32": torch.int32}[s.index_dtype]
    for name, found in integers.items():
        a[name] = None if found is None else torch.tensor(found, dtype=of_index)
    if s.gate:
        a["prefix_gate"] = normal(s.H).to(DTYPES[s.gate])
    if s.sinks:
        a["sinks"] = _sinks(s, normal(s.H)).to(DTYPES[s.sinks])
    if s.alibi:
        a["alibi_slopes"] = _slopes(s).to(DTYPES[s.alibi])
    for name, shape, of, kind in (
        ("attn_mask", s.mask, s.mask_dtype, s.mask_kind),
        ("prefix_bias", s.bias, s.bias_dtype, s.bias_kind),
    ):
        if shape is not None:
            a[name] = _bias(shape, of, kind, generator)
    return a


VALUES = ("outliers", "outliers everywhere", "large values", "large scores", "far scores", "ties",
          "tiny", "largest scores", "small queries")  # fmt: skip


def _set_values(s: Spec, x: dict[str, Tensor], generator: torch.Generator) -> None:
    """Numbers of the kind `s.values`, within what the dtype can hold."""
    half = s.dtype == "float16"
    most = float(torch.finfo(DTYPES[s.dtype]).max)
    keys = ("key", "prefix_key")
    if s.values.startswith("outliers"):
        size, lift = ((100.0, 3.0), (200.0, 5.0), (1880.0, 30.0))[s.seed % 3]
        x["query"][..., 0] += lift
        for name in keys:
            spread = torch.rand(x[name].shape[:-1], generator=generator) < 0.1
            x[name][..., 0] += size if s.values == "outliers everywhere" else spread * size
    elif s.values == "large values":
        for name in ("value", "prefix_value"):
            x[name].clamp_(-4, 4).mul_(most / 8)
        s.dout_size = 1e-3 if half else 4 / most
    elif s.values == "large scores":
        for name in (*keys, "query"):
            x[name] *= 8 if half else 100
    elif s.values == "far scores":
        x["query"] *= 16 if half else 1e4
        for name in keys:
            x[name] *= 16 if half else 1e4
    elif s.values == "largest scores":
        x["query"] *= 0.1
        for name in keys:
            x[name].clamp_(-4, 4).mul_(most / (8 * s.D))
    elif s.values == "ties":
        for name in x:
            x[name].round_()
    elif s.values == "tiny":
        for name in x:
            x[name] *= 1e-3 if half else 1e-15
    elif s.values == "small queries":
        x["query"] *= 1e-3
        for name in keys:
            x[name] *= 1e3


SINKS = ("normal", "normal", "blank", "some blank", "huge", "low", "lowest")


def _sinks(s: Spec, x: Tensor) -> Tensor:
    lowest = torch.finfo(DTYPES[s.sinks or "float32"]).min
    if s.sinks_kind == "some blank":
        x[::2] = -math.inf
    one = {"blank": -math.inf, "huge": 1e4, "low": -1e4, "lowest": lowest}.get(s.sinks_kind)
    return x if one is None else torch.full_like(x, one)


def _slopes(s: Spec) -> Tensor:
    usual = 2.0 ** -torch.arange(1, s.H + 1, dtype=torch.float64)
    return usual * {"usual": 1, "zero": 0, "negative": -1, "steep": 1e4}[s.alibi_kind]


BOOLS = ("some", "most", "rows", "none", "all")
FLOATS = ("normal", "normal", "some -inf", "rows -inf", "some min", "rows min", "some -1e9",
          "rows -1e9", "all mixed", "high", "wide", "padding")  # fmt: skip


def _bias(shape: list[int], dtype: str, kind: str, generator: torch.Generator) -> Tensor:
    chance = torch.rand(shape, generator=generator)
    by_row = torch.rand([*shape[:-1], 1], generator=generator) < 0.5
    if dtype == "bool":
        kept = {"some": chance > 0.4, "most": chance > 0.05, "none": chance > 2, "all": chance > -1}
        return kept["some"] & by_row if kind == "rows" else kept[kind]
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    lowest = torch.finfo(DTYPES[dtype]).min
    fills = {"-inf": -math.inf, "min": lowest, "-1e9": max(-1e9, lowest)}
    how, _, fill = kind.partition(" ")
    if fill in fills:
        x.masked_fill_((chance < 0.4) if how == "some" else by_row, fills[fill])
    elif kind == "all mixed":
        for limit, number in ((0.7, lowest), (0.4, max(-1e9, lowest)), (0.2, -math.inf)):
            x.masked_fill_(chance < limit, number)
    elif kind == "padding":  # as transformers makes it: a minimum, nothing else
        x.zero_().masked_fill_((chance < 0.4) | by_row, lowest)
    elif kind == "high":
        x += 1e4
    elif kind == "wide":
        x *= 1e3
    return x.to(DTYPES[dtype])
