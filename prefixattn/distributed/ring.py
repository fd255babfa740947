"""Attention of one sequence that is spread over processes, with a prefix that all of them have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from prefixattn.api import make_problem
from prefixattn.choose import choose
from prefixattn.distributed.agreement import DTYPES, agree
from prefixattn.distributed.blocks import Blocks, Merged
from prefixattn.distributed.layout import chunks_of, gather_parts, in_order, lengths_of
from prefixattn.problem import TENSORS, Problem
from prefixattn.scalars import plain

ALL = slice(None)
FACTS = (
    *("B", "H", "H_kv", "D", "D_v", "R", "P", "dtype", "is_causal", "all_gather", "scale"),
    *("softcap", "query needs grad", "key needs grad", "prefix needs grad", "lse"),
    *("prefix_index", "prefix_lengths"),
)


def ring_prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    prefix_index: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
    method: Literal["ring", "all-gather"] = "ring",
    group: dist.ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`prefix_attention` of a whole sequence, of which each rank holds a part; the prefix once.

    Context parallelism (Liu et al., 2023, "Ring Attention with Blockwise Transformers"): the keys
    and values of each rank go around, and every rank's queries meet all of them; their softmaxes
    are merged by log-sum-exp. Each rank passes the part that `shard_sequence` gives it, from the
    head and from the tail, so that causal work is even. The prefix meets each query once, with the
    keys of its own rank.

    Args:
        query: `[B, H, M, D]`, this rank's part.
        key: `[B, H_kv, M, D]`, of the same tokens.
        value: `[B, H_kv, M, D_v]`.
        prefix_key: `[R, H_kv, P, D]`, the same on all ranks.
        prefix_value: `[R, H_kv, P, D_v]`, the same on all ranks.
        prefix_index: as for `prefix_attention`.
        prefix_lengths: as for `prefix_attention`.
        is_causal: a query sees the keys at positions up to its own in the whole sequence.
        scale: as for `prefix_attention`.
        softcap: as for `prefix_attention`.
        return_lse: whether to return the log-sum-exp too.
        implementation: as for `prefix_attention`.
        method: "ring": two parts at a time are in memory, sent while the one before is computed.
            "all-gather": the whole sequence's keys are, in one message; for shorter sequences.
        group: the processes that share the sequence. None: all.

    Returns:
        As `prefix_attention`, of this rank's queries. Differentiable in the five tensors, through
        both. The prefix's gradient is the whole sequence's, summed over the group: it is not to be
        summed over the group again.

    Raises:
        TypeError, ValueError, NotImplementedError: as `prefix_attention` does, and where ranks
            disagree; on all ranks.
        RuntimeError: on the other ranks, where one rank's own input is refused.
    """
    if not dist.is_initialized():
        raise RuntimeError("torch.distributed is not initialised: call init_process_group first")

    def check() -> tuple[Problem, dict[str, float]]:
        if method not in ("ring", "all-gather"):
            raise ValueError(f"method: expected ring or all-gather, got {method!r}")
        if not isinstance(plain(return_lse), bool):
            raise TypeError(f"return_lse: expected True or False, got {return_lse!r}")
        options: dict[str, Any] = {"scale": scale, "softcap": softcap}
        banked: dict[str, Any] = {"prefix_index": prefix_index, "prefix_lengths": prefix_lengths}
        problem = make_problem(
            query, key, value, prefix_key, prefix_value, is_causal=is_causal, **options, **banked
        )
        if problem.M != problem.N:
            raise ValueError(f"key: expected the {problem.M} tokens of query, got {problem.N}")
        choose(implementation, problem)
        facts = {name: getattr(problem, name) for name in ("B", "H", "H_kv", "D", "D_v", "R", "P")}
        facts |= {"tokens": problem.M, "dtype": DTYPES.index(problem.query.dtype)}
        facts |= {"is_causal": is_causal, "all_gather": method == "all-gather", "lse": return_lse}
        facts |= {"scale": float(problem.scale), "softcap": float(softcap or 0)}
        facts |= {name: _checksum(numbers) for name, numbers in banked.items()}
        inputs = (query, key, value, prefix_key, prefix_value)
        needed = [torch.is_grad_enabled() and x.requires_grad for x in inputs]
        facts |= {"query needs grad": needed[0], "key needs grad": needed[1] or needed[2]}
        facts |= {"prefix needs grad": needed[3] or needed[4]}
        return problem, facts

    device = query.device if isinstance(query, Tensor) else torch.device("cpu")
    problem, tokens = agree(check, FACTS, device, group)
    ring = Ring(dist.get_rank(group), len(tokens), sum(tokens), is_causal, group)
    blocks = Blocks.like(problem, implementation)
    run = _AllGather if method == "all-gather" else _Ring
    out, lse = run.apply(blocks, ring, *(getattr(problem, name) for name in TENSORS))
    return (out, lse) if return_lse else out


