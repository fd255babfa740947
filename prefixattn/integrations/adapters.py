"""Attention modules that bypass transformers' attention interface, and go through it in ours.

A module's class is replaced by a subclass whose forward does what the old one does, but for the
attention itself, which it leaves to the function that the configuration names.
"""

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, EncoderDecoderCache, PreTrainedModel

from prefixattn.integrations.derived import derive
from prefixattn.integrations.undo import Undoing

CONFIG = "prefixattn_config"
FREE = "prefixattn_free_of_positions"


def adapt(model: Any, undo: Undoing) -> bool:
    """Give ``model``'s attention modules forwards that go through the interface.

    Args:
        model: a transformers model; left as it is where no module of it is known here.
        undo: learns how to take every step back.

    Returns:
        Whether there were any such modules.
    """
    found = False
    stacks = [stack for stack in model.modules() if isinstance(stack, PreTrainedModel)]
    owners = {module: stack for stack in stacks for module in stack.modules()}  # the innermost
    for module in list(model.modules()):
        members = ADAPTERS.get((type(module).__module__, type(module).__name__))
        if members is None or (members is _own_attention and not hasattr(module, "_attn")):
            continue  # from transformers 5.24 on, GPT-J and CodeGen go through the interface
        found = True
        setattr(module, CONFIG, owners[module].config)
        undo.callback(delattr, module, CONFIG)
        undo.callback(derive(module, members))
    return found


def is_adapted(module: nn.Module) -> bool:
    """Whether the module goes through the interface by our forward."""
    return hasattr(module, CONFIG)


def is_free_of_positions(model: nn.Module) -> bool:
    """Whether ``model`` knows distances alone (ALiBi), so that there is nothing to move."""
    return any(getattr(module, FREE, False) for module in model.modules())


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kw: Any) -> Tensor:
    """What the attention function of the configuration gives: ``[B, M, H * D]``."""
    _refuse_weights(module, kw.pop("output_attentions", False))
    function = AttentionInterface()[getattr(module, CONFIG)._attn_implementation]
    out, _ = function(module, query, key, value, mask, **kw)
    return out.flatten(2)


def _refuse_weights(module: Any, asked: bool | None) -> None:
    if asked:
        raise NotImplementedError(
            f"{type(module).__name__} asks for returning attention weights (`output_attentions`), "
            "which is not supported"
        )


def _per_key(alibi: Tensor, num_heads: int, key: Tensor) -> Tensor:
    """``alibi`` as ``[B, H, 1, N]``: a static cache has slots that it does not reach yet."""
    bias = alibi.reshape(key.shape[0], num_heads, 1, -1)
    return nn.functional.pad(bias, (0, key.shape[2] - bias.shape[-1]))


def alibi_slopes(num_heads: int, device: torch.device) -> Tensor:
    """``[H]``: 2 ** (-8 i / H) for head i = 1 …; the heads beyond a power of two take the odd
    steps of twice as fine a scale (Press et al., 2022).
    """
    whole = 2 ** math.floor(math.log2(num_heads))
    steps = torch.arange(1, whole + 1, device=device) * (8 / whole)
    extra = (2 * torch.arange(num_heads - whole, device=device) + 1) * (4 / whole)
    return torch.exp2(-torch.cat([steps, extra]))


def _bloom(old: type) -> dict[str, Any]:
    def forward(
        self: Any,
        hidden_states: Tensor,
        residual: Tensor,
        alibi: Tensor,  # [B * H, 1, N]
        attention_mask: Tensor | None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        out = _attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.inv_norm_factor,
            dropout=self.attention_dropout.p if self.training else 0.0,
            position_bias=_per_key(alibi, self.num_heads, key),
            slopes=alibi_slopes(self.num_heads, query.device),
            output_attentions=output_attentions,
        )
        out = nn.functional.dropout(self.dense(out), self.hidden_dropout, self.training)
        return residual + out, None

    return {"forward": forward, FREE: True}


