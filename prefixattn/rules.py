"""The rules that a problem's input keeps: one function for each, all run before any work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor

from prefixattn.operands import check_layout
from prefixattn.problem import FIELD_NAMES, Problem

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)


def check(problem: Problem) -> None:
    """Hold the problem to every rule that needs no tensor's values.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape, a device, a number or a combination is wrong.
    """
    for rule in RULES:
        rule(problem)


def check_values(problem: Problem) -> None:
    """Hold the values of the integer tensors to their ranges.

    On a CPU they are read and a ValueError names the argument. On an accelerator reading them
    would wait for the device, so the same conditions become device-side assertions.
    """
    p = problem
    bounds = (
        ("prefix_index", p.prefix_index, -1, p.R - 1),
        ("prefix_lengths", p.prefix_lengths, 0, p.P),
        ("key_start", p.key_start, 0, p.N),
        ("key_length", p.key_length, 0, p.N),
        ("cu_seqlens_q", p.cu_seqlens_q, 0, p.M),
        ("cu_seqlens_k", p.cu_seqlens_k, 0, p.N),
    )
    for name, tensor, low, high in bounds:
        if tensor is not None:
            inside = ((tensor >= low) & (tensor <= high)).all()
            _require(inside, name, f"values from {low} to {high}", tensor)
    for side, tensor, longest in (
        ("q", p.cu_seqlens_q, p.max_seqlen_q),
        ("k", p.cu_seqlens_k, p.max_seqlen_k),
    ):
        if tensor is None:
            continue
        rising = (tensor[1:] >= tensor[:-1]).all() & (tensor[0] == 0)
        _require(rising, f"cu_seqlens_{side}", "values that start at 0 and never fall", tensor)
        if longest is not None:
            fits = (tensor.diff() <= longest).all()
            expected = f"segments of at most max_seqlen_{side} = {longest}"
            _require(fits, f"cu_seqlens_{side}", expected, tensor)


def _require(condition: Tensor, name: str, expected: str, got: Tensor) -> None:
    if got.device.type != "cpu":
        torch._assert_async(condition, f"{name}: expected {expected}")
    elif not condition:
        raise ValueError(f"{name}: expected {expected}, got {got.tolist()}")


def _shape(name: str, tensor: Tensor, expected: str, *sizes: int | None) -> None:
    """Raise unless `tensor` has these sizes (None: any)."""
    fits = tensor.ndim == len(sizes) and all(
        want is None or got == want for got, want in zip(tensor.shape, sizes, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in sizes)
        raise ValueError(
            f"{name}: expected shape {expected} = [{wanted}], got {list(tensor.shape)}"
        )


def _broadcasts(name: str, tensor: Tensor, expected: str, sizes: Sequence[int]) -> None:
    fits = tensor.ndim <= len(sizes) and all(
        got == 1 or got == want  # `in` would not compare symbolic sizes
        for got, want in zip(reversed(tensor.shape), reversed(sizes), strict=False)
    )
    if not fits:
        raise ValueError(
            f"{name}: expected a shape that broadcasts to {expected} = {list(sizes)}, "
            f"got {list(tensor.shape)}"
        )


def _dtype(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in dtypes:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        got = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"{name}: expected a tensor of {wanted}, got {got}")


def _check_types(p: Problem) -> None:
    for field in fields(p):
        value = getattr(p, field.name)
        if field.type == "Tensor" and not isinstance(value, Tensor):
            raise TypeError(f"{field.name}: expected a tensor, got {type(value).__name__}")
        if field.type == "Tensor | None" and not (value is None or isinstance(value, Tensor)):
            raise TypeError(f"{field.name}: expected a tensor or None, got {type(value).__name__}")
        if isinstance(value, Tensor):
            check_layout(field.name.replace("offsets", "offset"), value)


def _check_devices(p: Problem) -> None:
    for name in FIELD_NAMES:
        value = getattr(p, name)
        if isinstance(value, Tensor) and value.device != p.query.device:
            raise ValueError(
                f"{name}: expected device {p.query.device} as query has, got {value.device}"
            )


def _check_dtypes(p: Problem) -> None:
    _dtype("query", p.query, DTYPES)
    for name in ("key", "value", "prefix_key", "prefix_value"):
        _dtype(name, getattr(p, name), (p.query.dtype,))
    for name in ("prefix_gate", "prefix_bias", "sinks", "alibi_slopes"):
        if (tensor := getattr(p, name)) is not None:
            _dtype(name, tensor, DTYPES)
    if p.attn_mask is not None:
        _dtype("attn_mask", p.attn_mask, (torch.bool, *DTYPES))
    integers = ("prefix_index", "prefix_lengths", "key_start", "key_length")
    for name in (*integers, "cu_seqlens_q", "cu_seqlens_k", "query_offsets"):
        if (tensor := getattr(p, name)) is not None:
            _dtype(name.replace("offsets", "offset"), tensor, INDEX_DTYPES)


def _check_shapes(p: Problem) -> None:
    _shape("query", p.query, "[B, H, M, D]", None, None, None, None)
    _shape("key", p.key, "[B, H_kv, N, D]", p.B, None, None, p.D)
    _shape("value", p.value, "[B, H_kv, N, D_v]", p.B, p.H_kv, p.N, None)
    _shape("prefix_key", p.prefix_key, "[R, H_kv, P, D]", None, p.H_kv, None, p.D)
    _shape("prefix_value", p.prefix_value, "[R, H_kv, P, D_v]", p.R, p.H_kv, p.P, p.D_v)
    if p.H_kv == 0 or p.H % p.H_kv or p.H == 0:
        raise ValueError(f"query: expected heads H in multiples of H_kv = {p.H_kv}, got H = {p.H}")
    if p.D == 0 or p.D_v == 0:
        raise ValueError(f"query, value: expected D and D_v of at least 1, got {p.D} and {p.D_v}")
    for name in ("query", "key", "value", "prefix_key", "prefix_value"):
        tensor = getattr(p, name)
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"{name}: expected a contiguous last dimension, got strides {tensor.stride()}"
            )


def _check_packing(p: Problem) -> None:
    cu = {"cu_seqlens_q": p.cu_seqlens_q, "cu_seqlens_k": p.cu_seqlens_k}
    if all(tensor is None for tensor in cu.values()):
        for name in ("max_seqlen_q", "max_seqlen_k"):
            if getattr(p, name) is not None:
                raise ValueError(
                    f"{name}: expected None without cu_seqlens, got {getattr(p, name)}"
                )
        return
    for name, tensor in cu.items():
        if tensor is None:
            raise ValueError(f"{name}: expected a tensor, as its partner is given, got None")
        _shape(name, tensor, "[segments + 1]", None)
        if tensor.shape[0] == 0:
            raise ValueError(f"{name}: expected at least one value, got none")
    if p.cu_seqlens_q.shape != p.cu_seqlens_k.shape:  # type: ignore[union-attr]
        raise ValueError(
            f"cu_seqlens_k: expected shape {list(p.cu_seqlens_q.shape)} as cu_seqlens_q has, "  # type: ignore[union-attr]
            f"got {list(p.cu_seqlens_k.shape)}"  # type: ignore[union-attr]
        )
    if p.B != 1:
        raise ValueError(f"query: expected B = 1 when packed by cu_seqlens, got B = {p.B}")
    for name in ("key_start", "key_length"):
        if getattr(p, name) is not None:
            raise ValueError(f"{name}: expected None when packed by cu_seqlens, got a tensor")


def _check_prefix(p: Problem) -> None:
    if p.prefix_index is not None:
        rows = "[segments]" if p.packed else "[B]"
        _shape("prefix_index", p.prefix_index, rows, p.rows)
    elif p.R not in (1, p.rows):
        raise ValueError(
            f"prefix_key: expected R = 1 (shared) or R = {p.rows} (one each) without "
            f"prefix_index, got R = {p.R}"
        )
    if p.prefix_lengths is not None:
        _shape("prefix_lengths", p.prefix_lengths, "[R]", p.R)
    if p.prefix_gate is not None:
        _shape("prefix_gate", p.prefix_gate, "[H]", p.H)
    if p.prefix_bias is not None:
        _broadcasts("prefix_bias", p.prefix_bias, "[B, H, M, P]", (p.B, p.H, p.M, p.P))
    if p.prefix_in_window not in ("visible", "positions"):
        raise ValueError(
            f"prefix_in_window: expected 'visible' or 'positions', got {p.prefix_in_window!r}"
        )


def _check_sequence(p: Problem) -> None:
    if p.attn_mask is not None:
        _broadcasts("attn_mask", p.attn_mask, "[B, H, M, N]", (p.B, p.H, p.M, p.N))
    for name in ("key_start", "key_length"):
        if (tensor := getattr(p, name)) is not None:
            _shape(name, tensor, "[B]", p.B)
    if p.query_offsets is not None and p.query_offsets.ndim != 0:
        rows = "[] or [segments]" if p.packed else "[] or [B]"
        _shape("query_offset", p.query_offsets, rows, p.rows)
    for name in ("sinks", "alibi_slopes"):
        if (tensor := getattr(p, name)) is not None:
            _shape(name, tensor, "[H]", p.H)


def _check_numbers(p: Problem) -> None:
    if not -math.inf < p.scale < math.inf:
        raise ValueError(f"scale: expected a finite number, got {p.scale}")
    if p.window is not None and p.window < 1:
        raise ValueError(f"window: expected None or an int of at least 1, got {p.window}")
    if p.softcap is not None and not (0 < p.softcap < math.inf):
        raise ValueError(f"softcap: expected None or a positive number, got {p.softcap}")
    if not 0 <= p.dropout_p < 1:
        raise ValueError(f"dropout_p: expected a number in [0, 1), got {p.dropout_p}")


def _check_gradients(p: Problem) -> None:
    if p.alibi_slopes is not None and p.alibi_slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "alibi_slopes: expected a tensor without gradient (no implementation has one), "
            "got requires_grad=True; pass alibi_slopes.detach()"
        )


RULES = (
    _check_types,
    _check_devices,
    _check_shapes,
    _check_dtypes,
    _check_packing,
    _check_prefix,
    _check_sequence,
    _check_numbers,
    _check_gradients,
)