def _checksum(numbers: Tensor | None) -> int:
    return 0 if numbers is None else crc32(repr(numbers.tolist()).encode())


@dataclass(frozen=True)
class Ring:
    """A rank's place in the group, and which keys of another rank its queries see."""

    rank: int
    world: int
    length: int
    is_causal: bool
    group: dist.ProcessGroup | None

    def visible(self, source: int) -> tuple[slice, slice, bool]:
        """Of the keys from rank `source`: the queries that see any, the keys seen, causally or not.

        With head and tail on each rank every block is whole: a head is seen by all later heads and
        by all tails; a tail by earlier ranks' tails alone.
        """
        if not self.is_causal or source == self.rank:
            return ALL, ALL, self.is_causal
        if source < self.rank:
            return ALL, slice(0, lengths_of(self.length, source, self.world)[0]), False
        return slice(lengths_of(self.length, self.rank, self.world)[0], None), ALL, False

    def tokens_of(self, rank: int) -> int:
        """How many tokens a rank holds."""
        return sum(lengths_of(self.length, rank, self.world))

    def source(self, step: int) -> int:
        """Whose keys are here in this step; its own are in step 0."""
        return (self.rank - step) % self.world

    def pass_on(self, tensors: list[Tensor], step: int) -> Passing:
        """Begin to send what is here in `step` to the next rank, and to receive from the last."""
        tokens = self.tokens_of(self.source(step + 1))
        arriving = [x.new_empty(*x.shape[:2], tokens, x.shape[3]) for x in tensors]
        after, before = ((self.rank + way) % self.world for way in (1, -1))
        if self.group is not None:
            after, before = (dist.get_global_rank(self.group, rank) for rank in (after, before))
        sending = [x.contiguous() for x in tensors]
        operations = [dist.P2POp(dist.isend, x, after, self.group) for x in sending if x.numel()]
        operations += [dist.P2POp(dist.irecv, x, before, self.group) for x in arriving if x.numel()]
        works = dist.batch_isend_irecv(operations) if operations else []
        return Passing(works, sending, arriving)

    def steps(self, key: Tensor, value: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Each rank's keys and values in turn; the next ones travel while these are used."""
        for step in range(self.world):
            last = step == self.world - 1
            passing = None if last else self.pass_on([key, value], step)
            yield self.source(step), key, value
            if passing is not None:
                key, value = passing.wait()


@dataclass(frozen=True)
class Passing:
    """Messages on their way; what is sent must stay alive until they have arrived."""

    works: list[Any]
    sending: list[Tensor]
    arriving: list[Tensor]

    def wait(self) -> list[Tensor]:
        """What has arrived."""
        for work in self.works:
            work.wait()
        return self.arriving


class _Ring(torch.autograd.Function):
    """Keys and values go around; in the backward their gradients go around with them."""

    @staticmethod
    def forward(ctx: Any, blocks: Blocks, ring: Ring, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, pk, pv = tensors
        merged = Merged(q, v.shape[3])
        for source, key, value in ring.steps(k, v):
            rows, columns, causal = ring.visible(source)
            prefix = (pk, pv) if source == ring.rank else None
            part = q[:, :, rows], key[:, :, columns], value[:, :, columns]
            if part[0].shape[2] and (part[1].shape[2] or prefix):
                problem = blocks.problem(*part, prefix, is_causal=causal)
                merged.add(rows, *blocks.forward(problem))
        return _keep(ctx, blocks, ring, merged, tensors)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        blocks, ring = ctx.blocks, ctx.ring
        q, k, v, pk, pv, out, lse, lse_rest = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        dq, dk, dv, dpk, dpv = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v, pk, pv))
        arriving: Passing | None = None
        for step, (source, key, value) in enumerate(ring.steps(k, v)):
            rows, columns, causal = ring.visible(source)
            prefix = (pk, pv) if source == ring.rank else None
            part = q[:, :, rows], key[:, :, columns], value[:, :, columns]
            grads = None
            if part[0].shape[2] and (part[1].shape[2] or prefix):
                problem = blocks.problem(*part, prefix, is_causal=causal)
                whole = (dout, dlse, out, lse, lse_rest)
                up = [None if x is None else x[:, :, rows] for x in whole]
                grads = blocks.backward(problem, *up)
            if arriving is not None:  # the gradients of the keys that are here, from their journey
                dk, dv = arriving.wait()
            if grads is not None:
                dq[:, :, rows] += grads[0]
                dk[:, :, columns] += grads[1]
                dv[:, :, columns] += grads[2]
                if prefix:
                    dpk += grads[3]
                    dpv += grads[4]
            if ring.world > 1:
                arriving = ring.pass_on([dk, dv], step)
        if arriving is not None:
            dk, dv = arriving.wait()  # home again
        return _results(ctx, (dq, dk, dv, dpk, dpv), (q, k, v, pk, pv))


