"""Keys and values that another network computes, as a hyper-network does."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from torch import Tensor

from prefixattn.in_use import InUse
from prefixattn.initialise import places_in
from prefixattn.kept import Kept
from prefixattn.layers import (
    LayerShape,
    PrefixBatch,
    PrefixSource,
    check_count,
    check_layers,
    check_shapes,
    describe,
    spread,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ExternalPrefix(PrefixSource):
    """A place for keys and values that are activations: gradients flow to whatever made them.

    It has no parameters. Each forward runs within ``with prefix.use(keys, values):``.

    Args:
        shapes: what each layer that has a prefix asks for, in layer order.
        num_tokens: ``P``.
        layers: those that have a prefix. None: all.
        num_layers: layers of the model; needed with ``layers``.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        num_tokens: int,
        *,
        layers: Sequence[int] | None = None,
        num_layers: int | None = None,
    ) -> None:
        super().__init__()
        if not len(shapes):
            raise ValueError("shapes must name at least one layer, got none")
        self._num_tokens = check_count("num_tokens", num_tokens)
        if layers is not None and num_layers is None:
            raise ValueError("num_layers must be given with layers, got None")
        self._shapes = check_shapes(shapes)
        count = len(shapes) if num_layers is None else num_layers
        self._num_layers = check_count("num_layers", count)
        self.layers = check_layers(layers, self._num_layers, len(shapes))
        self._uses: InUse[list[tuple[Tensor, Tensor]]] = InUse(type(self).__name__)
        self._ready: Kept[PrefixBatch] = Kept()

    @classmethod
    def for_model(
        cls,
        model: "PreTrainedModel",
        num_tokens: int,
        *,
        part: str | None = None,
        layers: Sequence[int] | None = None,
    ) -> "ExternalPrefix":
        """A place for what ``model`` asks; ``part`` and ``layers`` as for `Prefix.from_text`."""
        places = places_in(model, part, layers)
        return cls(places.shapes, num_tokens, layers=places.layers, num_layers=places.num_layers)

    @property
    def num_tokens(self) -> int:
        """``P``, the prefix tokens per layer."""
        return self._num_tokens

    @property
    def layer_shapes(self) -> list[LayerShape | None]:
        """Per layer of the model, None where it has no prefix."""
        return spread(self._shapes, self.layers, self._num_layers)

    def use(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Have the forwards within this context attend to ``keys`` and ``values``.

        Args:
            keys: per layer that has a prefix ``[H_kv, P, D]``, shared by all rows, or
                ``[B, H_kv, P, D]``, one for each row.
            values: ``[H_kv, P, D_v]`` or ``[B, H_kv, P, D_v]`` likewise.

        Contexts nest. Raises at once:
            ValueError: shapes that are not those of the model.
            TypeError: something that is not a floating-point tensor.

        On entering:
            RuntimeError: another thread or task has keys and values in use.
        """
        return self._uses.hold(self._checked(keys, values))

    def batch(self) -> PrefixBatch:
        """What the forward of the model attends to: one entry for all rows, or one for each."""
        pairs = self._uses.read()
        if pairs is None:
            raise RuntimeError(
                "no keys and values are in use: run the model within "
                "`with prefix.use(keys, values):`"
            )
        return self._ready.of(
            [x for pair in pairs for x in pair],
            lambda: PrefixBatch(spread(pairs, self.layers, self._num_layers)),
        )

    def _checked(
        self, keys: Sequence[Tensor], values: Sequence[Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """Per layer, with a dimension for the entries."""
        for name, tensors in (("keys", keys), ("values", values)):
            if len(tensors) != len(self._shapes):
                raise ValueError(
                    f"{name} must hold {len(self._shapes)} tensors, one for each layer with a "
                    f"prefix, got {len(tensors)}"
                )
        rows: tuple[int, ...] | None = None
        pairs = []
        for i, (key, value, shape) in enumerate(zip(keys, values, self._shapes, strict=True)):
            for name, tensor, dim in (
                (f"keys[{i}]", key, shape.key_dim),
                (f"values[{i}]", value, shape.value_dim),
            ):
                if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                    raise TypeError(f"{name} must be floating point, got {describe(tensor)}")
                rows = tuple(tensor.shape[:-3]) if rows is None else rows
                expected = (*rows, shape.num_heads, self._num_tokens, dim)
                if tensor.shape != expected or len(rows) > 1 or 0 in rows:
                    raise ValueError(
                        f"{name} must be {expected[-3:]}, or with a dimension of rows before, the "
                        f"same for all layers, got {tuple(tensor.shape)}"
                    )
                if (tensor.dtype, tensor.device) != (keys[0].dtype, keys[0].device):
                    raise ValueError(
                        f"{name} must be {keys[0].dtype} on {keys[0].device} like keys[0], got "
                        f"{tensor.dtype} on {tensor.device}"
                    )
            pairs.append((key, value) if rows else (key[None], value[None]))
        return pairs
