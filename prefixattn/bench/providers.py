"""What is timed: each way to attend to a prefix and a causal sequence, as one small function.

A provider takes a shape and its tensors, prepares what a model would have prepared before the call
(a mask, a cache), and returns what is timed: a callable that gives the output `[B, H, M, D]`. It
raises `Unsupported` with the reason where it cannot take the shape. `outside.py` has those of
other packages.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from prefixattn import prefix_attention
from prefixattn.aten import Call, find_kernels
from prefixattn.bench import outside
from prefixattn.bench.inputs import Tensors
from prefixattn.bench.shapes import Shape
from prefixattn.bench.support import Attention, Provider, Unsupported, need, no_softcap
from prefixattn.choose import NAMES, choose

NO_KERNEL = ("No viable backend", "No available kernel")


def ours(shape: Shape, t: Tensors, passes: str, implementation: str) -> Attention:
    """prefix_attention by one implementation: nothing is copied, nothing prepared."""
    try:
        choose(implementation)
    except NotImplementedError as error:
        raise Unsupported(str(error)) from None
    if implementation == "reference":
        _scores_fit(shape, t)
    if implementation == "triton" and t.query.device.type == "cpu":
        raise Unsupported("its kernels take tensors on a GPU; interpreted they have no speed")
    options: dict[str, Any] = t.leaves | {"is_causal": True, "implementation": implementation}
    if shape.softcap is not None:
        options["softcap"] = shape.softcap
    if shape.R > 1:
        options["prefix_index"] = t.index

    def run() -> Tensor:
        out = prefix_attention(**options)
        assert isinstance(out, Tensor)
        return out

    return run


def transformers(shape: Shape, t: Tensors, passes: str) -> Attention:
    """transformers' own attention functions over a cache that starts with the prefix, as in PEFT.

    A cache holds a copy of the prefix for each row, made once for a whole text; each layer's call
    appends its new tokens by concatenation. The first call of a text, where nothing is cached yet,
    makes the copies. A model makes its mask once for all layers, so that this is not timed.
    """
    need("transformers")
    if shape.softcap is not None:  # eager
        _scores_fit(shape, t)
    prefix_key, prefix_value = t.rows()
    held: tuple[Tensor, Tensor] | None = None
    if shape.C:
        with torch.no_grad():
            held = (
                torch.cat([prefix_key, t.key[:, :, : shape.C]], dim=2),
                torch.cat([prefix_value, t.value[:, :, : shape.C]], dim=2),
            )
    module = SimpleNamespace(num_key_value_groups=t.group, is_causal=True, training=False)
    call = partial(_attention_function(shape), module, scaling=shape.D**-0.5, softcap=shape.softcap)
    mask = _transformers_mask(shape, t)

    def run() -> Tensor:
        key, value = held or t.rows()
        key = torch.cat([key, t.key[:, :, shape.C :]], dim=2)
        value = torch.cat([value, t.value[:, :, shape.C :]], dim=2)
        out, _ = call(t.query, key, value, mask)  # [B, M, H, D]
        assert isinstance(out, Tensor)
        return out.transpose(1, 2)

    return run


def _attention_function(shape: Shape) -> Callable[..., Any]:
    """What the model calls under its default attention; only eager knows a softcap."""
    if shape.softcap is not None:
        from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

        return eager_attention_forward
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward


def _transformers_mask(shape: Shape, t: Tensors) -> Tensor | None:
    """As its mask functions make it: bool for SDPA and none for one query, additive for eager."""
    if shape.M == 1:
        return None
    seen = torch.ones(shape.M, shape.P + shape.N, dtype=torch.bool, device=t.query.device)
    seen = seen.tril(shape.P + shape.C)[None, None]
    if shape.softcap is None:
        return seen
    lowest = torch.finfo(t.query.dtype).min
    return torch.zeros(seen.shape, dtype=t.query.dtype, device=seen.device).masked_fill(
        ~seen, lowest
    )


def cat_sdpa(shape: Shape, t: Tensors, passes: str, backend: SDPBackend) -> Attention:
    """One concatenation a call, then one backend of torch's attention, aligned bottom right."""
    no_softcap(shape, "torch's scaled_dot_product_attention")
    if backend is SDPBackend.MATH:
        _scores_fit(shape, t)
    if backend is SDPBackend.CUDNN_ATTENTION and shape.M > 1:
        raise Unsupported("cuDNN's attention in torch is causal from the upper left only")
    bias = _lower_right(shape.M, shape.P + shape.N) if shape.M > 1 else None

    def run() -> Tensor:
        key, value = t.concatenated()
        try:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(
                    t.query, key, value, attn_mask=bias, enable_gqa=t.group > 1
                )
        except RuntimeError as error:
            if not str(error).startswith(NO_KERNEL):
                raise
            raise Unsupported("torch has no such kernel for these tensors on this device") from None

    return run


def _lower_right(queries: int, keys: int) -> Tensor:
    """Causality that torch's kernels know: the last query meets the last key."""
    from torch.nn.attention.bias import causal_lower_right  # it imports the compiler: a second

    return causal_lower_right(queries, keys)


def copied_sdpa(shape: Shape, t: Tensors, passes: str) -> Attention:
    """Torch's attention over copies that lie ready for each row: only their reading is timed."""
    no_softcap(shape, "torch's scaled_dot_product_attention")
    if passes != "fwd":
        raise Unsupported("copies made beforehand give the prefix no gradient")
    with torch.no_grad():
        key, value = t.concatenated()
    bias = _lower_right(shape.M, key.shape[2]) if shape.M > 1 else None
    return lambda: scaled_dot_product_attention(
        t.query, key, value, attn_mask=bias, enable_gqa=t.group > 1
    )


