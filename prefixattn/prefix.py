"""Prefixes: the trained or shared keys and values of every layer, as modules."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prefixattn.files import (
    check_floating,
    read_json,
    read_number,
    read_tensors,
    write_json,
    write_tensors,
)
from prefixattn.layers import LayerShape, check_count, check_pairs, describe, split_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TENSORS_FILE = "prefix.safetensors"
CONFIG_FILE = "prefix_config.json"
FORMAT = "prefixattn"
FORMAT_VERSION = 1


class Prefix(nn.Module):
    """The prefix of a model: one key and one value per layer, in layer order, after RoPE.

    Args:
        keys: per layer ``[H_kv, P, D]``, floating point. ``P`` is one for all layers; heads and
            head dims may differ by layer.
        values: per layer ``[H_kv, P, D_v]``, of the key's dtype and device.

    The tensors become parameters; they are copied. Half-precision tensors are kept in float32, as
    PEFT keeps them: they are cast to the model's dtype once per forward.

    Raises:
        ValueError: no layers, or shapes that do not fit together.
        TypeError: something that is not a floating-point tensor.
    """

    keys: nn.ParameterList
    values: nn.ParameterList

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        super().__init__()
        check_pairs(keys, values)
        with torch.inference_mode(False):  # an inference tensor could never be trained
            self.keys = nn.ParameterList([nn.Parameter(_master_copy(key)) for key in keys])
            self.values = nn.ParameterList([nn.Parameter(_master_copy(v)) for v in values])

    @property
    def num_layers(self) -> int:
        return len(self.layer_shapes)

    @property
    def num_tokens(self) -> int:
        """``P``, the prefix tokens per layer."""
        return int(self.keys[0].shape[1])

    @property
    def layer_shapes(self) -> list[LayerShape]:
        pairs = zip(self.keys, self.values, strict=True)
        return [LayerShape(key.shape[0], key.shape[2], value.shape[2]) for key, value in pairs]

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        """Per layer ``(key [H_kv, P, D], value [H_kv, P, D_v])``."""
        return list(zip(self.keys, self.values, strict=True))

    def extra_repr(self) -> str:
        return f"num_tokens={self.num_tokens}, num_layers={self.num_layers}"

    # Initialisation

    @classmethod
    def from_text(cls, model: "PreTrainedModel", input_ids: Tensor) -> "Prefix":
        """The keys and values that ``model`` itself computes for a text.

        With such a prefix a causal model continues as if the text stood before its input; as a
        start for training it is the best one known (PEFT's MetaMathQA comparison: 41.6 % against
        18.6 % from random).

        Args:
            model: a transformers model that ``attach`` supports, not attached to.
            input_ids: ``[P]`` or ``[1, P]`` integer token ids.
        """
        from prefixattn.integrations.survey import own_sites, survey

        sites = own_sites(survey(model, _token_row(input_ids)))
        return cls([site.key[0] for site in sites], [site.value[0] for site in sites])

    @classmethod
    def zeros(cls, model: "PreTrainedModel", num_tokens: int) -> "Prefix":
        """A prefix of zeros: each token takes its share of the softmax and adds nothing."""
        return cls.random(model, num_tokens, std=0.0)

    @classmethod
    def random(
        cls,
        model: "PreTrainedModel",
        num_tokens: int,
        std: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> "Prefix":
        """A prefix drawn from a normal distribution, as PEFT's default draws it (``std=1``).

        Args:
            model: the transformers model it is for.
            num_tokens: ``P``, at least 1.
            std: standard deviation, at least 0.
            generator: a CPU generator; the draw does not depend on the model's device.
        """
        check_count("num_tokens", num_tokens)
        if not std >= 0:
            raise ValueError(f"std must be at least 0, got {std}")
        keys, values = [], []
        for shape, like in layer_shapes_of(model):
            draws = [
                torch.randn(shape.num_heads, num_tokens, dim, generator=generator) * std
                for dim in (shape.key_dim, shape.value_dim)
            ]
            keys.append(draws[0].to(like))
            values.append(draws[1].to(like))
        return cls(keys, values)

    # Files

    def save_pretrained(self, path: str | Path) -> None:
        """Write the prefix into the folder ``path``: safetensors and a small JSON file.

        Each file is written whole or not at all. ``layers.{i}.key`` and ``layers.{i}.value`` are
        what the attention sees, whatever kind of prefix this is.
        """
        folder = Path(path)
        tensors = {}
        with torch.no_grad():
            for i, (key, value) in enumerate(self()):
                tensors[f"layers.{i}.key"] = key
                tensors[f"layers.{i}.value"] = value
        write_tensors(folder / TENSORS_FILE, tensors | self._own_tensors())
        write_json(folder / CONFIG_FILE, self._config())

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Prefix":
        """The prefix saved in the folder ``path``, of the kind that was saved.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is truncated, of another format, or the two do not fit together.
        """
        folder = Path(path)
        source = folder / CONFIG_FILE
        config = read_json(source)
        if config.get("format") != FORMAT or config.get("version") != FORMAT_VERSION:
            raise ValueError(
                f"{source}: expected format {FORMAT!r} version {FORMAT_VERSION}, got "
                f"{config.get('format')!r} version {config.get('version')!r}"
            )
        kinds: dict[str, type[Prefix]] = {"prefix": Prefix, "projected": ProjectedPrefix}
        kind = config.get("kind")
        if not isinstance(kind, str) or kind not in kinds:
            raise ValueError(f"{source}: kind must be one of {sorted(kinds)}, got {kind!r}")
        tensors = read_tensors(folder / TENSORS_FILE)
        prefix = _layers_of(tensors, config, source)
        return kinds[kind]._load(prefix, tensors, config, source)

    def _own_tensors(self) -> dict[str, Tensor]:
        """What this kind of prefix needs to resume training beside the layers themselves."""
        return {}

    def _config(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "kind": "prefix",
            "num_tokens": self.num_tokens,
            "num_layers": self.num_layers,
        }

    @classmethod
    def _load(
        cls, layers: "Prefix", tensors: Mapping[str, Tensor], config: dict[str, Any], source: Path
    ) -> "Prefix":
        return layers


class ProjectedPrefix(Prefix):
    """A prefix computed by a small network, which trains more steadily (Li & Liang, 2021).

    ``embedding [P, embedding_dim] -> linear -> tanh -> linear``, the form of PEFT's
    ``prefix_projection``. The network runs once per forward. For use without training, fold it:
    ``ProjectedPrefix.folded()`` is a plain `Prefix` with the same keys and values.

    Args:
        shapes: what each layer asks for, in layer order.
        num_tokens: ``P``.
        embedding_dim: width of the embedding.
        hidden_dim: width between the two linear maps.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        num_tokens: int,
        embedding_dim: int,
        hidden_dim: int,
    ) -> None:
        nn.Module.__init__(self)
        if not shapes:
            raise ValueError("shapes must name at least one layer, got none")
        for name, count in (
            ("num_tokens", num_tokens),
            ("embedding_dim", embedding_dim),
            ("hidden_dim", hidden_dim),
        ):
            check_count(name, count)
        self._shapes = [LayerShape(*shape) for shape in shapes]
        self.embedding = nn.Embedding(num_tokens, embedding_dim)
        self.transform = nn.Sequential(
            nn.Linear(embedding_dim, hidden_dim),
            nn.Tanh(),
            nn.Linear(hidden_dim, sum(shape.width for shape in self._shapes)),
        )

    @classmethod
    def for_model(
        cls,
        model: "PreTrainedModel",
        num_tokens: int,
        *,
        embedding_dim: int | None = None,
        hidden_dim: int = 512,
    ) -> "ProjectedPrefix":
        """A freshly initialised network for ``model``; ``embedding_dim`` as PEFT's: H_kv * D."""
        found = layer_shapes_of(model)
        shapes = [shape for shape, _ in found]
        if embedding_dim is None:
            embedding_dim = shapes[0].num_heads * shapes[0].key_dim
        return cls(shapes, num_tokens, embedding_dim, hidden_dim).to(found[0][1])

    @property
    def num_tokens(self) -> int:
        return self.embedding.num_embeddings

    @property
    def layer_shapes(self) -> list[LayerShape]:
        return list(self._shapes)

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        flat = self.transform(self.embedding.weight)  # [P, sum of widths]
        return split_layers(flat, self._shapes)

    def folded(self) -> Prefix:
        """A plain `Prefix` of the keys and values that this network gives now."""
        with torch.no_grad():
            keys, values = zip(*self(), strict=True)
        return Prefix(keys, values)

    def _own_tensors(self) -> dict[str, Tensor]:
        return {f"projection.{name}": tensor for name, tensor in self.state_dict().items()}

    def _config(self) -> dict[str, Any]:
        return super()._config() | {
            "kind": "projected",
            "embedding_dim": self.embedding.embedding_dim,
            "hidden_dim": self.transform[0].out_features,
        }

    @classmethod
    def _load(
        cls, layers: Prefix, tensors: Mapping[str, Tensor], config: dict[str, Any], source: Path
    ) -> "ProjectedPrefix":
        prefix = cls(
            layers.layer_shapes,
            layers.num_tokens,
            read_number(config, "embedding_dim", source),
            read_number(config, "hidden_dim", source),
        ).to(layers.keys[0])
        own = {
            name.removeprefix("projection."): tensor
            for name, tensor in tensors.items()
            if name.startswith("projection.")
        }
        expected = {name: tuple(tensor.shape) for name, tensor in prefix.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in own.items()}
        if found != expected:
            raise ValueError(f"{source.parent}: the projection must be {expected}, got {found}")
        prefix.load_state_dict(own)
        return prefix


