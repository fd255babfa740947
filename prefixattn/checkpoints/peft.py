"""PEFT's prefix-tuning adapters, in and out.

The file holds one float32 tensor ``prompt_embeddings [P, 2 * L * H_kv * D]``; as
``[P, 2 * L, H_kv, D]`` it has the key of layer ``l`` at index ``2 * l`` and the value after it.
For classification and question answering the head that was trained beside it is in the file too.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

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
from prefixattn.layers import LayerShape, split_layers
from prefixattn.prefix import Prefix

TENSORS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
CONFIG_FILE = "adapter_config.json"
TENSOR_NAME = "prompt_embeddings"
HEAD_PREFIX = "base_model."
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
) -> None:
    """Write ``prefix`` as an adapter that ``PeftModel.from_pretrained(base, path)`` loads.

    Args:
        prefix: any kind; a projection is folded in, as PEFT's own files have it. PEFT needs the
            same heads and head dims in all layers, for keys and values alike.
        path: the folder to write.
        model: the base model or its name, for the configuration's ``base_model_name_or_path``.
            Tasks with a head need the model itself: PEFT's file holds the head too.
        task_type: PEFT's, for the class that loads it: ``"CAUSAL_LM"``, ``"SEQ_CLS"``, …

    Raises:
        ValueError: the layers differ in ways that PEFT's format cannot hold, or there is no head.
    """
    head = _head(model, task_type)
    shape = _shape(prefix)
    parts = []
    with torch.no_grad():
        for key, value in prefix():
            for part in (key, value):
                parts.append(part.float().transpose(0, 1).flatten(1))  # [P, H_kv * D]
        flat = torch.cat([part.cpu() for part in parts], dim=1)
    folder = Path(path)
    write_tensors(folder / TENSORS_FILE, {TENSOR_NAME: flat} | head)
    write_json(folder / CONFIG_FILE, _config(prefix, shape, _base_name(model), task_type))


def load_peft(path: str | Path, model: nn.Module | None = None) -> Prefix:
    """The prefix in a PEFT adapter's folder, of type PREFIX_TUNING or CARTRIDGE.

    A projection was folded in when PEFT saved it, and a cartridge's frozen tokens are among the
    others: what comes back is a plain `Prefix`, trainable throughout.

    Args:
        path: the folder.
        model: the base model, to load the head into that some tasks' files hold. Without it such a
            head is left out, with a warning.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is truncated, holds another kind of adapter, or does not fit together.
    """
    folder = Path(path)
    source = folder / CONFIG_FILE
    config = read_json(source)
    if config.get("peft_type") not in ("PREFIX_TUNING", "CARTRIDGE"):
        raise ValueError(
            f"{source}: peft_type must be PREFIX_TUNING or CARTRIDGE, got "
            f"{config.get('peft_type')!r}"
        )
    if config.get("num_transformer_submodules", 1) != 1:
        raise ValueError(f"{source}: prefixes of encoder-decoder models are not supported yet")
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
    keys, values = zip(*split_layers(flat, [shape] * num_layers), strict=True)
    _load_head(tensors, model, folder)
    return Prefix(keys, values)


def _shape(prefix: Prefix) -> LayerShape:
    """What every layer of ``prefix`` is like, where PEFT's format can hold it."""
    if prefix.kind == "gated":
        raise ValueError("PEFT's prefix tuning has no gates; Prefix.save_pretrained holds them")
    if prefix.num_frozen_tokens:
        raise ValueError(
            f"PEFT's prefix tuning trains all tokens, and {prefix.num_frozen_tokens} of prefix are "
            "frozen; Prefix.save_pretrained remembers them"
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
        tensors: Any = _read_pickle(folder / PICKLE_FILE)
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


def _read_pickle(path: Path) -> Any:
    """What `torch.save` wrote, of tensors alone: nothing in the file is executed."""
    if not is_zipfile(path):
        raise ValueError(f"{path} is damaged: it is not what torch.save writes")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, UnpicklingError) as error:
        raise ValueError(f"{path} is damaged or holds more than tensors") from error


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
        "encoder_hidden_size": width,
        "inference_mode": True,
        "num_attention_heads": shape.num_heads,
        "num_layers": prefix.num_layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": prefix.num_tokens,
        "peft_type": "PREFIX_TUNING",
        "prefix_projection": False,
        "task_type": task_type,
        "token_dim": width,
    }
