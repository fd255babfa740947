"""Providers of other packages; each is imported when it is asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from prefixattn.bench.inputs import Tensors
from prefixattn.bench.shapes import Shape
from prefixattn.bench.support import Attention, Unsupported, need_gpu, no_softcap


def flash_attn(shape: Shape, t: Tensors, passes: str) -> Attention:
    """One concatenation a call, then FlashAttention, whose causality is bottom right."""
    need_gpu(t, "flash_attn")
    from flash_attn import flash_attn_func  # type: ignore[import-not-found]

    def run() -> Tensor:
        key, value = t.concatenated()
        tensors = (x.transpose(1, 2) for x in (t.query, key, value))  # [B, S, H, D]
        out: Tensor = flash_attn_func(*tensors, causal=True, softcap=shape.softcap or 0.0)
        return out.transpose(1, 2)

    return run


def flashinfer(shape: Shape, t: Tensors, passes: str) -> Attention:
    """FlashInfer's way with a shared prefix: one call for it, one for the rows, `merge_state`."""
    need_gpu(t, "flashinfer")
    if passes != "fwd":
        raise Unsupported("flashinfer has no backward")
    if shape.R > 1:
        raise Unsupported("flashinfer's single prefill takes one prefix")
    import flashinfer as library  # type: ignore[import-not-found]

    device = t.query.device
    room = torch.empty(2**27, dtype=torch.uint8, device=device)
    rows = library.BatchPrefillWithRaggedKVCacheWrapper(room, "NHD")
    starts = torch.arange(shape.B + 1, dtype=torch.int32, device=device)
    rows.plan(
        *(starts * shape.M, starts * shape.N, shape.H, shape.H_kv, shape.D),
        causal=True,
        logits_soft_cap=shape.softcap,
        q_data_type=t.query.dtype,
    )
    # Tokens first, `[B * S, H, D]`: the layout of the query, key and value in memory.
    query, key, value = (
        x.detach().transpose(1, 2).flatten(0, 1) for x in (t.query, t.key, t.value)
    )
    prefix = [x.detach()[0].transpose(0, 1).contiguous() for x in (t.prefix_key, t.prefix_value)]

    def run() -> Tensor:
        own, own_lse = rows.run(query, key, value, return_lse=True)
        seen, seen_lse = library.single_prefill_with_kv_cache(
            query, *prefix, causal=False, logits_soft_cap=shape.softcap, return_lse=True
        )
        out, _ = library.merge_state(seen, seen_lse, own, own_lse)
        return out.unflatten(0, (shape.B, shape.M)).transpose(1, 2)

    return run


def xformers(shape: Shape, t: Tensors, passes: str) -> Attention:
    """One concatenation a call, then memory_efficient_attention over grouped heads."""
    need_gpu(t, "xformers")
    no_softcap(shape, "xformers")
    from xformers.ops import fmha, memory_efficient_attention  # type: ignore[import-not-found]

    mask = fmha.attn_bias.LowerTriangularFromBottomRightMask()

    def run() -> Tensor:
        key, value = (x.transpose(1, 2) for x in t.concatenated())  # [B, S, H_kv, D]
        query = t.query.transpose(1, 2)
        if t.group > 1:
            query = query.unflatten(2, (-1, t.group))
            key, value = (x[:, :, :, None].expand(-1, -1, -1, t.group, -1) for x in (key, value))
        out: Tensor = memory_efficient_attention(query, key, value, attn_bias=mask)
        return (out.flatten(2, 3) if t.group > 1 else out).transpose(1, 2)

    return run
