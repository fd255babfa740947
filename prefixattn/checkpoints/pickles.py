"""Reading what ``torch.save`` wrote: tensors and lists of them, and nothing else."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import torch
from torch import Tensor, nn

ALLOWED: list[Any] = [nn.ParameterList, nn.Parameter]


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
            if any(record.compress_type != ZIP_STORED for record in records.infolist()):
                raise ValueError(f"{path} is compressed, which torch.save never does")
        with torch.serialization.safe_globals(ALLOWED):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except BadZipFile as error:
        raise ValueError(f"{path} is damaged: it is not what torch.save writes") from error
    except (RuntimeError, UnpicklingError, EOFError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or holds more than tensors: {error}") from error
    _check(content, path)
    return content


def _check(thing: Any, path: Path) -> None:
    """Raise where a tensor, however deep, is larger than the memory behind it."""
    pending = [thing]
    while pending:
        thing = pending.pop()
        if isinstance(thing, Tensor):
            if thing.numel() * thing.element_size() > thing.untyped_storage().nbytes():
                raise ValueError(f"{path} holds a tensor {tuple(thing.shape)} without its numbers")
        elif isinstance(thing, dict):
            pending.extend(thing.values())
        elif isinstance(thing, list | tuple | nn.ParameterList):
            pending.extend(thing)