class _AllGather(torch.autograd.Function):
    """Every rank has all keys; its two chunks of queries see what stands before them."""

    @staticmethod
    def forward(ctx: Any, blocks: Blocks, ring: Ring, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, pk, pv = tensors
        merged = Merged(q, v.shape[3])
        key, value = _whole(ring, k, v)
        for rows, columns, offset in _views(ring):
            part = q[:, :, rows], key[:, :, columns], value[:, :, columns]
            own: dict[str, Any] = {"is_causal": ring.is_causal, "query_offset": offset}
            merged.add(rows, *blocks.forward(blocks.problem(*part, (pk, pv), **own)))
        return _keep(ctx, blocks, ring, merged, tensors)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        blocks, ring = ctx.blocks, ctx.ring
        q, k, v, pk, pv, out, lse, lse_rest = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        key, value = _whole(ring, k, v)
        sums = [torch.zeros_like(x, dtype=lse.dtype) for x in (q, key, value, pk, pv)]
        for rows, columns, offset in _views(ring):
            part = q[:, :, rows], key[:, :, columns], value[:, :, columns]
            own: dict[str, Any] = {"is_causal": ring.is_causal, "query_offset": offset}
            whole = (dout, dlse, out, lse, lse_rest)
            up = [None if x is None else x[:, :, rows] for x in whole]
            grads = blocks.backward(blocks.problem(*part, (pk, pv), **own), *up)
            places: tuple[slice, ...] = (rows, columns, columns, ALL, ALL)
            for total, grad, place in zip(sums, grads, places, strict=True):
                total[:, :, place] += grad
        mine = chunks_of(ring.length, ring.rank, ring.world)
        for of in (1, 2):
            dist.all_reduce(sums[of], group=ring.group)
            sums[of] = torch.cat([sums[of][:, :, chunk] for chunk in mine], 2)
        return _results(ctx, tuple(sums), (q, k, v, pk, pv))


def _whole(ring: Ring, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and values of the whole sequence."""
    lengths = [ring.tokens_of(rank) for rank in range(ring.world)]
    found = (gather_parts(x, 2, lengths, ring.group) for x in (key, value))
    whole_key, whole_value = (in_order(parts, 2, ring.world) for parts in found)
    return whole_key, whole_value


def _views(ring: Ring) -> Iterator[tuple[slice, slice, int]]:
    """Of each chunk here: its queries' rows, the keys they may see, the first one's position."""
    start = 0
    for chunk in chunks_of(ring.length, ring.rank, ring.world):
        stop = start + chunk.stop - chunk.start
        if start < stop:
            seen = slice(0, chunk.stop) if ring.is_causal else ALL
            yield slice(start, stop), seen, chunk.start
        start = stop


def _keep(
    ctx: Any, blocks: Blocks, ring: Ring, merged: Merged, tensors: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    out = merged.out.to(tensors[0].dtype)
    ctx.set_materialize_grads(False)
    ctx.blocks, ctx.ring = blocks, ring
    ctx.save_for_backward(*tensors, out, merged.lse, merged.lse_rest)
    return out, merged.lse


def _results(ctx: Any, grads: tuple[Tensor, ...], tensors: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """In the tensors' dtypes; the prefix's of all ranks' queries."""
    needed = ctx.needs_input_grad[2:]
    if needed[3] or needed[4]:
        for grad in grads[3:]:
            dist.all_reduce(grad, group=ctx.ring.group)
    found = (
        grad.to(x.dtype) if wanted else None
        for grad, x, wanted in zip(grads, tensors, needed, strict=False)
    )
    return None, None, *found
