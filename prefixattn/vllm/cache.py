"""What a worker keeps of adapters in host memory: its own layers and heads, within a budget."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

Layers = Mapping[str, tuple[Tensor, Tensor]]


@dataclass
class AdapterCache:
    """The adapters used last, by digest. One that is larger than the budget is used and not kept.

    Attributes:
        budget: bytes of keys and values.
        counts: hits, misses and evictions since they were last taken.
    """

    budget: int
    counts: dict[str, int] = field(default_factory=dict)
    held: OrderedDict[str, Layers] = field(default_factory=OrderedDict)
    num_bytes: int = 0

    def get(self, digest: str, make: Callable[[], Layers]) -> Layers:
        """The layers of this content; ``make`` reads them where they are not held."""
        if (found := self.held.get(digest)) is not None:
            self.held.move_to_end(digest)
            self._count("hits")
            return found
        self._count("misses")
        made = make()
        size = _bytes(made)
        if size <= self.budget:
            while self.num_bytes + size > self.budget:
                _, oldest = self.held.popitem(last=False)
                self.num_bytes -= _bytes(oldest)
                self._count("evictions")
            self.held[digest] = made
            self.num_bytes += size
        return made

    def _count(self, name: str) -> None:
        self.counts[name] = self.counts.get(name, 0) + 1


def _bytes(layers: Layers) -> int:
    return sum(tensor.nbytes for pair in layers.values() for tensor in pair)
