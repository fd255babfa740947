"""Reading and writing one folder of ``safetensors`` weights beside a JSON configuration."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

MOST_JSON = 1 << 22
MOST_LAYERS = 10_000  # a number in a file must not make us reserve memory for it
DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""What numbers may be, by safetensors' names."""


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` to ``path``, whole or not at all."""
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write ``tensors`` to ``path`` as safetensors, whole or not at all."""
    ready = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    header = {"format": "pt"} | dict(metadata or {})
    replace_file(path, lambda temporary: save_file(ready, temporary, metadata=header))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}")
    if path.stat().st_size > MOST_JSON:
        raise ValueError(f"{path} is larger than {MOST_JSON} bytes, no configuration is")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also of its bytes, or of a number's length
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(content).__name__}")
    return content


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in ``path``, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is truncated or is not safetensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}")
    try:
        return load_file(path, device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error


def open_tensors(path: Path) -> Any:
    """The safetensors file ``path``, mapped into memory: see `safetensors.safe_open`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is truncated or is not safetensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}")
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error


def read_number(config: Mapping[str, Any], name: str, source: Path) -> int:
    """The positive integer ``config[name]``; ``source`` is named where it is something else."""
    number = config.get(name)
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ValueError(f"{source}: {name} must be a positive integer, got {number!r}")
    return number


def check_floating(name: str, tensor: Tensor, source: Path) -> None:
    """Raise where ``tensor`` is not finite floating point: a damaged file must not train on."""
    if tensor.dtype not in DTYPES.values():
        kinds = ", ".join(str(dtype) for dtype in DTYPES.values())
        raise ValueError(f"{source}: {name} must be one of {kinds}, got {tensor.dtype}")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{source}: {name} holds NaN or infinity")


def single(tensor: Tensor) -> Tensor:
    """``tensor`` in float32 on the CPU.

    Raises:
        ValueError: it would lose digits.
    """
    found = tensor.detach().to("cpu", torch.float32)
    if tensor.dtype == torch.float64 and not torch.equal(found.double(), tensor.detach().cpu()):
        raise ValueError("the format holds float32, and the prefix's float64 would lose digits")
    return found


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then move it there in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
