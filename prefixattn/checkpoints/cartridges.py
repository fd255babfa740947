"""Cartridges as HazyResearch's code keeps them: one ``.pt`` file of lists of parameters.

``trainable_keys`` and ``trainable_values`` hold a tensor ``[1, H_kv, P - frozen, D]`` for each
layer, ``frozen_keys`` and ``frozen_values`` the tokens before them, or nothing. Files of early
versions say ``fixed`` for frozen.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prefixattn.checkpoints.pickles import read_pickle
from prefixattn.files import MOST_LAYERS, check_floating, replace_file
from prefixattn.prefix import Prefix

HALVES = ("keys", "values")
SUFFIXES = (".pt", ".torch")
"""Those of a file that is recognised as a cartridge."""


def save_cartridge(prefix: Prefix, path: str | Path) -> None:
    """Write ``prefix`` as a cartridge: one file, whole or not at all.

    Args:
        prefix: with a prefix in every layer; its frozen tokens are the cartridge's.
        path: the file to write, with one of `SUFFIXES`.

    Raises:
        ValueError: another suffix, gates, layers without a prefix, or keys for positions that are
            kept.
    """
    file = Path(path)
    if file.suffix not in SUFFIXES:
        raise ValueError(f"a cartridge's path must end in {' or '.join(SUFFIXES)}, got {file.name}")
    if prefix.kind == "gated":
        raise ValueError("a cartridge has no gates; Prefix.save_pretrained holds them")
    if prefix.positions != "shift":
        raise ValueError(
            f"a cartridge stands before its text, and prefix is for positions={prefix.positions!r}"
        )
    if len(prefix.layers) != prefix.num_layers:
        raise ValueError(f"a cartridge has every layer, and prefix only has layers {prefix.layers}")
    count = prefix.num_frozen_tokens
    content = {}
    with torch.no_grad():
        for half, tensors in zip(HALVES, zip(*prefix(), strict=True), strict=True):
            whole = [tensor[None].cpu() for tensor in tensors]
            frozen = [x[:, :, :count].clone() for x in whole]  # a tensor each, if an empty one
            content[f"trainable_{half}"] = _parameters([x[:, :, count:].clone() for x in whole])
            content[f"frozen_{half}"] = _parameters(frozen, trains=False)
    replace_file(file, lambda temporary: torch.save(content, temporary))


def load_cartridge(path: str | Path) -> Prefix:
    """The prefix in a cartridge's file, its first tokens frozen as they were.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, holds anything but tensors, or does not fit together.
    """
    file = Path(path)
    content = read_pickle(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a dict, got a {type(content).__name__}")
    halves = []
    for half in HALVES:
        trained = _tensors(content, f"trainable_{half}", file)
        name = f"frozen_{half}" if f"frozen_{half}" in content else f"fixed_{half}"
        frozen = _tensors(content, name, file) if content.get(name) is not None else []
        if not trained or (frozen and len(frozen) != len(trained)):
            raise ValueError(
                f"{file}: trainable_{half} must hold one tensor for each layer and {name} as many "
                f"or none, got {len(trained)} and {len(frozen)}"
            )
        halves.append((trained, frozen))
    counts = {x.shape[2] for _, frozen in halves for x in frozen} or {0}
    if len(counts) > 1:
        raise ValueError(f"{file}: all layers must freeze as many tokens, got {sorted(counts)}")
    try:
        keys, values = (
            [torch.cat(pair, dim=2)[0] for pair in zip(frozen, trained, strict=True)]
            if frozen
            else [x[0] for x in trained]
            for trained, frozen in halves
        )
        return Prefix(keys, values, num_frozen_tokens=counts.pop())
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{file}: its layers do not fit together: {error}") from error


def _parameters(tensors: list[Tensor], trains: bool = True) -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(tensor, requires_grad=trains) for tensor in tensors])


def _tensors(content: dict[Any, Any], name: str, file: Path) -> list[Tensor]:
    found = content.get(name)
    if not isinstance(found, list | tuple | nn.ParameterList):
        raise ValueError(f"{file}: expected a list {name}, got a {type(found).__name__}")
    if len(found) > MOST_LAYERS:
        raise ValueError(f"{file}: expected at most {MOST_LAYERS} layers, got {len(found)}")
    for i, tensor in enumerate(found):
        if not isinstance(tensor, Tensor) or tensor.ndim != 4 or tensor.shape[0] != 1:
            what = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{file}: {name}[{i}] must be a tensor [1, H_kv, P, D], got {what}")
        check_floating(f"{name}[{i}]", tensor, file)
    return list(found)
