"""How the `sdpa` implementation cuts a dense problem into parts that PyTorch can compute.

A `KernelPart` is a rectangle, or a square causal triangle, of queries and keys that one of
PyTorch's kernels reads where they lie. A `BlockPart` is a whole half, prefix or sequence, that no
kernel can express. `plan` decides which; reading per-row numbers for it waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from prefixattn import blocks
from prefixattn.aten import Call, Kernels
from prefixattn.gradients import Index, LogSum, Total, Upstream
from prefixattn.operands import overlaps
from prefixattn.problem import FURTHEST, Problem, cut

ALL = slice(None)
# Fewer queries than this are copied together, so that all rows read a shared prefix once; for
# more, reading the prefix again for each row costs less than the copy.
FEW_QUERIES = 64
# More slots are computed apart and merged: PyTorch's CPU kernel adds each slot's weighted value to
# one running float32 sum, which on 131,072 slots errs by 7e-4, a hundred times as much as eager.
MOST_SLOTS = 4096


@dataclass(frozen=True)
class KernelPart:
    """Some rows' queries against some slots of one half, by one of PyTorch's kernels."""

    problem: Problem
    kernels: Kernels
    half: str
    rows: slice | Tensor
    queries: slice
    source_rows: slice
    slots: slice
    is_causal: bool = False

    @property
    def index(self) -> Index | None:
        """Where the part lies in the output; None: it is all of it."""
        everything = isinstance(self.rows, slice) and self.rows == ALL
        whole = everything and self.queries == slice(0, self.problem.M)
        return None if whole else (self.rows, ALL, self.queries)

    def forward(self) -> tuple[Tensor, LogSum]:
        q, k, v = self._inputs()
        folds = q.shape[0] > k.shape[0] and q.shape[2] < FEW_QUERIES
        if folds:
            folded = self._fold(q)
        else:
            folded, k, v = q, k.expand(q.shape[0], -1, -1, -1), v.expand(q.shape[0], -1, -1, -1)
        bias = self._bias()
        out, lse = self.kernels.forward(self._call(folded, k, v, bias))
        if folds:
            out, lse = self._unfold(out, q), self._unfold(lse[..., None], q)[..., 0]
        elif bias is not None:
            lse = lse.masked_fill(~self._alive(bias), -torch.inf)
        return out, (lse, torch.zeros_like(lse))

    def backward(self, up: Upstream, totals: dict[str, Total]) -> None:
        q, k, v = self._inputs()
        # Where nothing is seen, +inf makes every probability zero.
        lse = self._of_queries(up.lse)
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)[..., None].contiguous()
        out, dout = self._of_queries(up.out), self._of_queries(up.dout)
        for rows in self._row_chunks(q, k):
            parts = [x[rows] for x in (dout, q, out, lse)]
            folds = parts[0].shape[0] > k.shape[0]
            if folds:
                parts = [self._fold(x) for x in parts]
            dout_part, q_part, out_part, lse_part = parts
            call = self._call(q_part, k, v, self._bias())
            dq, dk, dv = self.kernels.backward(call, dout_part, out_part, lse_part[..., 0])
            dq = self._unfold(dq, q[rows]) if folds else dq
            self._add(totals, dq, dk, dv, (self._rows_of(rows), ALL, self.queries))

    def _call(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Call:
        return Call(q, k, v, bias, self.is_causal, self.problem.scale)

    def _rows_of(self, chunk: slice) -> slice | Tensor:
        if isinstance(self.rows, Tensor):
            return self.rows[chunk]
        first = self.rows.start or 0
        return slice(first + chunk.start, first + chunk.stop)

    def _inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        p = self.problem
        key, value = (p.key, p.value) if self.half == "sequence" else (p.prefix_key, p.prefix_value)
        k, v = (part[self.source_rows, :, self.slots] for part in (key, value))
        # PyTorch's kernels lay their results out as the queries are, and refuse such keys.
        q, k, v = (x.contiguous() if overlaps(x) else x for x in (self._of_queries(p.query), k, v))
        return q, k, v

    def _of_queries(self, x: Tensor) -> Tensor:
        return x[self.rows][:, :, self.queries]

    def _add(
        self, totals: dict[str, Total], dq: Tensor, dk: Tensor, dv: Tensor, index: Index | None
    ) -> None:
        prefix = "prefix_" if self.half == "prefix" else ""
        source = (self.source_rows, ALL, self.slots)
        for name, grad, where in (
            ("query", dq, index),
            (f"{prefix}key", dk, source),
            (f"{prefix}value", dv, source),
        ):
            if name in totals:
                total = totals[name]
                total.add(grad, None if grad.shape == total.shape else where)

    def _fold(self, x: Tensor) -> Tensor:
        """Rows that share their keys as one: `[b, H, m, *]` to `[1, H_kv, b * group * m, *]`."""
        grouped = x.unflatten(1, (self.problem.H_kv, -1)).transpose(0, 1)
        return grouped.reshape(1, self.problem.H_kv, -1, x.shape[-1])

    def _unfold(self, x: Tensor, like: Tensor) -> Tensor:
        b, h, m, _ = like.shape
        return x[0].unflatten(1, (b, -1, m)).transpose(0, 1).reshape(b, h, m, -1)

    def _row_chunks(self, q: Tensor, k: Tensor) -> list[slice]:
        """Rows for one backward call: all, or as many as the kernel can sum over with care."""
        rows, limit = q.shape[0], self.kernels.queries_per_backward
        if rows == k.shape[0] or limit is None:
            return [slice(0, rows)]
        step = max(1, limit // (self.problem.H // self.problem.H_kv * q.shape[2]))
        return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]

    def _bias(self) -> Tensor | None:
        """The part's additive bias in a dtype the kernels take."""
        p = self.problem
        bias = cut(
            p.attn_mask if self.half == "sequence" else p.prefix_bias, self.queries, self.slots
        )
        if bias is None:
            return None
        bias = bias if bias.shape[0] == 1 else bias[self.rows]
        if bias.dtype != torch.bool:
            return bias.to(p.accumulator)
        return torch.zeros_like(bias, dtype=p.accumulator).masked_fill(~bias, -torch.inf)

    def _alive(self, bias: Tensor) -> Tensor:
        """Which queries see any key through the bias, broadcastable to `[b, H, m]`.

        The CPU kernel gives `lse = 0`, not `-inf`, to a query that sees none.
        """
        seen = bias > -torch.inf
        m, k = self.queries.stop - self.queries.start, self.slots.stop - self.slots.start
        if not self.is_causal:
            return seen.expand(*seen.shape[:-1], k).any(-1)
        if seen.shape[-2] == 1:
            return seen[..., 0, :].expand(*seen.shape[:-2], k).cumsum(-1) > 0
        triangle = torch.ones(m, k, dtype=torch.bool, device=bias.device).tril()
        return (seen & triangle).any(-1)


