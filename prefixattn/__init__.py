"""Prefix attention: a trained or shared prefix and a sequence, in one softmax, with no copies."""

from prefixattn.api import explain, prefix_attention
from prefixattn.encoder_decoder import EncoderDecoderPrefix
from prefixattn.integrations import attach
from prefixattn.prefix import Prefix, ProjectedPrefix

__all__ = [
    "EncoderDecoderPrefix",
    "Prefix",
    "ProjectedPrefix",
    "attach",
    "explain",
    "prefix_attention",
]