def _falcon(old: type) -> dict[str, Any]:
    rotate: Callable[..., tuple[Tensor, Tensor]] = sys.modules[old.__module__].apply_rotary_pos_emb

    def forward(
        self: Any,
        hidden_states: Tensor,
        alibi: Tensor | None,  # [B * H, 1, N], or [B, H, 1, N] with a mask that holds it
        attention_mask: Tensor | None,
        position_ids: Tensor | None = None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        parts = self._split_heads(self.query_key_value(hidden_states))
        query, key, value = (part.transpose(1, 2) for part in parts)
        biases: dict[str, Tensor] = {}
        if alibi is None:
            assert position_embeddings is not None
            query, key = rotate(query, key, *position_embeddings)
        else:
            slopes = alibi_slopes(self.num_heads, query.device)
            biases["slopes"] = slopes * self.inv_norm_factor
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        if alibi is not None and (attention_mask is None or attention_mask.ndim != 4):
            bias = _per_key(alibi, self.num_heads, key)
            biases["position_bias"] = bias * self.inv_norm_factor
        out = _attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.inv_norm_factor,
            # Stock falcon drops no attention weights where positions are rotary.
            dropout=self.attention_dropout.p if self.training and alibi is not None else 0.0,
            output_attentions=output_attentions,
            **biases,
        )
        return self.dense(out), None

    return {"forward": forward}


def _own_attention(old: type) -> dict[str, Any]:
    """For modules whose scores, softmax and sum are a method ``_attn`` of theirs.

    ``_attn`` takes query, key and value ``[B, H, M or N, D]`` and a mask, and gives the output
    ``[B, H, M, D]`` and the weights, which are None here.
    """

    def _attn(
        self: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        window = self.config.window_size if getattr(self, "attention_type", "") == "local" else None
        if window is not None and attention_mask is not None and attention_mask.ndim == 4:
            end = key.shape[2]
            near = self.bias[:, :, end - query.shape[2] : end, :end]
            far = False if attention_mask.dtype == torch.bool else -torch.inf
            attention_mask = attention_mask.masked_fill(~near, far)
        out = _attend(
            self,
            query.to(value.dtype),  # float32, for scores that we add up in float32 anyway
            key.to(value.dtype),
            value,
            attention_mask,
            scaling=1 / float(getattr(self, "scale_attn", 1)),
            dropout=self.attn_dropout.p if self.training else 0.0,
            sliding_window=window,
        )
        return out.unflatten(2, (query.shape[1], -1)).transpose(1, 2), None

    def forward(self: Any, *args: Any, output_attentions: bool = False, **kwargs: Any) -> Any:
        _refuse_weights(self, output_attentions)
        return old.forward(self, *args, **kwargs)  # type: ignore[attr-defined]

    return {"_attn": _attn, "forward": forward}


def _trocr(old: type) -> dict[str, Any]:
    def forward(
        self: Any,
        hidden_states: Tensor,  # [B, M, E]
        key_value_states: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        cache: Any = None,  # its name from transformers 5.24 on
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

        crosses, known = key_value_states is not None, None
        cache = past_key_values if cache is None else cache
        if isinstance(cache, EncoderDecoderCache):
            known = cache.is_updated if crosses else None  # which layers have read the encoder
            cache = cache.cross_attention_cache if crosses else cache.self_attention_cache
        if known is not None and known.get(self.layer_idx):
            key, value = cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
        else:
            source = key_value_states if crosses else hidden_states
            key, value = heads(self.k_proj(source)), heads(self.v_proj(source))
            if cache is not None:
                key, value = cache.update(key, value, self.layer_idx)
            if known is not None:
                known[self.layer_idx] = True
        out = _attend(
            self,
            heads(self.q_proj(hidden_states)),
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.dropout if self.training else 0.0,
            is_causal=not crosses,
            output_attentions=output_attentions,
        )
        return self.out_proj(out), None

    return {"forward": forward}


def _module(family: str) -> str:
    return f"transformers.models.{family}.modeling_{family}"


ADAPTERS: dict[tuple[str, str], Callable[[type], dict[str, Any]]] = {
    (_module("bloom"), "BloomAttention"): _bloom,
    (_module("falcon"), "FalconAttention"): _falcon,
    (_module("codegen"), "CodeGenAttention"): _own_attention,
    (_module("gpt_neo"), "GPTNeoSelfAttention"): _own_attention,
    (_module("gptj"), "GPTJAttention"): _own_attention,
    (_module("trocr"), "TrOCRAttention"): _trocr,
}
