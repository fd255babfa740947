"""The formats by name: recognised from their files, read, written, and one turned into another."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from prefixattn.checkpoints.adapterhub import ARCHITECTURE, load_adapterhub, save_adapterhub
from prefixattn.checkpoints.attached import is_attached, load_attached
from prefixattn.checkpoints.cartridges import SUFFIXES, load_cartridge, save_cartridge
from prefixattn.checkpoints.llama_adapter import load_adaption_prompt
from prefixattn.checkpoints.peft import SEQ2SEQ, load_peft, save_peft
from prefixattn.checkpoints.ptuning import is_ptuning_v2, load_ptuning_v2, save_ptuning_v2
from prefixattn.encoder_decoder import EncoderDecoderPrefix
from prefixattn.files import read_json
from prefixattn.layers import Positions
from prefixattn.positions import move_prefix
from prefixattn.prefix import Prefix
from prefixattn.projected import ProjectedPrefix
from prefixattn.ranks import whole
from prefixattn.stored import CONFIG_FILE as PREFIX_FILE
from prefixattn.stored import ENCODER_DECODER_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Loaded = Prefix | EncoderDecoderPrefix
Model = nn.Module | None


@dataclass(frozen=True)
class Format:
    """One way to keep a prefix in files.

    ``load(path, model)`` and ``save(prefix, path, model)``; ``save`` is None where it is read only.
    ``needs_model``: it cannot be read without the base model.
    """

    name: str
    words: str
    recognises: Callable[[Path], bool]
    load: Callable[[Path, Any], Loaded]
    save: Callable[[Any, Path, Any], None] | None
    needs_model: bool = False


def _named(file: str, name: str, *values: str) -> Callable[[Path], bool]:
    """Whether a folder's JSON ``file`` says one of ``values`` of ``name``."""

    def recognises(path: Path) -> bool:
        return (path / file).is_file() and read_json(path / file).get(name) in values

    return recognises


def _is_ours(path: Path) -> bool:
    return (path / PREFIX_FILE).is_file() or (path / ENCODER_DECODER_FILE).is_file()


def _is_adapterhub(path: Path) -> bool:
    file = path / "adapter_config.json"
    config = read_json(file).get("config") if file.is_file() else None
    return isinstance(config, dict) and config.get("architecture") == ARCHITECTURE


def _load_ours(path: Path, model: Model) -> Loaded:
    pair = (path / ENCODER_DECODER_FILE).is_file()
    return EncoderDecoderPrefix.from_pretrained(path) if pair else Prefix.from_pretrained(path)


def _task(model: Model) -> str:
    config: Any = getattr(model, "config", None)
    return SEQ2SEQ if getattr(config, "is_encoder_decoder", False) else "CAUSAL_LM"


FORMATS = {
    found.name: found
    for found in (
        Format(
            "prefixattn",
            "Prefix.save_pretrained's own, which holds any",
            _is_ours,
            _load_ours,
            lambda prefix, path, model: prefix.save_pretrained(path),
        ),
        Format(
            "peft",
            "PEFT's prefix tuning",
            _named("adapter_config.json", "peft_type", "PREFIX_TUNING"),
            load_peft,
            lambda prefix, path, model: save_peft(prefix, path, model, task_type=_task(model)),
        ),
        Format(
            "peft-cartridge",
            "PEFT's cartridge",
            _named("adapter_config.json", "peft_type", "CARTRIDGE"),
            load_peft,
            lambda prefix, path, model: save_peft(
                prefix, path, model, task_type=_task(model), peft_type="CARTRIDGE"
            ),
        ),
        Format(
            "adaption-prompt",
            "PEFT's LLaMA-Adapter, read only",
            _named("adapter_config.json", "peft_type", "ADAPTION_PROMPT"),
            load_adaption_prompt,
            None,
            needs_model=True,
        ),
        Format(
            "adapterhub",
            "AdapterHub's prefix tuning",
            _is_adapterhub,
            load_adapterhub,
            lambda prefix, path, model: save_adapterhub(prefix, path),
            needs_model=True,
        ),
        Format(
            "cartridge",
            "HazyResearch's cartridge, one .pt file",
            lambda path: path.is_file() and path.suffix in SUFFIXES,
            lambda path, model: load_cartridge(path),
            lambda prefix, path, model: save_cartridge(prefix, path),
        ),
        Format(
            "ptuning-v2",
            "P-tuning v2's prefix_encoder in a model's state; ChatGLM's is read",
            is_ptuning_v2,
            lambda path, model: load_ptuning_v2(path),
            lambda prefix, path, model: save_ptuning_v2(prefix, path, model),
        ),
        Format(
            "attached-model",
            "a model's own weights, saved with a prefix attached, read only",
            is_attached,
            lambda path, model: load_attached(path),
            None,
        ),
    )
}


