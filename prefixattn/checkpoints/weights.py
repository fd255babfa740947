"""The weights of a whole model in a folder, of which a prefix is a small part.

They are what transformers' ``save_pretrained`` and its Trainer write: one file or several, as
safetensors or as pickles. Only what is asked for is read, where the files allow that.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from prefixattn.checkpoints.pickles import read_pickle
from prefixattn.files import open_tensors, read_json

SINGLE, PICKLE = "model.safetensors", "pytorch_model.bin"
# In the order in which transformers looks for them.
FILES = (SINGLE, f"{SINGLE}.index.json", PICKLE, f"{PICKLE}.index.json")


def weights_file(folder: Path) -> Path | None:
    """The file, or the index of several, that holds the weights; None where there are none."""
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


def marked(name: object, mark: str) -> bool:
    """Whether ``mark``, such as ``"prefix_encoder."``, stands in a tensor's name as a module."""
    return isinstance(name, str) and f".{mark}" in f".{name}"


def holds(folder: Path, mark: str) -> bool:
    """Whether the weights have tensors of a module named ``mark``. A lone pickle is read for this.

    Raises:
        FileNotFoundError: a shard that the index names is missing.
        ValueError: a file is damaged.
    """
    file = weights_file(folder)
    if file is None:
        return False
    if file.name == SINGLE:
        return any(marked(name, mark) for name in _names(file))
    content = read_pickle(file) if file.name == PICKLE else _places(file)
    return isinstance(content, dict) and any(marked(name, mark) for name in content)


def read_marked(folder: Path, mark: str) -> dict[str, Tensor]:
    """The tensors of the module ``mark``, by their names in it.

    Raises:
        FileNotFoundError: there are no weights, or a shard that the index names is missing.
        ValueError: a file is damaged, two modules are named so, or something is no tensor.
    """
    file = weights_file(folder)
    if file is None:
        raise FileNotFoundError(f"no {SINGLE} and no {PICKLE}, whole or in parts, in {folder}")
    content: Mapping[Any, Any]
    if file.name.endswith(".json"):
        places = {name: place for name, place in _places(file).items() if marked(name, mark)}
        content = {}
        for shard in sorted(set(places.values())):
            wanted = {name for name, place in places.items() if place == shard}
            found = _read(shard, mark)
            if missing := sorted(wanted - set(found)):
                raise ValueError(f"{shard} must hold {missing}, as {file.name} says")
            content |= {name: found[name] for name in wanted}
    else:
        content = _read(file, mark)
    modules = {name.rpartition(mark)[0] for name in content}
    if len(modules) > 1:
        raise ValueError(f"{folder}: several modules are named {mark[:-1]}: {sorted(modules)}")
    for name, tensor in content.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{folder}: {name} must be a tensor, got {type(tensor).__name__}")
    return {name.rpartition(mark)[2]: tensor for name, tensor in content.items()}


def _places(index: Path) -> dict[str, Path]:
    """Which file each tensor lies in, of those beside the index."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise ValueError(f"{index}: weight_map must name a file for each tensor")
    for file in set(names.values()):
        if Path(file).name != file or "\\" in file:
            raise ValueError(f"{index}: weight_map must name files beside it, got {file!r}")
    return {name: index.parent / file for name, file in names.items()}


def _names(file: Path) -> list[str]:
    with open_tensors(file) as tensors:
        return list(tensors.keys())


def _read(file: Path, mark: str) -> dict[str, Any]:
    """The tensors of one file whose names are marked."""
    if file.suffix == ".safetensors":
        with open_tensors(file) as tensors:
            return {n: tensors.get_tensor(n) for n in tensors.keys() if marked(n, mark)}  # noqa: SIM118
    content = read_pickle(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected tensors by name, got a {type(content).__name__}")
    return {name: tensor for name, tensor in content.items() if marked(name, mark)}
