"""Every implementation against the float64 reference: listed cases, then random ones."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefixattn import blocks, sdpa
from prefixattn.testing import (
    Case,
    assert_within_budget,
    evaluate,
    make_inputs,
    poisoned_memory,
    run_implementation,
    truth,
    widest,
    with_dropout,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WITHOUT_GRADIENT = {"triton": ("attn_mask", "prefix_bias")}

CASES = (
    Case("plain", causal=False),
    Case("causal", M=23, N=23),
    Case("causal-long", B=1, M=300, N=300, P=70),  # several blocks of every kernel
    Case("causal-tiles", B=1, H=2, H_kv=1, M=50, N=50, P=40),  # the same, for an interpreter
    Case("decode-tiles", B=3, H_kv=1, M=1, N=150, P=40, R=2, index=(1, -1, 1)),
    Case("bottom-right", M=5, N=12),
    Case("more-queries-than-keys", M=9, N=4),  # the first queries see the prefix only
    Case("decode-split-ragged", B=1, H_kv=1, M=1, N=700, P=700, lengths=(5,)),
    Case("decode-far-apart", M=1, N=9, offset=(2**32, 4), window=8, positions=True),
    Case("decode", B=3, M=1, N=33, P=17),
    Case("one-query-one-key", B=1, M=1, N=1, P=1),
    Case("empty-prefix", P=0),
    Case("empty-sequence", N=0),
    Case("empty-both", P=0, N=0),
    Case("no-queries", M=0),
    Case("no-rows", B=0),
    Case("no-bank", R=0, index=(-1, -1)),
    Case("no-groups", H=2, H_kv=2, B=1),
    Case("one-key-head", H=6, H_kv=1, D=40),
    Case("wider-values", D=24, D_v=16),
    Case("offset", M=5, N=12, offset=3),
    Case("offset-negative", M=5, N=12, offset=-2),  # the first two queries see the prefix only
    Case("offset-past-the-end", M=3, N=4, offset=9),
    Case("offset-of-64-bits", M=3, N=4, offset=(2**40, -(2**40)), window=2**50),
    Case("offset-by-row", M=5, N=12, offset=(2, 6)),
    Case("static-cache", M=3, N=20, offset=(8, 8), stops=(11, 11)),
    Case("left-padding", M=9, N=9, starts=(0, 4)),
    Case("right-padding", M=9, N=9, stops=(9, 3)),
    Case("both-paddings", M=9, N=9, starts=(2, 4), stops=(9, 7)),
    Case("nothing-but-padding", M=4, N=6, P=0, starts=(6, 0), stops=(6, 6)),
    Case("one-each", B=3, R=3),
    Case("one-each-ragged", B=3, R=3, lengths=(5, 0, 2)),
    Case("index", B=5, R=3, index=(2, -1, 0, 2, 2)),
    Case("index-ragged", B=5, R=3, index=(2, -1, 0, 2, 1), lengths=(3, 0, 5)),
    Case("shared-ragged", lengths=(3,)),
    Case("index-windowed", B=3, R=2, index=(1, -1, 1), lengths=(5, 3), window=4, positions=True),
    Case("window", M=20, N=20, window=6),
    Case("window-bidirectional", M=20, N=20, window=6, causal=False),
    Case("window-that-never-bites", M=6, N=6, window=11, positions=True),
    Case("window-positions", M=12, N=12, P=9, window=5, positions=True),
    Case("window-positions-padded", M=9, N=9, starts=(0, 4), window=4, positions=True),
    Case("softcap", softcap=2.0),
    Case("scale", scale=0.7),
    Case("scale-zero", scale=0.0),
    Case("scale-negative", scale=-0.7, M=9, N=9, starts=(0, 4)),
    Case("sinks", sinks=True),
    Case("sinks-alone", P=0, N=4, M=6, sinks=True),  # the first queries see their sink only
    Case("alibi", M=9, N=9, alibi=True),
    Case("alibi-positions", M=9, N=9, alibi=True, positions=True),
    Case("bool-mask", N=9, mask=(2, 1, 7, 9), causal=False),
    Case("bool-mask-causal", mask=(7, 7)),
    Case("key-mask-causal", M=9, N=9, mask=(2, 1, 1, 9)),
    Case("key-mask-offset", M=4, N=9, mask=(2, 1, 1, 9)),
    Case("query-mask", mask=(2, 1, 7, 1)),
    Case("float-mask", mask=(1, 4, 7, 7), mask_dtype="float"),
    Case("float-mask-by-key", mask=(2, 1, 1, 7), mask_dtype="float"),
    Case("bias", bias=(1, 4, 7, 5)),
    Case("bias-index", B=4, R=2, index=(1, 0, -1, 1), bias=(4, 1, 1, 5)),
    Case("bias-one-each", R=2, bias=(5,)),
    Case("gate", gate=True),
    Case("gate-long", gate=True, M=40, N=40),
    Case("gate-sinks", gate=True, sinks=True, P=9),
    Case("gate-empty-sequence", gate=True, N=0),
    Case("gate-windowed", gate=True, window=4, positions=True),
    Case("packed", B=1, M=13, N=13, segments=((5, 5), (1, 1), (7, 7))),
    Case("packed-tail", B=1, M=13, N=15, segments=((5, 6), (0, 2), (4, 4))),
    Case("packed-index", B=1, M=9, N=9, R=2, index=(1, -1, 1), segments=((2, 2), (4, 4), (3, 3))),
    Case("packed-one-each", B=1, M=6, N=6, R=2, segments=((2, 2), (4, 4))),
    Case(
        "packed-everything",
        B=1,
        M=9,
        N=9,
        R=2,
        index=(1, 0),
        lengths=(2, 5),
        segments=((4, 5), (5, 4)),
        window=4,
        positions=True,
        softcap=3.0,
        sinks=True,
        alibi=True,
        mask=(1, 4, 9, 9),
        mask_dtype="float",
        bias=(1, 1, 9, 5),
        offset=(1, 0),
    ),
    Case(
        "everything",
        B=3,
        H=6,
        H_kv=3,
        M=8,
        N=11,
        P=6,
        R=2,
        D=20,
        D_v=12,
        index=(1, 0, -1),
        lengths=(4, 6),
        starts=(0, 3, 1),
        stops=(11, 9, 10),
        offset=(3, 2, 1),
        window=5,
        positions=True,
        softcap=3.0,
        sinks=True,
        alibi=True,
        mask=(3, 1, 8, 11),
        bias=(6, 1, 6),
        gate=True,
    ),
)


INTERPRETED = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="Triton is not interpreted here"
)


def runs() -> list[object]:
    """Implementation, device, dtype and case. Triton's interpreter is slow: see `interpretable`."""
    found = []
    for name, device, dtypes, marks in (
        ("sdpa", "cpu", DTYPES, ()),
        ("cpu", "cpu", DTYPES, ()),
        ("sdpa", "cuda", DTYPES, (pytest.mark.gpu,)),
        ("triton", "cpu", DTYPES[1:], (pytest.mark.triton, INTERPRETED)),
        ("triton", "cuda", DTYPES[1:], (pytest.mark.triton, pytest.mark.gpu)),
    ):
        for dtype in dtypes:
            for case in CASES:
                if (name, device) != ("triton", "cpu") or interpretable(case, dtype):
                    words = (name, device, str(dtype).removeprefix("torch."), case.name)
                    found.append(
                        pytest.param(name, device, dtype, case, marks=marks, id="-".join(words))
                    )
    return found


