"""Numbers at the edge: large scores, hidden and long rows, outliers, integers near their limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from prefixattn import prefix_attention
from prefixattn.problem import TENSORS
from prefixattn.testing import (
    Case,
    assert_within_budget,
    evaluate,
    make_inputs,
    run_implementation,
)

triton = pytest.param("triton", marks=pytest.mark.triton)
IMPLEMENTATIONS = ("reference", "sdpa", "cpu", triton)
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
LOWEST = torch.finfo(torch.float32).min


def _run(
    inputs: dict[str, Any], implementation: str, wanted: tuple[str, ...] = TENSORS
) -> list[Tensor]:
    """Output, lse, and gradients of the wanted tensors for upstream gradients through both."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in wanted}
    arguments = inputs | leaves
    out, lse = prefix_attention(**arguments, implementation=implementation, return_lse=True)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in (out, lse)]
    return [out, lse, *torch.autograd.grad([out, lse], list(leaves.values()), upstream)]


def _left_padding(low: float) -> Tensor:
    mask = torch.zeros(5, 9)
    mask[:3], mask[:, :3] = low, low
    return mask


def _first_query(low: float, first_key: int = 0) -> Tensor:
    mask = torch.zeros(5, 9)
    mask[0, first_key:] = low
    return mask


# Of each: prefix tokens, and the mask that hides by some number.
HIDDEN: dict[str, tuple[int, Callable[[float], Tensor]]] = {
    "one query": (0, _first_query),
    "one query, some keys": (0, lambda low: _first_query(low, 3)),
    "left padding": (0, _left_padding),
    "all of them": (0, lambda low: torch.full((5, 9), low)),
    "beside a prefix": (3, _first_query),
}


@each_implementation
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("low", [LOWEST, -1e9, -1e5])
@pytest.mark.parametrize("hidden", HIDDEN)
def test_rows_that_an_additive_mask_hides(
    hidden: str, low: float, causal: bool, implementation: str
) -> None:
    """Eager gives such a query the mean of all values, and each key 1 / N of its gradient."""
    tokens, mask = HIDDEN[hidden]
    inputs = make_inputs(Case("hidden", M=5, N=9, P=tokens, D=16, causal=causal), torch.float32)
    inputs["attn_mask"] = mask(low)
    expected = _run(inputs, "reference")
    for got, wanted in zip(_run(inputs, implementation), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-4, atol=2e-4)


