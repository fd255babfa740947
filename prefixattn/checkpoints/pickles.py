"""Reading what ``torch.save`` wrote: tensors and lists of them, and nothing else."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import torch
from torch import Tensor, nn

ALLOWED: list[Any] = [nn.ParameterList, nn.Parameter]
DAMAGE = (
    RuntimeError,
    UnpicklingError,
    UnicodeDecodeError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    MemoryError,
)
"""What torch raises on bytes that are no pickle of its own."""


def read_pickle(path: Path) -> Any:
    """The content of ``path``, on the CPU; nothing in the file is executed.

    Memory is bounded by the file's size: compressed records are refused, and so are tensors that
    say to be larger than their numbers.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or holds more than tensors and lists of them.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}")
    try:
        with ZipFile(path) as records:
            found = records.infolist()
        if any(record.compress_type != ZIP_STORED for record in found):
            raise ValueError(f"{path} is compressed, which torch.save never does")
        if sum(record.file_size for record in found) > path.stat().st_size:
            raise ValueError(f"{path} is damaged: its records are larger than the file")
        with torch.serialization.safe_globals(ALLOWED):
            content = torch.load(path, map_location="cpu", weights_only=True)
        _check(content, path)
    except BadZipFile as error:
        raise ValueError(f"{path} is damaged: it is not what torch.save writes") from error
    except DAMAGE as error:
        raise ValueError(f"{path} is damaged or holds more than tensors: {error}") from error
    return content


def _check(thing: Any, path: Path) -> None:
    """Raise where a tensor, however deep, is not dense or larger than the memory behind it."""
    pending, seen = [thing], set()
    while pending:
        thing = pending.pop()
        if id(thing) in seen:  # lists may hold themselves, or each other over and over
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            if thing.layout != torch.strided or thing.is_nested or thing.is_meta:
                raise ValueError(f"{path} holds a tensor that is not dense numbers")
            if thing.numel() * thing.element_size() > thing.untyped_storage().nbytes():
                raise ValueError(f"{path} holds a tensor {tuple(thing.shape)} without its numbers")
        elif isinstance(thing, dict):
            pending.extend(thing.values())
        elif isinstance(thing, nn.ParameterList):
            if len(thing._parameters) != thing._size:
                raise ValueError(f"{path} holds a list of another length than it says")
            pending.extend(thing._parameters.values())
        elif isinstance(thing, list | tuple):
            pending.extend(thing)
