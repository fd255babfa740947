"""The hook on a stack of layers: move the text, and put the prefix among the keywords."""

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from prefixattn.integrations.carrier import KEYWORD, SLOT, Carrier, Entry, Options, Slot, Span
from prefixattn.integrations.documents import tell_apart
from prefixattn.integrations.entries import Entries, Rows
from prefixattn.integrations.given import Caller, by_key, cache_in, checked_places, row_of
from prefixattn.integrations.implementation import Naming
from prefixattn.integrations.outline import Hooks, refuse_changes
from prefixattn.integrations.per_thread import PerThread
from prefixattn.integrations.places import Places, argument_names
from prefixattn.integrations.spread import AsAttached
from prefixattn.integrations.survey import input_embeddings, takes_keywords
from prefixattn.integrations.transformers import NAME, register
from prefixattn.kept import forward, made_cache
from prefixattn.layers import PrefixBatch

BATCHING_WORDS = "generate() takes batches, `prefixattn vllm` serves prefixes; detach() first"


class Source(Protocol):
    """Who gives a prefix to each forward, or None for none."""

    def __call__(self) -> PrefixBatch | None: ...

    @property
    def parameters(self) -> list[nn.Parameter]: ...  # that its prefixes are made of

    @property
    def num_tokens(self) -> int: ...  # of its longest prefix now


class Group(NamedTuple):
    """Layers that have their prefix from one source.

    ``owners``: per slot the module whose relative bias its keys have, or None.
    """

    source: Source
    slots: Sequence[Slot]
    owners: Sequence[Any]

    @property
    def crosses(self) -> bool:
        return any(slot.crosses for slot in self.slots)


