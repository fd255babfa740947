"""Wrong input raises before any work, naming the argument, what came and what was expected."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prefixattn import build, choose, cpu, explain, prefix_attention, quick
from prefixattn.api import make_problem
from prefixattn.testing import Case, make_inputs

BASE = Case("base", B=2, H=4, H_kv=2, M=5, N=6, P=3, D=8)
PACKED = Case("packed", B=1, M=5, N=5, segments=((2, 2), (3, 3)))


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values)


# (what to change in a right call, the error, what its message must hold)
WRONG: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
    ({"query": None}, TypeError, "query: expected a tensor, got NoneType"),
    ({"key": [1.0]}, TypeError, "key: expected a tensor, got list"),
    ({"attn_mask": 1}, TypeError, "attn_mask: expected a tensor or None, got int"),
    ({"query": torch.randn(2, 4, 5)}, ValueError, r"query: expected shape \[B, H, M, D\]"),
    ({"query": torch.randn(())}, ValueError, "query: expected shape"),
    (
        {"key": torch.randn(2, 2, 6, 9)},
        ValueError,
        r"key: .*\[2, any, any, 8\], got \[2, 2, 6, 9\]",
    ),
    ({"value": torch.randn(2, 2, 7, 8)}, ValueError, r"value: .*got \[2, 2, 7, 8\]"),
    ({"prefix_key": torch.randn(1, 3, 3, 8)}, ValueError, "prefix_key: expected shape"),
    ({"prefix_value": torch.randn(1, 2, 4, 8)}, ValueError, "prefix_value: expected shape"),
    ({"query": torch.randn(2, 3, 5, 8)}, ValueError, "query: expected heads H in multiples of"),
    ({"query": torch.randn(2, 4, 8, 5).mT}, ValueError, "query: expected a contiguous last"),
    (
        {"query": torch.ones(2, 4, 5, 8, dtype=torch.int64)},
        TypeError,
        "query: .*float16.*got int64",
    ),
    ({"key": torch.randn(2, 2, 6, 8).half()}, TypeError, "key: .*float32, got float16"),
    ({"prefix_key": torch.randn(1, 2, 3, 8).bfloat16()}, TypeError, "prefix_key: .*got bfloat16"),
    ({"query": torch.empty(2, 4, 5, 8, device="meta")}, ValueError, "key: expected device meta"),
    ({"prefix_index": ints(0)}, ValueError, r"prefix_index: .*\[B\] = \[2\], got \[1\]"),
    ({"prefix_index": torch.zeros(2)}, TypeError, "prefix_index: .*int32, int64, got float32"),
    ({"prefix_index": ints(0, 1)}, ValueError, r"prefix_index: .*from -1 to 0, got \[0, 1\]"),
    ({"prefix_index": ints(0, -2)}, ValueError, "prefix_index: expected values from -1"),
    ({"prefix_lengths": ints(4)}, ValueError, r"prefix_lengths: .*from 0 to 3, got \[4\]"),
    ({"prefix_lengths": ints(1, 1)}, ValueError, r"prefix_lengths: expected shape \[R\]"),
    ({"prefix_gate": torch.randn(2)}, ValueError, r"prefix_gate: expected shape \[H\] = \[4\]"),
    ({"prefix_bias": torch.randn(5, 4)}, ValueError, "prefix_bias: expected a shape that broad"),
    ({"prefix_bias": torch.ones(5, 3).bool()}, TypeError, "prefix_bias: .*got bool"),
    ({"prefix_in_window": "always"}, ValueError, "prefix_in_window: .*got 'always'"),
    ({"attn_mask": torch.ones(5, 5).bool()}, ValueError, r"attn_mask: .*\[2, 4, 5, 6\]"),
    ({"attn_mask": torch.ones(5, 6).long()}, TypeError, "attn_mask: expected a tensor of bool"),
    ({"key_start": ints(0)}, ValueError, r"key_start: expected shape \[B\]"),
    ({"key_start": ints(0, 7)}, ValueError, "key_start: expected values from 0 to 6"),
    ({"key_length": ints(-1, 6)}, ValueError, "key_length: expected values from 0 to 6"),
    ({"query_offset": 1.5}, TypeError, "query_offset: .*got float"),
    ({"query_offset": True}, TypeError, "query_offset: .*got bool"),
    ({"query_offset": ints(1, 2, 3)}, ValueError, r"query_offset: .*\[\] or \[B\] = \[2\]"),
    ({"query_offset": torch.zeros(2)}, TypeError, "query_offset: .*got float32"),
    ({"scale": float("nan")}, ValueError, "scale: expected a finite number, got nan"),
    ({"scale": "x"}, TypeError, "scale: expected a number or None, got str"),
    ({"window": 0}, ValueError, "window: .*at least 1, got 0"),
    ({"window": 2.0}, TypeError, "window: expected an int or None, got float"),
    ({"softcap": -1.0}, ValueError, "softcap: .*got -1.0"),
    ({"dropout_p": 1.0}, ValueError, r"dropout_p: expected a number in \[0, 1\), got 1.0"),
    ({"is_causal": 1}, TypeError, "is_causal: expected a bool, got int"),
    ({"deterministic": "yes"}, TypeError, "deterministic: expected a bool, got str"),
    ({"return_lse": "no"}, TypeError, "return_lse: expected a bool, got str"),
    ({"window": 2**70}, ValueError, "window: expected a number within 2.62"),
    ({"query_offset": -(2**63)}, ValueError, "query_offset: expected a number within 2.62"),
    ({"sinks": torch.randn(2)}, ValueError, r"sinks: expected shape \[H\]"),
    ({"alibi_slopes": torch.randn(2, 4)}, ValueError, r"alibi_slopes: expected shape \[H\]"),
    ({"alibi_slopes": torch.randn(4, requires_grad=True)}, ValueError, "alibi_slopes: .*gradient"),
    ({"max_seqlen_q": 3}, ValueError, "max_seqlen_q: expected None without cu_seqlens"),
    ({"cu_seqlens_q": ints(0, 5)}, ValueError, "cu_seqlens_k: expected a tensor"),
    ({"cu_seqlens_q": ints(0, 5), "cu_seqlens_k": ints(0, 6)}, ValueError, "query: expected B = 1"),
    ({"implementation": "cuda"}, ValueError, "implementation: expected 'auto' or one of"),
)
WRONG_PACKED: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
    ({"cu_seqlens_k": ints(0, 5)}, ValueError, r"cu_seqlens_k: expected shape \[3\]"),
    ({"cu_seqlens_q": ints(1, 2, 5)}, ValueError, "cu_seqlens_q: expected values that start at 0"),
    ({"cu_seqlens_k": ints(0, 3, 2)}, ValueError, "cu_seqlens_k: .*never fall"),
    ({"cu_seqlens_q": ints(0, 2, 6)}, ValueError, "cu_seqlens_q: expected values from 0 to 5"),
    ({"key_start": ints(0)}, ValueError, "key_start: expected None when packed"),
    (
        {"max_seqlen_q": 2},
        ValueError,
        "cu_seqlens_q: expected segments of at most max_seqlen_q = 2",
    ),
    ({"max_seqlen_k": -5}, ValueError, "cu_seqlens_k: expected segments of at most"),
    ({"prefix_index": ints(0)}, ValueError, r"prefix_index: .*\[segments\] = \[2\]"),
)


def names(wrong: tuple[tuple[dict[str, Any], type[Exception], str], ...]) -> list[str]:
    return ["-".join(change) for change, _, _ in wrong]


@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=names(WRONG))
def test_wrong_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs = make_inputs(BASE, torch.float32)
    prefix_attention(**inputs)
    with pytest.raises(error, match=message):
        prefix_attention(**(inputs | change))


@pytest.mark.parametrize(("change", "error", "message"), WRONG_PACKED, ids=names(WRONG_PACKED))
def test_wrong_packed_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs = make_inputs(PACKED, torch.float32)
    prefix_attention(**inputs)
    with pytest.raises(error, match=message):
        prefix_attention(**(inputs | change))


def test_triton_refuses_cpu_tensors_unless_it_is_interpreted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = make_inputs(BASE, torch.float32)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for found, message in ((False, "torch finds no CUDA or ROCm device"), (True, "not on cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=found: found)
        monkeypatch.setattr(choose, "HAS_TRITON", True)
        with pytest.raises(NotImplementedError, match=f"'triton' cannot run here: .*{message}"):
            prefix_attention(**inputs, implementation="triton")
    monkeypatch.setattr(choose, "HAS_TRITON", False)
    with pytest.raises(NotImplementedError, match="the package triton is not installed"):
        prefix_attention(**inputs, implementation="triton")


NOT_FOR_TRITON: tuple[tuple[Case, torch.dtype, dict[str, Any], str], ...] = (
    (BASE, torch.float64, {}, "take float16, bfloat16 and float32, not float64"),
    (Case("wide", D=272), torch.float32, {}, "head dims up to 256, not 272"),
    (
        BASE,
        torch.float32,
        {"attn_mask": torch.zeros(1, requires_grad=True)},
        "no gradient for attn_mask",
    ),
    (
        BASE,
        torch.float32,
        {"prefix_bias": torch.zeros(1, requires_grad=True)},
        "no gradient for prefix_bias",
    ),
    (
        BASE,
        torch.float32,
        {"prefix_key": torch.empty(2**25 + 32).as_strided((1, 2, 3, 8), (0, 16, 2**24, 1))},
        r"take prefix_key with under 2\^24 numbers from a token to the next",
    ),
)


@pytest.mark.parametrize(("case", "dtype", "change", "message"), NOT_FOR_TRITON)
def test_what_triton_refuses_auto_gives_to_another(
    case: Case,
    dtype: torch.dtype,
    change: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choose, "HAS_TRITON", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    inputs = make_inputs(case, dtype) | change
    problem = make_problem(**inputs)
    with pytest.raises(NotImplementedError, match=f"'triton' cannot run here: .*{message}"):
        choose.choose("triton", problem)
    assert choose.choose("auto", problem) == "cpu"
    assert message.replace("\\", "") in explain(**inputs, implementation="triton")


def test_the_cpp_kernels_refuse_tensors_of_other_devices() -> None:
    inputs = make_inputs(BASE, torch.float32)
    inputs |= {name: x.to("meta") for name, x in inputs.items() if isinstance(x, torch.Tensor)}
    words = explain(**inputs, implementation="cpu")
    assert words.startswith("nothing runs: implementation: 'cpu' cannot run here: its kernels take")
    assert "cpu cannot: its kernels take tensors on the CPU, not on meta" in words
    assert choose.choose("auto", make_problem(**inputs)) == "sdpa"


def test_without_a_compiler_auto_takes_sdpa_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name it raises, and it is not what an earlier call ran by."""
    inputs = make_inputs(Case("compiler", causal=True), torch.float32)
    with_kernels = prefix_attention(**inputs)
    monkeypatch.setattr(build, "obstacle", lambda: "there is no C++ compiler")
    quick.forget()
    assert "cpu cannot: there is no C++ compiler" in explain(**inputs)
    assert explain(**inputs).startswith("sdpa runs")
    torch.testing.assert_close(prefix_attention(**inputs), with_kernels)
    with pytest.raises(NotImplementedError, match="'cpu' cannot run here: there is no C\\+\\+"):
        prefix_attention(**inputs, implementation="cpu")


def test_auto_never_takes_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "HAS_TRITON", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    inputs = make_inputs(BASE, torch.float32)
    assert choose.choose("auto", make_problem(**inputs)) == "cpu"
    assert "triton cannot: TRITON_INTERPRET=1 interprets the kernels" in explain(**inputs)


def test_a_bank_that_is_neither_shared_nor_one_each() -> None:
    inputs = make_inputs(Case("bank", B=2, R=3, index=(0, 1)), torch.float32)
    with pytest.raises(ValueError, match="R = 1 .shared. or R = 2 .one each."):
        prefix_attention(**(inputs | {"prefix_index": None}))


def test_explain_says_what_runs_and_why_not_the_rest() -> None:
    inputs = make_inputs(BASE, torch.float32)
    first, *others = explain(**inputs).splitlines()
    assert first.startswith("cpu runs")
    assert f"cpu can: fused C++ kernels ({cpu.instructions()})" in others[1]
    assert [line.split()[0] for line in others] == ["triton", "cpu", "sdpa", "reference"]
    assert "prefix by CPU flash attention, sequence by CPU flash attention" in others[2]
    assert explain(**inputs, implementation="reference").startswith("reference runs")


def test_explain_names_what_keeps_the_kernels_out() -> None:
    def sdpa_line(case: Case) -> str:
        return explain(**make_inputs(case, torch.float32)).splitlines()[3]

    assert "in blocks of plain PyTorch because of softcap" in sdpa_line(Case("s", softcap=1.0))
    windowed = sdpa_line(Case("w", window=3))
    assert "prefix by CPU flash" in windowed
    assert "sequence in blocks of plain PyTorch because of window" in windowed
    assert "no kernel for these head dims" in sdpa_line(Case("d", D=16, D_v=8))


def test_explain_refuses_what_the_operation_refuses() -> None:
    inputs = make_inputs(BASE, torch.float32)
    with pytest.raises(ValueError, match="window"):
        explain(**(inputs | {"window": 0}))
    with pytest.raises(ValueError, match="implementation"):
        explain(**inputs, implementation="cuda")
    with pytest.raises(ValueError, match="prefix_index"):
        explain(**(inputs | {"prefix_index": ints(0, 5), "window": 2}))


def test_explain_draws_no_random_number() -> None:
    inputs = make_inputs(BASE, torch.float32)
    before = torch.get_rng_state()
    assert "because of dropout_p" in explain(**inputs, dropout_p=0.5)
    assert torch.equal(torch.get_rng_state(), before)
