"""Prefix attention: a trained or shared prefix and a sequence, in one softmax, with no copies."""

from prefixattn.api import explain, prefix_attention
from prefixattn.bank import PrefixBank
from prefixattn.encoder_decoder import EncoderDecoderPrefix
from prefixattn.external import ExternalPrefix
from prefixattn.gated import GatedPrefix
from prefixattn.integrations import attach, detach
from prefixattn.positions import move_prefix
from prefixattn.prefix import Prefix
from prefixattn.projected import ProjectedPrefix

__all__ = [
    "EncoderDecoderPrefix",
    "ExternalPrefix",
    "GatedPrefix",
    "Prefix",
    "PrefixBank",
    "ProjectedPrefix",
    "attach",
    "detach",
    "explain",
    "move_prefix",
    "prefix_attention",
]