FILES = {
    *("prefix.safetensors", PREFIX_FILE, ENCODER_DECODER_FILE, "encoder", "decoder", "cross"),
    *("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "README.md"),
    *("pytorch_adapter.bin", "adapter.safetensors", "head_config.json", "pytorch_model_head.bin"),
    *("config.json", "model.safetensors", "pytorch_model.bin"),
}
"""What a folder of one of these formats may hold."""


def recognise(path: str | Path) -> str:
    """The name of the format that the files at ``path`` are in.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ValueError: the files are in none of `FORMATS`, or damaged.
    """
    place = Path(path)
    if not place.exists():
        raise FileNotFoundError(f"no file or folder {place}")
    for found in FORMATS.values():
        if found.recognises(place):
            return found.name
    raise ValueError(f"{place} is in none of the formats {', '.join(FORMATS)}")


def load(path: str | Path, format: str | None = None, model: Model = None) -> Loaded:
    """The prefix at ``path``, in whatever format it is.

    Args:
        path: a folder, or a cartridge's file.
        format: a name of `FORMATS`. None: see `recognise`.
        model: the base model, which some formats cannot be read without.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or of another format, a name is unknown, or ``model`` is
            needed.
    """
    found = _format(format) if format is not None else FORMATS[recognise(path)]
    if found.needs_model and model is None:
        raise ValueError(f"model must be given: {found.name} files cannot be read without it")
    return found.load(Path(path), model)


def save(prefix: Loaded, path: str | Path, format: str = "prefixattn", model: Model = None) -> None:
    """Write ``prefix`` to ``path`` in a format that holds all of it.

    One that is spread over ranks is gathered: every rank calls this, and rank 0 writes.

    Args:
        prefix: a `Prefix` of any kind, or an `EncoderDecoderPrefix`.
        path: a folder, or a cartridge's file.
        format: a name of `FORMATS`.
        model: the base model, for what PEFT's files say of it, and to refuse as P-tuning v2 what it
            could not read.

    Raises:
        ValueError: the format would lose something of ``prefix``, which is named, or is unknown.
    """
    found = _format(format)
    if found.save is None:
        raise ValueError(f"{found.name} files can be read, but not written")
    if isinstance(prefix, EncoderDecoderPrefix) and found.name != "prefixattn":
        own = prefix.parts.get("decoder")
        if set(prefix.parts) != {"decoder"} or not isinstance(own, Prefix):
            raise ValueError(
                f"{found.name} holds a decoder's own prefix, and would lose {sorted(prefix.parts)}"
            )
        prefix = own
    if isinstance(prefix, ProjectedPrefix) and found.name != "prefixattn":
        raise ValueError(
            f"{found.name} would lose the network that makes the prefix: save prefix.folded()"
        )
    if isinstance(prefix, Prefix) and prefix.dropout and found.name != "prefixattn":
        raise ValueError(f"{found.name} would lose the dropout of {prefix.dropout}")
    with whole(prefix) as writes:
        if writes:
            found.save(prefix, Path(path), model)


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    *,
    format: str | None = None,
    model: Model = None,
    positions: Positions | None = None,
    overwrite: bool = False,
) -> tuple[str, Loaded]:
    """Write what is at ``source`` to ``target`` in another format, whole or not at all.

    Args:
        source: what `load` reads.
        target: what must not be there yet.
        to: a name of `FORMATS`.
        format: of ``source``; None: see `recognise`.
        model: the base model, where one of the formats needs it.
        positions: move the keys, as ``model`` turns them, where they are for another policy.
        overwrite: replace what is at ``target``.

    Returns:
        The format of ``source``, and the prefix.

    Raises:
        FileExistsError: there is something at ``target``.
        FileNotFoundError, ValueError: as `load` and `save` do.
    """
    place = Path(target)
    _format(to)
    if place.exists():
        _check_target(place, Path(source), overwrite)
    name = format or recognise(source)
    prefix = load(source, name, model)
    if positions is not None and positions != prefix.positions:
        prefix = _moved(prefix, model, positions)
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}.") as folder:
        ready = Path(folder) / place.name
        save(prefix, ready, to, model)
        before = Path(folder) / "before"
        if place.exists():
            place.replace(before)
        try:
            ready.replace(place)
        except BaseException:
            if before.exists():
                before.replace(place)
            raise
    return name, prefix


def _check_target(target: Path, source: Path, overwrite: bool) -> None:
    """Raise unless ``target`` may be replaced: nothing but a prefix's own files may go."""
    if not overwrite:
        raise FileExistsError(f"{target} exists already")
    if target.resolve() in (source.resolve(), *source.resolve().parents):
        raise FileExistsError(f"{target} holds {source}, which is read")
    if target.is_dir():
        others = [x.name for x in target.iterdir() if x.name not in FILES]
        if others:
            raise FileExistsError(f"{target} holds more than a prefix: {sorted(others)[:5]}")


def _moved(prefix: Loaded, model: Model, positions: Positions) -> Prefix:
    if model is None or not isinstance(prefix, Prefix):
        raise ValueError("positions needs the base model, and a prefix of one stack of layers")
    by = prefix.num_tokens if positions == "shift" else -prefix.num_tokens
    moved = move_prefix(prefix, cast("PreTrainedModel", model), by)
    moved.positions = positions
    return moved


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {name!r}")
    return FORMATS[name]
