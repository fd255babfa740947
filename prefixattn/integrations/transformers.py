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
from prefixattn.integrations.carrier import CAUSAL, KEYWORD, SLOT, Carrier, Entry, Span
from prefixattn.integrations.implementation import NAMING, View
from prefixattn.integrations.relay import RELAYED
from prefixattn.integrations.visibility import Seat, by_document, by_mask, by_place, places_of

NAME = "prefixattn"

# Keywords that change which keys a query sees, which this function does not implement.
_REFUSED = {
    "indices": "sparse attention",
    "block_indices": "sparse attention",
    "output_attentions": "returning attention weights",
}


# Keywords that the attention function reads, beside those that a module without a prefix has.
_READ = frozenset(_REFUSED) | {
    *("cu_seq_lens_q", "softcap", "s_aux", "sinks", "position_bias", "slopes"),
}


def register() -> None:
    """Make ``"prefixattn"`` an attention implementation of transformers. Idempotent."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, named_mask)


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
    seat = _seat(module, kwargs)
    dropout_p = dropout if module.training else 0.0
    unmasked = attention_mask is None and not dropout_p and _READ.isdisjoint(kwargs)
    if unmasked and seat is not None and seat.plain:
        out = _attend_plainly(module, seat, query, key, value, scaling)
        return out.transpose(1, 2).contiguous(), None
    _refuse(module, kwargs)
    if seat is None:
        _refuse_stranger(module)
        entry, implementation = None, "auto"
        named = getattr(module, CAUSAL, kwargs.get("is_causal"))
        causal = bool(getattr(module, "is_causal", True) if named is None else named)
        if attention_mask is None:
            key, value, kwargs, causal = _aligned(query, key, value, kwargs, causal)
    else:
        entry, causal = seat.entry, seat.slot.causal
        implementation = seat.carrier.options.implementation
        if not seat.slot.crosses:
            _check_length(module, key, seat.span)

    documents = None if seat is None else seat.documents
    if attention_mask is not None and attention_mask.ndim == 4:
        arguments = by_mask(query, attention_mask, seat, causal)
    elif seat is not None and documents is not None and documents.by_lengths:
        dense = by_document(query, None, seat, documents)
        arguments = by_mask(query, dense, seat, causal)
    else:
        segments = kwargs.get("cu_seq_lens_q")
        if segments is not None and len(segments) > 2:  # one document needs no keeping apart
            raise NotImplementedError(
                "packed rows (cu_seq_lens_q) need position_ids that start again at each document, "
                "no attention_mask and use_cache=False"
            )
        arguments = by_place(query, key, attention_mask, seat, causal)
        if seat is None and attention_mask is not None:
            arguments["window"] = kwargs.get("sliding_window")
    _add_position_bias(arguments, kwargs, seat)

    sinks = kwargs.get("s_aux")
    prefix_key, prefix_value = _prefix_of(entry, key, value)
    attend = prefix_attention if seat is None else seat.carrier.attend
    attended = attend(
        query,
        key,
        value,
        prefix_key,
        prefix_value,
        scale=scaling,
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("sinks") if sinks is None else sinks,
        dropout_p=dropout_p,
        implementation=implementation,
        **({} if entry is None else _of_entry(entry, query)),
        **arguments,
    )
    assert isinstance(attended, Tensor)  # and not the pair that return_lse gives
    return attended.transpose(1, 2).contiguous(), None


def _aligned(
    query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any], causal: bool
) -> tuple[Tensor, Tensor, dict[str, Any], bool]:
    """What a mask of None means where nothing else tells places: the same as to ``sdpa``.

    One query sees all keys, and of several the first stands at the first key: what lies behind the
    last of them is a static cache's, and empty.
    """
    length = query.shape[2]
    if not causal or length == 1:
        return key, value, kwargs, False
    if key.shape[2] > length:
        key, value = key[:, :, :length], value[:, :, :length]
        if kwargs.get("position_bias") is not None:
            kwargs = kwargs | {"position_bias": kwargs["position_bias"][..., :length]}
    return key, value, kwargs, True


def _attend_plainly(
    module: nn.Module, seat: Seat, query: Tensor, key: Tensor, value: Tensor, scale: float | None
) -> Tensor:
    """The short way of most layers: nothing but a prefix, a sequence, and perhaps causality."""
    _check_length(module, key, seat.span)
    prefix_key, prefix_value = _prefix_of(seat.entry, key, value)
    carrier = seat.carrier
    return carrier.attend.plainly(
        query,
        key,
        value,
        prefix_key,
        prefix_value,
        seat.slot.causal,
        scale,
        carrier.options.implementation,
    )


def _seat(module: nn.Module, kwargs: dict[str, Any]) -> Seat | None:
    """None for a module that was given no prefix."""
    index: int | None = getattr(module, SLOT, None)
    if index is None:
        return None
    carrier: Carrier | None = kwargs.get(KEYWORD)
    if carrier is None and (relayed := getattr(module, RELAYED, None)) is not None:
        carrier = relayed.get()
    if carrier is None:
        raise RuntimeError(
            f"{type(module).__name__} has a prefix, but the forward that reached it did not bring "
            "it: call the model that was attached to, not a layer of it by itself, and not a "
            ".forward that something else had put on the object before it was attached to"
        )
    return Seat(carrier, carrier.slots[index], carrier.spans[index], carrier.entries[index])


def named_mask(*args: Any, config: Any = None, **kwargs: Any) -> Tensor | None:
    """The mask function of the name: the short one where every module has places of its own.

    Where a module may ask for attention and no carrier tells its places, masks are ``sdpa``'s.
    """
    compact = isinstance(config, View) and getattr(config, NAMING).compact
    make: Callable[..., Tensor | None] = attention_mask if compact else sdpa_mask
    return make(*args, config=config, **kwargs)


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
    """A mask for modules with places: None or bool ``[B, N]`` where keys and places say it all.

    The attention function applies causality, windows and chunks itself. What they cannot express
    (packed documents, image blocks, two-sided windows) comes as bool ``[B, 1, M, N]``.
    ``generate`` may call this on its own result, so ``[B, N]`` maps to itself.
    """
    if local_size is None:
        plain = mask_function in (causal_mask_function, bidirectional_mask_function)
    else:
        # A window's mask function is a closure, which must not be opened while compiling. These
        # arguments tell: anything laid over the window forbids the skip (one query decoding from a
        # static cache forbids it too).
        plain = allow_is_causal_skip or (q_length == 1 and not allow_is_bidirectional_skip)
    if use_vmap or not plain:
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


def _refuse_stranger(module: nn.Module) -> None:
    """A layer that was made from an attached model's configuration, and is in no model."""
    config: Any = vars(module).get("config")
    if isinstance(config, View) and getattr(config, NAMING).read(config) == NAME:
        raise NotImplementedError(
            f"{type(module).__name__} was made from the configuration of a model with a prefix, "
            "and is no module of it: make it from copy.deepcopy(config)"
        )


