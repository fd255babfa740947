"""A PeftModel of another kind (LoRA) with a prefix beside its adapters: its files hold both.

The prefix lies in the subfolder ``prefix``, in our format, and in PEFT's where that can hold it:
PEFT reads the folder as one adapter, and the subfolder as another.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from prefixattn.checkpoints import save_peft
from prefixattn.integrations.derived import derive
from prefixattn.integrations.undo import Undoing
from prefixattn.prefix import Prefix

FOLDER = "prefix"
BESIDE = "prefixattn_beside"


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
    if FOLDER in model.peft_config:
        raise ValueError(f"model has an adapter named {FOLDER!r}, the name of the prefix's folder")
    setattr(model, BESIDE, True)
    undo.callback(delattr, model, BESIDE)
    undo.callback(derive(model, _saves_the_prefix_too))
    return True


def _attached(model: Any) -> Prefix:
    prefix: Prefix = model.get_base_model().prefixattn
    return prefix


def _saves_the_prefix_too(old: type) -> dict[str, Any]:
    base: Any = old

    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        base.save_pretrained(self, save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            prefix, folder = _attached(self), Path(save_directory) / FOLDER
            prefix.save_pretrained(folder)
            shapes = set(prefix.layer_shapes)
            alike = len(shapes) == 1 and all(s and s.key_dim == s.value_dim for s in shapes)
            plain = prefix.kind != "gated" and prefix.positions == "shift"
            if alike and plain and not prefix.num_frozen_tokens:
                rounded = copy.deepcopy(prefix).float()  # ours beside it has every digit
                save_peft(rounded, folder, getattr(self.get_base_model(), "name_or_path", None))

    def load_adapter(self: Any, model_id: Any, adapter_name: str, *args: Any, **kw: Any) -> Any:
        if adapter_name != FOLDER:
            return base.load_adapter(self, model_id, adapter_name, *args, **kw)
        around = Path(model_id).parent
        if (around / "adapter_config.json").is_file():
            # Where there are subfolders, the Trainer of transformers 5.17 reads nothing else.
            base.load_adapter(self, around, self.active_adapters[0], is_trainable=True)
        with torch.no_grad():
            saved = Prefix.from_pretrained(model_id)
            return _attached(self).load_state_dict(saved.state_dict())

    return {"save_pretrained": save_pretrained, "load_adapter": load_adapter}
