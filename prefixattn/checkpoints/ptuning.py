"""P-tuning v2's prefixes (Liu et al., 2022): part of a model's own state, beside its config.json.

``prefix_encoder.embedding.weight [P, 2 * L * H * D]``, as ``[P, 2 * L, H, D]`` with the key of
layer ``l`` at index ``2 * l`` and the value after it; or, where a network made it,
``prefix_encoder.embedding.weight [P, hidden]`` before ``trans``: linear, tanh, linear.

ChatGLM's code keeps them in the same way. Its configurations use other names, its keys may have
fewer heads than its queries, and its text is counted from 0, as without the prefix.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prefixattn.checkpoints.weights import holds, read_marked
from prefixattn.files import (
    check_floating,
    read_json,
    read_number,
    single,
    write_json,
    write_tensors,
)
from prefixattn.layers import LayerShape, Positions, split_layers
from prefixattn.prefix import Prefix

CONFIG_FILE = "config.json"
TENSORS_FILE = "model.safetensors"
PREFIX = "prefix_encoder."
CHATGLM = "chatglm"  # model_type of ChatGLM-6B and of all that came after it
EMBEDDING = "embedding.weight"
NETWORK = ("trans.0.weight", "trans.0.bias", "trans.2.weight", "trans.2.bias")


def save_ptuning_v2(prefix: Prefix, path: str | Path, model: nn.Module | None = None) -> None:
    """Write ``prefix`` as P-tuning v2's ``prefix_encoder``, without the rest of a model's state.

    Args:
        prefix: with the same heads and head dims in every layer; a projection is folded in.
        path: the folder to write.
        model: the base model. P-tuning v2 takes keys to have the heads and the width of the
            queries; without the model that is not checked, and what is written is wrong for a model
            with fewer key heads.

    Raises:
        ValueError: the format cannot hold this prefix, or not that of such a model.
    """
    shapes = set(prefix.layer_shapes)
    shape = shapes.pop()
    if prefix.kind == "gated" or prefix.num_frozen_tokens or prefix.positions != "shift":
        raise ValueError(
            "P-tuning v2 has no gates, no frozen tokens, and its text stands behind the prefix; "
            f"prefix is of kind {prefix.kind!r}, has {prefix.num_frozen_tokens} frozen tokens and "
            f"is for positions={prefix.positions!r}"
        )
    if shapes or shape is None or shape.key_dim != shape.value_dim:
        raise ValueError(
            "P-tuning v2 needs the same heads and head dims in every layer, keys and values alike; "
            f"prefix has {prefix.layer_shapes}"
        )
    _check_model(model, shape)
    with torch.no_grad():
        flat = [single(x).transpose(0, 1).flatten(1) for pair in prefix() for x in pair]
    config = {
        "num_hidden_layers": prefix.num_layers,
        "num_attention_heads": shape.num_heads,
        "hidden_size": shape.num_heads * shape.key_dim,
        "pre_seq_len": prefix.num_tokens,
        "prefix_projection": False,
    }
    folder = Path(path)
    write_tensors(folder / TENSORS_FILE, {PREFIX + EMBEDDING: torch.cat(flat, dim=1)})
    write_json(folder / CONFIG_FILE, config)


def _check_model(model: Any, shape: LayerShape) -> None:
    """Raise where the configuration that is written would not describe ``model``."""
    if model is None:
        return
    config = model.config.get_text_config()
    wanted = (config.num_attention_heads, config.hidden_size)
    found = (shape.num_heads, shape.num_heads * shape.key_dim)
    if found != wanted:
        raise ValueError(
            "P-tuning v2 needs keys of as many heads as the queries and as wide as the model, "
            f"{wanted[0]} heads and {wanted[1]} numbers for {type(model).__name__}; prefix has "
            f"{found[0]} heads and {found[1]} numbers"
        )


def load_ptuning_v2(path: str | Path) -> Prefix:
    """The prefix in the folder of a model that P-tuning v2 trained; what else is there stays there.

    A network that made the prefix is folded in. The state may be one file or several, as
    safetensors or as pickles.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, holds no such prefix, or the files do not fit together.
    """
    folder = Path(path)
    num_layers, shape, positions = _described(folder / CONFIG_FILE)
    state = read_marked(folder, PREFIX)
    for name, tensor in state.items():
        check_floating(PREFIX + name, tensor, folder)
    flat = _flat(state, folder)
    if flat.ndim != 2 or flat.shape[1] != num_layers * shape.width or not len(flat):
        raise ValueError(
            f"{folder}: the prefix must be [P, {num_layers * shape.width}], a key and a value of "
            f"{shape.num_heads} heads of {shape.key_dim} numbers for each of {num_layers} layers, "
            f"got {tuple(flat.shape)}"
        )
    keys, values = zip(*split_layers(flat, [shape] * num_layers), strict=True)
    prefix = Prefix(keys, values)
    prefix.positions = positions
    return prefix


def is_ptuning_v2(path: Path) -> bool:
    """Whether this is the folder of a model with such a prefix."""
    return (path / CONFIG_FILE).is_file() and holds(path, PREFIX)


def _described(source: Path) -> tuple[int, LayerShape, Positions]:
    """What a configuration says: layers, what each of them asks for, where the text is counted."""
    config = read_json(source)
    chatglm = config.get("model_type") == CHATGLM
    num_layers = read_number(config, "num_layers" if chatglm else "num_hidden_layers", source)
    if chatglm and "multi_query_group_num" in config:  # from ChatGLM2 on
        heads = read_number(config, "multi_query_group_num", source)
        dim = read_number(config, "kv_channels", source)
        return num_layers, LayerShape(heads, dim, dim), "keep"
    heads, width = (read_number(config, n, source) for n in ("num_attention_heads", "hidden_size"))
    if width % heads:
        raise ValueError(f"{source}: hidden_size {width} is not a multiple of {heads} heads")
    shape = LayerShape(heads, width // heads, width // heads)
    return num_layers, shape, "keep" if chatglm else "shift"


def _flat(state: dict[str, Tensor], folder: Path) -> Tensor:
    """``[P, 2 * L * hidden]``."""
    allowed = {EMBEDDING} if EMBEDDING in state and len(state) == 1 else {EMBEDDING, *NETWORK}
    if set(state) != allowed:
        raise ValueError(
            f"{folder}: expected {PREFIX}{EMBEDDING}, alone or with {', '.join(NETWORK)}, got "
            f"{sorted(state)}"
        )
    flat = state[EMBEDDING].float()
    if len(allowed) == 1:
        return flat
    first, first_bias, second, second_bias = (state[name].float() for name in NETWORK)
    try:
        hidden = torch.tanh(torch.nn.functional.linear(flat, first, first_bias))
        return torch.nn.functional.linear(hidden, second, second_bias)
    except RuntimeError as error:
        raise ValueError(f"{folder}: the network's layers do not fit together: {error}") from error
