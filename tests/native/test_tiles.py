"""The C++ kernels by tiles: AMX's where there are any, and emulated ones everywhere."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from prefixattn import prefix_attention
from prefixattn.testing import (
    Case,
    assert_within_budget,
    evaluate,
    make_inputs,
    poisoned_memory,
    run_implementation,
)

Use = Callable[[str], None]
SETS = ("amx", "amx_emulated")
WIDTHS = (
    (16, 16),
    (32, 64),
    (40, 24),
    (64, 64),
    (80, 80),
    (96, 96),
    (128, 128),
    (192, 128),
    (256, 256),
)

# More than one strip of 32 queries, one chunk of keys, one group of 512; and what lies beside them.
CASES = (
    Case("causal", B=1, H=2, H_kv=1, M=70, N=70, P=40, D=64),
    Case("more-queries-than-keys", B=1, H=1, H_kv=1, M=100, N=60, P=0, D=64),
    Case("shared", B=3, H=4, H_kv=2, M=33, N=65, P=130, D=64, R=1),
    Case("groups", B=1, H=1, H_kv=1, M=40, N=1100, P=530, D=64, causal=False),
    Case("window", B=1, H=2, H_kv=2, M=300, N=300, P=70, D=64, window=37, positions=True),
    Case("far-window", B=1, H=1, H_kv=1, M=64, N=1500, P=20, D=64, window=20),
    Case(
        "ragged",
        B=3,
        R=3,
        M=40,
        N=90,
        P=33,
        index=(2, -1, 0),
        lengths=(3, 0, 33),
        starts=(0, 37, 5),
    ),
    Case("stops", B=2, M=50, N=90, P=9, stops=(90, 41), D=64),
    Case("packed", B=1, M=100, N=100, segments=((40, 40), (33, 33), (27, 27)), D=64),
    Case("sinks", B=1, H=2, M=66, N=66, P=5, sinks=True, D=64),
    Case("gate", B=1, H=2, M=66, N=66, P=35, gate=True, D=64),
    Case("dropless-features", B=1, M=66, N=66, P=35, softcap=3.0, alibi=True, bias=(35,), D=64),
)


def assert_meets_the_reference(inputs: dict[str, Any]) -> None:
    with poisoned_memory():
        got = evaluate(inputs, run_implementation("cpu"))
    assert_within_budget(got, inputs)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("instructions", SETS)
def test_cases(instructions: str, case: Case, use_instructions: Use) -> None:
    use_instructions(instructions)
    inputs = make_inputs(case, torch.bfloat16)
    assert_meets_the_reference(inputs)


@pytest.mark.parametrize(("width", "value_width"), WIDTHS)
@pytest.mark.parametrize("instructions", SETS)
def test_widths(instructions: str, width: int, value_width: int, use_instructions: Use) -> None:
    use_instructions(instructions)
    case = Case("", B=1, H=2, H_kv=1, M=50, N=150, P=45, D=width, D_v=value_width)
    inputs = make_inputs(case, torch.bfloat16)
    assert_meets_the_reference(inputs)


@pytest.mark.parametrize("size", [4.0, 30.0, 1e4, 1e15])
@pytest.mark.parametrize("instructions", SETS)
def test_scores_that_rise(instructions: str, size: float, use_instructions: Use) -> None:
    """Each chunk's scores are larger than those before: levels are raised again and again."""
    use_instructions(instructions)
    inputs = make_inputs(Case("", B=1, H=1, H_kv=1, M=64, N=400, P=100, D=32), torch.bfloat16)
    inputs["query"] = inputs["query"].abs() * 0.1
    rising = torch.linspace(-1, 1, 500)[None, None, :, None] * size
    for name, part in (("prefix_key", rising[:, :, :100]), ("key", rising[:, :, 100:])):
        inputs[name] = (inputs[name] * 0.05 + part / 32).to(torch.bfloat16)
    assert_meets_the_reference(inputs)


