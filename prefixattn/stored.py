"""A folder that holds one prefix: what it says, held to the rules before any numbers are read."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefixattn.files import (
    DTYPES,
    MOST_LAYERS,
    check_floating,
    open_tensors,
    read_json,
    read_number,
)
from prefixattn.layers import LayerShape, Positions, check_layers, spread

TENSORS_FILE = "prefix.safetensors"
CONFIG_FILE = "prefix_config.json"
ENCODER_DECODER_FILE = "encoder_decoder_prefix.json"
BESIDE = "prefix"
"""The subfolder in which a PeftModel's files have the prefix beside its own adapters."""
SAVED_WITH = "prefix_config"
"""Of the tensors' metadata, what the JSON file beside them says."""
FORMAT = "prefixattn"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class StoredPrefix:
    """A saved prefix, opened but not loaded.

    Attributes:
        folder: as `prefixattn.Prefix.save_pretrained` wrote it.
        config: its JSON file.
        layers: those of the model that have a prefix.
        layer_shapes: per layer of the model, None where it has no prefix.
        num_tokens: ``P``.
        dtype: the widest of its layers'.
    """

    folder: Path
    config: Mapping[str, Any]
    layers: Sequence[int]
    layer_shapes: Sequence[LayerShape | None]
    num_tokens: int
    dtype: torch.dtype
    stamp: tuple[int, ...]

    @classmethod
    def open(cls, folder: Path) -> "StoredPrefix":
        """Read the JSON file and the header of the tensors, and hold them against each other.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is truncated, of another format, or the two do not fit together or
                are of different saves.
        """
        config = read_config(folder)
        source = folder / CONFIG_FILE
        file = folder / TENSORS_FILE
        stamp = _stamp(file)
        num_layers = read_number(config, "num_layers", source)
        with open_tensors(file) as tensors:
            _check_saved_together(config, tensors.metadata() or {}, folder)
            names = [name for name in tensors.keys() if name.startswith("layers.")]  # noqa: SIM118
            layers = _layers(config, num_layers, len(names), source)
            _check_names(names, layers, num_layers, folder)
            slices = {name: tensors.get_slice(name) for name in names}
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            types = {name: part.get_dtype() for name, part in slices.items()}
        num_tokens = read_number(config, "num_tokens", source)
        dtype = torch.float16
        for name, kind in types.items():
            if kind not in DTYPES:
                raise ValueError(f"{file}: {name} must be floating point, got {kind}")
            dtype = torch.promote_types(dtype, DTYPES[kind])
        found = [_shape(layer, shapes, num_tokens, folder) for layer in layers]
        places = spread(found, layers, num_layers)
        return cls(folder, config, layers, places, num_tokens, dtype, stamp)

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Per layer that has a prefix, key ``[H_kv, P, D]`` and value ``[H_kv, P, D_v]``.

        They are the file's own memory on the CPU: copy them.

        Raises:
            FileNotFoundError: the file is gone.
            ValueError: the file has changed since it was opened, or holds NaN or infinity.
        """
        file = self.folder / TENSORS_FILE
        names = [f"layers.{layer}.{part}" for layer in self.layers for part in ("key", "value")]
        if _stamp(file) != self.stamp:
            raise ValueError(f"{file} has changed since it was opened")
        with open_tensors(file) as tensors:
            found = [tensors.get_tensor(name) for name in names]
        for name, tensor in zip(names, found, strict=True):
            check_floating(name, tensor, file)
        return list(zip(found[0::2], found[1::2], strict=True))

    def others(self) -> dict[str, Tensor]:
        """The tensors that are no layers, by name."""
        with open_tensors(self.folder / TENSORS_FILE) as tensors:
            names = [name for name in tensors.keys() if not name.startswith("layers.")]  # noqa: SIM118
            return {name: tensors.get_tensor(name) for name in names}

    def positions(self, default: Positions) -> Positions:
        """The position policy that the file names."""
        named = self.config.get("positions", default)
        if named not in ("shift", "keep"):
            raise ValueError(
                f"{self.folder / CONFIG_FILE}: positions must be shift or keep, got {named!r}"
            )
        return named

    def options(self) -> dict[str, Any]:
        """The keywords of `prefixattn.Prefix` that the file keeps."""
        source = self.folder / CONFIG_FILE
        frozen, dropout = (self.config.get(n, 0) for n in ("num_frozen_tokens", "dropout"))
        if type(frozen) is not int or not 0 <= frozen < self.num_tokens:
            raise ValueError(
                f"{source}: num_frozen_tokens must be in [0, {self.num_tokens}), got {frozen!r}"
            )
        if type(dropout) not in (int, float) or not 0 <= dropout < 1:
            raise ValueError(f"{source}: dropout must be in [0, 1), got {dropout!r}")
        return {
            "num_frozen_tokens": frozen,
            "dropout": dropout,
            "layers": self.layers,
            "num_layers": len(self.layer_shapes),
        }


def read_config(folder: Path) -> dict[str, Any]:
    """The JSON file of a saved prefix, if it is of our format."""
    source = folder / CONFIG_FILE
    if not source.is_file() and folder.exists():
        beside = folder / BESIDE  # where an attached PeftModel of another kind saves it
        other = f"there is one in {beside}" if (beside / CONFIG_FILE).is_file() else ""
        raise FileNotFoundError(
            f"no {CONFIG_FILE} in {folder}; "
            f"{other or 'prefixattn.checkpoints.load reads other formats'}"
        )
    config = read_json(source)
    if config.get("format") != FORMAT or config.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"{source}: expected format {FORMAT!r} version {FORMAT_VERSION}, got "
            f"{config.get('format')!r} version {config.get('version')!r}"
        )
    return config


def as_metadata(config: Mapping[str, Any]) -> dict[str, str]:
    """What keeps tensors from being read with the JSON file of another save."""
    return {SAVED_WITH: json.dumps(config, sort_keys=True)}


def _check_saved_together(
    config: Mapping[str, Any], metadata: Mapping[str, str], folder: Path
) -> None:
    """Raise where the tensors are of another save than the JSON file; earlier ones do not say."""
    expected = metadata.get(SAVED_WITH)
    if expected is not None and as_metadata(config)[SAVED_WITH] != expected:
        raise ValueError(
            f"{folder}: {CONFIG_FILE} is not what {TENSORS_FILE} was saved with, for saving was "
            f"interrupted or the file was edited. It must be {expected}"
        )


def _layers(config: Mapping[str, Any], num_layers: int, found: int, source: Path) -> list[int]:
    """The layers that the file says it holds, if it can hold as many."""
    named = config.get("layers")
    if named is None:
        if 2 * num_layers != found:
            raise ValueError(
                f"{source.parent}: num_layers is {num_layers}, but the file holds {found} layer "
                "tensors, and each layer has two"
            )
        return list(range(num_layers))
    if not isinstance(named, list) or num_layers > MOST_LAYERS:
        raise ValueError(
            f"{source}: layers must be a list, of at most {MOST_LAYERS} layers, got "
            f"{type(named).__name__} of {num_layers}"
        )
    try:
        return check_layers(named, num_layers, found // 2)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _check_names(
    found: Sequence[str], layers: Sequence[int], num_layers: int, folder: Path
) -> None:
    names = {f"layers.{layer}.{part}" for layer in layers for part in ("key", "value")}
    if set(found) != names:
        missing, extra = sorted(names - set(found)), sorted(set(found) - names)
        raise ValueError(
            f"{folder}: num_layers is {num_layers}, but layer tensors are missing: "
            f"{missing}, unexpected: {extra}"
        )


def _shape(
    layer: int, shapes: Mapping[str, tuple[int, ...]], num_tokens: int, folder: Path
) -> LayerShape:
    key, value = shapes[f"layers.{layer}.key"], shapes[f"layers.{layer}.value"]
    if len(key) != 3 or len(value) != 3 or key[:2] != value[:2] or 0 in key + value:
        raise ValueError(
            f"{folder}: layer {layer} must hold a key [H_kv, P, D] and a value [H_kv, P, D_v], got "
            f"{key} and {value}"
        )
    if key[1] != num_tokens:
        raise ValueError(
            f"{folder}: num_tokens is {num_tokens}, but the tensors hold {key[1]} tokens"
        )
    return LayerShape(key[0], key[2], value[2])


def _stamp(file: Path) -> tuple[int, ...]:
    if not file.is_file():
        raise FileNotFoundError(f"no {file.name} in {file.parent}")
    status = file.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino
