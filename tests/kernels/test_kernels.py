"""The kernels on paths that only some sizes or chips take, and what else they promise."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton

from prefixattn import prefix_attention
from prefixattn.api import make_problem
from prefixattn.kernels import config, decode
from prefixattn.testing import (
    Case,
    assert_within_budget,
    evaluate,
    make_inputs,
    poisoned_memory,
    run_implementation,
)

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="Triton is not interpreted here"),
]
DECODED = (
    Case("one-query", B=3, M=1, N=33, P=17),
    Case("a-tile-straddles-rows", B=5, H=6, H_kv=2, M=3, N=20, P=9, D=20, D_v=12),
    Case("sorted-rows", B=7, R=3, index=(2, -1, 0, 2, 1, 1, 0), lengths=(5, 0, 3), M=2, N=9),
    Case("one-each", B=3, R=3, lengths=(5, 0, 2), M=1, N=9),
    Case("static-cache", B=2, M=1, N=40, offset=(20, 30), stops=(21, 31), starts=(0, 4)),
    Case("window", B=2, M=2, N=40, P=20, window=7, positions=True, starts=(0, 5)),
    Case("nothing-seen", B=2, M=2, N=9, P=0, starts=(9, 0), stops=(9, 9)),
    Case("no-sequence", B=2, M=2, N=0, P=9, sinks=True),
    Case("no-bank", B=2, R=0, index=(-1, -1), N=9, M=1),
    Case("gate", B=3, R=2, index=(1, -1, 0), M=1, N=20, P=9, gate=True, sinks=True),
    Case("gate-no-sequence", B=2, M=1, N=0, P=9, gate=True),
    Case("scores", B=2, M=2, N=20, P=9, softcap=2.0, alibi=True, positions=True),
    Case("masks", B=2, M=2, N=20, P=9, mask=(2, 1, 2, 20), bias=(1, 4, 1, 9)),
    Case("float-mask", B=2, M=2, N=20, mask=(20,), mask_dtype="float", sinks=True),
)


@pytest.fixture
def always_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every problem goes to the split kernel, in splits of a few slots."""
    monkeypatch.setattr(config, "DECODE_QUERIES", 10**6)
    monkeypatch.setattr(config, "DECODE_KEYS", 1)
    monkeypatch.setattr(config, "SHORTEST_SPLIT", 6)


@pytest.mark.usefixtures("always_decode")
@pytest.mark.parametrize("case", DECODED, ids=lambda case: case.name)
def test_decode_meets_the_reference(case: Case) -> None:
    inputs = make_inputs(case, torch.float32)
    assert decode.suits(make_problem(**inputs))
    with poisoned_memory():
        frozen = ("attn_mask", "prefix_bias")
        got = evaluate(inputs, run_implementation("triton"), frozen=frozen)
    assert_within_budget(got, inputs)


def test_what_decode_leaves_to_the_forward() -> None:
    def suits(case: Case) -> bool:
        return decode.suits(make_problem(**make_inputs(case, torch.float32)))

    assert suits(Case("decode", M=1, N=400))
    assert suits(Case("long-prefix", M=1, N=1, P=400))
    assert not suits(Case("short", M=1, N=20))
    assert not suits(Case("prefill", M=400, N=400))
    assert not suits(Case("packed", B=1, M=2, N=400, segments=((1, 200), (1, 200))))


@pytest.mark.parametrize("splits", [1, 3, 50])
def test_however_the_sums_over_queries_are_cut(
    splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One part, some, and as many as there are chunks, for the prefix and for the sequence."""
    monkeypatch.setitem(config.CHIPS, "interpreter", config.Chip(2 * splits, 2**30))
    for case in (
        Case("shared", B=3, M=40, N=40, P=20, H=4, H_kv=1),
        Case("index", B=4, R=2, index=(1, -1, 1, 0), lengths=(9, 17), M=20, N=20, P=17),
        Case("packed", B=1, M=30, N=30, P=5, segments=((20, 20), (0, 0), (9, 10))),
    ):
        inputs = make_inputs(case, torch.float32)
        with poisoned_memory():
            got = evaluate(inputs, run_implementation("triton"))
        assert_within_budget(got, inputs)


def test_wide_heads_have_their_keys_and_values_summed_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(config, "WIDEST_PAIR", 16)
    inputs = make_inputs(Case("apart", R=2, index=(1, 0), sinks=True), torch.float32)
    with poisoned_memory():
        got = evaluate(inputs, run_implementation("triton"))
    assert_within_budget(got, inputs)


@pytest.mark.parametrize("d", [16, 40, 80, 96, 192, 256])
def test_head_dims(d: int) -> None:
    inputs = make_inputs(Case("dims", B=1, H=2, H_kv=1, M=5, D=d, D_v=d // 2), torch.bfloat16)
    with poisoned_memory():
        got = evaluate(inputs, run_implementation("triton"))
    assert_within_budget(got, inputs)


def test_any_strides_with_a_contiguous_last_dimension() -> None:
    """Views of a larger tensor, an expanded batch, a bank that is a slice of another."""
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(2, 9, 3, 4, 16, generator=generator)
    query, key, value = (fused[:, :, i].transpose(1, 2) for i in range(3))
    bank = torch.randn(3, 2, 4, 12, 16, generator=generator)
    inputs = {
        "query": query,
        "key": key[:1].expand(2, -1, -1, -1),
        "value": value,
        "prefix_key": bank[::2, 0, :, 3:9],
        "prefix_value": bank[::2, 1, :, ::2],
        "prefix_index": torch.tensor([1, 9, 0, 9])[::2],
        "is_causal": True,
    }
    with poisoned_memory():
        got = evaluate(inputs, run_implementation("triton"))
    assert_within_budget(got, inputs)


def test_no_segment_at_all() -> None:
    """Every query is blind: zeros, -inf, and gradients of zero."""
    empty = torch.zeros(1, dtype=torch.int32)
    inputs = make_inputs(Case("none", B=1, M=5, N=5), torch.float32)
    inputs |= {"cu_seqlens_q": empty, "cu_seqlens_k": empty, "is_causal": False}
    leaves = [inputs[name].requires_grad_() for name in ("query", "key", "prefix_value")]
    with poisoned_memory():
        out, lse = prefix_attention(**inputs, return_lse=True, implementation="triton")
        grads = torch.autograd.grad(out.sum(), leaves)
    assert not out.any()
    assert (lse == -torch.inf).all()
    assert not any(grad.any() for grad in grads)


def test_what_is_kept_for_backward_does_not_grow_with_rows_times_prefix() -> None:
    """Inputs, output, lse and its rest: the prefix is held once, however many rows see it."""
    inputs = make_inputs(Case("kept", B=6, M=3, N=3, P=50), torch.float32)
    inputs["prefix_key"].requires_grad_()
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out, lse = prefix_attention(**inputs, return_lse=True, implementation="triton")
    names = ("query", "key", "value", "prefix_key", "prefix_value")
    tensors = [*(inputs[name] for name in names), out, lse, torch.empty_like(lse)]
    assert sum(kept) == sum(x.untyped_storage().nbytes() for x in tensors)
