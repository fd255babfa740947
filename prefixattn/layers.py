"""The layers of a prefix: their shapes, their order in one flat tensor, and the rules they keep."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypedDict, TypeVar

from torch import Tensor, nn

from prefixattn.scalars import integer, real

T = TypeVar("T")


class LayerShape(NamedTuple):
    """What one layer asks of its prefix: ``key [H_kv, P, D]`` and ``value [H_kv, P, D_v]``."""

    num_heads: int
    key_dim: int
    value_dim: int

    @property
    def width(self) -> int:
        """Numbers one prefix token holds in this layer."""
        return self.num_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True)
class PrefixBatch:
    """What one forward attends to, per layer: ``R`` entries, of which each row reads one.

    Attributes:
        pairs: per layer key ``[R, H_kv, P, D]`` and value ``[R, H_kv, P, D_v]``; None where a
            layer has no prefix.
        index: int ``[rows]``, the entry of each row, -1 for none. None: one entry serves all rows,
            or ``R`` are one for each.
        lengths: int ``[R]``, used tokens of each entry. None: all ``P``.
        gates: per layer float ``[H]``, the form of LLaMA-Adapter (``out = seq + gate * prefix``).
            None: one softmax.
    """

    pairs: Sequence[tuple[Tensor, Tensor] | None]
    index: Tensor | None = None
    lengths: Tensor | None = None
    gates: Sequence[Tensor | None] | None = None


Positions = Literal["shift", "keep"]
"""Where a text begins behind ``P`` prefix tokens: at position ``P``, or at 0 as without them."""


class Training(TypedDict, total=False):
    """How a prefix trains: keywords of `prefixattn.Prefix` that its initialisers pass on."""

    num_frozen_tokens: int
    dropout: float


class Options(Training, total=False):
    """All keywords of `prefixattn.Prefix`."""

    layers: Sequence[int] | None
    num_layers: int | None


class PrefixSource(nn.Module):
    """What `prefixattn.attach` takes: a module that says what each forward attends to."""

    @property
    def num_tokens(self) -> int:
        """``P``, the tokens of the longest entry."""
        raise NotImplementedError

    @property
    def layer_shapes(self) -> list[LayerShape | None]:
        """Per layer of the model, None where a layer has no prefix."""
        raise NotImplementedError

    @property
    def num_layers(self) -> int:
        """Layers of the model, those without a prefix too."""
        return len(self.layer_shapes)

    def batch(self) -> PrefixBatch:
        """What a forward of the model attends to. Called once per forward.

        The same object as for the token before says that its numbers are the same.
        """
        raise NotImplementedError


def spread(items: Iterable[T], layers: Sequence[int], num_layers: int) -> list[T | None]:
    """One place per layer: ``items`` in those that ``layers`` names, None in the others."""
    places: list[T | None] = [None] * num_layers
    for layer, item in zip(layers, items, strict=True):
        places[layer] = item
    return places


def split_layers(flat: Tensor, shapes: Sequence[LayerShape]) -> list[tuple[Tensor, Tensor]]:
    """Views of ``flat [P, sum of widths]`` per layer, each token ``key, value`` layer by layer.

    For equal layers this is PEFT's order, ``flat.view(P, 2 * L, H_kv, D)``.
    """
    pairs = []
    for shape, part in zip(shapes, flat.split([s.width for s in shapes], dim=1), strict=True):
        sizes = [shape.num_heads * shape.key_dim, shape.num_heads * shape.value_dim]
        key, value = part.split(sizes, dim=1)
        pairs.append(
            (
                key.view(-1, shape.num_heads, shape.key_dim).transpose(0, 1),  # [H_kv, P, D]
                value.view(-1, shape.num_heads, shape.value_dim).transpose(0, 1),
            )
        )
    return pairs


def check_count(name: str, count: Any) -> int:
    """``count``, which must be a positive integer; ``name`` is the argument it came in."""
    found = integer(count)
    if found is None or found < 1:
        raise ValueError(f"{name} must be a positive integer, got {count!r}")
    return found


def check_number(name: str, number: Any, low: float, high: float) -> float:
    """``number``, which must be in ``[low, high)``; ``name`` is the argument it came in."""
    found = real(number)
    if found is None or not low <= found < high:
        expected = f"at least {low}" if high == math.inf else f"in [{low}, {high})"
        raise ValueError(f"{name} must be {expected}, got {number!r}")
    return float(found)


def check_shapes(shapes: Iterable[LayerShape]) -> list[LayerShape]:
    """What each layer asks for, whose numbers must be positive integers."""
    found = []
    for i, shape in enumerate(shapes):
        if len(shape) != len(LayerShape._fields):
            expected = ", ".join(LayerShape._fields)
            raise ValueError(f"shapes[{i}] must be ({expected}), got {shape!r}")
        numbers = zip(LayerShape._fields, shape, strict=True)
        found.append(LayerShape(*(check_count(f"shapes[{i}].{n}", x) for n, x in numbers)))
    return found


def check_layers(
    layers: Sequence[int] | None, num_layers: int, count: int | None = None
) -> list[int]:
    """Which of ``num_layers`` have a prefix, in order; None is all.

    Args:
        layers: increasing, at least 0 and below ``num_layers``.
        num_layers: layers of the model.
        count: how many there must be, where that is known: one for each of the keys.
    """
    num_layers = check_count("num_layers", num_layers)
    given = list(range(num_layers)) if layers is None else list(layers)
    chosen = [layer for layer in map(integer, given) if layer is not None]
    if len(chosen) != len(given) or not chosen or chosen != sorted(set(chosen)):
        raise ValueError(f"layers must be increasing integers, at least one, got {given}")
    if chosen[0] < 0 or chosen[-1] >= num_layers:
        raise ValueError(f"layers must be in [0, {num_layers}), got {chosen}")
    if count is not None and len(chosen) != count:
        raise ValueError(f"layers must name one layer for each of {count} keys, got {chosen}")
    return chosen


def check_pairs(keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Hold the tensors of a prefix to the rules of `Prefix`."""
    if not len(keys):
        raise ValueError("keys must hold one tensor per layer, got none")
    if len(keys) != len(values):
        raise ValueError(f"values must be as many as keys, {len(keys)}, got {len(values)}")
    num_tokens = None
    for i, (key, value) in enumerate(zip(keys, values, strict=True)):
        for name, tensor in ((f"keys[{i}]", key), (f"values[{i}]", value)):
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                raise TypeError(f"{name} must be floating point, got {describe(tensor)}")
            if tensor.ndim != 3 or 0 in tensor.shape:
                raise ValueError(
                    f"{name} must be [H_kv, P, D] with no empty dimension, got "
                    f"{tuple(tensor.shape)}"
                )
        num_tokens = key.shape[1] if num_tokens is None else num_tokens
        if key.shape[1] != num_tokens:
            raise ValueError(
                f"keys[{i}] must hold P = {num_tokens} tokens like keys[0], got {key.shape[1]}"
            )
        if value.shape[:2] != key.shape[:2]:
            raise ValueError(
                f"values[{i}] must begin with the key's [H_kv, P] = {tuple(key.shape[:2])}, got "
                f"{tuple(value.shape[:2])}"
            )
        if (value.dtype, value.device) != (key.dtype, key.device):
            raise ValueError(
                f"values[{i}] must be {key.dtype} on {key.device} like keys[{i}], got "
                f"{value.dtype} on {value.device}"
            )


def describe(thing: object) -> str:
    """The dtype of a tensor, the type of anything else."""
    return str(thing.dtype) if isinstance(thing, Tensor) else f"a {type(thing).__name__}"
