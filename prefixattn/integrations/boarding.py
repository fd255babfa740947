"""The hook on the backbone: shift the positions, and put the prefix among the keywords."""

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefixattn.integrations.carrier import KEYWORD, Carrier, Layout, Options, Span
from prefixattn.integrations.transformers import NAME, register

MASK_OR_PLACES = ("attention_mask", "position_ids", "past_key_values")

Source = Callable[[], Sequence[tuple[Tensor, Tensor]] | None]


class Boarding:
    """A forward pre-hook for the innermost model that owns the layers.

    Args:
        source: called once per forward for ``(key [H_kv, P, D], value [H_kv, P, D_v])`` per slot,
            or None where this forward has no prefix.
        layout: of the slots.
        causal: whether a query sees only what stands before it.
        options: of `attach`.
        backbone: the model that is hooked.
    """

    def __init__(
        self,
        source: Source,
        layout: Layout,
        causal: bool,
        options: Options,
        backbone: PreTrainedModel,
    ) -> None:
        self.source = source
        self.layout = layout
        self.causal = causal
        self.options = options
        self.names = list(inspect.signature(type(backbone).forward).parameters)[1:]
        self.checkpoints = [m for m in backbone.modules() if hasattr(m, "gradient_checkpointing")]
        self.table = _position_table(backbone)
        self.numbering = _numbering(backbone)
        self.trains: bool | None = None  # whether the prefix did when it was first seen
        self.counts_mask = _counts_mask(backbone)

    def __call__(
        self, backbone: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if backbone.config._attn_implementation != NAME:
            raise RuntimeError(
                f"{type(backbone).__name__} has a prefix, but its attention implementation is now "
                f"{backbone.config._attn_implementation!r}: it would be lost. detach() first"
            )
        kwargs = dict(zip(self.names, args, strict=False)) | kwargs
        inputs = kwargs.get("input_ids")
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        if inputs is None:
            raise ValueError(f"{type(backbone).__name__} needs input_ids or inputs_embeds")
        pairs = self._pairs(backbone, inputs, kwargs)
        cache = kwargs.get("past_key_values")
        cache = getattr(cache, "self_attention_cache", cache)
        spans, cached = _spans(cache, self.layout, inputs.shape[1])
        positions = self._positions(kwargs, inputs, cached)
        # While compiling, transformers takes every mask-free batch with positions for packed
        # documents, and builds a dense mask. A mask that hides nothing prevents it.
        unpadded = (
            torch.compiler.is_compiling()
            and self.causal
            and all(kwargs.get(name) is None for name in MASK_OR_PLACES)
        )
        if unpadded:
            kwargs["attention_mask"] = inputs.new_ones(inputs.shape[:2], dtype=torch.bool)
        self._keep_documents_apart(kwargs)
        if pairs is not None and self.options.positions == "shift":
            num_tokens = pairs[0][0].shape[1]
            self._check_table(backbone, positions, num_tokens, cached, inputs.shape[1])
            if self.numbering is not None and kwargs.get("position_ids") is None:
                kwargs["position_ids"] = self.numbering(kwargs, cached + num_tokens)
            else:
                kwargs["position_ids"] = positions + num_tokens
        kwargs[KEYWORD] = Carrier(
            pairs,
            spans,
            self.layout,
            positions[0] if positions.ndim == 3 else positions,
            self.options,
            unpadded=unpadded,
        )
        return (), kwargs

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A model that is unpickled in a new process finds its attention function there."""
        self.__dict__.update(state)
        register()

    def embedding_hook(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Have reentrant checkpointing run its backward: it asks its input for a gradient."""
        if self._reentrant() and torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_(True)

    def _pairs(
        self, backbone: PreTrainedModel, inputs: Tensor, kwargs: dict[str, Any]
    ) -> list[tuple[Tensor, Tensor]] | None:
        """The prefix of this forward, in the dtype that the layers compute in."""
        pairs = self.source()
        if pairs is None:
            return None
        if not torch.compiler.is_compiling():
            self._warn_of_freezing(backbone, pairs)
        if self._reentrant() and torch.is_grad_enabled():
            if any(key.grad_fn is not None and _saves(key) for key, _ in pairs):
                raise RuntimeError(
                    "reentrant gradient checkpointing cannot train a prefix that is computed by a "
                    "network: pass gradient_checkpointing_kwargs={'use_reentrant': False}, or fold "
                    "the prefix"
                )
            embeds = kwargs.get("inputs_embeds")
            if embeds is not None and not embeds.requires_grad:
                kwargs["inputs_embeds"] = embeds.detach().requires_grad_(True)
        device = inputs.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        else:
            dtype = backbone.dtype
        return [(key.to(dtype), value.to(dtype)) for key, value in pairs]

    def _warn_of_freezing(
        self, backbone: PreTrainedModel, pairs: Sequence[tuple[Tensor, Tensor]]
    ) -> None:
        """Say once that a prefix which trained does so no longer, while something else does."""
        if not (torch.is_grad_enabled() and backbone.training):
            return
        trains = any(x.requires_grad for pair in pairs for x in pair)
        if self.trains and not trains and any(p.requires_grad for p in backbone.parameters()):
            warnings.warn(
                "the prefix was frozen after it was attached (adding a LoRA adapter freezes all "
                "other parameters); requires_grad_(True) on the prefix trains it again",
                stacklevel=2,
            )
        self.trains = trains

    def _reentrant(self) -> bool:
        return any(
            module.gradient_checkpointing
            and module.training
            and _is_reentrant(getattr(module, "_gradient_checkpointing_func", None))
            for module in self.checkpoints
        )

    def _positions(self, kwargs: dict[str, Any], inputs: Tensor, cached: int | Tensor) -> Tensor:
        """``[B or 1, M]`` (or what the caller gave): the places of this forward's text."""
        given = kwargs.get("position_ids")
        if given is not None:
            return given
        if self.numbering is not None:
            return self.numbering(kwargs, cached)
        places = torch.arange(inputs.shape[1], device=inputs.device) + cached  # [M]
        mask = kwargs.get("attention_mask")
        if not self.causal or not isinstance(mask, Tensor) or mask.ndim != 2:
            return places[None]
        if isinstance(cached, int) and mask.shape[1] < cached + inputs.shape[1]:
            raise ValueError(
                f"attention_mask must cover the {cached} cached and {inputs.shape[1]} new tokens, "
                f"got {tuple(mask.shape)}"
            )
        mask = mask.to(inputs.device) != 0
        if self.counts_mask:
            return (mask.long().cumsum(dim=1) - 1).index_select(1, places).clamp(min=0)
        # Left padding must not come between prefix and text; what is masked later keeps its place.
        return (places - mask.int().argmax(dim=1, keepdim=True)).clamp(min=0)

    def _keep_documents_apart(self, kwargs: dict[str, Any]) -> None:
        """Packed documents are told by their positions, which transformers reads with no cache."""
        given = kwargs.get("position_ids")
        if given is None or given.ndim != 2:
            return
        if kwargs.get("attention_mask") is not None or kwargs.get("past_key_values") is not None:
            return
        if torch.compiler.is_compiling():  # which must not look at the positions
            if "use_cache" in self.names and kwargs.get("use_cache") is None:
                kwargs["use_cache"] = False
        elif "use_cache" in self.names and bool((given.diff(dim=-1) != 1).any()):
            if kwargs.get("use_cache"):
                raise ValueError("position_ids that start again (packed rows) need use_cache=False")
            kwargs["use_cache"] = False

    def _check_table(
        self,
        backbone: PreTrainedModel,
        positions: Tensor,
        num_tokens: int,
        cached: int | Tensor,
        length: int,
    ) -> None:
        """Raise where shifted positions would run off a learned position table."""
        if self.table is None or torch.compiler.is_compiling() or isinstance(cached, Tensor):
            return
        first = 0 if self.numbering is None else self.numbering.first
        if first + num_tokens + cached + length <= self.table:
            return
        last = int(positions.max()) + num_tokens
        if last >= self.table:
            raise ValueError(
                f"{type(backbone).__name__} knows positions up to {self.table - 1}, but behind a "
                f"prefix of {num_tokens} tokens the input reaches {last}"
            )


def _spans(cache: Any, layout: Layout, length: int) -> tuple[list[Span], int | Tensor]:
    """Where each slot's keys will lie, and how many tokens are cached, before the cache grows."""
    if cache is None:
        return [Span(length, None)] * len(layout.cache_layers), 0
    spans = []
    copies: dict[Any, Tensor] = {}  # static layers of one kind count alike
    for index in layout.cache_layers:
        key_length, start = cache.get_mask_sizes(length, index)
        offset = cache.get_query_offset(index)
        if isinstance(offset, Tensor):
            kind = (type(cache.layers[index]), key_length, start)
            if kind not in copies:
                copies[kind] = offset.clone() - start  # the layer adds to its counter in place
            spans.append(Span(key_length, copies[kind]))
        elif offset - start + length == key_length:
            spans.append(Span(key_length, None))
        else:
            spans.append(Span(key_length, offset - start))
    return spans, cache.get_seq_length(layout.cache_layers[0])


def _is_reentrant(checkpoint: Any) -> bool:
    """Whether this checkpointing function, a partial of torch's, is of the reentrant kind."""
    return getattr(checkpoint, "keywords", {}).get("use_reentrant") is not False


def _saves(tensor: Tensor) -> bool:
    """Whether the graph behind ``tensor`` keeps tensors, so that it can be walked only once."""
    pending: list[Any] = [tensor.grad_fn]
    seen: set[Any] = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        saved = (getattr(node, name) for name in dir(node) if name.startswith("_saved_"))
        if any(isinstance(value, Tensor) for value in saved):
            return True
        pending.extend(parent for parent, _ in node.next_functions)
    return False


def _position_table(backbone: PreTrainedModel) -> int | None:
    """The number of learned absolute positions, where the model has such a table."""
    for name, module in backbone.named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and (
            leaf == "wpe" or "position_emb" in leaf or "embed_pos" in leaf
        ):
            return module.num_embeddings - getattr(module, "offset", 0)
    return None


class _Numbering:
    """Positions as a model with a padding row in its table counts them (RoBERTa's family)."""

    def __init__(self, embeddings: Any) -> None:
        self.embeddings = embeddings
        self.first = embeddings.padding_idx + 1

    def __call__(self, inputs: dict[str, Any], past: int | Tensor) -> Tensor:
        """``[B, M]`` behind ``past`` tokens; padding keeps its own row."""
        owner, padding = self.embeddings, self.embeddings.padding_idx
        if inputs.get("input_ids") is not None:
            return owner.create_position_ids_from_input_ids(inputs["input_ids"], padding, past)
        embeds = inputs["inputs_embeds"]
        return owner.create_position_ids_from_inputs_embeds(embeds, padding) + past


def _numbering(backbone: PreTrainedModel) -> _Numbering | None:
    for name, module in backbone.named_modules():
        count = getattr(module, "create_position_ids_from_input_ids", None)
        if count is None and not hasattr(module, "create_position_ids_from_inputs_embeds"):
            continue
        if count is None or "past_key_values_length" not in inspect.signature(count).parameters:
            raise NotImplementedError(
                f"{type(backbone).__name__} cannot carry a prefix: {name} counts positions in a "
                "way that is not known here"
            )
        return _Numbering(module)
    return None


def _counts_mask(backbone: PreTrainedModel) -> bool:
    """Whether the model's positions count the mask, gaps included (OPT's family)."""
    return any(
        isinstance(module, nn.Embedding)
        and "attention_mask" in inspect.signature(type(module).forward).parameters
        for module in backbone.modules()
    )
