"""PyTorch's own attention kernels with their log-sum-exp, forward and backward, by device.

These are the operators under `scaled_dot_product_attention`. Each takes `query [B, H, M, D]`,
`key` and `value [B, H_kv, K, D]` with `M, K >= 1`, an upper-left causal flag for `M == K`, and an
additive bias where it says so; `lse` is `[B, H, M]`, natural log. Backward returns the gradients of
query, key and value, given the output and `lse` that the probabilities are normalised by, which may
be those of a larger softmax that this call is a part of.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

ops = torch.ops.aten


class Kernels(ABC):
    """One device's attention kernels."""

    name: str
    takes_bias = False
    # The most folded queries one backward call may have: kernels that sum key gradients in the
    # input dtype lose a rounding per query block. None: no limit.
    queries_per_backward: int | None = None

    @abstractmethod
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Output and lse."""

    @abstractmethod
    def backward(
        self,
        dout: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor],
        results: tuple[Tensor, Tensor],
        bias: Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value from those inputs, and from output and lse."""


class CpuFlash(Kernels):
    """The CPU flash kernel: any float dtype, grouped heads, a bias in the query's dtype or float32.

    Its backward adds key gradients up in the input dtype, block by block.
    """

    name = "CPU flash attention"
    takes_bias = True
    queries_per_backward = 1024

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        return ops._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal, attn_mask=bias, scale=scale
        )

    def backward(
        self,
        dout: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor],
        results: tuple[Tensor, Tensor],
        bias: Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return ops._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, *inputs, *results, 0.0, is_causal, attn_mask=bias, scale=scale
        )


class CudaFlash(Kernels):
    """FlashAttention-2 as PyTorch ships it: half dtypes, grouped heads, no bias."""

    name = "CUDA flash attention"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = ops._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)
        return out, lse

    def backward(
        self,
        dout: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor],
        results: tuple[Tensor, Tensor],
        bias: Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, _ = inputs
        # The random state is not read at dropout 0, but the schema wants tensors.
        state = torch.empty(2, dtype=torch.uint64, device=q.device)
        return ops._scaled_dot_product_flash_attention_backward(
            dout,
            *inputs,
            *results,
            None,
            None,
            q.shape[2],
            k.shape[2],
            0.0,
            is_causal,
            state,
            state,
            scale=scale,
        )


class CudaEfficient(Kernels):
    """The memory-efficient kernel: float32 too, one query head per key head, no bias here."""

    name = "CUDA memory-efficient attention"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = ops._scaled_dot_product_efficient_attention(
            q, k, v, None, True, 0.0, is_causal, scale=scale
        )
        return out, lse[..., : q.shape[2]]

    def backward(
        self,
        dout: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor],
        results: tuple[Tensor, Tensor],
        bias: Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, lse = results
        # The kernel reads log-sum-exps in rows padded to 32 queries.
        lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)
        state = torch.empty((), dtype=torch.int64, device=out.device)
        dq, dk, dv, _ = ops._scaled_dot_product_efficient_attention_backward(
            dout,
            *inputs,
            None,
            out,
            lse,
            state,
            state,
            0.0,
            [True, True, True, False],
            is_causal,
            scale=scale,
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
