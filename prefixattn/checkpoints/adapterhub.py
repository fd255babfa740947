"""AdapterHub's prefix tuning: a folder with ``adapter_config.json`` and the adapter's state.

Each of ``self_prefix``, ``encoder_prefix`` and ``cross_prefix`` holds its numbers as
``[P, 2 * L, H, D]``, the key of layer ``l`` at index ``2 * l``: flat in ``control_trans``, or made
of ``wte`` by linear, tanh, linear. Keys are not rotated and the text keeps its positions. The state
repeats every prefix below each layer's ``pool``.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prefixattn.checkpoints.pickles import read_pickle
from prefixattn.encoder_decoder import EncoderDecoderPrefix
from prefixattn.files import (
    check_floating,
    read_json,
    read_number,
    read_tensors,
    replace_file,
    single,
    write_json,
)
from prefixattn.initialise import Places, places_in
from prefixattn.layers import split_layers
from prefixattn.prefix import Prefix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG_FILE = "adapter_config.json"
PICKLE_FILE = "pytorch_adapter.bin"
TENSORS_FILE = "adapter.safetensors"
ARCHITECTURE = "prefix_tuning"
PARTS = {"encoder_prefix": "encoder", "self_prefix": "decoder", "cross_prefix": "cross"}
OWN = "self_prefix"
FLAT = "control_trans"
NETWORK = ("wte.weight", *(f"{FLAT}.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")))
STATE = re.compile(r"(?:.*\.)?prefix_tuning\.prefix_tunings\.[^.]+\.(\w+_prefix)\.(.+)")
ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "gelu": torch.nn.functional.gelu}


def load_adapterhub(path: str | Path, model: "PreTrainedModel") -> Prefix | EncoderDecoderPrefix:
    """The prefix in an AdapterHub adapter's folder, to be attached with positions kept.

    Args:
        path: the folder.
        model: the base model: the files do not say how many heads keys have.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, of another kind of adapter, or does not fit the model.
        NotImplementedError: a model with relative bias (T5).
    """
    folder = Path(path)
    source = folder / CONFIG_FILE
    config = read_json(source).get("config")
    if not isinstance(config, dict) or config.get("architecture") != ARCHITECTURE:
        raise ValueError(f"{source}: config.architecture must be {ARCHITECTURE!r}")
    if config.get("use_gating"):
        raise ValueError(f"{source}: gates that are computed from the text are not supported")
    activation = ACTIVATIONS.get(str(config.get("non_linearity", "tanh")).lower())
    if activation is None:
        raise ValueError(
            f"{source}: non_linearity must be one of {sorted(ACTIVATIONS)}, got "
            f"{config['non_linearity']!r}"
        )
    if any(hasattr(module, "relative_attention_bias") for module in model.modules()):
        raise NotImplementedError(
            f"{type(model).__name__} biases scores by distance, which AdapterHub counts from the "
            "prefix on: no policy of ours gives its numbers"
        )
    num_tokens = read_number(config, "prefix_length", source)
    whole = bool(model.config.is_encoder_decoder)
    found = {}
    for name, state in _states(folder).items():
        if whole or name == OWN:  # models of one stack have parts in their files that nobody runs
            part = PARTS[name] if whole else None
            flat = _flat(state, activation, f"{folder}: {name}")
            found[PARTS[name]] = _prefix(
                flat, num_tokens, places_in(model, part), f"{folder}: {name}"
            )
    if not found:
        raise ValueError(f"{folder}: expected a {OWN}, got {sorted(_states(folder))}")
    return EncoderDecoderPrefix(**found) if whole else found["decoder"]


def save_adapterhub(prefix: Prefix, path: str | Path, name: str = "prefix") -> None:
    """Write ``prefix`` as an adapter of a model of one stack, flat.

    ``adapters`` loads it by ``model.load_adapter(path)`` into a model of as many layers.

    Args:
        prefix: with the same heads and head dims in every layer, for positions that are kept.
        path: the folder to write.
        name: the adapter's.

    Raises:
        ValueError: the format cannot hold this prefix.
    """
    shapes = set(prefix.layer_shapes)
    shape = shapes.pop()
    if prefix.positions != "keep":
        raise ValueError(
            "AdapterHub's text keeps its positions, and prefix is for positions="
            f"{prefix.positions!r}: move_prefix makes one for it, where the model allows"
        )
    if prefix.kind == "gated" or prefix.num_frozen_tokens:
        raise ValueError("AdapterHub's prefixes have no gates of this form and no frozen tokens")
    if shapes or shape is None or shape.key_dim != shape.value_dim:
        raise ValueError(
            "AdapterHub needs the same heads and head dims in every layer, keys and values alike; "
            f"prefix has {prefix.layer_shapes}"
        )
    with torch.no_grad():
        flat = [single(x).transpose(0, 1).flatten(1) for pair in prefix() for x in pair]
    key = f"prefix_tuning.prefix_tunings.{name}.self_prefix.{FLAT}"
    state = {key: torch.cat(flat, dim=1).flatten()}
    config = {
        "architecture": ARCHITECTURE,
        "flat": True,
        "prefix_length": prefix.num_tokens,
        "bottleneck_size": 512,
        "non_linearity": "tanh",
        "dropout": 0.0,
        "use_gating": False,
        "shared_gating": True,
        "cross_prefix": True,
        "encoder_prefix": True,
        "leave_out": [],
        "init_weights_seed": None,
    }
    folder = Path(path)
    replace_file(folder / PICKLE_FILE, lambda temporary: torch.save(state, temporary))
    hidden = shape.num_heads * shape.key_dim
    write_json(folder / CONFIG_FILE, {"config": config, "hidden_size": hidden, "name": name})


def _states(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Per part of the model its tensors, without the copies."""
    safe = (folder / TENSORS_FILE).is_file()
    content: Any = (
        read_tensors(folder / TENSORS_FILE) if safe else read_pickle(folder / PICKLE_FILE)
    )
    if not isinstance(content, dict):
        raise ValueError(f"{folder}: expected tensors by name, got a {type(content).__name__}")
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in content.items():
        match = STATE.fullmatch(name) if isinstance(name, str) else None
        if match is None:
            continue
        if match[1] not in PARTS or not isinstance(tensor, Tensor):
            raise ValueError(f"{folder}: {name} is none of {sorted(PARTS)}, or no tensor")
        check_floating(name, tensor, folder)
        found.setdefault(match[1], {})[match[2]] = tensor.float()
    if not found:
        raise ValueError(f"{folder}: expected a tensor prefix_tuning.prefix_tunings.….self_prefix")
    return found