def cat_flex(shape: Shape, t: Tensors, passes: str) -> Attention:
    """One concatenation a call, then compiled flex_attention with a block mask."""
    if passes != "fwd" and t.query.device.type == "cpu":
        raise Unsupported("flex_attention has no backward on a CPU")
    from torch.nn.attention.flex_attention import create_block_mask

    past, cap = shape.P + shape.C, shape.softcap or 1.0
    mask = None
    if shape.M > 1:
        mask = create_block_mask(
            lambda b, h, query, key: key <= query + past,
            *(None, None, shape.M, past + shape.M),
            device=str(t.query.device),
        )

    def capped(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    compiled = _compiled_flex()

    def run() -> Tensor:
        key, value = t.concatenated()
        out = compiled(
            *(t.query, key, value),
            score_mod=capped if shape.softcap else None,
            block_mask=mask,
            enable_gqa=t.group > 1,
        )
        assert isinstance(out, Tensor)
        return out

    return run


@cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = 256  # one for each shape, none of them in the time
    return torch.compile(flex_attention, dynamic=False)


def merge(shape: Shape, t: Tensors, passes: str) -> Attention:
    """Two of torch's attention calls and a merge by their log-sum-exps, forward only.

    Where all rows share one prefix, they are one call's queries; the prefix is read once.
    """
    no_softcap(shape, "torch's scaled_dot_product_attention")
    if passes != "fwd":
        raise Unsupported("torch's attention kernels give their log-sum-exp no gradient")
    if shape.C and shape.M > 1:
        raise Unsupported("torch's attention kernels are causal from the upper left only")
    kernels = find_kernels(t.query, t.key, t.value)
    if kernels is None:
        raise Unsupported("torch has no attention kernel with a log-sum-exp for these tensors")
    scale, causal = shape.D**-0.5, shape.M > 1

    def run() -> Tensor:
        own, own_lse = kernels.forward(Call(t.query, t.key, t.value, None, causal, scale))
        if shape.R == 1:
            folded = t.query.transpose(0, 1).flatten(1, 2)[None]  # [1, H, B * M, D]
            call = Call(folded, t.prefix_key, t.prefix_value, None, False, scale)
            seen, seen_lse = kernels.forward(call)
            seen = seen[0].unflatten(1, (shape.B, shape.M)).transpose(0, 1)
            seen_lse = seen_lse[0].unflatten(1, (shape.B, shape.M)).transpose(0, 1)
        else:
            seen, seen_lse = kernels.forward(Call(t.query, *t.rows(), None, False, scale))
        share = torch.sigmoid(seen_lse - own_lse)[..., None].to(own.dtype)  # the prefix's part
        return torch.lerp(own, seen, share)

    return run


def no_prefix(shape: Shape, t: Tensors, passes: str) -> Attention:
    """The floor: the same attention with no prefix at all, by the best of torch."""
    if shape.softcap is not None:
        implementation = choose("auto")
        empty = {name: getattr(t, name)[:, :, :0] for name in ("prefix_key", "prefix_value")}
        options: dict[str, Any] = {"softcap": shape.softcap, "implementation": implementation}
        tensors = t.leaves | empty
        return lambda: prefix_attention(**tensors, is_causal=True, **options)  # type: ignore[return-value]
    square = shape.C == 0
    bias = None if square or shape.M == 1 else _lower_right(shape.M, shape.N)
    return lambda: scaled_dot_product_attention(
        *(t.query, t.key, t.value),
        attn_mask=bias,
        is_causal=square and shape.M > 1,
        enable_gqa=t.group > 1,
    )


def _scores_fit(shape: Shape, t: Tensors) -> None:
    """Refuse to materialise scores that would take a good part of the free memory."""
    from prefixattn.bench.machine import free_memory

    size = 4 * shape.B * shape.H * shape.M * (shape.P + shape.N)
    free = free_memory(t.query.device.type)
    if 6 * size > free:
        found = f"{size / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
        raise Unsupported(f"it materialises scores of {found}")


def copies_ready(name: str, shape: Shape) -> int:
    """Bytes of prefix copies that a provider holds for each row before its call."""
    if name == "copied+sdpa" or (name == "transformers" and shape.C):
        return 2 * shape.B * shape.H_kv * shape.P * shape.D * shape.torch_dtype.itemsize
    return 0


FLOOR = "no-prefix"
PROVIDERS: dict[str, Provider] = {
    **{f"ours-{name}": partial(ours, implementation=name) for name in NAMES},
    "transformers": transformers,
    "cat+math": partial(cat_sdpa, backend=SDPBackend.MATH),
    "cat+flash": partial(cat_sdpa, backend=SDPBackend.FLASH_ATTENTION),
    "cat+efficient": partial(cat_sdpa, backend=SDPBackend.EFFICIENT_ATTENTION),
    "cat+cudnn": partial(cat_sdpa, backend=SDPBackend.CUDNN_ATTENTION),
    "cat+flex": cat_flex,
    "copied+sdpa": copied_sdpa,
    "merge": merge,
    "flash-attn": outside.flash_attn,
    "FlashInfer": outside.flashinfer,
    "xformers": outside.xformers,
    FLOOR: no_prefix,
}
SLOW_TO_START = ("cat+flex",)  # it compiles for half a minute: by name only in suite "quick"
OURS = tuple(name for name in PROVIDERS if name.startswith("ours-"))
