"""Attention over a sequence that is spread over processes: `torch.distributed`, imported by name.

Data, tensor and pipeline parallelism need nothing of this: see `docs/distributed.md`.
"""

from prefixattn.distributed.layout import shard_sequence, unshard_sequence
from prefixattn.distributed.ring import ring_prefix_attention

__all__ = ["ring_prefix_attention", "shard_sequence", "unshard_sequence"]