def _flat(state: dict[str, Tensor], activation: Callable[[Tensor], Tensor], where: str) -> Tensor:
    """The numbers of one part, as they lie."""
    if set(state) == {FLAT}:
        return state[FLAT].flatten()
    if set(state) != set(NETWORK):
        raise ValueError(f"{where} must hold {FLAT} or {NETWORK}, got {sorted(state)}")
    wte, first, first_bias, second, second_bias = (state[name] for name in NETWORK)
    linear = torch.nn.functional.linear
    try:
        return linear(activation(linear(wte, first, first_bias)), second, second_bias).flatten()
    except RuntimeError as error:
        raise ValueError(f"{where}: its network's layers do not fit together: {error}") from error


def _prefix(flat: Tensor, num_tokens: int, places: Places, where: str) -> Prefix:
    numbers = sum(s.num_heads * (s.key_dim + s.value_dim) for s in places.shapes)
    if flat.numel() != num_tokens * numbers:
        raise ValueError(
            f"{where} must hold {num_tokens} tokens of the model's {numbers} numbers, got "
            f"{flat.numel()} numbers"
        )
    keys, values = zip(*split_layers(flat.view(num_tokens, numbers), places.shapes), strict=True)
    prefix = Prefix(keys, values)
    prefix.positions = "keep"
    return prefix