@pytest.mark.parametrize("instructions", SETS)
def test_long_rows(instructions: str, use_instructions: Use) -> None:
    """More keys than floats may sum: as many equal weights, whose mean is what each value is."""
    use_instructions(instructions)
    query = torch.ones(1, 1, 64, 32, dtype=torch.bfloat16)
    key = torch.zeros(1, 1, 1, 32, dtype=torch.bfloat16).expand(1, 1, 100_003, 32)
    value = torch.full((1, 1, 1, 32), 0.3, dtype=torch.bfloat16).expand(1, 1, 100_003, 32)
    out, lse = prefix_attention(
        query, key, value, key[:, :, :40_000], value[:, :, :40_000], is_causal=False,
        return_lse=True, implementation="cpu",
    )  # fmt: skip
    assert (out == value[0, 0, 0, 0]).all()
    wanted = torch.tensor(140_003.0, dtype=torch.float64).log()
    torch.testing.assert_close(lse.double(), wanted.expand_as(lse), atol=2e-6, rtol=0)


@pytest.mark.parametrize("instructions", SETS)
def test_what_nobody_sees_may_be_no_number(instructions: str, use_instructions: Use) -> None:
    use_instructions(instructions)
    case = Case("", B=2, H=1, H_kv=1, M=70, N=130, P=40, D=64, starts=(5, 40), lengths=(33,))
    inputs = make_inputs(case, torch.bfloat16)
    wanted = evaluate(inputs, run_implementation("cpu"))
    for row, start in enumerate((5, 40)):
        for name in ("key", "value"):
            inputs[name][row, :, :start] = torch.nan
    for name in ("prefix_key", "prefix_value"):
        inputs[name][:, :, 33:] = torch.nan
    got = evaluate(inputs, run_implementation("cpu"))
    assert torch.equal(got.out, wanted.out)
    assert torch.equal(got.lse, wanted.lse)
    assert torch.equal(got.grads["query"], wanted.grads["query"])


@pytest.mark.parametrize("instructions", SETS)
def test_numbers_that_are_none_stay_so(instructions: str, use_instructions: Use) -> None:
    use_instructions(instructions)
    inputs = make_inputs(
        Case("", B=1, H=1, H_kv=1, M=64, N=90, P=7, D=64, causal=False), torch.bfloat16
    )
    inputs["value"][0, 0, 50, 3] = torch.nan
    inputs["query"][0, 0, 9, 1] = torch.nan
    out, lse = run_implementation("cpu")(inputs)
    assert out[0, 0, :, 3].isnan().all()
    assert out[0, 0, 9].isnan().all()
    assert lse[0, 0, 9].isnan()
    rest = [query for query in range(64) if query != 9]
    assert out[0, 0, rest][:, [0, 1, 2, *range(4, 64)]].isfinite().all()
    assert lse[0, 0, rest].isfinite().all()


@pytest.mark.parametrize("instructions", SETS)
def test_a_query_that_sees_one_key_gets_its_value(instructions: str, use_instructions: Use) -> None:
    use_instructions(instructions)
    inputs = make_inputs(Case("", B=1, H=1, H_kv=1, M=70, N=70, P=0, D=64), torch.bfloat16)
    out, lse = run_implementation("cpu")(inputs)
    assert torch.equal(out[0, 0, 0], inputs["value"][0, 0, 0])
    score = (inputs["query"][0, 0, 0].double() @ inputs["key"][0, 0, 0].double()) / 8
    torch.testing.assert_close(lse[0, 0, 0].double(), score, atol=2e-6, rtol=2e-7)


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[6]], ids=lambda case: case.name)
def test_tiles_and_emulated_ones_give_the_same_bits(case: Case, use_instructions: Use) -> None:
    inputs = make_inputs(case, torch.bfloat16)
    results = []
    for instructions in SETS:
        use_instructions(instructions)
        results.append(evaluate(inputs, run_implementation("cpu")))
    assert torch.equal(results[0].out, results[1].out)
    assert torch.equal(results[0].lse, results[1].lse)
    for name, grad in results[0].grads.items():
        assert torch.equal(grad, results[1].grads[name]), name
