"""Who holds which part of a sequence: from the head and from the tail, so that causal work is even.

A sequence is cut into `2 * world` chunks; rank `r` holds the chunks `r` and `2 * world - 1 - r`,
one behind the other. Of a causal sequence, every rank then computes as much as every other. Where
the length does not divide, the first chunks are one token longer; a chunk may be empty.
"""

from __future__ import annotations

from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor


def chunk_starts(length: int, world: int) -> list[int]:
    """Where each of the `2 * world` chunks begins, and behind the last one `length`."""
    count = 2 * world
    size, longer = divmod(length, count)
    return [chunk * size + min(chunk, longer) for chunk in range(count + 1)]


def chunks_of(length: int, rank: int, world: int) -> tuple[slice, slice]:
    """The two parts of the whole sequence that a rank holds."""
    starts = chunk_starts(length, world)
    head, tail = (slice(starts[c], starts[c + 1]) for c in (rank, 2 * world - 1 - rank))
    return head, tail


def lengths_of(length: int, rank: int, world: int) -> tuple[int, int]:
    """Tokens of a rank's two chunks."""
    head, tail = chunks_of(length, rank, world)
    return head.stop - head.start, tail.stop - tail.start


def shard_sequence(tensor: Tensor, dim: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """The part of a whole sequence that this rank holds, copied; differentiable.

    Every rank passes the same whole tensor: token ids, labels and `position_ids` alike.

    Args:
        tensor: any dtype; `dim` is the sequence's.
        dim: may be negative.
        group: the processes that share the sequence. None: all.
    """
    parts = chunks_of(tensor.shape[dim], dist.get_rank(group), dist.get_world_size(group))
    return torch.cat([tensor.narrow(dim, p.start, p.stop - p.start) for p in parts], dim)


def unshard_sequence(tensor: Tensor, dim: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """The whole sequence from every rank's part, on every rank; not differentiable.

    Args:
        tensor: this rank's part, as `shard_sequence` gives it.
        dim: the sequence's.
        group: the processes that share the sequence. None: all.

    Raises:
        IndexError: the tensor has no such dimension; on all ranks.
        ValueError: ranks disagree on the dtype, the dimension or a size beside it, or the parts are
            none of one sequence; on all ranks.
    """
    world, ndim = dist.get_world_size(group), tensor.ndim
    place = dim % ndim if -ndim <= dim < ndim else -1
    kind = crc32(str(tensor.dtype).encode())
    alike = gather_numbers([ndim, place, kind], tensor.device, group)
    if any(found != alike[0] for found in alike):
        raise ValueError(
            "tensor: expected the same number of dimensions, dtype and dim on all ranks, got "
            f"{ndim} dimensions, {tensor.dtype} and dim={dim} here, and others elsewhere"
        )
    if place < 0:
        raise IndexError(f"dim: expected one of the {ndim} dimensions of tensor, got {dim}")
    shapes = gather_numbers(list(tensor.shape), tensor.device, group)
    lengths = [shape.pop(place) for shape in shapes]
    if any(found != shapes[0] for found in shapes):
        raise ValueError(f"tensor: expected the same sizes beside dim on all ranks, got {shapes}")
    expected = [sum(lengths_of(sum(lengths), rank, world)) for rank in range(world)]
    if lengths != expected:
        raise ValueError(
            f"tensor: expected parts of {expected} by rank, as shard_sequence cuts {sum(lengths)}, "
            f"got {lengths}"
        )
    return in_order(gather_parts(tensor.detach(), place, lengths, group), place, world)


def gather_parts(
    tensor: Tensor, dim: int, lengths: list[int], group: dist.ProcessGroup | None
) -> list[Tensor]:
    """Every rank's part along `dim`, of the given lengths."""
    longest = max(lengths)
    moved = tensor.movedim(dim, 0)
    padded = moved.new_zeros(longest, *moved.shape[1:])
    padded[: len(moved)] = moved
    found = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(found, padded, group=group)
    return [x[:length].movedim(0, dim) for x, length in zip(found, lengths, strict=True)]


def in_order(parts: list[Tensor], dim: int, world: int) -> Tensor:
    """Every rank's part as the whole sequence."""
    length = sum(part.shape[dim] for part in parts)
    heads, tails = [], []
    for rank, part in enumerate(parts):
        head, tail = part.split(lengths_of(length, rank, world), dim)
        heads.append(head)
        tails.append(tail)
    return torch.cat([*heads, *reversed(tails)], dim)


def gather_numbers(
    numbers: list[int], device: torch.device, group: dist.ProcessGroup | None
) -> list[list[int]]:
    """Every rank's numbers, in the order of ranks; each passes as many."""
    mine = torch.tensor(numbers, dtype=torch.int64, device=device)
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, mine, group=group)
    return [x.tolist() for x in found]
