"""What people do with a causal model, each held to the token-prefix identity.

A situation returns None where the model with the prefix says what the stock model says behind the
text, or what is wrong.
"""

import torch

from . import forwards, generation, objects, training
from .specimen import Situation

SITUATIONS: dict[str, Situation] = {
    "no mask": forwards.no_mask,
    "left pad": forwards.left_padding,
    "right pad": forwards.right_padding,
    "position_ids": forwards.position_ids,
    "packed": forwards.packed_rows,
    "embeds": forwards.embeddings,
    "4D mask": forwards.dense_mask,
    "rows": objects.rows,
    "gradients": training.gradients,
    "checkpoint": training.checkpointed,
    "reentrant": training.checkpointed_reentrant,
    "greedy": generation.greedy,
    "greedy pad": generation.greedy_padded,
    "no cache": generation.no_cache,
    "static": generation.static_cache,
    "sliding": generation.sliding_cache,
    "offloaded": generation.offloaded_cache,
    "quantized": generation.quantized_cache,
    "beams": generation.beams,
    "sampling": generation.sampling,
    "assisted": generation.assisted,
    "lookup": generation.prompt_lookup,
    "chunked": generation.chunked_prefill,
    "turn 2": generation.second_turn,
    "by hand": generation.decode_loop,
    "compile": objects.compiled,
    "bf16": objects.half_precision,
    "autocast": objects.autocast,
    "copies": objects.copies,
    "detach": objects.detached,
    "raises": objects.raises,
    "switched": objects.switched_away,
}
MISSING: dict[str, str] = {}  # what this machine cannot try, and why
if not torch.cuda.is_available():
    MISSING["offloaded"] = "needs a GPU"
if not generation.QUANTIZERS:
    MISSING["quantized"] = "needs optimum-quanto or hqq"
