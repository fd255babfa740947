"""What all ranks must agree on before any of them waits for keys of another."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist

from prefixattn.distributed.layout import gather_numbers, lengths_of

Checked = TypeVar("Checked")
CHECKSUMS = ("prefix_index", "prefix_lengths")  # facts whose numbers say nothing to people
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def agree(
    check: Callable[[], tuple[Checked, Mapping[str, float]]],
    names: tuple[str, ...],
    device: torch.device,
    group: dist.ProcessGroup | None,
) -> tuple[Checked, list[int]]:
    """What `check` returns, and each rank's tokens, once all ranks have passed it and agree.

    Args:
        check: holds this rank's input to the rules; what it found, and its facts by name:
            `tokens`, which may differ as the layout says, and `names`, which may not differ.
        names: the facts of every rank, known even where its input is refused.
        device: of the tensors.
        group: the processes that share the sequence.

    Raises:
        Exception: what `check` raised here.
        RuntimeError: another rank's input was refused there.
        ValueError: a fact differs between ranks, or the parts are none of one sequence.
    """
    try:
        found, facts = check()
    except Exception:
        gather_numbers(
            [1, *(0 for _ in ("tokens", *names))], device, group
        )  # the others hear of it
        raise
    mine = [0, *(_number(facts[name]) for name in ("tokens", *names))]
    everyone = gather_numbers(mine, device, group)
    if refused := [rank for rank, numbers in enumerate(everyone) if numbers[0]]:
        raise RuntimeError(f"rank {refused[0]} refused its input: its own error says why")
    for place, name in enumerate(names, 2):
        values = [numbers[place] for numbers in everyone]
        if len(set(values)) > 1:
            shown = [_shown(name, value) for value in values]
            got = "others" if name in CHECKSUMS else f"{shown} by rank"
            raise ValueError(f"{name}: expected the same on all ranks, got {got}")
    tokens = [numbers[1] for numbers in everyone]
    whole, world = sum(tokens), len(tokens)
    expected = [sum(lengths_of(whole, rank, world)) for rank in range(world)]
    if tokens != expected:
        raise ValueError(
            f"query: expected parts of {expected} tokens by rank, as shard_sequence cuts "
            f"{whole}, got {tokens}"
        )
    return found, tokens


def _number(value: float) -> int:
    """An int as it is, and the bits of any other number."""
    if isinstance(value, int):
        return int(value)
    (bits,) = struct.unpack("<q", struct.pack("<d", value))
    return int(bits)


def _shown(name: str, value: int) -> object:
    if name in ("scale", "softcap"):
        return struct.unpack("<d", struct.pack("<q", value))[0]
    return str(DTYPES[value]) if name == "dtype" else value
