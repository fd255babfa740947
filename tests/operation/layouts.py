"""Tensors of given numbers in memory of every kind, NaN around them and in what nobody may read."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import oracle
from .problems import DTYPES, FIVE, Spec, build

SHARED = {"one row": 0, "one head": 1, "one token": 2}


def tensors(s: Spec) -> dict[str, Any]:
    """The arguments of `prefix_attention` for a spec, laid out and with NaN where it says so."""
    a = build(s)
    shares = {
        name: layout in SHARED or layout == "overlap"
        for name, layout in zip(FIVE, s.layouts, strict=True)
    }
    if s.nan != "nowhere":
        _spoil(s, a, shares)
    for name, layout in zip(FIVE, s.layouts, strict=True):
        a[name] = lay(a[name], layout)
    for name, layout in (("attn_mask", s.mask_layout), ("prefix_bias", s.bias_layout)):
        if a.get(name) is not None:
            a[name] = _lay_bias(a[name], layout, (s.B, s.H, s.M))
    if s.vectors == "steps":
        for name, x in a.items():
            if isinstance(x, Tensor) and x.ndim == 1:
                a[name] = x.repeat_interleave(2)[::2]
    return a


def upstream(s: Spec) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of output and lse, None where none comes through it."""
    dtype = DTYPES[s.dtype]
    generator = torch.Generator().manual_seed(s.seed % 2**63 + 1)
    found = []
    for name, size, of in (
        ("out", (s.B, s.H, s.M, s.D_v), dtype),
        ("lse", (s.B, s.H, s.M, 1), torch.promote_types(dtype, torch.float32)),
    ):
        x = torch.randn(size, generator=generator, dtype=torch.float64) * s.dout_size
        x = x.to(of)
        if s.dout == "one number":
            x = x.flatten()[:1].sum().expand(size)
        elif s.dout == "overlap" and name == "lse":
            x = lay(x, "one head")
        else:
            x = lay(x, s.dout)
        found.append(x if s.through in (name, "both") else None)
    dout, dlse = found
    return dout, None if dlse is None else dlse[..., 0]


def lay(x: Tensor, layout: str) -> Tensor:
    """`x [a, b, c, d]` so laid out; where numbers are shared, `x` with fewer numbers."""
    a, b, c, d = x.shape
    if x.numel() == 0 or layout == "whole":
        return x
    if layout in SHARED:
        return x.narrow(SHARED[layout], 0, 1).clone().expand(x.shape)
    if layout == "overlap":  # neighbours in one line of numbers, as a sliding window
        return x.flatten()[-(c + d - 1) :].clone().as_strided(x.shape, (0, 0, 1, 1))
    if layout == "negative":
        return torch._neg_view(-x)
    if layout == "odd last stride":  # which says nothing where the dimension has one number
        return x.clone().as_strided(x.shape, (*x.stride()[:3], 7)) if d == 1 else x
    room = {
        "bshd": lambda: x.new_full((a, c, b, d), torch.nan).transpose(1, 2),
        "padded": lambda: x.new_full((a, b, c, d + 3), torch.nan)[..., 1 : d + 1],
        "steps": lambda: x.new_full((a, b, 2 * c, d), torch.nan)[:, :, ::2],
        "fused": lambda: x.new_full((a, c, 3 * b, d), torch.nan)[:, :, b : 2 * b].transpose(1, 2),
    }[layout]()
    return room.copy_(x)


def _lay_bias(x: Tensor, layout: str, sizes: tuple[int, ...]) -> Tensor:
    if x.numel() == 0 or layout == "whole":
        return x
    if layout == "expanded":
        whole = torch.broadcast_shapes(x.shape, (*sizes, x.shape[-1]))
        return x.expand(whole)
    if layout == "transposed" and x.ndim > 1:
        return x.mT.contiguous().mT
    fill = {"fill_value": True if x.dtype == torch.bool else torch.nan, "dtype": x.dtype}
    if layout == "padded":
        return torch.full((*x.shape[:-1], x.shape[-1] + 3), **fill)[..., 1:-2].copy_(x)
    return torch.full((*x.shape[:-1], x.shape[-1] * 2), **fill)[..., ::2].copy_(x)


def _spoil(s: Spec, a: dict[str, Any], shares: dict[str, bool]) -> None:
    """NaN in every slot that nobody may read: see `Spec.nan`."""
    used = {"prefix": torch.zeros(s.B, s.H, s.M, s.P), "sequence": torch.zeros(s.B, s.H, s.M, s.N)}
    entries = {"used": torch.zeros(s.R, s.P), "seen": torch.zeros(s.R, s.P)}
    slots = {"used": torch.zeros(s.B, s.N), "seen": torch.zeros(s.B, s.N)}
    arguments, last = arrays(a), 0
    mask = a.get("attn_mask")
    visible = torch.ones(s.B, s.N)
    if mask is not None and mask.dtype == torch.bool:
        visible = mask.expand(s.B, s.H, s.M, s.N).float().sum((1, 2))
    for row in oracle.rows_of(arguments):
        begin, last = row.keys.start, row.queries.stop
        keys = slice(begin + row.start, begin + max(row.start, row.stop))
        used["prefix"][row.batch, :, row.queries, : row.tokens] = 1
        used["sequence"][row.batch, :, row.queries, keys] = 1
        for query in range(row.queries.stop - row.queries.start):
            tokens, found = oracle.seen(arguments, row, query)
            slots["used"][row.batch, keys] = 1
            slots["seen"][
                row.batch, begin + found.start : begin + max(found) + 1 if found else 0
            ] = 1
            if row.tokens:
                entries["used"][row.entry, : row.tokens] = 1
                entries["seen"][row.entry, tokens.start : tokens.stop] = 1
    for name, where in (("attn_mask", "sequence"), ("prefix_bias", "prefix")):
        bias = a.get(name)
        if bias is not None and bias.dtype != torch.bool:
            shape = (1,) * (4 - bias.ndim) + tuple(bias.shape)
            bias[(used[where].sum_to_size(shape) == 0).reshape(bias.shape)] = torch.nan
    if not shares["query"] and s.segments is not None:
        a["query"][:, :, last:] = torch.nan
    slots["seen"] *= visible
    for name in FIVE[1:]:
        if not shares[name]:
            level = "seen" if s.nan == "hidden" and name.endswith("key") else "used"
            kept = (entries if name.startswith("prefix") else slots)[level]
            a[name].masked_fill_(kept[:, None, :, None] == 0, torch.nan)


def arrays(a: dict[str, Any]) -> dict[str, Any]:
    """Arguments as the oracle takes them: numpy arrays in place of tensors."""
    return {name: _array(x) if isinstance(x, Tensor) else x for name, x in a.items()}


def _array(x: Tensor) -> np.ndarray:
    x = x.detach()
    return (x.double() if x.is_floating_point() else x).resolve_neg().numpy()
