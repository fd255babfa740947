"""A prefix that a small network computes: the reparameterisation of prefix tuning."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from prefixattn.files import check_floating, read_number
from prefixattn.initialise import Start, places_in
from prefixattn.layers import LayerShape, Training, check_count, check_shapes, split_layers
from prefixattn.prefix import Prefix
from prefixattn.stored import CONFIG_FILE, TENSORS_FILE, StoredPrefix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OWN = "projection."


class _Affine(nn.Module):
    """A linear map that is no `nn.Linear`: what is done to all of a model's is not meant for it.

    LoRA on ``target_modules="all-linear"`` would be, and libraries that quantise.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        like = nn.Linear(in_features, out_features)
        self.weight, self.bias = like.weight, like.bias

    def forward(self, x: Tensor) -> Tensor:
        """``[*, in_features] -> [*, out_features]``."""
        return nn.functional.linear(x, self.weight, self.bias)


class ProjectedPrefix(Prefix, kind="projected"):
    """A prefix computed by a small network, which trains more steadily (Li & Liang, 2021).

    ``embedding [P, embedding_dim] -> linear -> tanh -> linear``, the form of PEFT's
    ``prefix_projection``. The network runs once per forward. For use without training, fold it:
    ``ProjectedPrefix.folded()`` is a plain `Prefix` with the same keys and values.

    Args:
        shapes: what each layer that has a prefix asks for, in layer order.
        num_tokens: ``P``.
        embedding_dim: width of the embedding.
        hidden_dim: width between the two linear maps.
        dropout: as for `Prefix`.
        layers: as for `Prefix`.
        num_layers: as for `Prefix`.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        num_tokens: int,
        embedding_dim: int,
        hidden_dim: int,
        *,
        dropout: float = 0.0,
        layers: Sequence[int] | None = None,
        num_layers: int | None = None,
    ) -> None:
        nn.Module.__init__(self)
        if not len(shapes):
            raise ValueError("shapes must name at least one layer, got none")
        num_tokens = check_count("num_tokens", num_tokens)
        embedding_dim = check_count("embedding_dim", embedding_dim)
        hidden_dim = check_count("hidden_dim", hidden_dim)
        self._place(layers, num_layers, len(shapes), dropout)
        self.num_frozen_tokens = 0
        self._own_shapes = check_shapes(shapes)
        self.embedding = nn.Embedding(num_tokens, embedding_dim)
        self.transform = nn.Sequential(
            _Affine(embedding_dim, hidden_dim),
            nn.Tanh(),
            _Affine(hidden_dim, sum(shape.width for shape in self._own_shapes)),
        )

    @classmethod
    def for_model(
        cls,
        model: "PreTrainedModel",
        num_tokens: int,
        *,
        embedding_dim: int | None = None,
        hidden_dim: int = 512,
        dropout: float = 0.0,
        part: str | None = None,
        layers: Sequence[int] | None = None,
    ) -> "ProjectedPrefix":
        """A freshly initialised network for ``model``; ``embedding_dim`` as PEFT's: H_kv * D.

        ``part`` and ``layers`` are as for `Prefix.from_text`.
        """
        places = places_in(model, part, layers)
        if embedding_dim is None:
            embedding_dim = places.shapes[0].num_heads * places.shapes[0].key_dim
        return cls(
            places.shapes,
            num_tokens,
            embedding_dim,
            hidden_dim,
            dropout=dropout,
            layers=places.layers,
            num_layers=places.num_layers,
        ).to(places.like[0])

    @property
    def num_tokens(self) -> int:
        """``P``, the prefix tokens per layer."""
        return self.embedding.num_embeddings

    def _shapes(self) -> list[LayerShape]:
        return self._own_shapes

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        flat = self.transform(self.embedding.weight)  # [P, sum of widths]
        return split_layers(flat, self._own_shapes)

    def folded(self) -> Prefix:
        """A plain `Prefix` of the keys and values that this network gives now."""
        with torch.no_grad():
            keys, values = zip(*self(), strict=True)
        return Prefix(
            keys, values, dropout=self.dropout, layers=self.layers, num_layers=self.num_layers
        )

    @classmethod
    def _started(cls, start: Start, training: Training) -> NoReturn:
        raise NotImplementedError(
            f"{cls.__name__} starts from the weights of its network: use {cls.__name__}.for_model"
        )

    def _own_tensors(self) -> dict[str, Tensor]:
        return {f"{OWN}{name}": tensor for name, tensor in self.state_dict().items()}

    def _config(self) -> dict[str, Any]:
        return super()._config() | {
            "embedding_dim": self.embedding.embedding_dim,
            "hidden_dim": self.transform[0].out_features,
        }

    @classmethod
    def _load(cls, stored: StoredPrefix) -> "ProjectedPrefix":
        source = stored.folder / CONFIG_FILE
        embedding_dim = read_number(stored.config, "embedding_dim", source)
        hidden_dim = read_number(stored.config, "hidden_dim", source)
        shapes = [shape for shape in stored.layer_shapes if shape is not None]
        options = stored.options()
        if options.pop("num_frozen_tokens"):
            raise ValueError(f"{source}: a projected prefix has no frozen tokens")
        own = {name.removeprefix(OWN): tensor for name, tensor in stored.others().items()}
        for name, tensor in own.items():
            check_floating(f"{OWN}{name}", tensor, stored.folder / TENSORS_FILE)
        expected = {
            "embedding.weight": (stored.num_tokens, embedding_dim),
            "transform.0.weight": (hidden_dim, embedding_dim),
            "transform.0.bias": (hidden_dim,),
            "transform.2.weight": (sum(shape.width for shape in shapes), hidden_dim),
            "transform.2.bias": (sum(shape.width for shape in shapes),),
        }
        found = {name: tuple(tensor.shape) for name, tensor in own.items()}
        if found != expected:
            raise ValueError(f"{source.parent}: the projection must be {expected}, got {found}")
        prefix = cls(shapes, stored.num_tokens, embedding_dim, hidden_dim, **options)
        prefix.to(own["embedding.weight"].dtype).load_state_dict(own)
        return prefix
