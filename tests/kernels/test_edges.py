"""Numbers at the edges of their types: what eager PyTorch has in float32, the kernels have too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton

from prefixattn import prefix_attention
from prefixattn.kernels import config
from prefixattn.testing import (
    Case,
    Inputs,
    Results,
    assert_within_budget,
    eager,
    evaluate,
    make_inputs,
    poisoned_memory,
    run_implementation,
)

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="Triton is not interpreted here"),
]
LOWEST = torch.finfo(torch.float32).min
KERNELS = ("forward", "decode")


def choose(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every problem goes to this kernel; the splits of decode are a few slots long."""
    monkeypatch.setattr(config, "DECODE_QUERIES", 10**6 if kernel == "decode" else 0)
    monkeypatch.setattr(config, "DECODE_KEYS", 1)
    monkeypatch.setattr(config, "SHORTEST_SPLIT", 6)


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(request.param, monkeypatch)


def run(inputs: Inputs) -> Results:
    frozen = ("attn_mask", "prefix_bias")
    with poisoned_memory():
        return evaluate(inputs, run_implementation("triton"), frozen=frozen)


def assert_as_eager(inputs: Inputs) -> None:
    """The output, lse and gradients are finite, and eager's to some units in the last place."""
    got, want = run(inputs), eager(inputs)
    pairs = {"out": (got.out, want.out), "lse": (got.lse, want.lse)}
    pairs |= {f"d{name}": (grad, want.grads[name]) for name, grad in got.grads.items()}
    for name, (ours, theirs) in pairs.items():
        if ours.numel() == 0:
            continue
        assert theirs.isfinite().all(), f"{name}: nothing to compare with"
        assert ours.isfinite().all(), name
        error = ((ours - theirs) / theirs.abs().max().clamp(min=1e-30)).abs().max().item()
        assert error < 1e-5, f"{name}: {error:.1e} of the largest number"


# A number of a mask that stands for "hidden", for all that a query sees: the mean of all values.
PLAIN = Case("", B=1, H=2, M=4, N=40, P=0, causal=False)
HIDDEN = {
    "finfo.min": (PLAIN, LOWEST),
    "-1e9": (PLAIN, -1e9),
    "the prefix too": (Case("", B=1, H=2, M=4, N=40, P=20, bias=(20,), causal=False), LOWEST),
    "a gate": (Case("", B=1, H=2, M=4, N=40, P=9, bias=(9,), gate=True, causal=False), LOWEST),
    "a sink": (Case("", B=1, H=2, M=4, N=40, P=0, sinks=True, causal=False), LOWEST),
    "causal": (Case("", B=1, H=2, M=20, N=20, P=0), LOWEST),
    "distances": (Case("", B=1, H=2, M=4, N=40, P=0, alibi=True, causal=False), LOWEST),
}


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("name", HIDDEN)
def test_a_number_hides_all_keys_from_a_query(name: str) -> None:
    """lse = finfo.min has no room for log N, and parts of one lse are not parts of one size."""
    case, fill = HIDDEN[name]
    inputs = make_inputs(case, torch.float32)
    inputs["attn_mask"] = torch.zeros(case.M, case.N)
    inputs["attn_mask"][:2] = fill
    if case.bias is not None:
        inputs["prefix_bias"] = torch.zeros(case.M, case.P)
        inputs["prefix_bias"][:2] = fill
    if case.sinks:
        inputs["sinks"] = torch.full((case.H,), fill)
    assert_as_eager(inputs)


def whole_numbers(**features: Any) -> Inputs:
    """Products that are whole numbers of up to 20, of which many are equal."""
    inputs = make_inputs(Case("", B=1, H=2, M=6, N=30, P=20, **features), torch.float32)
    return inputs | {name: inputs[name].sign() for name in ("query", "key", "prefix_key")}


# Powers of two, whose scores stay products in the kernels, and others; negative ones.
SCALES = (2.0**10, 1.37 * 2.0**30, 2.0**100, 1.37 * 2.0**120, 2.0**122, -(2.0**120))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("scale", SCALES, ids=lambda scale: f"{scale:.0e}")
def test_scores_of_any_size(scale: float) -> None:
    """The softmax of huge scores is that of the largest; equal ones share."""
    inputs = whole_numbers(D=20) | {"scale": scale}
    if scale == 2.0**122:  # the scores reach 3e38, the products 64
        inputs["query"] = inputs["query"] * 3
    assert_as_eager(inputs)