@each_implementation
def test_a_sink_beside_a_hidden_row(implementation: str) -> None:
    inputs = make_inputs(Case("sink", M=3, N=8, P=0, sinks=True), torch.float32)
    inputs["attn_mask"] = torch.full((3, 8), LOWEST)
    inputs["sinks"] = torch.full((4,), LOWEST)
    names = (*TENSORS, "sinks")
    expected = _run(inputs, "reference", names)
    for got, wanted in zip(_run(inputs, implementation, names), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


# A large channel in the queries, the keys' one, which keys have it, and how many queries there are.
OUTLIERS = [
    (q, k, step, queries, width)
    for q, k in ((3, 100), (5, 200), (30, 1880))
    for step in (1, 9)
    for queries, width in ((1, 64), (8, 128), (70, 64))
]


@pytest.mark.parametrize("implementation", ["sdpa", "cpu"])
@pytest.mark.parametrize(
    "outliers", OUTLIERS, ids=lambda o: f"{o[1]} in every {o[2]}, M {o[3]}, D {o[4]}"
)
def test_gradients_under_outliers_in_keys(outliers: tuple[int, ...], implementation: str) -> None:
    """A score that the backward computes otherwise than the forward did loses dq to its last digit.

    The error is held against eager's over several draws: of one number it is mere chance.
    """
    q_size, k_size, step, queries, width = outliers
    errors = {name: torch.zeros(5) for name in ("reference", implementation)}
    for seed in range(6):
        case = Case("outliers", B=1, H=4, H_kv=4, M=queries, N=64, P=8, D=width, causal=False)
        inputs = make_inputs(case, torch.float32, seed=seed)
        inputs["query"][..., 0] = q_size
        for name in ("key", "prefix_key"):
            inputs[name][:, :, ::step, 0] = k_size
        wide = {name: inputs[name].double() for name in TENSORS}
        exact = _run({**inputs, **wide}, "reference")[2:]
        for name, error in errors.items():
            found = _run(inputs, name)[2:]
            error += torch.tensor(
                [
                    float((x - y).abs().max() / y.abs().max())
                    for x, y in zip(found, exact, strict=True)
                ]
            )
    assert (errors[implementation] <= 3 * errors["reference"] + 1e-5).all(), errors


@pytest.mark.parametrize("implementation", ["sdpa", "cpu"])
@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("weight", [1.0, 1e-3])
def test_long_rows_keep_their_sum(weight: float, queries: int, implementation: str) -> None:
    """A million keys, the first of score 0, the others of score log(weight); all values are 1."""
    keys = 2**20
    query = torch.zeros(1, 1, queries, 8)
    query[..., 0] = 1
    key = torch.zeros(1, 1, keys, 8)
    key[..., 1:, 0] = math.log(weight)
    value = torch.ones(1, 1, 1, 8).expand(1, 1, keys, 8)
    none = torch.zeros(1, 1, 0, 8)
    out, lse = prefix_attention(
        query, key, value, none, none, scale=1.0, return_lse=True, implementation=implementation
    )
    exact = math.log(1 + (keys - 1) * float(key[0, 0, 1, 0].double().exp()))
    assert float((out - 1).abs().max()) < 5e-6
    assert float((lse - exact).abs().max()) < 4e-6


def test_a_long_row_in_the_backward() -> None:
    """Sums over keys (dq) and over queries (dk, dv and the prefix's) err as eager's do."""
    torch.manual_seed(0)
    for queries, keys, tokens in ((3, 60_000, 5), (6_000, 24, 5)):
        shape = {"query": queries, "key": keys, "value": keys}
        inputs = {name: torch.randn(1, 1, shape.get(name, tokens), 8).add_(0.5) for name in TENSORS}
        names = tuple(TENSORS)
        wide = {name: x.double() for name, x in inputs.items()}
        exact, eager, got = (
            _run(x, name, names)[2:]
            for x, name in ((wide, "reference"), (inputs, "reference"), (inputs, "cpu"))
        )
        for truth, plain, mine in zip(exact, eager, got, strict=True):
            largest = float(truth.abs().max())
            allowed = 3 * float((plain - truth).abs().max()) + 4 * 2**-23 * largest
            assert float((mine - truth).abs().max()) <= allowed


@each_implementation
@pytest.mark.parametrize("size", [1e3, 1e6, 1e10, 1e20, 1e30, 3e37])
@pytest.mark.parametrize("queries", [2, 14])
def test_scores_of_any_finite_size(queries: int, size: float, implementation: str) -> None:
    case = Case("large", B=1, H=2, M=queries, N=30, P=4, D=17, causal=False)
    inputs = make_inputs(case, torch.float32)
    inputs["query"] = inputs["query"] * 0.1
    inputs["key"] = inputs["key"].clamp(-2, 2) * size
    inputs["prefix_key"] = inputs["prefix_key"].clamp(-2, 2) * size
    names = ("value", "prefix_value")
    expected = _run(inputs, "reference", names)
    assert all(x.isfinite().all() for x in expected)
    for got, wanted in zip(_run(inputs, implementation, names), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-2 if size == 1e3 else 1e-4, atol=1e-4)


NUMBERS: dict[str, dict[str, Any]] = {
    "a large scale": {"scale": 1e30},
    "a large scale below zero": {"scale": -1e30},
    "no scale": {"scale": 0.0},
    "a tiny softcap": {"softcap": 1e-30},
    "a large softcap": {"softcap": 1e30},
    "a large softcap and scale": {"softcap": 1e38, "scale": 1e30},
    "a large bias": {"attn_mask": torch.arange(-4, 5) * 7e37},
    "a large bias before the prefix": {"prefix_bias": torch.arange(-2, 3) * 1.5e38},
    "steep slopes": {"alibi_slopes": torch.full((4,), 1e37), "prefix_in_window": "positions"},
}


@each_implementation
@pytest.mark.parametrize("name", NUMBERS)
def test_options_of_any_finite_size(name: str, implementation: str) -> None:
    inputs = make_inputs(Case("numbers", M=3, N=9, P=5), torch.float32) | NUMBERS[name]
    wanted = prefix_attention(**inputs, implementation="reference", return_lse=True)
    assert wanted[0].isfinite().all()
    got = prefix_attention(**inputs, implementation=implementation, return_lse=True)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["reference", "sdpa", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("queries", [2, 20])
def test_values_near_the_largest_number(
    queries: int, dtype: torch.dtype, implementation: str
) -> None:
    """The mean of values is within them, where their sum is not."""
    most = torch.finfo(dtype).max / 4
    query, none = torch.zeros(1, 1, queries, 8, dtype=dtype), torch.zeros(1, 1, 4, 8, dtype=dtype)
    value = torch.full((1, 1, 40, 8), most, dtype=dtype)
    key = torch.zeros(1, 1, 40, 8, dtype=dtype)
    out = prefix_attention(query, key, value, none, value[:, :, :4], implementation=implementation)
    torch.testing.assert_close(out / most, torch.ones_like(out))


EDGES = {
    "offset near 2^31": {"query_offset": 2**31 - 3},
    "offset near -2^31": {"query_offset": -(2**31) + 1},
    "offset near 2^62": {"query_offset": 2**62 - 1},
    "offset near -2^62": {"query_offset": 1 - 2**62},
    "window near 2^31": {"window": 2**31 - 1},
    "window near 2^62": {"window": 2**62 - 1},
    "both near 2^31": {"window": 2**31 - 2, "query_offset": 2**31 - 3},
    "both near 2^31, apart": {"window": 2**31 - 2, "query_offset": -(2**31) + 1},
    "both near 2^62": {"window": 2**62 - 5, "query_offset": 2**62 - 1},
    "both near 2^62, apart": {"window": 2**62 - 1, "query_offset": 1 - 2**62},
    "offsets of int32": {"query_offset": torch.tensor([2**31 - 1, -(2**31)], dtype=torch.int32)},
    "offsets of int64": {"query_offset": torch.tensor([2**63 - 1, -(2**63)])},
    "offsets of int64 and a window": {
        "query_offset": torch.tensor([2**62 + 3, 2]),
        "window": 2**62 - 1,
    },
}


def _sees(position: int, slot: int, window: int | None, causal: bool) -> bool:
    """The definition, in Python's integers of any size."""
    if causal and slot > position:
        return False
    return window is None or slot > position - window


@each_implementation
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("edge", EDGES)
def test_integers_at_the_edge(
    edge: str, positions: bool, causal: bool, implementation: str
) -> None:
    inputs = make_inputs(Case("edge", B=2, M=4, N=40, P=6, positions=positions), torch.float32)
    inputs |= EDGES[edge] | {"is_causal": causal}
    offset, window = inputs["query_offset"], inputs.get("window")
    first = offset.tolist() if isinstance(offset, Tensor) else [offset] * 2
    first = [40 - 4 if x is None else x for x in first]
    mask = torch.tensor(
        [[[_sees(f + i, j, window, causal) for j in range(40)] for i in range(4)] for f in first]
    )
    of_prefix = torch.tensor(
        [
            [
                [not positions or _sees(f + i, j - 6, window, False) for j in range(6)]
                for i in range(4)
            ]
            for f in first
        ]
    )
    seen = {
        "attn_mask": mask[:, None],
        "prefix_bias": torch.where(of_prefix[:, None], 0, -torch.inf),
    }
    plain = {name: inputs[name] for name in TENSORS} | seen
    expected = prefix_attention(**plain, implementation="reference", return_lse=True)
    got = prefix_attention(**inputs, implementation=implementation, return_lse=True)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@each_implementation
@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 3e38])
def test_a_key_that_a_bool_mask_hides_may_hold_anything(
    bad: float, queries: int, implementation: str
) -> None:
    """Its scores are masked, so that neither the output nor the gradients of keys know of it."""
    case = Case("masked", B=1, H=2, M=queries, N=30, P=3, causal=False)
    inputs = make_inputs(case, torch.float32)
    inputs["attn_mask"] = torch.arange(30) != 7
    names = ("key", "value", "prefix_key", "prefix_value")
    expected = _run(inputs, "reference", names)
    inputs["key"] = inputs["key"].clone()
    inputs["key"][:, :, 7] = bad
    for got, wanted in zip(_run(inputs, implementation, names), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "cpu"])
def test_scores_that_are_far_from_zero(implementation: str) -> None:
    """A bias that all keys have in common changes nothing but lse."""
    inputs = make_inputs(Case("far", M=9, N=9, mask=(9, 9), mask_dtype="float"), torch.float32)
    inputs["attn_mask"] = torch.full((9, 9), 512.0)
    inputs["prefix_bias"] = torch.full((9, 5), 512.0)
    got = evaluate(inputs, run_implementation(implementation))
    assert_within_budget(got, inputs)