@dataclass(frozen=True)
class BlockPart:
    """A whole half in blocks of plain PyTorch."""

    problem: Problem
    half: str
    index: Index | None = None

    def forward(self) -> tuple[Tensor, LogSum]:
        out, *numbers = blocks.forward(self._source())
        return out, (numbers[0], numbers[1])

    def backward(self, up: Upstream, totals: dict[str, Total]) -> None:
        prefix = "prefix_" if self.half == "prefix" else ""
        names = {
            "query": "query",
            "key": f"{prefix}key",
            "value": f"{prefix}value",
            "bias": "prefix_bias" if prefix else "attn_mask",
        }
        wanted = {role: name in totals for role, name in names.items()}
        grads = blocks.backward(self._source(), up, wanted)
        for role, name in names.items():
            if (grad := getattr(grads, role)) is not None:
                totals[name].add(grad)

    def weighed(self, up: Upstream) -> Tensor:
        """`sum(dout * out)` over this half's share of the output, `[B, H, M]`."""
        return blocks.weighed(self._source(), up)

    def _source(self) -> blocks.Source:
        p, rows = self.problem, row_numbers(self.problem)
        prefix = self.half == "prefix"
        position = rows.offset[:, None] + torch.arange(p.M, device=p.query.device)  # [B or 1, M]
        first = rows.start - rows.tokens if prefix else torch.zeros_like(rows.start)
        distance = position - first[:, None]
        low, high = torch.zeros_like(distance), rows.tokens[:, None].expand_as(distance)
        if not prefix:
            low = rows.start[:, None].expand_as(distance)
            high = rows.stop[:, None].expand_as(distance)
            high = high.minimum(position + 1) if p.is_causal else high
        positioned = p.windowed_prefix or not prefix
        if p.window is not None and positioned:
            low = low.maximum(distance.clamp(min=-1) - p.window + 1)
        entry = None if p.prefix_index is None else p.prefix_index.long().clamp(min=0)
        return blocks.Source(
            query=p.query,
            key=p.prefix_key if prefix else p.key,
            value=p.prefix_value if prefix else p.value,
            entry=entry if prefix else None,
            low=low,
            high=high,
            bias=p.prefix_bias if prefix else p.attn_mask,
            alibi_slopes=p.alibi_slopes if positioned else None,
            distance_to_first=distance,
            scale=p.scale,
            softcap=p.softcap,
            dropout_seed=p.dropout_seed,
            dropout_p=p.dropout_p,
            first_column=0 if prefix else p.P,
            dtype=p.accumulator,
        )


