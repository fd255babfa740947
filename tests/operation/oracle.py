"""Prefix attention once more, by loops over rows, heads and queries, in numpy's widest floats.

It is written from what the public function's documentation says, and shares nothing with the
package, its reference included: what both have wrong in the same way no test could find.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# 64 bits of precision and 15 of exponent on x86: float64's own largest numbers stay finite in it.
WIDE = np.longdouble
Array = np.ndarray


@dataclass(frozen=True)
class Row:
    """One batch row or packed segment: slices of its queries and keys, and where they lie."""

    batch: int
    queries: slice
    keys: slice
    start: int  # of the keys in use, counted from the row's first slot
    stop: int
    offset: int  # position of query 0
    entry: int  # in the bank, -1 for none
    tokens: int  # of the entry


@dataclass
class Answer:
    """Output `[B, H, M, D_v]`, lse `[B, H, M]` and gradients by argument name.

    `sizes` are the sums of the absolute values of what the gradients are sums of: where these
    cancel, whatever computes them in floats errs by units in the last place of the sizes.
    """

    out: Array
    lse: Array
    grads: dict[str, Array] = field(default_factory=dict)
    sizes: dict[str, Array] = field(default_factory=dict)


def rows_of(a: dict[str, Any]) -> Iterator[Row]:
    """The rows of a call with these arguments (numpy arrays, numbers, None)."""
    (b, _, m, _), n = a["query"].shape, a["key"].shape[2]
    bank, _, p, _ = a["prefix_key"].shape
    cu_q, cu_k = a.get("cu_seqlens_q"), a.get("cu_seqlens_k")
    count = b if cu_q is None else len(cu_q) - 1
    offset, index, lengths = (
        a.get(name) for name in ("query_offset", "prefix_index", "prefix_lengths")
    )
    for row in range(count):
        batch, queries, keys = row, slice(0, m), slice(0, n)
        if cu_q is not None:
            batch = 0
            queries = slice(int(cu_q[row]), int(cu_q[row + 1]))
            keys = slice(int(cu_k[row]), int(cu_k[row + 1]))
        start, stop = 0, keys.stop - keys.start
        at = stop - (queries.stop - queries.start)
        if offset is not None:
            at = int(np.broadcast_to(offset, (count,))[row])
        if a.get("key_start") is not None:
            start = int(a["key_start"][row])
        if a.get("key_length") is not None:
            stop = int(a["key_length"][row])
        if index is not None:
            entry = int(index[row])
        else:
            entry = 0 if bank == 1 else row
        tokens = 0
        if entry >= 0:
            tokens = p if lengths is None else int(lengths[entry])
        yield Row(batch, queries, keys, start, stop, at, entry, tokens)


def seen(a: dict[str, Any], row: Row, query: int) -> tuple[range, range]:
    """Prefix tokens and sequence slots of the row that one of its queries sees, before any mask.

    The arithmetic is Python's: positions may be of any size.
    """
    position, window = row.offset + query, a.get("window")
    prefix, low, high = 0, row.start, row.stop
    if window is not None:
        low = max(low, position - window + 1)
        if a.get("prefix_in_window") == "positions":  # token j is at start + j - tokens
            prefix = max(0, position - window + 1 - row.start + row.tokens)
    if a.get("is_causal"):
        high = min(high, position + 1)
    return range(prefix, row.tokens), range(low, high)


def attention(a: dict[str, Any], dout: Array | None = None, dlse: Array | None = None) -> Answer:
    """Output, lse and, with an upstream gradient, the gradients of all float arguments.

    Args:
        a: the arguments of `prefix_attention` as numpy arrays of any float dtype.
        dout: upstream gradient of the output, None: nothing comes through it.
        dlse: the same of lse.
    """
    b, h, m, _ = a["query"].shape
    backward = dout is not None or dlse is not None
    out = np.zeros((b, h, m, a["value"].shape[3]), WIDE)
    answer = Answer(out, np.full((b, h, m), -np.inf, WIDE))
    if backward:
        dout = np.zeros_like(answer.out) if dout is None else dout.astype(WIDE)
        dlse = np.zeros_like(answer.lse) if dlse is None else dlse.astype(WIDE)
        answer.grads = {
            name: np.zeros(a[name].shape, WIDE)
            for name in (
                *("query", "key", "value", "prefix_key", "prefix_value"),
                *("prefix_gate", "prefix_bias", "attn_mask", "sinks"),
            )
            if a.get(name) is not None and a[name].dtype != bool
        }
        answer.sizes = {name: grad.copy() for name, grad in answer.grads.items()}
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for row in rows_of(a):
            for head in range(h):
                for query in range(row.queries.stop - row.queries.start):
                    place = (row.batch, head, row.queries.start + query)
                    one = Query(a, row, head, query)
                    answer.out[place], answer.lse[place] = one.forward()
                    if backward:
                        one.backward(dout[place], dlse[place], answer)
    return answer


class Half:
    """The keys of the prefix, or of the sequence, that one query sees, and their scores."""

    def __init__(self, a: dict[str, Any], row: Row, head: int, query: int, prefix: bool) -> None:
        width = a["query"].shape[1] // a["key"].shape[1]
        slots = seen(a, row, query)[0 if prefix else 1]
        self.names = ("prefix_key", "prefix_value") if prefix else ("key", "value")
        source = (row.entry if prefix else row.batch, head // width)
        first = 0 if prefix else row.keys.start
        self.query_place = (row.batch, head, row.queries.start + query)
        self.q = a["query"][self.query_place].astype(WIDE)
        bias_name = "prefix_bias" if prefix else "attn_mask"
        bias = a.get(bias_name)
        columns = np.arange(slots.start, max(slots.start, slots.stop)) + first
        self.bias: Array | None = None
        self.bias_name = bias_name if bias is not None and bias.dtype != bool else None
        if bias is not None:
            size = (a["query"].shape[0], a["query"].shape[1], a["query"].shape[2])
            total = a[self.names[0]].shape[2]
            at = self.query_place
            numbers = np.broadcast_to(bias, (*size, total))[at][columns]
            kept = numbers if bias.dtype == bool else numbers > -np.inf
            columns, numbers = columns[kept], numbers[kept]
            self.bias = None if bias.dtype == bool else numbers.astype(WIDE)
            # The places of these numbers in the bias itself, which may be broadcast.
            shape = (1,) * (4 - bias.ndim) + bias.shape
            fixed = tuple(0 if n == 1 else i for n, i in zip(shape[:3], at, strict=True))
            last = np.zeros_like(columns) if shape[3] == 1 else columns
            self.bias_place = (*fixed, last)
        self.place = (*source, columns)
        self.k, self.v = (np.zeros((0, a[name].shape[3]), WIDE) for name in self.names)
        if len(columns):  # an empty bank has no entry to look into
            self.k, self.v = (a[name][self.place].astype(WIDE) for name in self.names)
        self.scale = WIDE(a["query"].shape[3]) ** -0.5
        if a.get("scale") is not None:
            self.scale = WIDE(a["scale"])
        scores = (self.k * self.q).sum(-1) * self.scale
        self.slope = np.ones_like(scores)
        if a.get("softcap") is not None:
            cap = WIDE(a["softcap"])
            bent = np.tanh(scores / cap)
            # 1 - tanh², without what it would lose where tanh is close to 1.
            scores, self.slope = cap * bent, np.cosh(np.clip(scores / cap, -5e3, 5e3)) ** -2
        slopes = a.get("alibi_slopes")
        if slopes is not None and (not prefix or a.get("prefix_in_window") == "positions"):
            shift = row.start - row.tokens if prefix else -first
            far = row.offset + query - shift  # from slot 0; a Python number of any size
            distance = np.array([abs(far - int(column)) for column in columns], dtype=WIDE)
            scores = scores - slopes[head].astype(WIDE) * distance
        self.scores = scores if self.bias is None else scores + self.bias

    def add(self, weights: Array, ds: Array, size: Array, dout: Array, answer: Answer) -> None:
        """Add what this half gives to the gradients of its keys, of its bias and of the query.

        Args:
            weights: of its values in the output, gate included.
            ds: gradients of its scores.
            size: sums of the absolute values that these are sums of.
            dout: `[D_v]`.
            answer: whose gradients and sizes grow.
        """
        if len(ds) == 0:
            return
        for sums, by_score, absolute in ((answer.grads, ds, False), (answer.sizes, size, True)):
            q, k, d, w, factor = self.q, self.k, dout, weights, self.slope * self.scale
            if absolute:
                q, k, d, w, factor = (np.abs(x) for x in (q, k, d, w, factor))
            if self.bias_name is not None:
                grad = sums[self.bias_name]
                view = grad[(None,) * (4 - grad.ndim)]  # a view: adding to it reaches `sums`
                np.add.at(view, self.bias_place, by_score)
            by_product = by_score * factor
            sums[self.names[0]][self.place] += by_product[:, None] * q
            sums[self.names[1]][self.place] += w[:, None] * d
            sums["query"][self.query_place] += (by_product[:, None] * k).sum(0)


class Query:
    """One query of one head, forward and then backward."""

    def __init__(self, a: dict[str, Any], row: Row, head: int, query: int) -> None:
        self.head = head
        self.prefix, self.sequence = (Half(a, row, head, query, prefix) for prefix in (True, False))
        self.gate = None if a.get("prefix_gate") is None else WIDE(a["prefix_gate"][head])
        self.sink = -np.inf if a.get("sinks") is None else WIDE(a["sinks"][head])
        self.has_sink = a.get("sinks") is not None

    def forward(self) -> tuple[Array, Any]:
        """The output `[D_v]` and lse."""
        halves = [self.sequence] if self.gate is not None else [self.prefix, self.sequence]
        self.lse, self.weights, self.of_sink = softmax([half.scores for half in halves], self.sink)
        self.own = sum(
            (w[:, None] * half.v).sum(0) for w, half in zip(self.weights, halves, strict=True)
        )
        self.out = self.own
        if self.gate is not None:
            _, (self.prefix_weights,), _ = softmax([self.prefix.scores], -np.inf)
            self.prefix_out = (self.prefix_weights[:, None] * self.prefix.v).sum(0)
            self.out = self.own + self.gate * self.prefix_out
        return self.out, self.lse

    def backward(self, dout: Array, dlse: Any, answer: Answer) -> None:
        """Add this query's share to the gradients, by the formula for softmax."""
        halves = [self.sequence] if self.gate is not None else [self.prefix, self.sequence]
        delta = (dout * self.own).sum() - dlse
        size = np.abs(dout * self.own).sum() + np.abs(dlse)
        for weights, half in zip(self.weights, halves, strict=True):
            products = half.v * dout
            ds = weights * (products.sum(-1) - delta)
            half.add(weights, ds, weights * (np.abs(products).sum(-1) + size), dout, answer)
        if self.has_sink:
            answer.grads["sinks"][self.head] -= self.of_sink * delta
            answer.sizes["sinks"][self.head] += self.of_sink * size
        if self.gate is not None:
            weights, half, products = self.prefix_weights, self.prefix, self.prefix.v * dout
            own = dout * self.prefix_out
            ds = self.gate * weights * (products.sum(-1) - own.sum())
            size = np.abs(self.gate) * weights * (np.abs(products).sum(-1) + np.abs(own).sum())
            half.add(self.gate * weights, ds, size, dout, answer)
            answer.grads["prefix_gate"][self.head] += own.sum()
            answer.sizes["prefix_gate"][self.head] += np.abs(own).sum()


def softmax(parts: list[Array], sink: Any) -> tuple[Any, list[Array], Any]:
    """Log-sum-exp (-inf over nothing), weights of each part's scores, and the sink's weight.

    The weights are not `exp(score - lse)`: beside scores of 1e38 `lse` has no room for `log N`.
    """
    every = np.concatenate([*parts, np.array([sink], WIDE)])
    peak = every.max()
    if peak == -np.inf:
        return peak, [np.zeros_like(part) for part in parts], WIDE(0)
    total = np.exp(every - peak).sum()
    weights = [np.exp(part - peak) / total for part in parts]
    return peak + np.log(total), weights, np.exp(sink - peak) / total
