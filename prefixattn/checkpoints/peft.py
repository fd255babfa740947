"""PEFT's prefix-tuning adapters, in and out.

The file holds one float32 tensor ``prompt_embeddings [P, 2 * L * H_kv * D]``; as
``[P, 2 * L, H_kv, D]`` it has the key of layer ``l`` at index ``2 * l`` and the value after it.
A cartridge has the same, and says how many of its first tokens are frozen. For an encoder-decoder
PEFT repeats the ``L`` layers and gives each layer of the decoder two of them, of which the first is
read: layer ``i`` has that of number ``2 * i mod L``.

For classification and question answering the head that was trained beside it is in the file too.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prefixattn.checkpoints.pickles import read_pickle
from prefixattn.files import (
    check_floating,
    read_json,
    read_number,
    read_tensors,
    single,
    write_json,
    write_tensors,
)
from prefixattn.layers import LayerShape, split_layers
from prefixattn.prefix import Prefix

TENSORS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
CONFIG_FILE = "adapter_config.json"
TENSOR_NAME = "prompt_embeddings"
HEAD_PREFIX = "base_model."
TYPES = ("PREFIX_TUNING", "CARTRIDGE")
SEQ2SEQ = "SEQ_2_SEQ_LM"
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""The children of the base model that PEFT trains and saves beside the adapter, by task."""


def save_peft(
    prefix: Prefix,
    path: str | Path,
    model: nn.Module | str | None = None,
    *,
    task_type: str = "CAUSAL_LM",
    peft_type: Literal["PREFIX_TUNING", "CARTRIDGE"] = "PREFIX_TUNING",
) -> None:
    """Write ``prefix`` as an adapter that ``PeftModel.from_pretrained(base, path)`` loads.

    Args:
        prefix: any kind; a projection is folded in, as PEFT's own files have it. PEFT needs the
            same heads and head dims in all layers, for keys and values alike.
        path: the folder to write.
        model: the base model or its name, for the configuration's ``base_model_name_or_path``.
            Tasks with a head need the model itself: PEFT's file holds the head too.
        task_type: PEFT's, for the class that loads it: ``"CAUSAL_LM"``, ``"SEQ_CLS"``, … With
            ``"SEQ_2_SEQ_LM"`` the prefix is the decoder's own, as in PEFT.
        peft_type: ``"CARTRIDGE"`` keeps frozen tokens, which prefix tuning has not.

    Raises:
        ValueError: the layers differ in ways that PEFT's format cannot hold, or there is no head.
    """
    if peft_type not in TYPES:
        raise ValueError(f"peft_type must be one of {TYPES}, got {peft_type!r}")
    head = _head(model, task_type)
    shape = _shape(prefix, peft_type)
    with torch.no_grad():
        layers = [
            torch.cat([single(part).transpose(0, 1).flatten(1) for part in pair], dim=1)
            for pair in prefix()
        ]  # [P, 2 * H_kv * D] each
    if task_type == SEQ2SEQ:
        layers = _as_peft_reads(layers)
    folder = Path(path)
    config = _config(prefix, shape, _base_name(model), task_type)
    config |= {"peft_type": peft_type, "num_layers": len(layers)}
    if peft_type == "CARTRIDGE":
        config |= {"num_frozen_tokens": prefix.num_frozen_tokens}
    else:
        config |= {"encoder_hidden_size": config["token_dim"], "prefix_projection": False}
    write_tensors(folder / TENSORS_FILE, {TENSOR_NAME: torch.cat(layers, dim=1)} | head)
    write_json(folder / CONFIG_FILE, config)


