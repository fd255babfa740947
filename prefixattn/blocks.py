"""Attention in blocks of plain PyTorch, for what PyTorch's own kernels cannot express.

A source of keys is seen through intervals: query `i` of row `b` sees the slots
`low[b, i] <= j < high[b, i]`. Causality, windows, padding and ragged prefixes are all such
intervals. No block of scores holds more than `BLOCK_SCORES` numbers, whatever the lengths.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from prefixattn.gradients import Upstream, log_sum
from prefixattn.philox import keep_mask, random_words
from prefixattn.problem import cut

BLOCK_QUERIES = 256
BLOCK_SCORES = 2**22
# What the largest weight of a softmax is kept as while values are summed, so that their sum stays
# within the largest number wherever their mean does.
ONE = 2.0**-24


@dataclass(frozen=True)
class Source:
    """Queries and one source of keys and values for them.

    `query [B, H, M, D]`, `key [S, H_kv, K, D]`, `value [S, H_kv, K, D_v]`; `entry [B]` names each
    row's source (None: `S` is 1 or `B`); `low`, `high` `[B or 1, M]`; `bias` broadcasts to
    `[B, H, M, K]`, bool or additive; `distance_to_first [B or 1, M]` is query position minus the
    position of slot 0, used with `alibi_slopes [H]`; `first_column` counts dropout's columns.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    entry: Tensor | None
    low: Tensor
    high: Tensor
    bias: Tensor | None
    alibi_slopes: Tensor | None
    distance_to_first: Tensor
    scale: float
    softcap: float | None
    dropout_seed: Tensor | None
    dropout_p: float
    first_column: int
    dtype: torch.dtype

    @property
    def group(self) -> int:
        return self.query.shape[1] // self.key.shape[1]


@dataclass(frozen=True)
class Block:
    """The scores of some queries and keys, and what the chain rule needs of how they came."""

    queries: slice
    keys: slice
    q: Tensor  # [B, H_kv, group * m, D]
    k: Tensor  # [B or 1, H_kv, n, D]
    v: Tensor  # [B or 1, H_kv, n, D_v]
    scores: Tensor  # [B, H, m, n], -inf where unseen
    slope: Tensor | None  # d score / d (scaled dot product), with softcap only
    keep: Tensor | None  # dropout


def forward(source: Source) -> tuple[Tensor, Tensor, Tensor]:
    """`out [B, H, M, D_v]`, `lse` and `lse_rest [B, H, M]` of a softmax over this source alone."""
    b, h, m_all, _ = source.query.shape
    out = source.query.new_zeros(b, h, m_all, source.value.shape[-1], dtype=source.dtype)
    peak, total = out.new_full((b, h, m_all), -torch.inf), out.new_zeros(b, h, m_all)
    for block in _blocks(source):
        rows = (slice(None), slice(None), block.queries)
        new = torch.maximum(peak[rows], block.scores.amax(-1))
        safe = new.masked_fill(new == -torch.inf, 0)
        weights = torch.exp(block.scores - safe[..., None]).mul_(ONE)
        shrink = torch.exp(peak[rows] - safe)
        total[rows] = total[rows] * shrink + weights.sum(-1)
        addend = _ungroup(_group(_drop(source, block, weights), source.group) @ block.v, h)
        out[rows] = torch.addcmul(addend, out[rows], shrink[..., None])
        peak[rows] = new
    return out.div_(total.masked_fill(total == 0, 1)[..., None]), *log_sum(peak, total / ONE)


@dataclass
class Gradients:
    """Gradients of a source in its accumulating dtype; None where not wanted."""

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    bias: Tensor | None


def backward(source: Source, up: Upstream, wanted: dict[str, bool]) -> Gradients:
    """Gradients, given the log-sum-exp that the probabilities are normalised by.

    Args:
        source: as in forward.
        up: what comes from the whole softmax that this source is a part of.
        wanted: which of query, key, value, bias to compute.
    """

    def zeros(name: str) -> Tensor | None:
        like: Tensor = getattr(source, name)
        return (
            torch.zeros(like.shape, dtype=source.dtype, device=like.device)
            if wanted[name]
            else None
        )

    grads = Gradients(zeros("query"), zeros("key"), zeros("value"), zeros("bias"))
    for block in _blocks(source):
        rows = (slice(None), slice(None), block.queries)
        weights, d_grouped, d_weights = _upstream(source, block, up)
        if grads.value is not None:
            dropped = _group(_drop(source, block, weights), source.group)
            _add_rows(grads.value[:, :, block.keys], dropped.mT @ d_grouped, source.entry)
        d_scores = weights * (_drop(source, block, d_weights) - up.delta[rows][..., None])
        if grads.bias is not None:
            _add_broadcast(grads.bias, d_scores, block)
        if block.slope is not None:
            d_scores = d_scores * block.slope
        ds = _group(d_scores * source.scale, source.group)
        if grads.query is not None:
            grads.query[:, :, block.queries] += _ungroup(ds @ block.k, source.query.shape[1])
        if grads.key is not None:
            _add_rows(grads.key[:, :, block.keys], ds.mT @ block.q, source.entry)
    return grads


def weighed(source: Source, up: Upstream) -> Tensor:
    """`[B, H, M]`: `sum(dout * out)` over this source's share of the output.

    It is summed from the very numbers that `backward` subtracts it from: what `out` lost when it
    was rounded does not come in.
    """
    total = torch.zeros_like(up.lse)
    for block in _blocks(source):
        weights, _, d_weights = _upstream(source, block, up)
        total[:, :, block.queries] += (weights * _drop(source, block, d_weights)).sum(-1)
    return total