Part = KernelPart | BlockPart


class RowNumbers(NamedTuple):
    """int64 `[B]`: first key, one past the last key, position of query 0, prefix tokens."""

    start: Tensor
    stop: Tensor
    offset: Tensor
    tokens: Tensor


def row_numbers(p: Problem) -> RowNumbers:
    """Where each row's keys, queries and prefix lie, on the problem's device."""

    def spread(value: Tensor | int) -> Tensor:
        return torch.as_tensor(value, device=p.query.device).long().expand(p.B)

    lengths: Tensor | int = p.P if p.prefix_lengths is None else p.prefix_lengths
    if p.prefix_index is not None:
        padded = torch.full((p.R + 1,), p.P, device=p.query.device)
        padded[:-1] = lengths
        padded[-1] = 0  # what an index of -1 finds
        lengths = padded[p.prefix_index.long()]
    offset = p.query_offsets if p.query_offsets is not None else p.query_offset
    return RowNumbers(
        spread(0 if p.key_start is None else p.key_start),
        spread(p.N if p.key_length is None else p.key_length),
        spread(p.N - p.M if offset is None else offset).clamp(-FURTHEST, FURTHEST),
        spread(lengths),
    )


def plan(p: Problem, half: str, kernels: Kernels | None) -> list[Part]:
    """The parts of one half; `kernels=None` wants blocks.

    Args:
        p: a dense problem.
        half: "prefix" or "sequence".
        kernels: what to compute with where it can express the half.
    """
    slots = p.N if half == "sequence" else p.P * p.R
    if slots == 0 or p.M == 0 or p.B == 0:
        return []
    if kernels is None or obstacle(p, half, kernels):
        return [BlockPart(p, half)]
    return _sequence_parts(p, kernels) if half == "sequence" else _prefix_parts(p, kernels)


def obstacle(p: Problem, half: str, kernels: Kernels) -> str | None:
    """What these kernels, which know a bias and a causal flag, cannot express of a half."""
    positioned = half == "sequence" or p.windowed_prefix
    bias = p.attn_mask if half == "sequence" else p.prefix_bias
    if p.softcap is not None:
        return "softcap"
    if p.dropout_p > 0:
        return "dropout_p"
    if p.scale <= 0:
        return "scale"  # kernels scale their -inf masks too: NaN at 0, everything else below
    if positioned and p.alibi_slopes is not None:
        return "alibi_slopes"
    if bias is not None and not kernels.takes_bias:
        return "attn_mask" if half == "sequence" else "prefix_bias"
    if bias is not None and bias.dtype == torch.bool and not _products_are_finite(p):
        return "a key under attn_mask that is not finite"  # -inf added to NaN does not hide it
    if p.window is not None and positioned and _window_bites(p, half):
        return "window"
    return None


def _products_are_finite(p: Problem) -> bool:
    """Whether every product of a query and a sequence key is sure to be a finite number."""
    largest = (float(torch.linalg.vector_norm(x, torch.inf)) for x in (p.query, p.key))
    bound = math.prod(largest) * p.D * max(p.scale, 1)
    return bound < torch.finfo(p.accumulator).max / 2  # false for NaN


def _window_bites(p: Problem, half: str) -> bool:
    """Whether the last query's window leaves out any slot of the half."""
    rows = row_numbers(p)
    first = rows.start - rows.tokens if half == "prefix" else rows.start
    assert p.window is not None
    return bool((rows.offset + p.M - 1 >= first + p.window).any())