def interpretable(case: Case, dtype: torch.dtype) -> bool:
    """Whether Triton's interpreter takes a case: all but a long one, in float32; a few in others.

    It multiplies in float32 whatever the dtype is, so that those test the casts alone.
    """
    few = ("causal", "decode", "index-ragged", "gate", "everything", "packed-everything")
    return case.name != "causal-long" and (dtype == torch.float32 or case.name in few)


@pytest.mark.parametrize(("implementation", "device", "dtype", "case"), runs())
def test_an_implementation_meets_the_reference(
    implementation: str, device: str, dtype: torch.dtype, case: Case
) -> None:
    inputs = make_inputs(case, dtype, device)
    # An lse gradient takes sdpa to its blocks; the next test has both of its paths.
    with_lse_gradient = implementation != "sdpa" or dtype == torch.float64
    frozen = WITHOUT_GRADIENT.get(implementation, ())
    with poisoned_memory():
        run = run_implementation(implementation)
        got = evaluate(inputs, run, with_lse_gradient, frozen=frozen)
    assert_within_budget(got, inputs, with_lse_gradient)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_sdpa_without_an_lse_gradient(case: Case) -> None:
    inputs = make_inputs(case, torch.float64)
    with poisoned_memory():
        got = evaluate(inputs, run_implementation("sdpa"), with_lse_gradient=False)
    assert_within_budget(got, inputs, with_lse_gradient=False)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_sdpa_in_many_small_blocks(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel, and blocks so small that every running maximum and offset is used."""
    monkeypatch.setattr(sdpa, "find_kernels", lambda query, key, value: None)
    monkeypatch.setattr(blocks, "BLOCK_QUERIES", 4)
    monkeypatch.setattr(blocks, "BLOCK_SCORES", 2**9)
    inputs = make_inputs(case, torch.float64)
    with poisoned_memory():
        got = evaluate(inputs, run_implementation("sdpa"))
    assert_within_budget(got, inputs)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_reference_in_low_precision(case: Case) -> None:
    """The public reference sums in float32: better than eager attention in bfloat16."""
    inputs = make_inputs(case, torch.bfloat16)
    with poisoned_memory():
        got = evaluate(inputs, run_implementation("reference"))
    assert_within_budget(got, inputs)


@st.composite
def cases(draw: st.DrawFn, times: int = 1) -> Case:
    """Any combination of features on small odd sizes, or on ones so many times as large."""

    def maybe(strategy: st.SearchStrategy) -> object:
        return draw(st.none() | strategy)

    def many(low: int, high: int, count: int) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.integers(low, high), min_size=count, max_size=count)))

    heads_kv = draw(st.sampled_from((1, 2, 3)))
    packed = draw(st.booleans())
    batch = 1 if packed else draw(st.integers(1, 4))
    pairs = st.lists(
        st.tuples(st.integers(0, 9 * times), st.integers(0, 9 * times)), min_size=1, max_size=4
    )
    segments = tuple(draw(pairs)) if packed else None
    m = (
        sum(q for q, _ in segments) + draw(st.integers(0, 2))
        if segments
        else draw(st.integers(1, 17 * times))
    )
    n = (
        sum(k for _, k in segments) + draw(st.integers(0, 2))
        if segments
        else draw(st.integers(0, 19 * times))
    )
    rows = len(segments) if segments else batch
    by_index = draw(st.booleans())
    entries = draw(st.integers(1, 3)) if by_index else draw(st.sampled_from((1, rows)))
    tokens = draw(st.integers(0, 9 * times))
    heads = heads_kv * draw(st.sampled_from((1, 2, 4)))
    shape, bias = (
        tuple(size if draw(st.booleans()) else 1 for size in (batch, heads, m, keys))
        for keys in (n, tokens)
    )
    if times > 1:  # one number for many keys gets a sum that cancels, all of it rounding
        shape, bias = (*shape[:3], n), (*bias[:3], tokens)
    return Case(
        "random",
        B=batch,
        H=heads,
        H_kv=heads_kv,
        M=m,
        N=n,
        P=tokens,
        R=entries,
        D=draw(st.sampled_from((1, 8, 20))),
        D_v=draw(st.sampled_from((None, 12))),
        causal=draw(st.booleans()),
        index=many(-1, entries - 1, rows) if by_index else None,
        lengths=many(0, tokens, entries) if draw(st.booleans()) else None,
        starts=many(0, n, batch) if not packed and draw(st.booleans()) else None,
        stops=many(0, n, batch) if not packed and draw(st.booleans()) else None,
        offset=maybe(st.integers(-3, 20 * times))
        if draw(st.booleans())
        else many(-3, 20 * times, rows),
        segments=segments,
        mask=shape if draw(st.booleans()) else None,
        mask_dtype=draw(st.sampled_from(("bool", "float"))),
        bias=bias if draw(st.booleans()) else None,
        gate=draw(st.booleans()),
        sinks=draw(st.booleans()),
        alibi=draw(st.booleans()),
        window=maybe(st.integers(1, 12 * times)),
        positions=draw(st.booleans()),
        softcap=maybe(st.just(3.0)),
    )


@given(cases(), st.integers(0, 2**20), st.booleans())
@settings(
    max_examples=250, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
def test_sdpa_meets_the_reference_on_random_problems(case: Case, seed: int, lse: bool) -> None:
    inputs = make_inputs(case, torch.float64, seed=seed)
    with poisoned_memory():
        got = evaluate(inputs, run_implementation("sdpa"), lse)
    assert_within_budget(got, inputs, lse)


@given(cases(), st.integers(0, 2**20), st.booleans(), st.sampled_from(DTYPES))
@settings(
    max_examples=250, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
def test_cpu_meets_the_reference_on_random_problems(
    case: Case, seed: int, lse: bool, dtype: torch.dtype
) -> None:
    inputs = make_inputs(case, dtype, seed=seed)
    with poisoned_memory():
        got = evaluate(inputs, run_implementation("cpu"), lse)
    assert_within_budget(got, inputs, lse)


@given(cases(15), st.integers(0, 2**20), st.sampled_from(DTYPES))
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_cpu_meets_the_reference_across_its_blocks(
    case: Case, seed: int, dtype: torch.dtype
) -> None:
    """Sizes of several blocks of queries and tiles of keys."""
    inputs = make_inputs(case, dtype, seed=seed)
    with poisoned_memory():
        got = evaluate(inputs, run_implementation("cpu"))
    assert_within_budget(got, inputs)


@pytest.mark.triton
@INTERPRETED
@given(cases(), st.integers(0, 2**20), st.booleans(), st.sampled_from(DTYPES[1:]))
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_triton_meets_the_reference_on_random_problems(
    case: Case, seed: int, lse: bool, dtype: torch.dtype
) -> None:
    inputs = make_inputs(case, dtype, seed=seed)
    with poisoned_memory():
        run, frozen = run_implementation("triton"), WITHOUT_GRADIENT["triton"]
        got = evaluate(inputs, run, lse, frozen=frozen)
    assert_within_budget(got, inputs, lse)


DROPPED = ("plain", "index-ragged", "gate", "packed-index", "left-padding")


@pytest.mark.parametrize("small_blocks", [False, True], ids=["one-block", "small-blocks"])
@pytest.mark.parametrize("name", DROPPED)
def test_dropout_is_the_same_everywhere(
    name: str, small_blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bits come from counters, so that implementations agree to rounding, dropped or not."""
    if small_blocks:
        monkeypatch.setattr(blocks, "BLOCK_QUERIES", 4)
        monkeypatch.setattr(blocks, "BLOCK_SCORES", 2**9)
    agree_on_dropout(name, "sdpa")


@pytest.mark.parametrize("name", DROPPED)
def test_dropout_in_cpp(name: str) -> None:
    agree_on_dropout(name, "cpu")


@pytest.mark.triton
@INTERPRETED
@pytest.mark.parametrize("name", DROPPED)
def test_dropout_in_the_kernels(name: str) -> None:
    agree_on_dropout(name, "triton")


def agree_on_dropout(name: str, implementation: str) -> None:
    """An implementation drops what the reference drops."""
    case = next(case for case in CASES if case.name == name)
    inputs = make_inputs(case, widest(implementation))
    dropped = [
        evaluate(inputs, with_dropout(inputs, 0.4, seed=7, implementation=found))
        for found in ("reference", implementation)
    ]
    torch.testing.assert_close(dropped[0].out, dropped[1].out)
    torch.testing.assert_close(dropped[0].lse, dropped[1].lse)
    for argument, grad in dropped[0].grads.items():
        torch.testing.assert_close(grad, dropped[1].grads[argument], msg=f"d{argument}")
    kept = truth(inputs)
    assert not torch.allclose(dropped[0].out.double(), kept.out)
    torch.testing.assert_close(dropped[0].lse, kept.lse, check_dtype=False)
