"""Prefixes in the files of PEFT, AdapterHub, Cartridges, P-tuning v2, and of whole models."""

from prefixattn.checkpoints.peft import load_peft, save_peft
from prefixattn.checkpoints.registry import FORMATS, Format, convert, load, recognise, save

__all__ = ["FORMATS", "Format", "convert", "load", "load_peft", "recognise", "save", "save_peft"]
