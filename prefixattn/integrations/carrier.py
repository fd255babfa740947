"""What one forward of a stack of layers hands to its attention layers, through their keywords."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from prefixattn.api import Repeated
from prefixattn.choose import choose
from prefixattn.integrations.documents import Documents

KEYWORD = "prefix_attention"
"""The keyword a `Carrier` travels under."""

SLOT = "prefixattn_slot"
"""The attribute of a target attention module: its place among the slots of its stack."""

CAUSAL = "prefixattn_causal"
"""The attribute of every attention module of an attached model: whether it hides what is behind."""


class Span(NamedTuple):
    """Where the keys of one layer lie: how many there are, and which one is query 0's own.

    ``query_offset`` None is the last ``M`` of them; static caches give a tensor. ``dropped`` keys
    were before them, which a sliding cache has let go.
    """

    key_length: int
    query_offset: int | Tensor | None
    dropped: int | Tensor = 0


class Slot(NamedTuple):
    """What is known of one target layer once and for all.

    ``causal``: a query sees nothing that stands behind it. ``chunk`` is the size of the pieces of
    text that do not see each other, where a layer has such.
    ``crosses``: its keys are another stack's output; it has neither places nor a cache that grows.
    ``name`` is the module's, where it is asked for.
    """

    cache_layer: int
    causal: bool = True
    window: int | None = None
    chunk: int | None = None
    crosses: bool = False
    name: str = ""


@dataclass(frozen=True)
class Entry:
    """The prefix of one layer, as `prefixattn.prefix_attention` takes it.

    ``bias`` broadcasts to ``[B, H, M, P]``.
    """

    key: Tensor  # [R, H_kv, P, D]
    value: Tensor  # [R, H_kv, P, D_v]
    index: Tensor | None = None  # [B]
    lengths: Tensor | None = None  # [R]
    gate: Tensor | None = None  # [H]
    bias: Tensor | None = None


@dataclass(frozen=True)
class Options:
    """How a prefix lies among positions, and what computes the attention; see `attach`."""

    prefix_in_window: str
    positions: str
    implementation: str

    def __post_init__(self) -> None:
        allowed = {
            "prefix_in_window": ("positions", "visible"),
            "positions": ("shift", "keep"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {values}, got {getattr(self, name)!r}")
        choose(self.implementation)  # refuses what the first forward would


class Carrier:
    """The prefix of one forward, and what its layers must know about the sequence.

    Not a dataclass: frameworks that move inputs between devices would take it apart. Checkpointing
    keeps it with the layer's other arguments, so that a recomputation sees what the forward saw,
    whatever has run in between.
    """

    def __init__(
        self,
        entries: Sequence[Entry | None],
        spans: Sequence[Span],
        slots: Sequence[Slot],
        positions: Tensor,
        options: Options,
        mask: Tensor | None,
        *,
        unpadded: bool,
        documents: Documents | None,
    ) -> None:
        self.entries = entries  # per slot; None: no prefix now
        self.spans = spans  # per slot
        self.slots = slots
        self.positions = positions  # [B or 1, M]: text tokens before each, as windows count
        self.options = options
        self.mask = mask  # [B, N] of all the text, as the caller gave it
        self.unpadded = unpadded  # a mask [B, N] hides nothing
        self.documents = documents  # of packed rows
        self.attend = Repeated()
        self.kept: dict[object, tuple[Tensor, object]] = {}  # what layers that see alike share
