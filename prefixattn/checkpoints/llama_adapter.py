"""PEFT's ADAPTION_PROMPT adapters (LLaMA-Adapter, Zhang et al., 2023), read as gated prefixes.

The file holds ``adaption_prompt [1, P, hidden]`` and a number ``adaption_gate [1]`` for each of the
last layers. The keys and values are what the layer's own projections make of the prompt, without a
position; every head has the same gate.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prefixattn.files import check_floating, read_json, read_number, read_tensors
from prefixattn.gated import GatedPrefix

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
STATE = re.compile(r"(?:base_model\.model\.)?(.+)\.adaption_(prompt|gate)")
KINDS = ("llama", "mistral")


def load_adaption_prompt(path: str | Path, model: nn.Module) -> GatedPrefix:
    """The gated prefix that PEFT's adapter is for ``model``.

    Args:
        path: the adapter's folder.
        model: the base model, whose projections make keys and values of the prompts. PEFT's form
            for GPT-2 adds its part behind the output projection, which no attention can: it is
            refused.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, of another kind, or does not fit the model.
        NotImplementedError: a model of another family.
    """
    folder = Path(path)
    source = folder / CONFIG_FILE
    config = read_json(source)
    if config.get("peft_type") != "ADAPTION_PROMPT":
        raise ValueError(
            f"{source}: peft_type must be ADAPTION_PROMPT, got {config.get('peft_type')!r}"
        )
    num_tokens = read_number(config, "adapter_len", source)
    base: Any = model
    kind = base.config.model_type
    if kind not in KINDS:
        why = (
            "PEFT adds its part behind the output projection there" if kind == "gpt2" else "unknown"
        )
        raise NotImplementedError(f"{type(model).__name__} is none of {KINDS}: {why}")
    layers, keys, values, gates = [], [], [], []
    for name, state in sorted(_states(folder).items(), key=lambda item: _number(item[0])):
        prompt, gate = _checked(state, name, num_tokens, base.config.hidden_size, folder)
        try:
            attention: Any = model.get_submodule(name)
            projections = (attention.k_proj, attention.v_proj)
        except AttributeError as error:
            raise ValueError(f"{folder}: {type(model).__name__} has no attention {name}") from error
        with torch.no_grad():
            halves = [
                project(prompt.to(project.weight))[0].unflatten(-1, (-1, attention.head_dim))
                for project in projections
            ]  # [P, H_kv, D]
        layers.append(attention.layer_idx)
        keys.append(halves[0].transpose(0, 1))
        values.append(halves[1].transpose(0, 1))
        gates.append(gate.to(keys[-1]).expand(base.config.num_attention_heads))
    return GatedPrefix(keys, values, gates, layers=layers, num_layers=base.config.num_hidden_layers)


def _states(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Per attention module of the base model its prompt and its gate."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_tensors(folder / TENSORS_FILE).items():
        match = STATE.fullmatch(name)
        if match is None:
            raise ValueError(f"{folder}: unexpected tensor {name}")
        check_floating(name, tensor, folder)
        found.setdefault(match[1], {})[match[2]] = tensor
    if not found:
        raise ValueError(f"{folder}: expected tensors ….adaption_prompt and ….adaption_gate")
    return found


def _checked(
    state: dict[str, Tensor], name: str, num_tokens: int, hidden: int, folder: Path
) -> tuple[Tensor, Tensor]:
    shapes = {part: tuple(tensor.shape) for part, tensor in state.items()}
    wanted = {"prompt": (1, num_tokens, hidden), "gate": (1,)}
    if shapes != wanted:
        raise ValueError(f"{folder}: {name} must hold {wanted}, got {shapes}")
    return state["prompt"], state["gate"]


def _number(name: str) -> int:
    """The number of the layer that a module's name holds."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)