@pytest.mark.parametrize("scale", [1.0, 1e10])
@pytest.mark.parametrize("cap", [1e-20, 30.0, 1e37])
def test_soft_caps_of_any_size(cap: float, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    choose("forward", monkeypatch)
    assert_as_eager(whole_numbers(D=16) | {"softcap": cap, "scale": scale})


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("size", [3e38, -3e38])
@pytest.mark.parametrize("sunk", [False, True], ids=["biases", "biases and sinks"])
def test_biases_and_sinks_of_any_size(size: float, sunk: bool) -> None:
    inputs = whole_numbers(D=16, bias=(20,), sinks=True)
    inputs["prefix_bias"], inputs["attn_mask"] = torch.full((20,), size), torch.full((30,), size)
    if sunk:
        inputs["sinks"] = torch.full((2,), size)
    assert_as_eager(inputs)


def test_a_sink_over_all_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the unit of products, an eighth, it would be infinite."""
    choose("forward", monkeypatch)
    sinks = torch.full((2,), 3e38)
    assert_as_eager(whole_numbers(D=16, sinks=True) | {"sinks": sinks, "scale": 0.125})


# Window and position of query 0; the keys are at positions 0 to 29, right behind the prefix.
FAR = {
    "the longest window": (2**31 - 1, None),
    "a window of 64 bits": (2**31, -5),
    "the longest there is": (2**62 - 1, -5),
    "far behind": (None, 2**31 - 3),
    "far behind, in a window as long": (2**31 - 3, 2**31),
    "further behind": (2**62 - 10, 2**62 - 1),
    "furthest behind": (None, 2**62 - 1),
    "far before": (7, -(2**31)),
    "furthest before": (2**62 - 1, -(2**62) + 1),
    "an int32": (2**31 - 1, torch.tensor([2**31 - 20, -(2**31) + 9], dtype=torch.int32)),
    "an int64": (2**40, torch.tensor([2**40 + 3, 25])),
}


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("name", FAR)
def test_windows_and_positions_of_any_size(name: str) -> None:
    window, offset = FAR[name]
    inputs = make_inputs(Case("", H=2, M=6, N=30, P=9, positions=True), torch.float32)
    assert_within_budget(run(inputs | {"window": window, "query_offset": offset}), inputs | {
        "window": window, "query_offset": offset,
    })  # fmt: skip


@pytest.mark.parametrize("offset", [2**31 - 3, 2**40, -(2**33)])
def test_distances_of_any_size(offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    choose("forward", monkeypatch)
    case = Case("", H=2, M=6, N=30, P=9, alibi=True, positions=True, causal=False, offset=offset)
    inputs = make_inputs(case, torch.float32)
    inputs["alibi_slopes"] = torch.tensor([2.0**-30, 2.0**-36])
    assert_within_budget(run(inputs), inputs)


@pytest.mark.parametrize("everywhere", [False, True], ids=["some keys", "every key"])
@pytest.mark.parametrize("width", [64, 128], ids=["a power of two scales", "another number"])
def test_one_large_channel_of_the_keys(
    width: int, everywhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A query's gradients of scores sum to 0, or their sum times that channel is its gradient."""
    choose("forward", monkeypatch)
    inputs = make_inputs(
        Case("", B=1, H=4, H_kv=4, M=16, N=64, P=8, D=width, causal=False), torch.float32
    )
    inputs["query"][..., 0] += 5
    keys = torch.rand(64, generator=torch.Generator().manual_seed(0)) < 0.1
    inputs["key"][..., 0] += 200 * (torch.ones(64) if everywhere else keys)
    inputs["prefix_key"][..., 0] += 200 * everywhere
    assert_within_budget(run(inputs), inputs)


# The sums of so few numbers go out to memory, or are parts of their own.
STRETCHED = (
    Case("plain", B=1, H=2, M=36, N=70, P=40),
    Case("small-prefix", B=1, H=2, H_kv=1, M=36, N=40, P=5, sinks=True),
    Case("gate", B=2, H=2, M=5, N=40, P=30, R=2, index=(1, -1), gate=True),
    Case("packed", B=1, H=2, M=50, N=60, P=40, segments=((30, 30), (0, 0), (20, 30))),
    Case("one-each", R=2, M=40, N=9, P=20, H=4, H_kv=1),
    Case("blind", B=1, M=30, N=40, P=0, H=2, starts=(30,)),
    Case("more-queries", B=1, M=50, N=20, P=3, H=4, H_kv=1),
)


@pytest.mark.parametrize(
    ("case", "kernel_name"),
    [
        pytest.param(case, name, id=f"{case.name}-{name}")
        for case in STRETCHED
        for name in KERNELS
        if name == "forward" or case.segments is None  # decode packs no rows
    ],
)
def test_sums_in_stretches(case: Case, kernel_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(kernel_name, monkeypatch)
    monkeypatch.setattr(config, "LONGEST_SUM", {16: 20, 32: 20})
    inputs = make_inputs(case, torch.float32)
    assert_within_budget(run(inputs), inputs)


def test_sums_begin_anew_where_the_scores_outgrow_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stretches of scores 200 apart, rising in one query and falling in another."""
    choose("forward", monkeypatch)
    monkeypatch.setattr(config, "LONGEST_SUM", {16: 20, 32: 20})
    inputs = make_inputs(Case("", B=1, H=2, M=2, N=96, P=0, causal=False), torch.float32)
    inputs["query"][..., 0] = torch.tensor([1.0, -1.0])
    inputs["key"][..., 0] = torch.arange(96) // 16 * 800.0
    assert_within_budget(run(inputs), inputs)


@pytest.mark.usefixtures("kernel")
def test_many_keys_of_about_the_same_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """One running float32 sum errs by 1.1e-5 here, and by more the more there are."""
    monkeypatch.setattr(config, "SHORTEST_SPLIT", 2**15)
    keys, weight = 2**15, 0.7
    query, key = torch.zeros(1, 1, 2, 16), torch.zeros(1, 1, 1, 16)
    query[..., 0], key[..., 0] = 1, torch.tensor(weight).log()
    value = torch.ones(1, 1, 1, 16)
    none = torch.zeros(1, 1, 0, 16)
    inputs = {
        "query": query,
        "key": key.expand(1, 1, keys, 16),
        "value": value.expand(1, 1, keys, 16),
        "prefix_key": none,
        "prefix_value": none,
        "scale": 1.0,
    }
    out, lse = prefix_attention(**inputs, return_lse=True, implementation="triton")
    wanted = key[0, 0, 0, 0].double() + torch.tensor(float(keys), dtype=torch.float64).log()
    assert (lse.double() - wanted).abs().max() < 2e-6
    assert (out - 1).abs().max() < 3e-6