def _check_length(module: nn.Module, key: Tensor, span: Span) -> None:
    if key.shape[2] != span.key_length:
        raise RuntimeError(
            f"{type(module).__name__} has {key.shape[2]} keys where its cache promised "
            f"{span.key_length}: gradient checkpointing drops a cache that is passed to a model in "
            "training"
        )


def _prefix_of(entry: Entry | None, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """``[R, H_kv, P, D]`` and ``[R, H_kv, P, D_v]`` beside ``key``; ``P = 0`` without a prefix."""
    if entry is None:
        return key[:1, :, :0], value[:1, :, :0]
    if entry.key.dtype == key.dtype and entry.key.device == key.device:
        return entry.key, entry.value
    return entry.key.to(key), entry.value.to(value)


def _of_entry(entry: Entry, query: Tensor) -> dict[str, Any]:
    """What a prefix brings with it beside its keys and values, where it brings anything."""
    gate = None if entry.gate is None else entry.gate.to(query)
    found = {
        "prefix_index": entry.index,
        "prefix_lengths": entry.lengths,
        "prefix_gate": gate,
        "prefix_bias": entry.bias,
    }
    return {name: value for name, value in found.items() if value is not None}


def _add_position_bias(
    arguments: dict[str, Any], kwargs: dict[str, Any], seat: Seat | None
) -> None:
    """Add a model's own bias by position to what either half adds to its scores."""
    bias: Tensor | None = kwargs.get("position_bias")
    if bias is not None and not (seat is not None and seat.slot.crosses):
        mask = arguments.get("attn_mask")
        if mask is None:
            arguments["attn_mask"] = bias
        elif mask.dtype == torch.bool:
            arguments["attn_mask"] = torch.where(mask, bias, -torch.inf)
        else:
            arguments["attn_mask"] = mask + bias
    slopes: Tensor | None = kwargs.get("slopes")
    if slopes is not None and seat is not None and seat.entry is not None:
        distances = places_of(seat.entry, slopes.device)
        arguments["prefix_bias"] = (slopes[:, None, None] * distances).to(seat.entry.key.dtype)
