"""The ring and the all-gather against one process, and what disagreeing ranks are told."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launch import launch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prefixattn import prefix_attention
from prefixattn.distributed import ring_prefix_attention, shard_sequence, unshard_sequence
from prefixattn.distributed.layout import chunk_starts, lengths_of

# Name: tokens, prefix tokens, options of the call. Lengths that no number of ranks divides.
CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "causal": (17, 5, {"is_causal": True}),
    "every key": (16, 3, {}),
    "fewer tokens than chunks": (3, 2, {"is_causal": True}),
    "no prefix": (21, 0, {"is_causal": True}),
    "no tokens": (0, 2, {}),
    "a bank": (18, 4, {"is_causal": True, "prefix_index": (1, -1), "prefix_lengths": (2, 4)}),
    "capped scores": (19, 3, {"is_causal": True, "softcap": 2.0, "scale": 0.7}),
}
METHODS = ("ring", "all-gather")
IMPLEMENTATIONS = ("cpu", "sdpa", "reference")
B, H, H_KV, D, D_V = 2, 4, 2, 8, 6


def inputs_of(tokens: int, prefix: int, options: dict[str, Any]) -> tuple[list[Tensor], Any]:
    generator = torch.Generator().manual_seed(tokens)
    named = {name: torch.tensor(x) for name, x in options.items() if isinstance(x, tuple)}
    entries = 2 if named else 1
    shapes = [(B, H, tokens, D), (B, H_KV, tokens, D), (B, H_KV, tokens, D_V)]
    shapes += [(entries, H_KV, prefix, D), (entries, H_KV, prefix, D_V)]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [x.requires_grad_() for x in tensors], options | named


def largest_error(method: str, implementation: str, case: str) -> float:
    """Over output, lse and all gradients, through both."""
    tensors, options = inputs_of(*CASES[case])
    out, lse = prefix_attention(*tensors, **options, return_lse=True, implementation="reference")
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    for x in (dout, dlse):
        dist.broadcast(x, 0)
    torch.autograd.backward([out, lse], [dout, dlse])
    parts = [shard_sequence(x.detach(), 2).requires_grad_() for x in tensors[:3]]
    parts += [x.detach().clone().requires_grad_() for x in tensors[3:]]
    own = {"return_lse": True, "method": method, "implementation": implementation}
    mine = ring_prefix_attention(*parts, **options, **own)
    torch.autograd.backward(list(mine), [shard_sequence(x, 2) for x in (dout, dlse)])
    pairs = [(unshard_sequence(x, 2), y) for x, y in zip(mine, (out, lse), strict=True)]
    grads = [unshard_sequence(x.grad, 2) for x in parts[:3]] + [x.grad for x in parts[3:]]
    pairs += zip(grads, (x.grad for x in tensors), strict=True)
    errors = [(x - y).nan_to_num(0).abs().max() for x, y in pairs if y.numel()]
    return max([float(error.detach()) for error in errors], default=0.0)


def every_error() -> dict[str, float]:
    return {
        f"{method}, {name}, {case}": largest_error(method, name, case)
        for method in METHODS
        for name in IMPLEMENTATIONS
        for case in CASES
    }


@pytest.mark.parametrize("world", [1, 2, 4])
def test_spread_over_ranks_it_is_what_one_process_computes(world: int) -> None:
    for found in launch(every_error, world):
        assert isinstance(found, dict), found
        assert {name: error for name, error in found.items() if not error < 1e-12} == {}


def checkpointed() -> dict[str, float]:
    """Gradients that a recomputation gives, against those without."""
    tensors, options = inputs_of(33, 4, {"is_causal": True})
    parts = [shard_sequence(x.detach(), 2) for x in tensors[:3]] + [x.detach() for x in tensors[3:]]
    found = {}
    for method in METHODS:

        def work(*given: Tensor, method: str = method) -> Tensor:
            return ring_prefix_attention(*given, **options, method=method)

        grads = []
        for run in (work, lambda *x, work=work: checkpoint(work, *x, use_reentrant=False)):
            own = [x.clone().requires_grad_() for x in parts]
            run(*own).sum().backward()
            grads.append([x.grad for x in own])
        found[method] = max(float((a - b).abs().max()) for a, b in zip(*grads, strict=True))
    return found


def test_a_checkpoint_recomputes_it() -> None:
    for found in launch(checkpointed, 2):
        assert found == dict.fromkeys(METHODS, 0.0)


def in_half_precision() -> tuple[float, float]:
    """The error of the ring and of one process, both in bfloat16."""
    tensors, options = inputs_of(33, 4, {"is_causal": True})
    exact = prefix_attention(*tensors, **options)
    low = [x.detach().bfloat16() for x in tensors]
    parts = [shard_sequence(x, 2) for x in low[:3]]
    mine = unshard_sequence(ring_prefix_attention(*parts, *low[3:], **options), 2)
    one = prefix_attention(*low, **options)
    return tuple(float((x.double() - exact).abs().max().detach()) for x in (mine, one))


def test_in_bfloat16_it_errs_no_more_than_one_process() -> None:
    for mine, one in launch(in_half_precision, 4):
        assert 0 < mine <= 1.5 * one


def said(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def disagreements() -> dict[str, str]:
    """What a rank is told of each call, in which rank 1 does something else than rank 0."""
    other = dist.get_rank() == 1
    tensors, _ = inputs_of(16, 3, {})
    q, k, v, pk, pv = (x.detach() for x in tensors)
    q, k, v = (shard_sequence(x, 2) for x in (q, k, v))
    heads = [x[:, : 1 if other else 2] for x in (k, v, pk, pv)]
    short = [x[:, :, 1:] if other else x for x in (q, k, v)]

    def call(*arguments: Any, **options: Any) -> Callable[[], object]:
        return lambda: ring_prefix_attention(*arguments, **options)

    return {
        "heads": said(call(q, *heads)),
        "tokens": said(call(*short, pk, pv)),
        "dtype": said(call(*(x.float() if other else x for x in (q, k, v, pk, pv)))),
        "causality": said(call(q, k, v, pk, pv, is_causal=other)),
        "scale": said(call(q, k, v, pk, pv, scale=0.5 if other else 0.25)),
        "method": said(call(q, k, v, pk, pv, method=METHODS[other])),
        "index": said(
            call(
                q,
                k,
                v,
                *(x.repeat(2, 1, 1, 1) for x in (pk, pv)),
                prefix_index=torch.full((len(q),), int(other)),
            )
        ),
        "dim": said(lambda: unshard_sequence(q, 1 if other else 2)),
        "no dim": said(lambda: unshard_sequence(q, 9)),
        "beside": said(lambda: unshard_sequence(q[:, : 1 if other else 2], 2)),
        "parts": said(lambda: unshard_sequence(q[:, :, : 2 if other else 8], 2)),
        "wrong there": said(call(q, k, v, pk, pv.float() if other else pv)),
        "no such method": said(call(q, k, v, pk, pv, method="star" if other else "ring")),
        "no bool": said(call(q, k, v, pk, pv, return_lse=None if other else False)),
        "and after all that": said(call(q, k, v, pk, pv)),
    }


def test_ranks_that_disagree_are_all_told() -> None:
    first, second = launch(disagreements, 2)
    both = {
        "heads": "ValueError: H_kv: expected the same on all ranks, got [2, 1] by rank",
        "tokens": "ValueError: query: expected parts of [7, 8] tokens by rank, as shard_sequence "
        "cuts 15, got [8, 7]",
        "dtype": "ValueError: dtype: expected the same on all ranks, got ['torch.float64', "
        "'torch.float32'] by rank",
        "causality": "ValueError: is_causal: expected the same on all ranks, got [0, 1] by rank",
        "scale": "ValueError: scale: expected the same on all ranks, got [0.25, 0.5] by rank",
        "method": "ValueError: all_gather: expected the same on all ranks, got [0, 1] by rank",
        "index": "ValueError: prefix_index: expected the same on all ranks, got others",
        "no dim": "IndexError: dim: expected one of the 4 dimensions of tensor, got 9",
        "parts": "ValueError: tensor: expected parts of [5, 5] by rank, as shard_sequence cuts 10, "
        "got [8, 2]",
        "and after all that": "nothing",
    }
    assert {name: first[name] for name in both} == both
    assert {name: second[name] for name in both} == both
    for found in (first, second):
        assert found["dim"].startswith("ValueError: tensor: expected the same number of dim")
        assert found["beside"].startswith("ValueError: tensor: expected the same sizes beside dim")
    for name, words in (
        ("wrong there", "prefix_value"),
        ("no such method", "method"),
        ("no bool", "lse"),
    ):
        assert first[name].startswith("RuntimeError: rank 1 refused its input")
        assert words in second[name]


def with_a_death() -> str:
    tensors, _ = inputs_of(16, 3, {})
    q, k, v, pk, pv = (x.detach() for x in tensors)
    parts = [shard_sequence(x, 2) for x in (q, k, v)]
    ring_prefix_attention(*parts, pk, pv)
    if dist.get_rank() == 1:
        os._exit(1)
    return said(lambda: ring_prefix_attention(*parts, pk, pv))


def test_a_rank_that_dies_ends_the_others() -> None:
    first, second = launch(with_a_death, 2)
    assert second == "died"
    assert "Error" in first


def test_without_a_group_it_says_what_is_missing() -> None:
    x = torch.randn(1, 1, 2, 8)
    with pytest.raises(RuntimeError, match="init_process_group"):
        ring_prefix_attention(x, x, x, x, x)


def test_every_token_has_one_place_and_causal_work_is_even() -> None:
    for length in (0, 1, 7, 64, 101):
        for world in (1, 2, 3, 8):
            starts = chunk_starts(length, world)
            assert (starts[0], starts[-1], len(starts)) == (0, length, 2 * world + 1)
            sizes = [sum(lengths_of(length, rank, world)) for rank in range(world)]
            assert sum(sizes) == length
            assert max(sizes) - min(sizes) <= 1