def layer_shapes_of(model: "PreTrainedModel") -> list[tuple[LayerShape, Tensor]]:
    """What each layer of ``model`` asks for, with a tensor of its device and master dtype."""
    from prefixattn.integrations.survey import own_sites, survey

    sites = own_sites(survey(model))
    return [
        (
            LayerShape(site.key.shape[1], site.key.shape[3], site.value.shape[3]),
            _master_copy(site.key[:, :, :0]),
        )
        for site in sites
    ]


def _master_copy(tensor: Tensor) -> Tensor:
    """A copy to train: contiguous, and float32 where ``tensor`` is in half precision."""
    dtype = torch.float32 if tensor.dtype.itemsize < 4 else tensor.dtype
    return tensor.detach().to(dtype, copy=True).contiguous()


def _token_row(input_ids: Tensor) -> Tensor:
    if not isinstance(input_ids, Tensor) or input_ids.is_floating_point():
        raise TypeError(f"input_ids must be an integer tensor, got {describe(input_ids)}")
    row = input_ids[None] if input_ids.ndim == 1 else input_ids
    if row.ndim != 2 or row.shape[0] != 1 or row.shape[1] == 0:
        raise ValueError(
            f"input_ids must be [P] or [1, P] with P >= 1, got {tuple(input_ids.shape)}"
        )
    return row


