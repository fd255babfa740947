"""What must hold for any problem, whatever computes it."""

from __future__ import annotations

import pytest
import torch

from prefixattn import prefix_attention
from prefixattn.philox import keep_mask, random_words
from prefixattn.problem import SCHEMA_TYPES, Problem, schema_arguments
from prefixattn.testing import Case, make_inputs, widest

IMPLEMENTATIONS = ("reference", "sdpa", "cpu", pytest.param("triton", marks=pytest.mark.triton))
pytestmark = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def test_weights_sum_to_one(implementation: str) -> None:
    inputs = make_inputs(
        Case("ones", starts=(0, 3), window=3), widest(implementation), poison=False
    )
    for name in ("value", "prefix_value"):
        inputs[name] = torch.ones_like(inputs[name])
    out = prefix_attention(**inputs, implementation=implementation)
    torch.testing.assert_close(out, torch.ones_like(out))


def test_weights_sum_to_one_under_a_mask_of_huge_numbers(implementation: str) -> None:
    """What -1e9 or finfo.min hides from all alike is seen by all alike: no `-inf`, no blind row."""
    inputs = make_inputs(Case("huge", P=0, causal=False), torch.float32)
    inputs["value"] = torch.ones_like(inputs["value"])
    for softcap in (None, 9.0):
        for depth in (-1e9, torch.finfo(torch.float32).min):
            mask = torch.full((7,), depth)
            arguments = inputs | {"attn_mask": mask, "softcap": softcap}
            out = prefix_attention(**arguments, implementation=implementation)
            torch.testing.assert_close(out, torch.ones_like(out))


def test_packed_equals_separate(implementation: str) -> None:
    segments = ((4, 6), (3, 3), (1, 5))
    case = Case("packed", B=1, M=8, N=14, P=4, R=3, index=(2, -1, 0), segments=segments)
    inputs = make_inputs(case, widest(implementation))
    packed = prefix_attention(**inputs, implementation=implementation)
    q0 = k0 = 0
    for s, (queries, keys) in enumerate(segments):
        alone = inputs | {
            "query": inputs["query"][:, :, q0 : q0 + queries],
            "key": inputs["key"][:, :, k0 : k0 + keys],
            "value": inputs["value"][:, :, k0 : k0 + keys],
            "prefix_index": inputs["prefix_index"][s : s + 1],
            "cu_seqlens_q": None,
            "cu_seqlens_k": None,
        }
        separate = prefix_attention(**alone, implementation=implementation)
        torch.testing.assert_close(packed[:, :, q0 : q0 + queries], separate)
        q0, k0 = q0 + queries, k0 + keys


def test_a_prefix_is_a_sequence_that_causality_spares(implementation: str) -> None:
    """Concatenating the prefix to the keys, bottom-right, gives the same."""
    inputs = make_inputs(Case("concat", B=2, M=6, N=6, P=4), widest(implementation))
    split = prefix_attention(**inputs, implementation=implementation)
    for name in ("key", "value"):
        prefix = inputs[f"prefix_{name}"]
        inputs[name] = torch.cat([prefix.expand(2, -1, -1, -1), inputs[name]], dim=2)
        inputs[f"prefix_{name}"] = prefix[:, :, :0]
    whole = prefix_attention(**inputs, implementation=implementation)
    torch.testing.assert_close(split, whole)


def test_the_order_of_prefix_tokens_is_nothing(implementation: str) -> None:
    inputs = make_inputs(Case("order", P=9), widest(implementation))
    before = prefix_attention(**inputs, implementation=implementation)
    order = torch.randperm(9)
    for name in ("prefix_key", "prefix_value"):
        inputs[name] = inputs[name][:, :, order]
    torch.testing.assert_close(prefix_attention(**inputs, implementation=implementation), before)


def test_left_padding_changes_nothing(implementation: str) -> None:
    """The same text after pads: same outputs, windows and positions included."""
    case = Case("unpadded", B=1, M=6, N=6, window=3, positions=True, alibi=True)
    plain = make_inputs(case, widest(implementation))
    padded = dict(plain)
    for name in ("query", "key", "value"):
        pads = torch.full_like(plain[name][:, :, :2], 0.0 if name == "query" else torch.nan)
        padded[name] = torch.cat([pads, plain[name]], dim=2)
    padded["key_start"] = torch.tensor([2])
    out = prefix_attention(**padded, implementation=implementation)[:, :, 2:]
    torch.testing.assert_close(out, prefix_attention(**plain, implementation=implementation))


def test_dropout_keeps_the_mean_and_follows_the_generator(implementation: str) -> None:
    case = Case("dropout", B=2, H=4, M=48, N=48, P=48, D=8, causal=False)
    inputs = make_inputs(case, torch.float32)
    for name in ("value", "prefix_value"):
        inputs[name] = torch.ones_like(inputs[name])
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        runs.append(prefix_attention(**inputs, dropout_p=0.25, implementation=implementation))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert runs[0].mean().item() == pytest.approx(1.0, abs=0.01)


def test_random_words_are_philox(implementation: str) -> None:
    """The published known-answer vectors of Philox4x32-10 (Random123, kat_vectors), first word."""
    zero = torch.zeros(1, dtype=torch.int64)
    assert (
        random_words(torch.zeros(2, dtype=torch.int64), zero, zero, zero, zero).item() == 0x6627E8D5
    )
    ones = torch.full((1,), 0xFFFFFFFF)
    seed = torch.tensor([-1, 0])
    assert random_words(seed, ones, ones, ones, ones).item() == 0x408F276D
    words = random_words(torch.tensor([5, 0]), *(torch.arange(n) for n in (2, 3, 50, 70)))
    assert keep_mask(words, 0.3).float().mean().item() == pytest.approx(0.7, abs=0.01)


def test_the_schema_is_the_problem(implementation: str) -> None:
    listed = [argument.split(" ")[1] for argument in schema_arguments().split(", ")]
    assert listed == list(Problem.__dataclass_fields__)
    assert {argument.split(" ")[0] for argument in schema_arguments().split(", ")} <= set(
        SCHEMA_TYPES.values()
    )
