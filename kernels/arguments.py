"""From a `Problem` to what the kernels take, and the launch of one."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from prefixattn.kernels import config
from prefixattn.kernels.config import Tiles
from prefixattn.kernels.rows import Where
from prefixattn.kernels.scores import Bias, How, unit_of
from prefixattn.kernels.tile import INTERPRETED, Long, View
from prefixattn.problem import Problem


def view(tensor: Tensor | None) -> View | None:
    """A `[row, head, token, *]` tensor as the kernels take it."""
    return None if tensor is None else View(tensor, *tensor.stride()[:3])


def where(problem: Problem) -> Where:
    """Where the rows lie. The vectors are tiny: only a strided one is copied."""
    p = problem
    return Where(
        cu_seqlens_q=_contiguous(p.cu_seqlens_q),
        cu_seqlens_k=_contiguous(p.cu_seqlens_k),
        key_start=_contiguous(p.key_start),
        key_length=_contiguous(p.key_length),
        query_offsets=_contiguous(p.query_offsets),
        offset_stride=None if p.query_offsets is None else p.query_offsets.ndim,
        prefix_index=_contiguous(p.prefix_index),
        prefix_lengths=_contiguous(p.prefix_lengths),
        own_entry=1 if p.prefix_index is None and p.R > 1 else None,
    )


def how(problem: Problem) -> How:
    """How scores come about."""
    p = problem
    floats = p.attn_mask is not None and p.attn_mask.dtype != torch.bool
    added = floats or p.prefix_bias is not None or p.alibi_slopes is not None
    plain = p.softcap is None and p.sinks is None and not added
    dropped = p.dropout_seed is not None
    return How(
        scale=float(p.scale),
        unit=unit_of(float(p.scale), plain),
        causal=_flag(p.is_causal),
        window=p.window,
        prefix_window=_flag(p.windowed_prefix),
        softcap=None if p.softcap is None else float(p.softcap),
        alibi_slopes=_contiguous(p.alibi_slopes),
        attn_mask=_bias(p.attn_mask, (p.B, p.H, p.M, p.N)),
        prefix_bias=_bias(p.prefix_bias, (p.B, p.H, p.M, p.P)),
        dropout_seed=p.dropout_seed,
        dropout_threshold=round(p.dropout_p * 2**32) if dropped else None,
        dropout_scale=1 / (1 - p.dropout_p) if dropped else None,
    )


def lengths(problem: Problem) -> tuple[int, int, int, int, int, int | None]:
    """The numbers `rows, kv_heads, M, N, P, query_offset` of every kernel."""
    p = problem
    offset = p.query_offset
    if offset is None and p.query_offsets is None and not p.packed:
        offset = p.N - p.M
    return p.rows, p.H_kv, p.M, p.N, p.P, offset


def long(problem: Problem, shape: Tiles, width: int) -> Long | None:
    """Room for the sums `[B, H, M, width]` of problems with many slots; None: they have few."""
    p = problem
    stretch = config.stretch(shape, (p.max_seqlen_k or p.N) + p.P, 8 * p.query.element_size())
    if stretch is None:
        return None
    sums = torch.zeros(p.B, p.H, p.M, width, dtype=torch.float32, device=p.query.device)
    return Long(View(sums, *sums.stride()[:3]), stretch)


# Triton would compile a kernel anew for a length that is 1 or divisible by 16.
LENGTHS = ("rows", "kv_heads", "M", "N", "P", "query_offset")


def tiles_of(size: int, block: int, problem: Problem) -> int:
    """Tiles that the queries or keys of one batch row need; see `tile.segment_of` when packed."""
    return triton.cdiv(size, block) + (problem.rows if problem.packed else 0)


def tiles_for(problem: Problem, direction: str) -> Tiles:
    """The tiles of a problem on the chip it is on."""
    p = problem
    bits = 8 * p.query.element_size()
    return config.tiles(target(), direction, p.D, p.D_v, p.H // p.H_kv, p.P, bits)


def options(tiles: Tiles) -> dict[str, Any]:
    """The compiler's options of a launch."""
    found = {
        "num_warps": tiles.WARPS,
        "num_stages": tiles.STAGES,
        "enable_fp_fusion": True,  # its default is about to change
    }
    return found | {"maxnreg": tiles.REGISTERS} if tiles.REGISTERS else found


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which may be another one than the tensor's."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def target() -> str:
    """The kind of the current GPU: a name of `config.CHIPS`."""
    if INTERPRETED:
        return "interpreter"
    found = triton.runtime.driver.active.get_current_target()
    if found.backend != "cuda":
        return "gfx942"
    for generation in (100, 90, 80):
        if generation <= found.arch < generation + 6:
            return f"sm{generation}"
    return "sm86"


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _flag(on: bool) -> int | None:
    return 1 if on else None


def _bias(tensor: Tensor | None, sizes: tuple[int, int, int, int]) -> Bias | None:
    if tensor is None:
        return None
    data = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
    return Bias(data, *tensor.expand(sizes).stride())