class Boarding:
    """A forward pre-hook for the innermost model that owns the layers.

    Args:
        groups: whose slots are this stack's, in order. Each source is called once per forward.
        options: of `attach`.
        stack: the model that is hooked.
        namings: of the configurations that its layers look the attention implementation up in.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        options: Options,
        stack: PreTrainedModel,
        namings: Sequence[Naming],
    ) -> None:
        self.groups = groups
        self.slots = [slot for group in groups for slot in group.slots]
        self.options = options
        self.namings = namings
        self.hooks: Hooks  # given where they are put
        self.causal = all(s.causal for s in self.slots if not s.crosses)
        self.look(stack, Places(stack, self.causal))
        self.entries = [Entries() for _ in groups]
        self.longest = [group.source.num_tokens for group in groups]  # attach looks at those
        self.takes_keywords = takes_keywords(stack)
        # Other models may have several numbers for a token.
        self.reads_rows = isinstance(input_embeddings(stack), nn.Embedding)
        self.trains = any(p.requires_grad for p in self._parameters())  # when it was last seen
        self.as_attached = AsAttached(self._parameters())
        # Of the forward that runs now: for a relay, and where a model is around the stack.
        self.closed = False  # once it is detached
        self.current: PerThread[Carrier] = PerThread()
        self.caller: PerThread[Caller] = PerThread()

    def look(self, stack: PreTrainedModel, places: Places) -> None:
        """Take what the stack's modules are now for what they are."""
        self.places = places
        self.checkpoints = [m for m in stack.modules() if hasattr(m, "gradient_checkpointing")]

    def __call__(
        self, stack: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._check_implementation(stack)
        refuse_changes(stack, self.hooks.keep_up())
        kwargs = dict(zip(self.places.names, args, strict=False)) | kwargs
        _refuse_weights(stack, kwargs.get("output_attentions"))
        inputs = kwargs.get("input_ids")
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        if inputs is None:
            raise ValueError(f"{type(stack).__name__} needs input_ids or inputs_embeds")
        if self.reads_rows and kwargs.get("input_ids") is not None and inputs.ndim != 2:
            raise ValueError(
                f"input_ids must be [B, N] for a {type(stack).__name__} with a prefix, got "
                f"{tuple(inputs.shape)}: give each choice a row, input_ids.flatten(0, -2)"
            )
        kwargs["position_ids"] = checked_places(kwargs.get("position_ids"), inputs)
        caller = self.caller.get()
        documents, unpadded = None, False
        if self.places.causal and self.places.takes_ids and cache_in(kwargs) is None:
            documents, unpadded = tell_apart(kwargs, inputs, caller, self.places.names)
        chosen = kwargs["position_ids"] is not None
        if not chosen:
            del kwargs["position_ids"]  # which not every stack takes
        cache = cache_in(kwargs)
        cache = getattr(cache, "self_attention_cache", cache)
        spans, cached = _spans(cache, self.slots, inputs.shape[1])
        places = self.places.find(kwargs, inputs, cached, caller)
        text = self._text(kwargs, inputs, cached, places, caller)
        if documents is not None:
            text = documents.places
        compiling = torch.compiler.is_compiling()
        with nullcontext() if compiling else forward(_continues(cached, inputs), cache):
            batches = self._batches(stack, kwargs)
            where = (places, text, cached, chosen)
            entries = self._board(stack, kwargs, batches, where, inputs)
        mask = by_key(kwargs.get("attention_mask"))
        mask = caller.mask if mask is None and caller is not None else mask
        carrier = Carrier(
            entries,
            spans,
            self.slots,
            text,
            self.options,
            mask,
            unpadded=unpadded,
            documents=documents,
        )
        self.current.set(carrier)
        if self.takes_keywords:
            kwargs[KEYWORD] = carrier
        return (), kwargs

    def leave(self, stack: PreTrainedModel, args: tuple[Any, ...], output: Any) -> None:
        """After the stack's forward: nothing of it is kept."""
        self.current.set(None)
        self.places.forget()
        made = getattr(output, "past_key_values", None)
        if isinstance(made, Cache) and not torch.compiler.is_compiling():
            made_cache(getattr(made, "self_attention_cache", made))

    def note_caller(
        self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Before a model around the stack runs: what its caller says of padding and places."""
        refuse_changes(model, self.hooks.keep_up_above())
        if args:
            kwargs = dict(zip(argument_names(model), args, strict=False)) | kwargs
        # What an encoder-decoder is told of its decoder's text has names of its own.
        # Nothing of `places` is read here: a compiler would keep it, and `keep_up` may change it.
        text = "decoder_" if model.config.is_encoder_decoder and self.causal else ""
        mask, places = kwargs.get(f"{text}attention_mask"), kwargs.get(f"{text}position_ids")
        self.caller.set(Caller(by_key(mask), mask is not None, places is not None))

    def forget_caller(self, model: PreTrainedModel, args: tuple[Any, ...], output: Any) -> None:
        """After a model around the stack ran, the stack several times or not at all."""
        self.caller.set(None)

    def close(self) -> None:
        """It is detached."""
        self.closed = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A model that is unpickled in a new process finds its attention function there."""
        self.__dict__.update(state)
        register()

    def embedding_hook(self, module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        """Have reentrant checkpointing run its backward: it asks its input for a gradient."""
        if torch.is_grad_enabled() and not output.requires_grad and self._reentrant():
            output.requires_grad_(True)

    def _check_implementation(self, stack: PreTrainedModel) -> None:
        for naming in self.namings:
            if naming.name != NAME:
                raise RuntimeError(
                    f"{type(stack).__name__} has a prefix, but its attention implementation is "
                    f"now {naming.name!r}: it would be lost. detach() first"
                )

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.groups for parameter in group.source.parameters]

    def _batches(self, stack: PreTrainedModel, kwargs: dict[str, Any]) -> list[PrefixBatch | None]:
        """The prefixes of this forward; what training needs is seen to."""
        batches = [group.source() for group in self.groups]
        if not torch.is_grad_enabled():
            return batches
        tensors = [x for batch in batches if batch for pair in batch.pairs if pair for x in pair]
        if tensors and not torch.compiler.is_compiling():
            self._warn_of_freezing(stack, tensors)
            self.as_attached.check(stack, self._parameters)
        if tensors and self._reentrant():
            if any(x.grad_fn is not None and _saves(x) for x in tensors):
                raise RuntimeError(
                    "reentrant gradient checkpointing cannot train a prefix that is computed by a "
                    "network: pass gradient_checkpointing_kwargs={'use_reentrant': False}, or fold "
                    "the prefix"
                )
            embeds = kwargs.get("inputs_embeds")
            if embeds is not None and not embeds.requires_grad:
                kwargs["inputs_embeds"] = embeds.detach().requires_grad_(True)
        return batches

    def _board(
        self,
        stack: PreTrainedModel,
        kwargs: dict[str, Any],
        batches: Sequence[PrefixBatch | None],
        where: tuple[Tensor, Tensor, int | Tensor, bool],
        inputs: Tensor,
    ) -> list[Entry | None]:
        """Each slot's entry; the text is moved behind the prefix that stands before it."""
        places, text, cached, chosen = where
        self.places.forget()
        found: list[Entry | None] = []
        for place, (group, batch) in enumerate(zip(self.groups, batches, strict=True)):
            if batch is None:
                found += [None] * len(group.slots)
                continue
            rows, own = self.entries[place].of(batch, stack, inputs)
            if not torch.compiler.is_compiling() and rows.most > self.longest[place]:
                self.longest[place] = rows.most
                self._warn_of_dead_tokens(stack, len(found), group, rows.most)
            if group.crosses:
                found += own
                continue
            shifts = self.options.positions == "shift"
            before = rows.most if shifts else 0
            self.places.check(places, before, cached, inputs.shape[1], chosen=chosen)
            # Where the text stays, it begins at place 0 still, and not at its padding's end.
            self.places.move(kwargs, places, rows.shift if shifts else 0, cached)
            found += self._biased(group, own, text, rows)
        return found

    def _biased(
        self, group: Group, entries: list[Entry | None], text: Tensor, rows: Rows
    ) -> list[Entry | None]:
        """The entries with their part of a relative bias, computed once for those that share it."""
        if not self.places.biases:
            return entries
        biases: dict[int, Tensor] = {}
        found: list[Entry | None] = []
        for owner, entry in zip(group.owners, entries, strict=True):
            if owner is not None and entry is not None:
                if id(owner) not in biases:
                    num_tokens = entry.key.shape[2]
                    biases[id(owner)] = self.places.bias(owner, text, num_tokens, rows.lengths)
                entry = replace(entry, bias=biases[id(owner)])
            found.append(entry)
        return found

    def _warn_of_dead_tokens(
        self, stack: PreTrainedModel, first: int, group: Group, num_tokens: int
    ) -> None:
        """For a prefix longer than all before it: what `attach` says of those that it finds."""
        from prefixattn.integrations.handle import warn_of_dead_tokens  # which imports this module

        names: dict[int, str] = {}
        for name, module in stack.named_modules():
            names.setdefault(getattr(module, SLOT, -1), name)
        sites: list[Any] = [
            slot._replace(name=names[first + i]) for i, slot in enumerate(group.slots)
        ]
        warn_of_dead_tokens(num_tokens, sites, self.options, stacklevel=3)

    def _warn_of_freezing(self, stack: PreTrainedModel, tensors: Sequence[Tensor]) -> None:
        """Say once that a prefix which trained does so no longer, while something else does."""
        if not stack.training:
            return
        trains = any(x.requires_grad for x in tensors)
        if self.trains and not trains and any(p.requires_grad for p in stack.parameters()):
            warnings.warn(
                "the prefix was frozen after it was attached (adding a LoRA adapter freezes all "
                "other parameters); requires_grad_(True) on the prefix trains it again, and its "
                "save_pretrained saves it",
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

    def _text(
        self,
        kwargs: dict[str, Any],
        inputs: Tensor,
        cached: int | Tensor,
        places: Tensor,
        caller: Caller | None,
    ) -> Tensor:
        """``[B or 1, M]``: how many tokens of its text stand before each, as windows count them.

        The places that keys are turned by may be any; where a caller's mask is dense, they alone
        say where padding ends.
        """
        counts = any(s.window is not None or s.chunk is not None for s in self.slots)
        dense = (
            kwargs.get("attention_mask") is not None and by_key(kwargs["attention_mask"]) is None
        )
        row = row_of(places)
        own = caller is None or (caller.masks and caller.mask is None)
        if row is not None and (not counts or (dense and own)):
            return row
        return self.places.counted_places(kwargs, inputs, cached, caller, in_windows=True)


def _refuse_weights(stack: PreTrainedModel, asked: bool | None) -> None:
    if stack.config.output_attentions if asked is None else asked:
        raise NotImplementedError(
            f"{type(stack).__name__} is asked for attention weights (`output_attentions`), which "
            "are never computed: detach() first"
        )


def _spans(cache: Any, slots: Sequence[Slot], length: int) -> tuple[list[Span], int | Tensor]:
    """Where each slot's keys will lie, and how many tokens are cached, before the cache grows."""
    own = [slot for slot in slots if not slot.crosses]
    if cache is None or not own:
        return [Span(length, None)] * len(slots), 0
    # A paged cache: continuous batching that began before the prefix was there.
    if not hasattr(cache, "get_mask_sizes"):
        raise NotImplementedError(
            f"a {type(cache).__name__} shares blocks by tokens alone, and would lose the prefix: "
            f"{BATCHING_WORDS}"
        )
    # Layers that see alike have seen the same tokens: so transformers makes its masks, too.
    kinds: dict[Any, Span] = {}
    spans = []
    for slot in slots:
        kind = None if slot.crosses else (slot.window, slot.chunk)
        if kind not in kinds:
            kinds[kind] = Span(length, None) if kind is None else _span(cache, slot, length)
        spans.append(kinds[kind])
    return spans, cache.get_seq_length(own[0].cache_layer)


def _span(cache: Any, slot: Slot, length: int) -> Span:
    key_length, start = cache.get_mask_sizes(length, slot.cache_layer)
    offset = cache.get_query_offset(slot.cache_layer)
    if isinstance(offset, Tensor):
        # The layer adds to its counter in place.
        return Span(key_length, offset.clone() - start, start)
    if offset - start + length == key_length:
        return Span(key_length, None, start)
    return Span(key_length, offset - start, start)


def _continues(cached: int | Tensor, inputs: Tensor) -> bool:
    """Whether a forward of ``inputs`` follows on text in the cache, as far as can be told cheaply.

    Static caches count on the device: there one token is taken for a later one.
    """
    return inputs.shape[1] == 1 if isinstance(cached, Tensor) else cached > 0


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
