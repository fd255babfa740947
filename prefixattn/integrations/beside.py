"""A PeftModel of another kind (LoRA) with a prefix beside its adapters: its files hold both.

The prefix lies in the subfolder ``prefix``, in our format, and in PEFT's where that can hold it:
PEFT reads the folder as one adapter, and the subfolder as another. The prefix is read again with an
adapter that is, so that nothing depends on which of the folders a Trainer reads.
"""

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from prefixattn.checkpoints import FORMATS, save_peft
from prefixattn.checkpoints.peft import CONFIG_FILE, PICKLE_FILE, TENSORS_FILE
from prefixattn.integrations.derived import derive
from prefixattn.integrations.undo import Undoing
from prefixattn.prefix import Prefix
from prefixattn.stored import BESIDE as FOLDER

ROOT = "default"
"""The adapter that PEFT saves in the folder itself; all others have a subfolder of their name."""

BESIDE = "prefixattn_beside"
ALIKE = ("kind", "num_tokens", "num_layers", "layers", "num_frozen_tokens", "positions")
"""What a file's prefix and the attached one must have in common for the one to become the other."""


def keep_beside(model: PeftModel, prefix: nn.Module, undo: Undoing) -> bool:
    """Have ``model``'s own saving and loading take ``prefix`` along.

    Args:
        model: the PeftModel that was attached to.
        prefix: what was attached.
        undo: learns how to take every step back.

    Returns:
        Whether that could be done: a `Prefix` can be saved, and the model is a ``PeftModel``.
    """
    if not isinstance(prefix, Prefix) or not isinstance(model, PeftModel):
        return False
    _check_name(model)
    setattr(model, BESIDE, True)
    undo.callback(delattr, model, BESIDE)
    prefix.saved_beside = True
    undo.callback(setattr, prefix, "saved_beside", False)
    undo.callback(derive(model, _saves_the_prefix_too))
    return True


def _attached(model: Any) -> Prefix:
    prefix: Prefix = model.get_base_model().prefixattn
    return prefix


def _saves_the_prefix_too(old: type) -> dict[str, Any]:
    base: Any = old

    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        folder = Path(save_directory) / FOLDER
        _check_name(self)
        _check_folder(folder)
        base.save_pretrained(self, save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            _save(_attached(self), folder, getattr(self.get_base_model(), "name_or_path", None))

    def load_adapter(self: Any, model_id: Any, adapter_name: str, *args: Any, **kw: Any) -> Any:
        place, known = Path(model_id), adapter_name in self.peft_config
        if adapter_name == FOLDER and not known:
            if not _holds(place, "prefixattn"):
                raise ValueError(
                    f"adapter_name {FOLDER!r} is the attached prefix's, and there is none in "
                    f"{model_id}: expected a folder that save_pretrained wrote, or another name"
                )
            if (place.parent / CONFIG_FILE).is_file() and ROOT in self.peft_config:
                # Where there are subfolders, the Trainer of transformers 5.17 reads nothing else.
                base.load_adapter(self, place.parent, ROOT, is_trainable=True)
            return _load(_attached(self), place)
        loaded = base.load_adapter(self, model_id, adapter_name, *args, **kw)
        own_folder = adapter_name != ROOT and place.name == adapter_name
        saved = (place.parent if own_folder else place) / FOLDER
        if _holds(saved, "prefixattn"):
            if known:
                _load(_attached(self), saved)
            else:
                warnings.warn(
                    f"the new adapter {adapter_name!r} was read without the prefix in {saved}: the "
                    f"attached one stays; load_adapter({str(saved)!r}, {FOLDER!r}) replaces it",
                    stacklevel=2,
                )
        return loaded

    return {"save_pretrained": save_pretrained, "load_adapter": load_adapter}


def _holds(folder: Path, *formats: str) -> bool:
    return any(FORMATS[name].recognises(folder) for name in formats)


def _check_name(model: PeftModel) -> None:
    if FOLDER in model.peft_config:
        raise ValueError(
            f"model has an adapter named {FOLDER!r}, the name of the folder that the attached "
            "prefix is saved in: give the adapter another"
        )


def _check_folder(folder: Path) -> None:
    """Raise where the prefix would overwrite another kind of adapter."""
    if (folder / CONFIG_FILE).is_file() and not _holds(folder, "peft", "peft-cartridge"):
        raise FileExistsError(
            f"{folder} is the place of the attached prefix, and holds an adapter that is none: "
            "remove it, or save elsewhere"
        )


def _save(prefix: Prefix, folder: Path, base_name: str | None) -> None:
    for name in (CONFIG_FILE, TENSORS_FILE, PICKLE_FILE):  # they may be of an earlier prefix
        (folder / name).unlink(missing_ok=True)
    prefix.save_pretrained(folder)
    shapes = set(prefix.layer_shapes)
    alike = len(shapes) == 1 and all(s and s.key_dim == s.value_dim for s in shapes)
    if alike and prefix.kind != "gated" and prefix.positions == "shift":
        rounded = copy.deepcopy(prefix).float()  # ours beside it has every digit
        peft_type: Any = "CARTRIDGE" if prefix.num_frozen_tokens else "PREFIX_TUNING"
        save_peft(rounded, folder, base_name, peft_type=peft_type)


def _load(prefix: Prefix, folder: Path) -> Any:
    """Give ``prefix`` the numbers of the one in ``folder``.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or the two differ in more than their numbers.
    """
    saved = Prefix.from_pretrained(folder)
    for name in ALIKE:
        mine, theirs = getattr(prefix, name), getattr(saved, name)
        if mine != theirs:
            raise ValueError(
                f"{folder}: {name} must be {mine!r} like the attached prefix's, got {theirs!r}"
            )
    with torch.no_grad():
        return prefix.load_state_dict(saved.state_dict())
