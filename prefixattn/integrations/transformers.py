"""The attention and mask functions that transformers models call, under one name."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)

from prefixattn.api import prefix_attention
from prefixattn.integrations.carrier import KEYWORD, SLOT, Carrier

NAME = "prefixattn"

# Keywords that change which keys a query sees, which this function does not implement.
_REFUSED = {
    "indices": "sparse attention",
    "block_indices": "sparse attention",
    "position_bias": "a relative position bias",
    "output_attentions": "returning attention weights",
}


def register() -> None:
    """Make ``"prefixattn"`` an attention implementation of transformers. Idempotent."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: ``query [B, H, M, D]`` in, ``[B, M, H, D_v]`` out.

    A module with a slot attends to its prefix too; any other has an empty one.
    """
    _refuse(module, kwargs)
    carrier: Carrier | None = kwargs.get(KEYWORD)
    slot: int | None = getattr(module, SLOT, None)
    if slot is None:
        window = kwargs.get("sliding_window")
    elif carrier is None:
        raise RuntimeError(
            f"{type(module).__name__} has a prefix, but the forward that reached it did not bring "
            f"it: call the attached model itself, not a part of it, and not its .forward"
        )
    else:
        window = carrier.layout.windows[slot]
        _check_length(module, key, carrier, slot)

    prefix_key, prefix_value = _prefix_of(carrier, slot, key, value)
    causal = kwargs.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    if attention_mask is not None and attention_mask.ndim == 4:
        arguments = _by_mask(query, prefix_key, attention_mask, carrier, window, causal)
    else:
        if kwargs.get("cu_seq_lens_q") is not None:
            raise NotImplementedError(
                "packed rows (cu_seq_lens_q) need position_ids that start again at each document, "
                "no attention_mask and use_cache=False"
            )
        arguments = _by_place(key, attention_mask, carrier, slot, window, causal)

    sinks = kwargs.get("s_aux")
    out = prefix_attention(
        query,
        key,
        value,
        prefix_key,
        prefix_value,
        scale=scaling,
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("sinks") if sinks is None else sinks,
        dropout_p=dropout if module.training else 0.0,
        implementation="auto" if carrier is None else carrier.options.implementation,
        **arguments,
    )
    assert isinstance(out, Tensor)  # and not the pair that return_lse gives
    return out.transpose(1, 2).contiguous(), None


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """transformers' mask function: None or bool ``[B, N]`` where keys and places say it all.

    The attention function applies causality and the window itself. What they cannot express
    (packed documents, image blocks, chunks, two-sided windows) comes as bool ``[B, 1, M, N]``.
    ``generate`` may call this on its own result, so ``[B, N]`` maps to itself.
    """
    if local_size is None:
        by_place = mask_function in (causal_mask_function, bidirectional_mask_function)
    else:
        # A window's mask function is a closure, which must not be opened while compiling. These
        # arguments tell: anything laid over the window forbids the skip (one query decoding from a
        # static cache forbids it too); chunks are told by the configuration.
        plain = allow_is_causal_skip or (q_length == 1 and not allow_is_bidirectional_skip)
        by_place = plain and local_size != getattr(config, "attention_chunk_size", None)
    if use_vmap or not by_place:
        return sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            mask_function,
            attention_mask,
            local_size,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            use_vmap=use_vmap,
            **kwargs,
        )
    if attention_mask is None:
        return None
    if not torch.compiler.is_compiling() and bool(attention_mask.all()):
        return None
    if attention_mask.shape[1] == kv_length:
        return attention_mask
    padded = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    return padded[:, kv_offset : kv_offset + kv_length]


def _refuse(module: nn.Module, kwargs: dict[str, Any]) -> None:
    for name, meaning in _REFUSED.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise NotImplementedError(
                f"{type(module).__name__} asks for {meaning} (`{name}`), which is not supported"
            )


def _check_length(module: nn.Module, key: Tensor, carrier: Carrier, slot: int) -> None:
    expected = carrier.spans[slot].key_length
    if key.shape[2] != expected:
        raise RuntimeError(
            f"{type(module).__name__} has {key.shape[2]} keys where its cache promised {expected}: "
            "gradient checkpointing drops a cache that is passed to a model in training"
        )


def _prefix_of(
    carrier: Carrier | None, slot: int | None, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """``[1, H_kv, P, D]`` and ``[1, H_kv, P, D_v]`` beside ``key``; ``P = 0`` without a prefix."""
    if carrier is None or slot is None or carrier.pairs is None:
        return key[:1, :, :0], value[:1, :, :0]
    prefix_key, prefix_value = carrier.pairs[slot]
    return prefix_key[None].to(key), prefix_value[None].to(value)


def _by_place(
    key: Tensor,
    mask: Tensor | None,
    carrier: Carrier | None,
    slot: int | None,
    window: int | None,
    causal: bool,
) -> dict[str, Any]:
    """Arguments where a key's place says whether it is seen, beside a padding mask ``[B, N]``."""
    arguments: dict[str, Any] = {"is_causal": causal, "window": window}
    if carrier is not None and slot is not None:
        arguments["query_offset"] = carrier.spans[slot].query_offset
        arguments["prefix_in_window"] = carrier.options.prefix_in_window
        mask = None if carrier.unpadded else mask
    if mask is not None:
        if mask.shape[-1] != key.shape[2]:
            raise ValueError(
                f"attention_mask must cover the {key.shape[2]} keys, got {tuple(mask.shape)}"
            )
        arguments["attn_mask"] = mask[:, None, None, :]
        if window is not None:
            # The first real token of each row, where the prefix ends. A sliding cache may have
            # dropped it: then index 0 stands in, which no prefix token reaches either.
            arguments["key_start"] = mask.int().argmax(dim=1).expand(key.shape[0])
    return arguments


def _by_mask(
    query: Tensor,
    prefix_key: Tensor,
    mask: Tensor,
    carrier: Carrier | None,
    window: int | None,
    causal: bool,
) -> dict[str, Any]:
    """Arguments where a mask ``[B, 1, M, N]`` rules the sequence half."""
    arguments: dict[str, Any] = {"attn_mask": mask, "is_causal": False}
    num_tokens = prefix_key.shape[2]
    if carrier is None or window is None or num_tokens == 0:
        return arguments
    if carrier.options.prefix_in_window == "positions":
        token = torch.arange(num_tokens, device=query.device) - num_tokens  # [P], text begins at 0
        distance = carrier.positions.to(query.device)[:, None, :, None] - token  # [B, 1, M, P]
        # transformers counts the far end in where a window has two sides.
        seen = distance < window if causal else distance <= window
        hidden = torch.full((), -torch.inf, dtype=query.dtype, device=query.device)
        arguments["prefix_bias"] = torch.where(seen, torch.zeros_like(hidden), hidden)
    return arguments
