"""Every instruction set that this processor has, by itself, against the float64 reference."""

from collections.abc import Callable

import pytest
import torch

from prefixattn import cpu
from prefixattn.testing import (
    Case,
    assert_within_budget,
    evaluate,
    make_inputs,
    poisoned_memory,
    run_implementation,
    truth,
    with_dropout,
)

Use = Callable[[str], None]
SETS = ("plain", "avx2", "avx512", "avx512bf16", "amx", "amx_emulated", "neon_bf16")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Sizes beside whole vectors and tiles; queries few and many; every way through a tile.
CASES = (
    Case("one-number", B=1, H=1, H_kv=1, M=1, N=1, P=1, D=1),
    Case("odd", B=1, M=33, N=97, P=7, D=33, D_v=17),
    Case("whole", B=1, H=2, H_kv=1, M=64, N=192, P=96, D=64, causal=False),
    Case("wide", B=1, H=1, H_kv=1, M=13, N=20, P=3, D=256, D_v=200),
    Case("decode", B=3, H=4, H_kv=1, M=1, N=300, P=450, R=2, D=40, index=(1, -1, 1)),
    Case("decode-ragged", B=9, H=2, M=2, N=5, P=620, D=24, lengths=(211,)),
    Case("ragged", R=3, N=19, M=19, index=(2, 0), lengths=(3, 0, 5), starts=(0, 3)),
    Case("window", M=130, N=150, B=1, window=40, positions=True, P=50),
    Case("packed", B=1, M=38, N=43, segments=((21, 25), (1, 1), (16, 17)), index=(0, -1, 0)),
    Case("gate-sinks", gate=True, sinks=True, M=20, N=20),
    Case("mask-float", M=20, N=20, mask=(2, 1, 20, 20), mask_dtype="float", bias=(1, 4, 1, 5)),
    Case(
        "everything",
        M=21,
        N=30,
        P=9,
        D=20,
        starts=(0, 4),
        stops=(30, 21),
        mask=(2, 4, 21, 30),
        bias=(9,),
        window=11,
        positions=True,
        softcap=2.0,
        alibi=True,
        sinks=True,
    ),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("instructions", SETS)
def test_an_instruction_set_meets_the_reference(
    instructions: str, case: Case, dtype: torch.dtype, use_instructions: Use
) -> None:
    use_instructions(instructions)
    assert cpu.instructions() == instructions
    inputs = make_inputs(case, dtype)
    with poisoned_memory():
        got = evaluate(inputs, run_implementation("cpu"))
    assert_within_budget(got, inputs)


@pytest.mark.parametrize("instructions", SETS)
def test_dropout_of_an_instruction_set(instructions: str, use_instructions: Use) -> None:
    """The same numbers are dropped by all, and by the reference."""
    use_instructions(instructions)
    inputs = make_inputs(CASES[1], torch.float64)
    wanted, got = (
        evaluate(inputs, with_dropout(inputs, 0.4, seed=7, implementation=name))
        for name in ("reference", "cpu")
    )
    torch.testing.assert_close(got.out, wanted.out)
    for name, grad in got.grads.items():
        torch.testing.assert_close(grad, wanted.grads[name], msg=f"d{name}")
    assert not torch.allclose(got.out, truth(inputs).out)


@pytest.mark.parametrize("instructions", SETS)
def test_extreme_numbers(instructions: str, use_instructions: Use) -> None:
    """Scores far apart leave one key; what is infinite or NaN in a value that is seen stays so."""
    use_instructions(instructions)
    for queries in (1, 40):
        inputs = make_inputs(Case("", B=1, H=1, H_kv=1, M=queries, N=40, causal=False, D=16))
        inputs = {
            name: x.float() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()
        }
        inputs["query"] *= 1e4
        inputs["key"] *= 1e4
        out, lse = run_implementation("cpu")(inputs)
        assert out.isfinite().all()
        torch.testing.assert_close(lse, truth(inputs).lse.float())
        inputs["value"][:, :, 3, 5] = torch.nan
        out, _ = run_implementation("cpu")(inputs)
        assert out[..., 5].isnan().all()
        assert out[..., :5].isfinite().all()


def test_another_name_is_refused() -> None:
    before = cpu.instructions()
    assert cpu.library().prefixattn_use_instructions(b"avx1024") == 2
    assert cpu.instructions() == before