def _layers_of(tensors: Mapping[str, Tensor], config: dict[str, Any], source: Path) -> Prefix:
    """The plain prefix in a file's tensors, held against its configuration."""
    num_layers = read_number(config, "num_layers", source)
    found = {name for name in tensors if name.startswith("layers.")}
    if 2 * num_layers != len(found):
        raise ValueError(
            f"{source.parent}: num_layers is {num_layers}, but the file holds {len(found)} layer "
            "tensors, and each layer has two"
        )
    names = [f"layers.{i}.{part}" for i in range(num_layers) for part in ("key", "value")]
    if found != set(names):
        missing, extra = sorted(set(names) - found), sorted(found - set(names))
        raise ValueError(
            f"{source.parent}: num_layers is {num_layers}, but layer tensors are missing: "
            f"{missing}, unexpected: {extra}"
        )
    for name in names:
        check_floating(name, tensors[name], source.parent / TENSORS_FILE)
    prefix = Prefix([tensors[n] for n in names[0::2]], [tensors[n] for n in names[1::2]])
    num_tokens = read_number(config, "num_tokens", source)
    if prefix.num_tokens != num_tokens:
        raise ValueError(
            f"{source.parent}: num_tokens is {num_tokens}, but the tensors hold "
            f"{prefix.num_tokens} tokens"
        )
    return prefix