def load_peft(path: str | Path, model: nn.Module | None = None) -> Prefix:
    """The prefix in a PEFT adapter's folder, of type PREFIX_TUNING or CARTRIDGE.

    A projection was folded in when PEFT saved it: what comes back is a plain `Prefix`. A
    cartridge's frozen tokens stay frozen. The prefix of an encoder-decoder is the decoder's own.

    Args:
        path: the folder.
        model: the base model, to load the head into that some tasks' files hold (without it such a
            head is left out, with a warning), and to say how many layers a decoder has where PEFT's
            file has more.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is truncated, holds another kind of adapter, or does not fit together.
    """
    folder = Path(path)
    source = folder / CONFIG_FILE
    config = read_json(source)
    if config.get("peft_type") not in TYPES:
        raise ValueError(
            f"{source}: peft_type must be one of {TYPES}, got {config.get('peft_type')!r}"
        )
    submodules = config.get("num_transformer_submodules") or 1
    if submodules not in (1, 2) or (submodules == 1 and config.get("task_type") == SEQ2SEQ):
        raise ValueError(
            f"{source}: num_transformer_submodules must be 1, or 2 for an encoder-decoder, got "
            f"{submodules} for {config.get('task_type')!r}"
        )
    names = ("num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim")
    num_tokens, num_layers, heads, width = (read_number(config, n, source) for n in names)
    if width % heads:
        raise ValueError(f"{source}: token_dim {width} is not a multiple of {heads} heads")
    tensors = _read_tensors(folder)
    flat = tensors.pop(TENSOR_NAME)
    wanted = (num_tokens, 2 * num_layers * width)
    if tuple(flat.shape) != wanted:
        raise ValueError(
            f"{folder}: {TENSOR_NAME} must be [P, 2 * L * H_kv * D] = {wanted}, got "
            f"{tuple(flat.shape)}"
        )
    shape = LayerShape(heads, width // heads, width // heads)
    pairs = split_layers(flat, [shape] * num_layers)
    if submodules == 2:
        wanted_layers = _decoder_layers(model, num_layers, source)
        pairs = [pairs[2 * layer % num_layers] for layer in range(wanted_layers)]
    keys, values = zip(*pairs, strict=True)
    _load_head(tensors, model, folder)
    frozen = config.get("num_frozen_tokens", 0)
    try:
        return Prefix(keys, values, num_frozen_tokens=frozen)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _decoder_layers(model: nn.Module | None, num_layers: int, source: Path) -> int:
    config: Any = getattr(model, "config", None)
    if config is None:
        return num_layers
    found = getattr(config, "decoder_layers", None) or getattr(config, "num_decoder_layers", None)
    if not found:
        raise ValueError(f"{source}: is of an encoder-decoder, which {type(model).__name__} is not")
    if found > num_layers:
        raise ValueError(
            f"{source}: num_layers must be at least the {found} layers of the decoder of "
            f"{type(model).__name__}, got {num_layers}"
        )
    return int(found)


def _as_peft_reads(layers: Sequence[Tensor]) -> list[Tensor]:
    """A decoder's layers in the order in which PEFT's file has them for an encoder-decoder.

    PEFT reads number ``2 * i mod L`` for layer ``i``: for an odd ``L`` each layer has its own. A
    decoder of an even number of layers gets one more in the file, which nobody reads.
    """
    count = len(layers) + (len(layers) + 1) % 2
    slots = [torch.zeros_like(layers[0])] * count
    for layer, tensor in enumerate(layers):
        slots[2 * layer % count] = tensor
    return slots


def _shape(prefix: Prefix, peft_type: str) -> LayerShape:
    """What every layer of ``prefix`` is like, where PEFT's format can hold it."""
    if prefix.kind == "gated":
        raise ValueError("PEFT's prefix tuning has no gates; Prefix.save_pretrained holds them")
    if prefix.positions != "shift":
        raise ValueError(
            f"PEFT moves the text behind its prefixes, and this one is for positions="
            f"{prefix.positions!r}: move_prefix makes one for PEFT of it, where the model allows"
        )
    if prefix.num_frozen_tokens and peft_type != "CARTRIDGE":
        raise ValueError(
            f"PEFT's prefix tuning trains all tokens, and {prefix.num_frozen_tokens} of prefix are "
            'frozen; peft_type="CARTRIDGE" and Prefix.save_pretrained remember them'
        )
    shapes = set(prefix.layer_shapes)
    shape = shapes.pop()
    if shapes or shape is None or shape.key_dim != shape.value_dim:
        raise ValueError(
            "PEFT's format needs the same heads and head dims in every layer, keys and values "
            f"alike; prefix has {prefix.layer_shapes}. Prefix.save_pretrained holds any"
        )
    return shape


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    if not (folder / TENSORS_FILE).is_file() and (folder / PICKLE_FILE).is_file():
        tensors: Any = read_pickle(folder / PICKLE_FILE)
    else:
        tensors = read_tensors(folder / TENSORS_FILE)
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise ValueError(f"{folder}: expected tensors by name, got a {type(tensors).__name__}")
    if TENSOR_NAME not in tensors:
        raise ValueError(f"{folder}: expected the tensor {TENSOR_NAME}, got {sorted(tensors)}")
    for name, tensor in tensors.items():
        check_floating(name, tensor, folder)
    return dict(tensors)


def _head(model: nn.Module | str | None, task_type: str) -> dict[str, Tensor]:
    """What PEFT saves beside the adapter for this task."""
    names = HEADS.get(task_type, ())
    if not names:
        return {}
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model must be the base model for {task_type}, to save its head, got {model!r}"
        )
    children = {name: child for name, child in model.named_children() if name in names}
    if not children or any(hasattr(child, "modules_to_save") for child in children.values()):
        raise ValueError(
            f"model must be a plain model with one of {names} for {task_type}, got "
            f"{type(model).__name__} with {sorted(name for name, _ in model.named_children())}"
        )
    return {
        f"{HEAD_PREFIX}{name}.{key}": tensor
        for name, child in children.items()
        for key, tensor in child.state_dict().items()
    }


def _load_head(head: Mapping[str, Tensor], model: nn.Module | None, folder: Path) -> None:
    if not head:
        return
    if model is None:
        warnings.warn(
            f"{folder} also holds {sorted(head)}, which are no part of a prefix: pass model= to "
            "load them",
            stacklevel=3,
        )
        return
    state = {name.removeprefix(HEAD_PREFIX): tensor for name, tensor in head.items()}
    unexpected = sorted(set(state) - set(model.state_dict()))
    if unexpected:
        raise ValueError(f"{folder} holds {unexpected}, which {type(model).__name__} does not have")
    model.load_state_dict(state, strict=False)


def _base_name(model: nn.Module | str | None) -> str | None:
    if model is None or isinstance(model, str):
        return model
    return getattr(model, "name_or_path", None) or None


def _config(
    prefix: Prefix, shape: LayerShape, base_name: str | None, task_type: str
) -> dict[str, Any]:
    width = shape.num_heads * shape.key_dim
    return {
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "num_attention_heads": shape.num_heads,
        "num_transformer_submodules": 2 if task_type == SEQ2SEQ else 1,
        "num_virtual_tokens": prefix.num_tokens,
        "task_type": task_type,
        "token_dim": width,
    }
