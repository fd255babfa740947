"""How the operators run on DTensors: by heads, by batch rows, or both on a mesh of two dimensions.

Along one dimension of the mesh a call may be spread

- over heads: every tensor that has heads is `Shard` of them, and nothing is summed;
- over batch rows: query, key, value and what is said of rows are `Shard(0)`. A prefix that rows
  share is replicated, and its gradient is `Partial`: a sum over the mesh that DTensor makes when it
  is needed. A prefix of each row's own is `Shard(0)` like the rows.

What cannot be spread so (packed rows) is computed whole on every rank, from replicas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._op_schema import (
    OpSchema,
    OpStrategy,
    RuntimeSchemaInfo,
    StrategyType,
)
from torch.distributed.tensor._ops.utils import expand_to_full_mesh_op_strategy
from torch.distributed.tensor.experimental import register_sharding

from prefixattn.problem import FIELD_NAMES, TENSOR_FIELDS, Problem

Placements = dict[str, Any]
ROWS, HEADS = 0, 1
OF_UPSTREAM = 5  # dout, dlse, out, lse, lse_rest: what the backward takes before the arguments
OF_PREFIX = ("prefix_key", "prefix_value")
OF_HEADS = ("prefix_gate", "sinks", "alibi_slopes")  # [H]
OF_SCORES = ("prefix_bias", "attn_mask")  # broadcastable to [B, H, M, ...]
OF_ROWS = ("prefix_index", "key_start", "key_length")  # [rows]


def check(problem: Problem) -> None:
    """Refuse what has no meaning on DTensors (NotImplementedError)."""
    if problem.dropout_p > 0:
        raise NotImplementedError(
            f"dropout_p: expected 0 for DTensors, whose ranks each count random numbers from their "
            f"own first row and head, got {problem.dropout_p}"
        )


def _replicated(given: Sequence[str]) -> tuple[Placements, Placements]:
    return dict.fromkeys(given, Replicate()), dict.fromkeys(given, Replicate())


def _by_heads(fields: dict[str, Any], given: Sequence[str]) -> tuple[Placements, Placements]:
    """Placements of the arguments by heads, and of their gradients."""
    places, grads = _replicated(given)
    for name in given:
        if name in ("query", "key", "value", *OF_PREFIX):
            places[name] = grads[name] = Shard(HEADS)
        elif name in OF_HEADS:
            places[name] = grads[name] = Shard(0)
        elif name in OF_SCORES:
            _of_scores(fields, name, HEADS, places, grads)
    return places, grads


def _by_rows(fields: dict[str, Any], given: Sequence[str]) -> tuple[Placements, Placements] | None:
    """Placements of the arguments by rows, and of their gradients; None: it cannot be."""
    if fields["cu_seqlens_q"] is not None:
        return None  # all segments are one row
    places, grads = _replicated(given)
    entries, rows = fields["prefix_key"].shape[0], fields["query"].shape[0]
    own = fields["prefix_index"] is None and entries == rows and rows > 1
    for name in given:
        if name in ("query", "key", "value", *OF_ROWS):
            places[name] = grads[name] = Shard(ROWS)
        elif name in OF_PREFIX:
            places[name] = Shard(ROWS) if own else Replicate()
            grads[name] = Shard(ROWS) if own else Partial()
        elif name == "prefix_lengths":
            places[name] = Shard(ROWS) if own else Replicate()
        elif name == "query_offsets":
            places[name] = Shard(ROWS) if len(fields[name].shape) else Replicate()
        elif name in OF_HEADS:
            grads[name] = Partial()
        elif name in OF_SCORES:
            _of_scores(fields, name, ROWS, places, grads)
    return places, grads


def _of_scores(
    fields: dict[str, Any], name: str, axis: int, places: Placements, grads: Placements
) -> None:
    """A bias or mask: spread where it has that axis; where it is broadcast, its gradient is not."""
    shape = fields[name].shape
    at = axis - 4 + len(shape)  # counted from the end, as broadcasting does
    if at >= 0 and shape[at] > 1:
        places[name] = grads[name] = Shard(at)
    else:
        grads[name] = Partial()


def _ways(fields: dict[str, Any]) -> list[tuple[Placements, Placements, Any]]:
    """Every way to spread a call: its arguments' placements, their gradients', the outputs'."""
    given = [name for name in TENSOR_FIELDS if fields[name] is not None]
    ways: list[tuple[Placements, Placements, Any]] = [(*_replicated(given), Replicate())]
    if _heads_divide(fields):
        ways.append((*_by_heads(fields, given), Shard(HEADS)))
    if (by_rows := _by_rows(fields, given)) is not None:
        ways.append((*by_rows, Shard(ROWS)))
    return ways


def _heads_divide(fields: dict[str, Any]) -> bool:
    """Whether queries stay beside their keys where heads are spread over a dimension of the mesh.

    Chunks of unequal sizes would cut groups of query heads apart.
    """
    sizes, total = fields["query"].mesh.shape, fields["query"].mesh.size()
    heads, key_heads = fields["query"].shape[HEADS], fields["key"].shape[HEADS]
    even = all(key_heads % size == 0 for size in sizes)
    return heads == key_heads or (even and (key_heads % total == 0 or key_heads < total))


def _arguments(places: Placements) -> list[Any]:
    return [places.get(name) for name in FIELD_NAMES]


@register_sharding(torch.ops.prefixattn.attention.default)
def _forward(*arguments: Any) -> list[tuple[list[Any], list[Any]]]:
    fields = dict(zip(FIELD_NAMES, arguments, strict=False))
    return [([outputs] * 3, [*_arguments(places), None]) for places, _, outputs in _ways(fields)]


def _backward(schema: OpSchema) -> StrategyType:
    """`register_sharding` counts a list of gradients as one: this is what it does, for a list."""
    specs = [
        x.strategies[0].output_spec if isinstance(x, OpStrategy) else x for x in schema.args_schema
    ]
    upstream, arguments = specs[:OF_UPSTREAM], specs[OF_UPSTREAM:-2]
    wanted = schema.args_schema[-1]
    assert isinstance(wanted, list | tuple)
    ways = []
    for places, grads, outputs in _ways(dict(zip(FIELD_NAMES, arguments, strict=True))):
        given = [None if x is None else outputs for x in upstream]
        ways.append([*(grads[name] for name in wanted), *given, *_arguments(places), None, None])
    mesh = schema.get_mesh_from_args()
    return expand_to_full_mesh_op_strategy(mesh, schema, ways, input_index=len(wanted))


_propagator = DTensor._op_dispatcher.sharding_propagator
_propagator.register_op_strategy(
    torch.ops.prefixattn.attention_backward.default,
    _backward,
    RuntimeSchemaInfo(static_argnum=OF_UPSTREAM + len(TENSOR_FIELDS), needs_pytree=True),
)
