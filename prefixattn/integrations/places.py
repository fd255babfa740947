"""Where a stack of layers puts its text among positions, and how it is moved behind a prefix."""

import inspect
import warnings
from collections.abc import Callable, Container
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefixattn.integrations.adapters import is_free_of_positions
from prefixattn.integrations.given import Caller, Outer, by_key
from prefixattn.integrations.per_thread import PerThread
from prefixattn.integrations.refusal import refusal

# What a table's forward calls the tokens in the cache: from transformers 5.24 on, and before.
COUNTERS = ("cache_length", "past_key_values_length")


class Moved(NamedTuple):
    """Where a forward's text stands, ``[B or 1, M]``, and how much further on than it did."""

    places: Tensor
    shift: int | Tensor


class Counted(NamedTuple):
    """A static cache's counter, and what it stands at now, or more."""

    counter: Tensor
    tokens: int


def argument_names(module: nn.Module) -> list[str]:
    """What a module's forward takes, in order."""
    kind: Any = type(module)
    return _argument_names(kind)


@cache
def _argument_names(kind: Any) -> list[str]:
    return list(inspect.signature(kind.forward).parameters)[1:]


class Places:
    """What is known of a stack's positions once and for all.

    Args:
        stack: the model that owns the layers.
        causal: whether a query sees only what stands before it.

    Raises:
        NotImplementedError: positions are counted in a way that is not known here.
    """

    def __init__(self, stack: PreTrainedModel, causal: bool) -> None:
        self.causal = causal
        self.kind = type(stack).__name__
        self.names = argument_names(stack)
        self.takes_ids = "position_ids" in self.names
        self.added = _table_size(stack)
        self.table = _turning_size(stack) if self.added is None else self.added
        self.border = _rotary_border(stack)
        self.longest = _longest(stack)
        self.tables = [] if self.takes_ids else _tables(stack)
        self.numbering = _numbering(stack)
        self.counts_mask = _counts_mask(stack)
        self.biases = [m for m in stack.modules() if hasattr(m, "relative_attention_bias")]
        # A recurrence that begins anew at place 0 would not, behind a prefix.
        self.restarts = stack.config.model_type == "recurrent_gemma"
        self.movable = (
            self.takes_ids or bool(self.tables or self.biases) or is_free_of_positions(stack)
        ) and not self.restarts
        self.moved: PerThread[Moved] = PerThread()  # by this forward, for the tables' hooks
        self.counted: PerThread[Counted] = PerThread()
        self.outer = Outer()

    def find(
        self,
        kwargs: dict[str, Any],
        inputs: Tensor,
        cached: int | Tensor,
        caller: Caller | None = None,
    ) -> Tensor:
        """``[B or 1, M]`` (or what the caller gave): the places of this forward's text.

        ``caller`` is what a model around the stack was told. Places of that model's own making are
        kept like the caller's; only where they count the padding before a text, like stock models
        that are given no places, the text begins where it does without padding.
        """
        given = kwargs.get("position_ids")
        if given is None:
            if self.numbering is not None:
                return self.numbering(kwargs, cached)
            return self.counted_places(kwargs, inputs, cached, caller)
        if caller is None or caller.places or given.ndim != 2 or given.shape[0] != 1:
            return given
        mask = self._padding(kwargs, caller)
        if not self.causal or mask is None:
            return given
        return self.outer.without_padding(given, mask, cached)

    def counted_places(
        self,
        kwargs: dict[str, Any],
        inputs: Tensor,
        cached: int | Tensor,
        caller: Caller | None = None,
        in_windows: bool = False,
    ) -> Tensor:
        """``[B or 1, M]``: how many text tokens stand before each; padding is left out.

        With ``in_windows`` they are counted for windows alone. A static cache of sliding layers has
        a mask of its last slots: padding before them, which no window shows, is not left out.
        """
        length = inputs.shape[1]
        if isinstance(cached, int):
            places = torch.arange(cached, cached + length, device=inputs.device)
        else:
            places = torch.arange(length, device=inputs.device) + cached
        mask = self._padding(kwargs, caller)
        if not self.causal or mask is None:
            return places[None]
        covered = not isinstance(cached, int) or mask.shape[1] >= cached + length
        if not (covered or in_windows):
            raise ValueError(
                f"attention_mask must cover the {cached} cached and {length} new tokens, "
                f"got {tuple(mask.shape)}"
            )
        mask = mask.to(inputs.device)
        if self.counts_mask:
            return (mask.long().cumsum(dim=1) - 1).index_select(1, places).clamp(min=0)
        # Left padding must not come between prefix and text; what is masked later keeps its place.
        padding = mask.int().argmax(dim=1, keepdim=True)
        if in_windows:
            before = (places[-1] + 1 - mask.shape[1]).clamp(min=0)  # slots that the mask leaves out
            padding = torch.where(padding > 0, padding + before, 0)
        return (places - padding).clamp(min=0)

    def _padding(self, kwargs: dict[str, Any], caller: Caller | None) -> Tensor | None:
        """``[B, N]`` bool: the mask of this forward, or what its caller gave."""
        mask = by_key(kwargs.get("attention_mask"))
        if mask is None and kwargs.get("attention_mask") is not None and caller is not None:
            mask = caller.mask
        return None if mask is None else mask != 0

    def move(
        self,
        kwargs: dict[str, Any],
        places: Tensor,
        shift: int | Tensor,
        cached: int | Tensor,
    ) -> None:
        """Have the text stand ``shift`` (an int, or ``[B, 1]``) further on, in this forward."""
        moved = Moved(places + shift, shift)
        self.moved.set(moved)
        if not self.takes_ids:
            return  # a table of positions is hooked, and relative biases are distances
        if self.numbering is not None and kwargs.get("position_ids") is None:
            kwargs["position_ids"] = self.numbering(kwargs, cached + shift)
        else:
            kwargs["position_ids"] = moved.places

    def table_hook(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before a table that counts from the cache is read: count the prefix too."""
        moved = self.moved.get()
        if moved is None:
            return None
        given = dict(zip(argument_names(module), args, strict=False)) | kwargs
        name = counter_of(argument_names(module)) if given.get("position_ids") is None else None
        name = name or "position_ids"
        given[name] = given.get(name, 0) + self._shift_of_all(moved.shift)
        return (), given

    def _shift_of_all(self, shift: int | Tensor) -> int:
        """The shift that all rows have in common."""
        if isinstance(shift, int):
            return shift
        first = int(shift[0])
        if not bool((shift == first).all()):
            raise NotImplementedError(
                f"{self.kind} counts places for all rows at once: all prefixes must be as long"
            )
        return first

    def embedding_hook(self, module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """After a table of learned or sinusoidal positions was read: read it further on."""
        moved = self.moved.get()
        if moved is None:
            return None
        return nn.functional.embedding(moved.places + getattr(module, "offset", 0), module.weight)

    def forget(self) -> None:
        """This forward moves nothing."""
        self.moved.set(None)

    def bias(
        self, module: nn.Module, places: Tensor, num_tokens: int, lengths: Tensor | None
    ) -> Tensor:
        """``[B or 1, H, M, P]``: the relative bias of prefix tokens that end where the text begins.

        Args:
            module: one of `biases`.
            places: ``[B or 1, M]`` of the text, counted from 0.
            num_tokens: ``P``.
            lengths: ``[B]`` tokens in use, or None for ``P``.
        """
        owner: Any = module
        token = torch.arange(num_tokens, device=places.device)
        end = num_tokens if lengths is None else lengths[:, None, None]
        relative = token - end - places[:, :, None]  # [B, M, P]
        options = {}
        if "bidirectional" in inspect.signature(owner._relative_position_bucket).parameters:
            options = {
                "bidirectional": not getattr(owner, "is_decoder", True),  # Pix2Struct's all decode
                "num_buckets": owner.relative_attention_num_buckets,
                "max_distance": owner.relative_attention_max_distance,
            }
        bucket = owner._relative_position_bucket(relative, **options)
        bias: Tensor = owner.relative_attention_bias(bucket)  # [B, M, P, H]
        return bias.permute(0, 3, 1, 2)

    def check(
        self, places: Tensor, before: int, cached: int | Tensor, length: int, *, chosen: bool
    ) -> None:
        """Hold the last place of a forward against what the model knows.

        Args:
            places: of the text, unmoved.
            before: prefix tokens that the text is moved behind.
            cached: tokens in the cache.
            length: tokens of this forward.
            chosen: the caller gave the places, which the number of tokens says nothing of.

        Raises:
            ValueError: moved text would run off a learned table, or over the length at which the
                model turns its keys by other frequencies: the prefix's keys are of those before.
        """
        known = (self.table, self.border, self.longest) if before else (self.border,)
        if torch.compiler.is_compiling():
            known = (self.border,)  # models with one look at lengths in the middle of a graph, too
        limits = [x for x in known if x is not None]
        if not limits:
            return
        first = 0 if self.numbering is None else self.numbering.first
        room = min(limits) - first - before - length
        within = (
            self._count(cached, length, room) if isinstance(cached, Tensor) else cached
        ) <= room
        if within and not (chosen and self._may_look(places, length)):
            return
        last = int(places.max()) + before
        if before and self.table is not None and last >= self.table:
            raise ValueError(
                f"{self.kind} knows positions up to {self.table - 1}, but behind a prefix of "
                f"{before} tokens the input reaches {last}"
            )
        if self.border is not None and before <= self.border <= last:
            raise ValueError(
                f"{self.kind} turns keys by other frequencies from {self.border} tokens on, which "
                f"a prefix cannot follow: with {before} prefix tokens the input has {last + 1}"
            )
        if self.longest is not None and before and last >= self.longest:
            warnings.warn(
                f"with a prefix of {before} tokens the input has {last + 1}, more than the "
                f"{self.longest} that {self.kind} was made for",
                stacklevel=2,
            )
            self.longest = None  # said once

    def _may_look(self, places: Tensor, length: int) -> bool:
        """Whether to read places costs little: not where each token would wait for a device."""
        if torch.compiler.is_compiling():
            return False
        bounded = self.table is not None or self.border is not None
        return length > 1 or (bounded and places.device.type == "cpu")

    def _count(self, counter: Tensor, length: int, room: int) -> int:
        """What a static cache's counter stands at, or more where that is still within ``room``.

        To read it is to wait for the device: this is done where a text begins and where the room
        may be used up. In between, tokens are counted here.
        """
        known = self.counted.get()
        if known is None or known.counter is not counter or length > 1 or known.tokens > room:
            tokens = int(counter)
        else:
            tokens = known.tokens
        self.counted.set(Counted(counter, tokens + length))
        return tokens


def _rotary_border(stack: PreTrainedModel) -> int | None:
    """The length from which on rotary frequencies depend on the length, where they do."""
    rope = getattr(stack.config, "rope_parameters", None) or {}
    kinds = [x for x in rope.values() if isinstance(x, dict)] or [rope]
    borders = []
    for kind in kinds:
        if kind.get("rope_type") == "longrope":
            borders.append(kind.get("original_max_position_embeddings"))
        elif kind.get("rope_type") == "dynamic":
            borders.append(getattr(stack.config, "max_position_embeddings", None))
    return min((int(border) for border in borders if border), default=None)


def _longest(stack: PreTrainedModel) -> int | None:
    """The length that a model with rotary positions was made for."""
    rotates = any(_turns(name) for name, _ in stack.named_buffers())
    return getattr(stack.config, "max_position_embeddings", None) if rotates else None


def _own_modules(stack: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """The stack's modules, without those of other models inside it (towers for images or sound)."""
    others = [m for m in stack.modules() if isinstance(m, PreTrainedModel) and m is not stack]
    foreign = {module for other in others for module in other.modules()}
    return [(name, m) for name, m in stack.named_modules() if m not in foreign]


def _embeds_positions(name: str) -> bool:
    leaf = name.rpartition(".")[2]
    return leaf == "wpe" or "position_emb" in leaf or "embed_pos" in leaf


def _table_size(stack: PreTrainedModel) -> int | None:
    """The number of positions that are known, where the stack adds what a table has of them."""
    for name, module in _own_modules(stack):
        if isinstance(module, nn.Embedding) and _embeds_positions(name):
            return _rows(module) - getattr(module, "offset", 0)
    sines = getattr(stack, "pos_encoding", None)
    return len(sines) if isinstance(sines, Tensor) and sines.ndim == 2 else None


def _rows(table: nn.Embedding) -> int:
    """Of its weight, which may be a new one, or what it was made with where that is in shards."""
    return len(table.weight) if table.weight.ndim == 2 else table.num_embeddings


def position_modules(stack: PreTrainedModel) -> list[nn.Module]:
    """The modules that `Places` looks at: tables, what counts for them, and what turns keys."""
    own = _own_modules(stack)
    found = [module for name, module in own if _embeds_positions(name)]
    numbering = _numbering(stack)
    found += [] if numbering is None else [numbering.embeddings]
    return found + [m for _, m in own if _turning(m)]


def _turns(buffer: str) -> bool:
    return buffer.endswith("inv_freq")


def _turning(module: nn.Module) -> dict[str, Tensor]:
    """What the module turns keys by, by attribute: frequencies ``[T]``, or a table's place 1."""
    found = {name: x for name, x in module.named_buffers(recurse=False) if _turns(name)}
    table = turning_table(module)
    return found if table is None else found | {"embed_positions": table[1:2]}


def frequencies(module: nn.Module) -> dict[str, Tensor]:
    """The same in float64, without what accelerate keeps elsewhere between forwards."""
    found = _turning(module).items()
    return {name: x.detach().to("cpu", torch.float64) for name, x in found if not x.is_meta}


def known_positions(model: nn.Module, tokens: nn.Module | None) -> int | None:
    """How many tokens every stack of ``model`` has places for, where it has a table of them.

    Args:
        model: the model.
        tokens: what embeds its tokens: a stack without it is a tower, with places for patches.
    """
    found = []
    for stack in model.modules():
        if not isinstance(stack, PreTrainedModel) or not _embeds(stack, tokens):
            continue
        if (size := _table_size(stack)) is not None:
            numbering = _numbering(stack)
            found.append(size - (0 if numbering is None else numbering.first))
    return min(found, default=None)


def _embeds(stack: PreTrainedModel, tokens: nn.Module | None) -> bool:
    """Whether the stack itself, and no other model inside it, embeds tokens."""
    weight = getattr(tokens, "weight", None)  # which several modules may share
    return weight is not None and any(
        isinstance(module, nn.Embedding) and module.weight is weight
        for _, module in _own_modules(stack)
    )


def _turning_size(stack: PreTrainedModel) -> int | None:
    """The number of positions that attention modules have sines and cosines for."""
    return min((len(table) for table in turning_tables(stack)), default=None)


def turning_tables(model: nn.Module) -> list[Tensor]:
    """``[positions, 2 T]`` each: the sines and the cosines that modules turn keys by (GPT-J's)."""
    return [table for module in model.modules() if (table := turning_table(module)) is not None]


def turning_table(module: nn.Module) -> Tensor | None:
    """The module's own table of that kind, if it has one.

    GPT-J's and CodeGen's attentions have one each, and from transformers 5.24 on their rotary
    embedding has the only one.
    """
    table = getattr(module, "embed_positions", None)
    return table if isinstance(table, Tensor) and table.ndim == 2 else None


def _tables(stack: PreTrainedModel) -> list[nn.Module]:
    """The modules that the stack has positions looked up by."""
    found = []
    for name, module in _own_modules(stack):
        if _embeds_positions(name):
            names = argument_names(module)
            if isinstance(module, nn.Embedding) or counter_of(names):
                found.append(module)
    return found


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


def _numbering(stack: PreTrainedModel) -> _Numbering | None:
    names = argument_names(stack)
    for name, module in _own_modules(stack):
        count = getattr(module, "create_position_ids_from_input_ids", None)
        if count is None and not hasattr(module, "create_position_ids_from_inputs_embeds"):
            continue
        if _embeds_positions(name) and "position_ids" not in names:
            continue  # a table that counts for itself, and is told how far the text is moved
        if count is None or _embeds_positions(name) or not _counts_on(count):
            raise refusal(stack, f"{name} counts positions in a way that is not known here")
        return _Numbering(module)
    return None


def _counts_on(count: Callable[..., Any]) -> bool:
    return counter_of(inspect.signature(count).parameters) is not None


def counter_of(names: Container[str]) -> str | None:
    """The argument, if any, that says how many tokens are cached."""
    return next((name for name in COUNTERS if name in names), None)


def _counts_mask(stack: PreTrainedModel) -> bool:
    """Whether the model's positions count the mask, gaps included (OPT's family)."""
    return any(
        isinstance(module, nn.Embedding) and "attention_mask" in argument_names(module)
        for _, module in _own_modules(stack)
    )
