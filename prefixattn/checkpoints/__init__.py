"""Prefixes in the files of other libraries."""

from prefixattn.checkpoints.peft import load_peft, save_peft

__all__ = ["load_peft", "save_peft"]