def _upstream(source: Source, block: Block, up: Upstream) -> tuple[Tensor, Tensor, Tensor]:
    """A block's probabilities, its `dout` by key heads, and the gradients of the probabilities."""
    rows = (slice(None), slice(None), block.queries)
    lse = up.lse[rows].masked_fill(up.lse[rows] == -torch.inf, torch.inf)
    weights = torch.exp((block.scores - lse[..., None]) - up.lse_rest[rows][..., None])
    dout = _group(up.dout[rows].to(source.dtype), source.group)
    return weights, dout, _ungroup(dout @ block.v.mT, source.query.shape[1])


def _blocks(source: Source) -> Iterator[Block]:
    """Every block that some query sees a key of."""
    b, h, m_all, _ = source.query.shape
    k_all = source.key.shape[2]
    step_q = max(1, min(m_all, BLOCK_QUERIES, BLOCK_SCORES // max(1, 16 * b * h)))
    step_k = max(16, BLOCK_SCORES // max(1, b * h * step_q))
    on_cpu = source.low.device.type == "cpu"  # elsewhere reading the bounds would wait
    for q0 in range(0, m_all, step_q):
        queries = slice(q0, min(q0 + step_q, m_all))
        low, high = source.low[:, queries, None], source.high[:, queries, None]
        first, last = (int(low.min()), int(high.max())) if on_cpu else (0, k_all)
        for k0 in range(max(0, first), min(k_all, last), step_k):
            yield _block(source, queries, slice(k0, min(k0 + step_k, k_all)), low, high)


def _block(source: Source, queries: slice, keys: slice, low: Tensor, high: Tensor) -> Block:
    slot = torch.arange(keys.start, keys.stop, device=source.query.device)
    seen = ((slot >= low) & (slot < high)).unsqueeze(1)  # [B or 1, 1, m, n]
    # Slots that no query sees may hold anything, NaN too: 0 * NaN must not reach the output.
    used = seen.any(2)[..., None]  # [B or 1, 1, n, 1]
    if source.entry is None and source.key.shape[0] == 1:
        used = used.any(0, keepdim=True)
    q = _group(source.query[:, :, queries].to(source.dtype), source.group)
    k, v = (
        torch.where(used, _pick(part[:, :, keys], source.entry).to(source.dtype), 0)
        for part in (source.key, source.value)
    )
    scores = _ungroup(q @ k.mT, source.query.shape[1]) * source.scale
    slope = None
    if source.softcap is not None:
        bent = torch.tanh(scores / source.softcap)
        scores, slope = source.softcap * bent, 1 - bent * bent
    if source.alibi_slopes is not None:
        distance = (source.distance_to_first[:, queries, None] - slot).abs().unsqueeze(1)
        scores = scores - source.alibi_slopes.to(source.dtype)[:, None, None] * distance
    bias = cut(source.bias, queries, keys)
    if bias is not None and bias.dtype == torch.bool:
        seen = seen & bias
    elif bias is not None:
        scores = scores + bias.to(source.dtype)
    scores = scores.masked_fill(~seen, -torch.inf)
    return Block(queries, keys, q, k, v, scores, slope, _keep(source, queries, keys))


def _keep(source: Source, queries: slice, keys: slice) -> Tensor | None:
    if source.dropout_seed is None:
        return None
    b, h, _, _ = source.query.shape
    device = source.query.device
    words = random_words(
        source.dropout_seed,
        torch.arange(b, device=device),
        torch.arange(h, device=device),
        torch.arange(queries.start, queries.stop, device=device),
        torch.arange(keys.start, keys.stop, device=device) + source.first_column,
    )
    return keep_mask(words, source.dropout_p)


def _drop(source: Source, block: Block, weights: Tensor) -> Tensor:
    if block.keep is None:
        return weights
    return torch.where(block.keep, weights / (1 - source.dropout_p), 0)


def _pick(part: Tensor, entry: Tensor | None) -> Tensor:
    return part if entry is None else part[entry]


def _group(x: Tensor, group: int) -> Tensor:
    """`[B, H_kv * group, m, *]` as `[B, H_kv, group * m, *]`."""
    return x.reshape(x.shape[0], x.shape[1] // group, group * x.shape[2], x.shape[3])


def _ungroup(x: Tensor, heads: int) -> Tensor:
    return x.reshape(x.shape[0], heads, -1, x.shape[-1])


def _add_rows(total: Tensor, rows: Tensor, entry: Tensor | None) -> None:
    """Add per-row gradients `[B, ...]` to their sources' `[S, ...]`, row after row."""
    if entry is not None and rows.device.type == "cpu":
        total.index_add_(0, entry, rows)
    elif entry is not None:
        # A product with a one-hot matrix: elsewhere index_add_ is atomic, in no fixed order.
        sources = torch.arange(total.shape[0], device=entry.device)
        one_hot = (sources[:, None] == entry).to(rows.dtype)
        total.add_(torch.einsum("sb,b...->s...", one_hot, rows))
    elif total.shape[0] == 1:
        total.add_(rows.sum(0, keepdim=True))
    else:
        total.add_(rows)


def _add_broadcast(total: Tensor, grad: Tensor, block: Block) -> None:
    """Add a block's `[B, H, m, n]` to the gradient of a tensor that was broadcast to it."""
    part = cut(total, block.queries, block.keys)
    assert part is not None
    part.add_(grad.sum_to_size(part.shape))
