"""What one forward of the backbone hands to its attention layers, through their keywords."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from prefixattn.choose import choose

KEYWORD = "prefix_attention"
"""The keyword a `Carrier` travels under."""

SLOT = "prefixattn_slot"
"""The attribute of a target attention module: the index of its prefix layer."""


class Span(NamedTuple):
    """Where the keys of one layer lie: how many there are, and which one is query 0's own.

    ``query_offset`` None is the last ``M`` of them; static caches give a tensor.
    """

    key_length: int
    query_offset: int | Tensor | None


class Layout(NamedTuple):
    """What is known of each slot once and for all."""

    cache_layers: tuple[int, ...]
    windows: tuple[int | None, ...]


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
        pairs: Sequence[tuple[Tensor, Tensor]] | None,
        spans: Sequence[Span],
        layout: Layout,
        positions: Tensor,
        options: Options,
        *,
        unpadded: bool,
    ) -> None:
        self.pairs = pairs  # per slot key [H_kv, P, D], value [H_kv, P, D_v]; None: no prefix now
        self.spans = spans  # per slot
        self.layout = layout
        self.positions = positions  # [B or 1, M] of the text, unshifted
        self.options = options
        self.unpadded = unpadded  # a mask [B, N] hides nothing
