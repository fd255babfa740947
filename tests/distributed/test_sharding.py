"""The operators on DTensors: over heads, over rows, over both, against one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launch import launch
from torch import Tensor
from torch.distributed.tensor import (
    DTensor,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)

from prefixattn import prefix_attention
from prefixattn.problem import DIFFERENTIABLE

B, H, H_KV, M, P, D = 4, 8, 4, 6, 3, 8
LIMITS = {"reference": 1e-12, "auto": 1e-5}
Arguments = dict[str, Any]


def plain() -> Arguments:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "query": random(B, H, M, D),
        "key": random(B, H_KV, M, D),
        "value": random(B, H_KV, M, D),
        "prefix_key": random(1, H_KV, P, D),
        "prefix_value": random(1, H_KV, P, D),
        "is_causal": True,
    }


def with_own(tensors: Callable[[Callable[..., Tensor]], Arguments]) -> Callable[[], Arguments]:
    def make() -> Arguments:
        generator = torch.Generator().manual_seed(1)
        return plain() | tensors(
            lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
        )

    return make


CASES: dict[str, Callable[[], Arguments]] = {
    "plain": plain,
    "a prefix of each row's own": with_own(
        lambda r: {"prefix_key": r(B, H_KV, P, D), "prefix_value": r(B, H_KV, P, D)}
    ),
    "a bank": with_own(
        lambda r: {
            "prefix_key": r(3, H_KV, P, D),
            "prefix_value": r(3, H_KV, P, D),
            "prefix_index": torch.tensor([2, -1, 0, 2]),
            "prefix_lengths": torch.tensor([3, 1, 2]),
        }
    ),
    "padding": with_own(
        lambda r: {
            "key_start": torch.tensor([0, 1, 2, 0]),
            "key_length": torch.tensor([6, 6, 5, 3]),
            "query_offset": torch.tensor([0, 1, 0, 2]),
        }
    ),
    "a gate": with_own(lambda r: {"prefix_gate": r(H)}),
    "sinks": with_own(lambda r: {"sinks": r(H)}),
    "slopes": with_own(
        lambda r: {"alibi_slopes": r(H).abs(), "prefix_in_window": "positions", "window": 4}
    ),
    "a bias of rows": with_own(
        lambda r: {"prefix_bias": r(B, 1, 1, P), "attn_mask": r(B, 1, M, M)}
    ),
    "a bias of heads": with_own(lambda r: {"prefix_bias": r(H, 1, P), "attn_mask": r(1, H, 1, M)}),
    "a bias of all": with_own(lambda r: {"prefix_bias": r(P), "attn_mask": r(M, M)}),
}
OVER: dict[str, Callable[[Tensor, str], Placement]] = {
    "heads": lambda x, name: (
        Shard(0) if name in ("prefix_gate", "sinks", "alibi_slopes") else
        Shard(1) if name in ("query", "key", "value", "prefix_key", "prefix_value") else
        Replicate()
    ),
    "rows": lambda x, name: (
        Shard(0) if name in ("query", "key", "value", "key_start", "key_length", "prefix_index")
        else Replicate()
    ),
}  # fmt: skip


def difference(
    arguments: Arguments, mesh: Any, over: tuple[str, ...], implementation: str = "reference"
) -> float:
    """The largest over the output, lse and all gradients, of each one's largest number.

    In float32 for "auto": the C++ kernels know no float64.
    """
    if implementation == "auto":
        arguments = {
            name: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x
            for name, x in arguments.items()
        }
    names = [n for n in DIFFERENTIABLE if n in arguments]
    whole = arguments | {n: arguments[n].clone().requires_grad_() for n in names}
    expected = prefix_attention(**whole, return_lse=True, implementation="reference")
    upstream = [torch.ones_like(x) + torch.arange(x.numel()).view_as(x) / 9 for x in expected]
    torch.autograd.backward(expected, upstream)
    spread = dict(arguments)
    for name, x in arguments.items():
        if isinstance(x, Tensor):
            spread[name] = distribute_tensor(x, mesh, [OVER[way](x, name) for way in over])
            spread[name].requires_grad_(name in names)
    got = prefix_attention(**spread, return_lse=True, implementation=implementation)
    places = [Shard(1 if way == "heads" else 0) for way in over]
    for x, dx in zip(got, upstream, strict=True):
        assert isinstance(x, DTensor)
        assert list(x.placements) == places
        torch.autograd.backward(x, distribute_tensor(dx, mesh, places), retain_graph=True)
    pairs = [(x.full_tensor(), y) for x, y in zip(got, expected, strict=True)]
    pairs += [(spread[n].grad.full_tensor(), whole[n].grad) for n in names]
    return max(float((x - y).detach().abs().max() / y.detach().abs().max()) for x, y in pairs)


def over_one_dimension() -> dict[str, float]:
    mesh = init_device_mesh("cpu", (2,))
    return {
        f"{case} over {way}, {implementation}": difference(make(), mesh, (way,), implementation)
        for case, make in CASES.items()
        for way in OVER
        for implementation in LIMITS
    }


def over_two_dimensions() -> dict[str, float]:
    mesh = init_device_mesh("cpu", (2, 2))
    return {
        f"{case}, {implementation}": difference(make(), mesh, ("rows", "heads"), implementation)
        for case, make in CASES.items()
        for implementation in LIMITS
    }


@pytest.mark.parametrize(("work", "world"), [(over_one_dimension, 2), (over_two_dimensions, 4)])
def test_spread_over_a_mesh_it_is_what_one_process_computes(work: Any, world: int) -> None:
    for found in launch(work, world):
        assert isinstance(found, dict), found
        for name, error in found.items():
            assert error < LIMITS[name.rpartition(", ")[2]], name


UNEVEN = {"10 over 5": (10, 5), "6 over 3": (6, 3), "6 over 2": (6, 2), "3 over 3": (3, 3)}


def heads_that_do_not_divide() -> dict[str, float]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = {}
    for name, (heads, key_heads) in UNEVEN.items():
        generator = torch.Generator().manual_seed(7)
        shapes = {"query": (2, heads, 6, 8), "key": (2, key_heads, 6, 8)}
        shapes |= {"value": shapes["key"], "prefix_key": (1, key_heads, 3, 8)}
        shapes |= {"prefix_value": shapes["prefix_key"]}
        whole = {n: torch.randn(s, generator=generator).double() for n, s in shapes.items()}
        spread = {n: distribute_tensor(x, mesh, [Shard(1)]) for n, x in whole.items()}
        for implementation in ("reference", "sdpa", "auto"):
            out = prefix_attention(**spread, is_causal=True, implementation=implementation)
            expected = prefix_attention(**whole, is_causal=True, implementation="reference")
            error = float((out.full_tensor() - expected).abs().max())
            found[f"{name}, {implementation}"] = error
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_groups_of_heads_are_not_cut_apart(world: int) -> None:
    for found in launch(heads_that_do_not_divide, world):
        assert isinstance(found, dict), found
        assert {name: error for name, error in found.items() if not error < 1e-12} == {}


def what_cannot_be_spread() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,))

    def replicated(x: Tensor) -> DTensor:
        return distribute_tensor(x, mesh, [Replicate()])

    tensors = {name: x[:1] for name, x in plain().items() if isinstance(x, Tensor)}
    whole = {name: replicated(x) for name, x in tensors.items()}
    ends = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), torch.tensor([0, 2, 6]))
    segments = prefix_attention(**whole, **{name: replicated(x) for name, x in ends.items()})
    expected = prefix_attention(**tensors, **ends)
    found = {
        "packed": list(map(str, segments.placements)),
        "error": float((segments.full_tensor() - expected).abs().max()),
    }
    try:
        prefix_attention(**whole, dropout_p=0.5)
    except NotImplementedError as error:
        found["dropout"] = str(error)
    return found


def test_packed_rows_are_computed_whole_and_dropout_is_refused() -> None:
    for found in launch(what_cannot_be_spread, 2):
        assert found["packed"] == ["R"]
        assert found["error"] == 0
        assert found["dropout"].startswith("dropout_p: expected 0 for DTensors")
