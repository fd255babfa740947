"""Counter-based random bits for dropout: the same wherever and in whatever order they are made.

Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011): the key is
the seed, the counter is (column, query, head, row), and the first output word decides. Prefix token
`j` is column `j`, sequence key `j` is column `P + j`; a packed segment is a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def random_words(
    seed: Tensor, rows: Tensor, heads: Tensor, queries: Tensor, columns: Tensor
) -> Tensor:
    """Uniform 32-bit words, as int64 `[rows, heads, queries, columns]`.

    Args:
        seed: int64 `[2]`: the key, and the number of the first row.
        rows, heads, queries, columns: int64 `[n]` counters, each under 2^32.
    """
    counter = [
        columns.view(1, 1, 1, -1),
        queries.view(1, 1, -1, 1),
        heads.view(1, -1, 1, 1),
        (rows + seed[1]).view(-1, 1, 1, 1),
    ]
    key_0, key_1 = seed[0] & WORD, (seed[0] >> 32) & WORD
    for _ in range(ROUNDS):
        high_0, low_0 = _multiply(counter[0], MULTIPLIERS[0])
        high_1, low_1 = _multiply(counter[2], MULTIPLIERS[1])
        counter = [high_1 ^ counter[1] ^ key_0, low_1, high_0 ^ counter[3] ^ key_1, low_0]
        key_0, key_1 = (key_0 + WEYL[0]) & WORD, (key_1 + WEYL[1]) & WORD
    return counter[0]


def keep_mask(words: Tensor, dropout_p: float) -> Tensor:
    """Which probabilities stay: true with probability `1 - dropout_p`."""
    return words >= round(dropout_p * 2**32)


def new_seed(device: torch.device) -> Tensor:
    """A fresh int64 `[2]` seed from torch's generator of `device`, for row 0."""
    key = torch.randint(2**62, (1,), device=device)
    return torch.cat([key, key.new_zeros(1)])


def _multiply(words: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low words of a 32 x 32 bit product; int64 wraps, its bits stay right."""
    product = words * multiplier
    return (product >> 32) & WORD, product & WORD
