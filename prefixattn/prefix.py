"""Prefixes: the trained or shared keys and values of every layer, as modules."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, Unpack

import torch
from torch import Tensor, nn

from prefixattn.files import write_json, write_tensors
from prefixattn.initialise import (
    Start,
    master_copy,
    places_in,
    random_text,
    start_at_random,
    start_from_text,
)
from prefixattn.kept import Kept, stores
from prefixattn.layers import (
    LayerShape,
    Positions,
    PrefixBatch,
    PrefixSource,
    Training,
    check_count,
    check_layers,
    check_number,
    check_pairs,
    spread,
)
from prefixattn.ranks import whole
from prefixattn.scalars import integer
from prefixattn.stored import (
    CONFIG_FILE,
    ENCODER_DECODER_FILE,
    FORMAT,
    FORMAT_VERSION,
    TENSORS_FILE,
    StoredPrefix,
    as_metadata,
    read_config,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Prefix(PrefixSource):
    """The prefix of a model: one key and one value per layer, in layer order, after RoPE.

    Args:
        keys: per layer ``[H_kv, P, D]``, floating point. ``P`` is one for all layers; heads and
            head dims may differ by layer.
        values: per layer ``[H_kv, P, D_v]``, of the key's dtype and device.
        num_frozen_tokens: the first tokens, fewer than ``P``, which never train: they are buffers.
        dropout: share of the numbers in keys and values that each training forward sets to zero,
            the others growing to make up for it (Li & Liang, 2021).
        layers: those that have a prefix, for which ``keys`` and ``values`` are. None: all.
        num_layers: layers of the model; needed with ``layers``.

    The tensors become parameters; they are copied. Half-precision tensors are kept in float32, as
    PEFT keeps them: they are cast to the model's dtype once per forward.

    Attributes:
        keys: per layer that has a prefix, the part that trains, ``[H_kv, P - frozen, D]``.
        values: ``[H_kv, P - frozen, D_v]`` likewise.
        layers: those that have a prefix.
        positions: the policy that the keys were made for, which ``attach`` takes where none is
            named: ``"shift"``, or ``"keep"``.

    Raises:
        ValueError: no layers, or shapes or numbers that do not fit together.
        TypeError: something that is not a floating-point tensor.
    """

    keys: nn.ParameterList
    values: nn.ParameterList
    layers: list[int]
    kind: ClassVar[str] = "prefix"
    positions: Positions = "shift"
    saved_beside = False
    """Whether the PeftModel that it is attached to has it in its files."""

    _kinds: ClassVar[dict[str, "type[Prefix]"]] = {}

    def __init_subclass__(cls, *, kind: str | None = None, **keywords: Any) -> None:
        """Subclasses that files name give their ``kind``."""
        super().__init_subclass__(**keywords)
        if kind is not None:
            cls.kind = kind
            Prefix._kinds[kind] = cls

    def __init__(
        self,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        *,
        num_frozen_tokens: int = 0,
        dropout: float = 0.0,
        layers: Sequence[int] | None = None,
        num_layers: int | None = None,
    ) -> None:
        super().__init__()
        check_pairs(keys, values)
        self._place(layers, num_layers, len(keys), dropout)
        count, num_tokens = integer(num_frozen_tokens), keys[0].shape[1]
        if count is None or not 0 <= count < num_tokens:
            raise ValueError(
                f"num_frozen_tokens must be in [0, {num_tokens}), fewer than all, got "
                f"{num_frozen_tokens!r}"
            )
        self.num_frozen_tokens = count
        self._joined: Kept[list[tuple[Tensor, Tensor]]] = Kept()
        with torch.inference_mode(False):  # an inference tensor could never be trained
            self.keys = nn.ParameterList([nn.Parameter(master_copy(k[:, count:])) for k in keys])
            self.values = nn.ParameterList(
                [nn.Parameter(master_copy(v[:, count:])) for v in values]
            )
            for i, pair in enumerate(zip(keys, values, strict=True) if count else ()):
                for name, tensor in zip(frozen_names(i), pair, strict=True):
                    self.register_buffer(name, master_copy(tensor[:, :count]))

    def _place(
        self, layers: Sequence[int] | None, num_layers: int | None, count: int, dropout: float
    ) -> None:
        """Check and keep what is common to all kinds of prefixes."""
        if layers is not None and num_layers is None:
            raise ValueError("num_layers must be given with layers, got None")
        self._num_layers = check_count("num_layers", count if num_layers is None else num_layers)
        self.layers = check_layers(layers, self._num_layers, count)
        self.dropout = check_number("dropout", dropout, 0, 1)
        self._ready: Kept[PrefixBatch] = Kept()

    @property
    def num_layers(self) -> int:
        """Layers of the model, those without a prefix too."""
        return self._num_layers

    @property
    def num_tokens(self) -> int:
        """``P``, the prefix tokens per layer."""
        return self.num_frozen_tokens + int(self.keys[0].shape[1])

    @property
    def layer_shapes(self) -> list[LayerShape | None]:
        """Per layer of the model, None where it has no prefix."""
        return spread(self._shapes(), self.layers, self.num_layers)

    def _shapes(self) -> list[LayerShape]:
        """One per layer that has a prefix."""
        pairs = zip(self.keys, self.values, strict=True)
        return [LayerShape(key.shape[0], key.shape[2], value.shape[2]) for key, value in pairs]

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        """Per layer that has a prefix ``(key [H_kv, P, D], value [H_kv, P, D_v])``, no dropout."""
        trained = list(zip(self.keys, self.values, strict=True))
        if hasattr(self.keys[0], "ds_status"):
            trained = [(_whole(key, self), _whole(value, self)) for key, value in trained]
        if not self.num_frozen_tokens:
            return trained
        frozen = [
            (getattr(self, key), getattr(self, value))
            for key, value in map(frozen_names, range(len(trained)))
        ]

        def join() -> list[tuple[Tensor, Tensor]]:
            return [
                (torch.cat([first[0], then[0]], dim=1), torch.cat([first[1], then[1]], dim=1))
                for first, then in zip(frozen, trained, strict=True)
            ]

        return self._joined.of([x for pair in frozen + trained for x in pair], join)

    def batch(self) -> PrefixBatch:
        """What a forward of the model attends to: one entry for all rows."""

        def make() -> PrefixBatch:
            pairs = [(self._dropped(k)[None], self._dropped(v)[None]) for k, v in self()]
            return PrefixBatch(spread(pairs, self.layers, self.num_layers), gates=self._gates())

        if self.training and self.dropout:
            return make()
        return self._ready.of(self._depends(), make)

    def _depends(self) -> list[Tensor]:
        """The tensors that the keys and values are computed from."""
        return [x for store in stores(self) for x in store.values() if x is not None]

    def _gates(self) -> Sequence[Tensor | None] | None:
        """Per layer of the model, for a kind that has gates."""
        return None

    def _dropped(self, tensor: Tensor) -> Tensor:
        if not (self.training and self.dropout):
            return tensor
        return nn.functional.dropout(tensor, self.dropout)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Say that the files PEFT makes of such a state do not hold what trains here."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        adapted = any(".base_layer." in name for name in destination)
        if adapted and not self.saved_beside and any(p.requires_grad for p in self.parameters()):
            warnings.warn(
                "the files that PEFT saves of this model hold its adapters, and not the prefix, "
                "which trains too: save it by Prefix.save_pretrained, or attach it to the "
                "PeftModel, after adding adapters, whose save_pretrained then writes both",
                stacklevel=2,
            )

    def extra_repr(self) -> str:
        where = "" if len(self.layers) == self.num_layers else f", layers={self.layers}"
        frozen = f", num_frozen_tokens={n}" if (n := self.num_frozen_tokens) else ""
        dropout = f", dropout={self.dropout}" if self.dropout else ""
        return f"num_tokens={self.num_tokens}, num_layers={self.num_layers}{where}{frozen}{dropout}"

    # Initialisation

    @classmethod
    def from_text(
        cls,
        model: "PreTrainedModel",
        input_ids: Tensor,
        *,
        num_tokens: int | None = None,
        part: str | None = None,
        layers: Sequence[int] | None = None,
        **training: Unpack[Training],
    ) -> Self:
        """The keys and values that ``model`` itself computes for a text.

        With such a prefix a causal model continues as if the text stood before its input; as a
        start for training it is the best one known (PEFT's MetaMathQA comparison: 41.6 % against
        18.6 % from random).

        Args:
            model: a transformers model that ``attach`` supports. A prefix that it has does not
                come into this one.
            input_ids: ``[P]`` or ``[1, P]`` integer token ids.
            num_tokens: take the first ones of the text only.
            part: of an encoder-decoder, what the prefix is for: "encoder", "decoder" or "cross".
                None: the decoder, and all of a model of one stack. A decoder whose encoder reads no
                text (Whisper's) reads the text beside an encoder's output of zeros.
            layers: those that get a prefix. None: all.
            training: ``num_frozen_tokens`` and ``dropout``, as for `Prefix`.
        """
        return cls._started(start_from_text(model, input_ids, num_tokens, part, layers), training)

    @classmethod
    def from_random_text(
        cls,
        model: "PreTrainedModel",
        num_tokens: int,
        *,
        generator: torch.Generator | None = None,
        part: str | None = None,
        layers: Sequence[int] | None = None,
        **training: Unpack[Training],
    ) -> Self:
        """`from_text` of random tokens, without those that the configuration names as special.

        Args:
            model: the transformers model it is for.
            num_tokens: ``P``, at least 1.
            generator: a CPU generator.
            part: as for `from_text`.
            layers: as for `from_text`.
            training: as for `from_text`.
        """
        ids = random_text(model, num_tokens, generator)
        return cls._started(start_from_text(model, ids, None, part, layers), training)

    @classmethod
    def zeros(
        cls,
        model: "PreTrainedModel",
        num_tokens: int,
        *,
        part: str | None = None,
        layers: Sequence[int] | None = None,
        **training: Unpack[Training],
    ) -> Self:
        """A prefix of zeros: each token takes its share of the softmax and adds nothing."""
        return cls.random(model, num_tokens, std=0.0, part=part, layers=layers, **training)

    @classmethod
    def random(
        cls,
        model: "PreTrainedModel",
        num_tokens: int,
        std: float = 1.0,
        generator: torch.Generator | None = None,
        *,
        part: str | None = None,
        layers: Sequence[int] | None = None,
        **training: Unpack[Training],
    ) -> Self:
        """A prefix drawn from a normal distribution, as PEFT's default draws it (``std=1``).

        Args:
            model: the transformers model it is for.
            num_tokens: ``P``, at least 1.
            std: standard deviation, at least 0.
            generator: a CPU generator; the draw does not depend on the model's device.
            part: as for `from_text`.
            layers: as for `from_text`.
            training: as for `from_text`.
        """
        start = start_at_random(places_in(model, part, layers), num_tokens, std, generator)
        return cls._started(start, training)

    @classmethod
    def _started(cls, start: Start, training: Training) -> Self:
        """A prefix of this kind from what an initialiser gives."""
        return cls(
            start.keys,
            start.values,
            layers=start.layers,
            num_layers=start.num_layers,
            **training,
        )

    # Files

    def save_pretrained(self, path: str | Path) -> None:
        """Write the prefix into the folder ``path``: safetensors and a small JSON file.

        Each file is written whole or not at all, and one that is left from another save is refused
        on reading. ``layers.{i}.key`` and ``layers.{i}.value`` are what the attention sees,
        whatever kind of prefix this is. An earlier prefix in the folder is replaced.

        A prefix that FSDP2, tensor parallelism or DeepSpeed's ZeRO-3 has spread over ranks is
        gathered: every rank calls this, and rank 0 writes.
        """
        with whole(self) as writes:
            if writes:
                self._write(Path(path))

    def _write(self, folder: Path) -> None:
        config = self._config()
        tensors = self._own_tensors()  # first: ZeRO-3 takes a network apart behind its forward
        with torch.no_grad():
            for layer, (key, value) in zip(self.layers, self(), strict=True):
                tensors[f"layers.{layer}.key"] = key
                tensors[f"layers.{layer}.value"] = value
        write_tensors(folder / TENSORS_FILE, tensors, as_metadata(config))
        write_json(folder / CONFIG_FILE, config)
        (folder / ENCODER_DECODER_FILE).unlink(missing_ok=True)  # it names parts, no longer in use

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Prefix":
        """The prefix saved in the folder ``path``, of the kind that was saved.

        The folder may also be that of a model that was saved with a prefix attached, as a Trainer's
        checkpoint is. Its weights do not say everything of the prefix: a warning names what.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is truncated, of another format, or the two do not fit together.
        """
        folder = Path(path)
        if not (folder / CONFIG_FILE).is_file() and (found := _attached(folder)) is not None:
            return found
        kind = read_config(folder).get("kind")
        if not isinstance(kind, str) or kind not in cls._kinds:
            raise ValueError(
                f"{folder / CONFIG_FILE}: kind must be one of {sorted(cls._kinds)}, got {kind!r}"
            )
        stored = StoredPrefix.open(folder)
        prefix = cls._kinds[kind]._load(stored)
        prefix.positions = stored.positions(prefix.positions)
        return prefix

    def _own_tensors(self) -> dict[str, Tensor]:
        """What this kind of prefix needs to resume training beside the layers themselves."""
        return {}

    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "kind": self.kind,
            "num_tokens": self.num_tokens,
            "num_layers": self.num_layers,
        }
        if len(self.layers) != self.num_layers:
            config["layers"] = self.layers
        if self.num_frozen_tokens:
            config["num_frozen_tokens"] = self.num_frozen_tokens
        if self.dropout:
            config["dropout"] = self.dropout
        if self.positions != type(self).positions:
            config["positions"] = self.positions
        return config

    @classmethod
    def _load(cls, stored: StoredPrefix) -> "Prefix":
        keys, values = zip(*stored.pairs(), strict=True)
        return cls(keys, values, **stored.options())


Prefix._kinds["prefix"] = Prefix


def _attached(folder: Path) -> Prefix | None:
    """The prefix among a model's weights; None where the folder holds no such weights."""
    from prefixattn.checkpoints.attached import is_attached, load_attached

    if not is_attached(folder):
        return None
    found = load_attached(folder)
    if not isinstance(found, Prefix):
        raise ValueError(
            f"{folder} holds prefixes of several parts of an encoder-decoder: read them by "
            "EncoderDecoderPrefix.from_pretrained"
        )
    return found


def frozen_names(i: int) -> tuple[str, str]:
    """The buffers of the frozen tokens of the key and value at place ``i`` of ``layers``."""
    return f"frozen_key_{i}", f"frozen_value_{i}"


def _whole(parameter: Any, module: nn.Module) -> Tensor:
    """A view of what DeepSpeed's ZeRO-3 holds in parts, made while the forward of ``module`` runs.

    ZeRO-3 gathers what is registered for a module before its later forwards and backwards, and
    takes it apart behind them; the view stays.
    """
    if parameter.ds_status.name == "NOT_AVAILABLE":
        import deepspeed

        deepspeed.zero.register_external_parameter(module, parameter)
        parameter.all_gather()
    return parameter.view_as(parameter)
