"""Random problems: every implementation against an oracle that shares no line with the package.

`--random-problems N` says how many for each implementation. A failure prints its `Spec`: give that
to `faults` below to see it again, and other values to single fields to make it smaller.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from prefixattn import prefix_attention
from prefixattn.testing import poisoned_memory

from . import oracle, yardstick
from .layouts import arrays, tensors, upstream
from .problems import Spec, draw

# Name: the implementation, the instruction set, the scores that a problem may have.
KINDS: dict[str, tuple[str, str | None, int]] = {
    "reference": ("reference", None, 4000),
    "sdpa": ("sdpa", None, 4000),
    "cpu-plain": ("cpu", "plain", 4000),
    "cpu-avx2": ("cpu", "avx2", 4000),
    "cpu-avx512": ("cpu", "avx512", 4000),
    "cpu-avx512bf16": ("cpu", "avx512bf16", 4000),
    "cpu-amx": ("cpu", "amx", 4000),
    "cpu-amx_emulated": ("cpu", "amx_emulated", 4000),
    "cpu-neon_bf16": ("cpu", "neon_bf16", 4000),
    "triton": ("triton", None, 300),
}
WITHOUT_GRADIENT = {"triton": ("attn_mask", "prefix_bias")}
TOGETHER = 20  # problems in one test
INTERPRETED = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="Triton is not interpreted here"
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each implementation and `TOGETHER` problems, so that workers can share them."""
    if "first" not in metafunc.fixturenames:
        return
    wanted, found = metafunc.config.getoption("random_problems"), []
    for name, (implementation, _, _) in KINDS.items():
        triton = implementation == "triton"
        # Interpreted, a problem takes as long as dozens of the others: few, unless asked for.
        count = wanted or (20 if triton else 240)
        marks = [pytest.mark.triton, INTERPRETED] if triton else []
        for first in range(0, count, TOGETHER):
            number = min(TOGETHER, count - first)
            found.append(pytest.param(name, first, number, id=f"{name}-{first}", marks=marks))
    metafunc.parametrize(("name", "first", "number"), found)


@cache
def bounds_of(seed: int, most: int) -> yardstick.Bounds:
    """What a problem's results may be: the same for all implementations."""
    s = draw(seed, most)
    return yardstick.bounds_of(tensors(s), upstream(s))


def faults(s: Spec, bounds: yardstick.Bounds, implementation: str) -> list[str]:
    """What an implementation gets wrong in a problem, in words; empty when all is well."""
    a, before, threads = tensors(s), tensors(s), torch.get_num_threads()
    frozen = (*s.frozen, *WITHOUT_GRADIENT.get(implementation, ()))

    def run(arguments: dict[str, Any]) -> Any:
        return prefix_attention(**arguments, implementation=implementation, return_lse=True)

    torch.set_num_threads(s.threads)
    try:
        with poisoned_memory():
            found = yardstick.faults(bounds, yardstick.differentiate(a, run, upstream(s), frozen))
            with torch.no_grad():
                out, lse = run(a)
            only = yardstick.faults(bounds, {"out": out, "lse": lse})
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]
    finally:
        torch.set_num_threads(threads)
    found += [f"without gradients, {fault}" for fault in only]
    for name, x in before.items():
        if isinstance(x, torch.Tensor) and not torch.equal(x.nan_to_num(7), a[name].nan_to_num(7)):
            found.append(f"{name} was written to")
    return found


def test_random_problems(
    name: str, first: int, number: int, use_instructions: Callable[[str], None]
) -> None:
    implementation, instructions, most = KINDS[name]
    if instructions is not None:
        use_instructions(instructions)
    found = []
    for seed in range(first, first + number):
        s = draw(seed, most)
        if implementation == "triton" and s.dtype == "float64":
            continue
        if wrong := faults(s, bounds_of(seed, most), implementation):
            found.append(f"{s}\n    " + "\n    ".join(wrong))
    assert not found, f"{len(found)} of {number} problems:\n" + "\n".join(found)


def test_few_results_are_beyond_eager() -> None:
    """Where eager attention has no number nothing is compared: that must stay the exception."""
    counted = [
        bound.budget is not None for seed in range(60) for bound in bounds_of(seed, 4000).values()
    ]
    assert sum(counted) >= 0.9 * len(counted)


GRADIENTS = (
    Spec(1, dtype="float64", M=4, N=5, P=3, group=2, causal=True, sinks="float64", softcap=2.0),
    Spec(2, dtype="float64", B=2, M=3, N=4, P=3, R=2, index=[1, -1], lengths=[3, 2], gate="float64",
         bias=[1, 3, 3], bias_dtype="float64", mask=[2, 1, 1, 4], mask_dtype="float64"),
    Spec(3, dtype="float64", M=5, N=6, P=2, segments=[(2, 3), (3, 2)], window=3, positions=True,
         alibi="float64", scale=-0.7, sinks="float64", mask=[5, 1], mask_dtype="float64"),
)  # fmt: skip


@pytest.mark.parametrize("s", GRADIENTS, ids=lambda s: str(s.seed))
def test_the_oracles_gradients_are_its_own_slopes(s: Spec) -> None:
    """By finite differences, in 64 bits of precision."""
    a = arrays(tensors(s))
    a = {
        n: x.astype(oracle.WIDE) if isinstance(x, np.ndarray) and x.dtype == float else x
        for n, x in a.items()
    }
    random = np.random.default_rng(0)
    dout = random.normal(size=(s.B, s.H, s.M, s.D_v))
    dlse = random.normal(size=(s.B, s.H, s.M))
    step = oracle.WIDE(1e-6)
    for name, grad in oracle.attention(a, dout, dlse).grads.items():
        for _ in range(4):
            place = tuple(int(random.integers(size)) for size in a[name].shape)
            sides = []
            for sign in (1, -1):
                moved = {**a, name: a[name].copy()}
                moved[name][place] += sign * step
                answer = oracle.attention(moved)
                seen = answer.lse > -np.inf
                sides.append((answer.out * dout).sum() + (answer.lse * dlse)[seen].sum())
            slope = (sides[0] - sides[1]) / (2 * step)
            assert float(grad[place]) == pytest.approx(float(slope), rel=1e-6, abs=1e-8), name


def test_the_oracle_by_hand() -> None:
    """Two keys, one of them a prefix token: weights 1/4 and 3/4; and a query that sees nothing."""
    x = np.ones((1, 1, 1, 1))
    a = {"query": np.ones((1, 1, 2, 1)), "key": x * np.log(3), "value": x * 8}
    a |= {"prefix_key": x * 0, "prefix_value": x * 4, "scale": 1.0}
    answer = oracle.attention(a)
    assert answer.out[0, 0, :, 0] == pytest.approx([7, 7])
    assert answer.lse[0, 0] == pytest.approx([np.log(4)] * 2)
    a |= {"prefix_index": np.array([-1]), "is_causal": True}  # query 0 is at position -1
    answer = oracle.attention(a)
    assert answer.out[0, 0, :, 0].tolist() == [0, 8]
    assert answer.lse[0, 0, 0] == -np.inf