def _sequence_parts(p: Problem, kernels: Kernels) -> list[Part]:
    """Per row (once when all agree): a rectangle of past keys, a triangle, the queries after it."""
    rows_and_numbers: list[tuple[slice, tuple[int, int, int]]]
    if p.key_start is None and p.key_length is None and p.query_offsets is None:
        offset = p.N - p.M if p.query_offset is None else p.query_offset
        rows_and_numbers = [(ALL, (0, p.N, offset))]
    else:
        numbers = row_numbers(p)
        per_row = list(zip(*(x.tolist() for x in numbers[:3]), strict=True))
        if len(set(per_row)) == 1:
            rows_and_numbers = [(ALL, per_row[0])]
        else:
            rows_and_numbers = [(slice(b, b + 1), row) for b, row in enumerate(per_row)]
    found: list[Part] = []
    for rows, (start, stop, offset) in rows_and_numbers:
        for whole in _pieces(p, start, stop, offset):
            for queries, slots, is_causal in _short(whole):
                found.append(
                    KernelPart(p, kernels, "sequence", rows, queries, rows, slots, is_causal)
                )
    return found


Piece = tuple[slice, slice, bool]


def _short(piece: Piece) -> Iterator[Piece]:
    """The piece in pieces of at most `MOST_SLOTS` slots; nothing if it has no queries or slots."""
    queries, slots, is_causal = piece
    if queries.start >= queries.stop or slots.start >= slots.stop:
        return
    for first in range(slots.start, slots.stop, MOST_SLOTS):
        last = min(first + MOST_SLOTS, slots.stop)
        if not is_causal:
            yield queries, slice(first, last), False
            continue
        # A triangle: the queries that stand beside these slots, and all that come after them.
        begin = queries.start + first - slots.start
        end = begin + last - first
        yield slice(begin, end), slice(first, last), True
        if end < queries.stop:
            yield slice(end, queries.stop), slice(first, last), False


def _pieces(p: Problem, start: int, stop: int, offset: int) -> list[Piece]:
    """Queries, slots and causal flag of the pieces of a row, some of them empty."""
    every = slice(0, p.M)
    if not p.is_causal or offset >= stop - 1:
        return [(every, slice(start, stop), False)]
    if p.M == 1:
        return [(every, slice(start, offset + 1), False)]
    diagonal = max(start, offset)
    end = min(stop, offset + p.M)
    return [
        (every, slice(start, min(offset, stop)), False),
        (slice(diagonal - offset, end - offset), slice(diagonal, end), True),
        (slice(end - offset, p.M), slice(diagonal, end), False),
    ]


def _prefix_parts(p: Problem, kernels: Kernels) -> list[Part]:
    """One part for each bank entry in use, with all of its rows."""
    every = slice(0, p.M)
    if p.prefix_index is None and p.prefix_lengths is None:
        groups: list[tuple[slice | Tensor, slice, int]] = [(ALL, ALL, p.P)]
    else:
        tokens = row_numbers(p).tokens.tolist()
        if p.prefix_index is not None:
            entries = p.prefix_index.tolist()
        else:
            entries = [0] * p.B if p.R == 1 else list(range(p.B))
        by_entry: dict[int, list[int]] = {}
        for row, entry in enumerate(entries):
            if tokens[row] > 0:
                by_entry.setdefault(entry, []).append(row)
        groups = [
            (_rows(rows, p), slice(entry, entry + 1), tokens[rows[0]])
            for entry, rows in by_entry.items()
        ]
    if p.prefix_bias is not None:
        groups = [single for group in groups for single in _one_by_one(group, p)]
    return [
        KernelPart(p, kernels, "prefix", rows, every, source, slots)
        for rows, source, tokens in groups
        for _, slots, _ in _short((every, slice(0, tokens), False))
    ]


def _rows(rows: list[int], p: Problem) -> slice | Tensor:
    """Rows as a slice, which reads in place, where they are neighbours."""
    if len(rows) == p.B:
        return ALL
    if rows[-1] - rows[0] == len(rows) - 1:
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=p.query.device)


def _one_by_one(
    group: tuple[slice | Tensor, slice, int], p: Problem
) -> list[tuple[slice | Tensor, slice, int]]:
    """A group row by row, as a bias needs: rows with different biases cannot be folded."""
    rows, source, tokens = group
    numbers = torch.arange(p.B)[rows if isinstance(rows, slice) else rows.cpu()].tolist()
    own = p.R == p.B and source == ALL
    return [(slice(b, b + 1), slice(b, b + 1) if own else source, tokens) for b in numbers]
