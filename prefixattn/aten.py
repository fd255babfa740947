"""PyTorch's own attention kernels with their log-sum-exp, forward and backward, by device.

These are the operators under `scaled_dot_product_attention`. Backward takes the output and the
log-sum-exp that the probabilities are normalised by, which may be those of a larger softmax that
this call is a part of.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

ops = torch.ops.aten


@dataclass(frozen=True)
class Call:
    """What a kernel is called with.

    `query [B, H, M, D]`, `key` and `value [B, H_kv, K, D]` with `M, K >= 1`; an additive `bias`
    that broadcasts to `[B, H, M, K]`, for kernels that take one; `is_causal` is upper left, for
    `M == K`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    is_causal: bool
    scale: float


class Kernels(ABC):
    """One device's attention kernels."""

    name: str
    takes_bias = False
    deterministic = False  # whether the backward gives the same bits each run
    # The most folded queries one backward call may have: kernels that sum key gradients in the
    # input dtype lose a rounding per query block. None: no limit.
    queries_per_backward: int | None = None

    @abstractmethod
    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        """`out [B, H, M, D]` and `lse [B, H, M]`, natural log."""

    @abstractmethod
    def backward(
        self, call: Call, dout: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value."""


class CpuFlash(Kernels):
    """The CPU flash kernel: any float dtype, grouped heads, a bias in the query's dtype or float32.

    Its backward adds key gradients up in the input dtype, block by block.
    """

    name = "CPU flash attention"
    takes_bias = True
    deterministic = True
    queries_per_backward = 1024

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        return ops._scaled_dot_product_flash_attention_for_cpu(
            call.query,
            call.key,
            call.value,
            0.0,
            call.is_causal,
            attn_mask=call.bias,
            scale=call.scale,
        )

    def backward(
        self, call: Call, dout: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return ops._scaled_dot_product_flash_attention_for_cpu_backward(
            dout,
            call.query,
            call.key,
            call.value,
            out,
            lse,
            0.0,
            call.is_causal,
            attn_mask=call.bias,
            scale=call.scale,
        )


class CudaFlash(Kernels):
    """FlashAttention-2 as PyTorch ships it: half dtypes, grouped heads, no bias."""

    name = "CUDA flash attention"

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        out, lse, *_ = ops._scaled_dot_product_flash_attention(
            call.query, call.key, call.value, 0.0, call.is_causal, scale=call.scale
        )
        return out, lse

    def backward(
        self, call: Call, dout: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        # The random state is not read at dropout 0, but the schema wants tensors.
        state = torch.empty(2, dtype=torch.uint64, device=dout.device)
        return ops._scaled_dot_product_flash_attention_backward(
            dout,
            call.query,
            call.key,
            call.value,
            out,
            lse,
            None,
            None,
            call.query.shape[2],
            call.key.shape[2],
            0.0,
            call.is_causal,
            state,
            state,
            scale=call.scale,
        )


class CudaEfficient(Kernels):
    """The memory-efficient kernel: float32 too, one query head per key head, no bias here."""

    name = "CUDA memory-efficient attention"

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        out, lse, *_ = ops._scaled_dot_product_efficient_attention(
            call.query, call.key, call.value, None, True, 0.0, call.is_causal, scale=call.scale
        )
        return out, lse[..., : call.query.shape[2]]

    def backward(
        self, call: Call, dout: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        # The kernel reads log-sum-exps in rows padded to 32 queries.
        lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)
        state = torch.empty((), dtype=torch.int64, device=out.device)
        dq, dk, dv, _ = ops._scaled_dot_product_efficient_attention_backward(
            dout,
            call.query,
            call.key,
            call.value,
            None,
            out,
            lse,
            state,
            state,
            0.0,
            [True, True, True, False],
            call.is_causal,
            scale=call.scale,
        )
        return dq, dk, dv


def find_kernels(query: Tensor, key: Tensor, value: Tensor) -> Kernels | None:
    """The kernels for tensors like these, or None where PyTorch has none with a log-sum-exp.

    Args:
        query: `[B, H, M, D]`.
        key: `[B, H_kv, N, D]`.
        value: `[B, H_kv, N, D_v]`.
    """
    width = query.shape[-1]
    if width != value.shape[-1]:
        return None
    if query.device.type == "cpu":
        return CpuFlash()
    if query.device.type != "cuda" or width % 8:
        return None
    # PyTorch's own predicates know the chip, the build and what the user switched off.
    grouped = query.shape[1] != key.shape[1]
    params = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, False, grouped)
    if torch.backends.cuda.can_use_flash_attention(params):
        return CudaFlash()
    if not grouped and torch.backends.cuda.can_use_efficient_attention(params):
        return CudaEfficient()
    return None
