"""A number is a number from whatever library: taken as Python's own, or refused in words."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from prefixattn import (
    ExternalPrefix,
    GatedPrefix,
    Prefix,
    PrefixBank,
    ProjectedPrefix,
    move_prefix,
    prefix_attention,
)
from prefixattn.distill import top_k_targets
from prefixattn.layers import LayerShape
from prefixattn.testing import Case, make_inputs

# Every number that `prefix_attention` takes, in NumPy's words and in Python's.
ALIKE: dict[str, tuple[Any, Any]] = {
    "is_causal": (np.bool_(False), False),
    "query_offset": (np.int32(1), 1),
    "scale": (np.float32(0.25), 0.25),
    "window": (np.int64(3), 3),
    "softcap": (np.float16(5), 5.0),
    "dropout_p": (np.float64(0), 0.0),
    "return_lse": (np.bool_(True), True),
    "implementation": (np.str_("sdpa"), "sdpa"),
    "prefix_in_window": (np.str_("positions"), "positions"),
    "deterministic": (np.bool_(True), True),
    "an integer as scale": (np.uint8(1), 1),
}


def run(**arguments: Any) -> list[torch.Tensor]:
    """The outputs and one gradient."""
    inputs = make_inputs(Case("scalars"), torch.float32) | {"implementation": "sdpa"} | arguments
    leaf = inputs["prefix_key"].requires_grad_()
    found = prefix_attention(**inputs)
    outputs = list(found) if isinstance(found, tuple) else [found]
    return [*outputs, *torch.autograd.grad(outputs[0].sum(), leaf)]


@pytest.mark.parametrize("name", ALIKE)
def test_numpy_scalars_are_numbers(name: str) -> None:
    argument = "scale" if name.startswith("an ") else name
    seed = torch.get_rng_state()
    found = run(**{argument: ALIKE[name][0]})
    torch.set_rng_state(seed)
    expected = run(**{argument: ALIKE[name][1]})
    assert len(found) == len(expected)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


PACKED = Case("packed", B=1, M=5, N=5, segments=((2, 2), (3, 3)))


def test_numpy_scalars_are_lengths_of_segments() -> None:
    inputs = make_inputs(PACKED, torch.float32)
    expected = prefix_attention(**inputs, max_seqlen_q=3, max_seqlen_k=3)
    longest = {"max_seqlen_q": np.int64(3), "max_seqlen_k": np.uint16(3)}
    found = prefix_attention(**inputs, **longest)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"window": np.float32(3)}, "window: expected an int or None, got float"),
        ({"window": np.bool_(True)}, "window: expected an int or None, got bool"),
        ({"window": np.array(3)}, "window: .* got ndarray (pass the number: .item())"),
        ({"window": torch.tensor(3)}, "window: .* got Tensor (pass the number: .item())"),
        ({"scale": torch.tensor(0.5)}, "scale: .* got Tensor (pass the number: .item())"),
        ({"softcap": torch.tensor(5.0)}, "softcap: .* got Tensor (pass the number"),
        ({"dropout_p": torch.tensor(0.0)}, "dropout_p: .* got Tensor (pass the number"),
        ({"is_causal": np.int64(1)}, "is_causal: expected a bool, got int"),
        ({"is_causal": torch.tensor(True)}, "is_causal: .* got Tensor (pass the number"),
        ({"return_lse": torch.tensor(True)}, "return_lse: .* got Tensor (pass the number"),
        ({"deterministic": np.array(True)}, "deterministic: .* got ndarray (pass the number"),
        ({"query_offset": np.array(1)}, "query_offset: .* got ndarray (pass the number"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_tensors_and_other_kinds_of_numbers_are_refused(
    argument: dict[str, Any], message: str
) -> None:
    pattern = message.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(TypeError, match=pattern):
        run(**argument)


@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
def test_sizes_that_export_follows_are_numbers(strict: bool) -> None:
    """Without `strict` they are `torch.SymInt` and `torch.SymBool`, no int and no bool."""

    class Cached(torch.nn.Module):
        def forward(self, query: torch.Tensor, key: torch.Tensor, prefix: torch.Tensor) -> Any:
            length = key.shape[2]
            return prefix_attention(
                *(query, key, key, prefix, prefix),
                is_causal=query.shape[2] > 1,
                query_offset=length - query.shape[2],
                window=length,
            )

    key_length = torch.export.Dim("N", min=4, max=64)
    sizes = ((1, 2, 3, 8), (1, 2, 9, 8), (1, 2, 3, 8))
    program = torch.export.export(
        Cached(),
        tuple(torch.randn(size) for size in sizes),
        dynamic_shapes=(None, {2: key_length}, None),
        strict=strict,
    )
    other = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 17, 8), torch.randn(1, 2, 3, 8)
    torch.testing.assert_close(program.module()(*other), Cached()(*other))


@pytest.fixture(scope="module")
def llama() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    config = transformers.LlamaConfig(vocab_size=97, num_attention_heads=4, **sizes)
    return transformers.LlamaForCausalLM(config).eval()


SHAPES = [LayerShape(4, 8, 8)] * 2
TWO = {"layers": [0, 2], "num_layers": 3}
NUMPY_TWO = {"layers": np.array([0, 2]), "num_layers": np.int64(3)}


def tensors(count: int = 2) -> list[torch.Tensor]:
    return [torch.randn(4, 5, 8) for _ in range(count)]


# What makes a prefix, and its numbers in Python's words and in NumPy's.
MADE: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]] = {
    "Prefix": (
        lambda model, **options: Prefix(tensors(), tensors(), **options),
        {"num_frozen_tokens": 2, "dropout": 0.5, **TWO},
        {"num_frozen_tokens": np.int64(2), "dropout": np.float32(0.5), **NUMPY_TWO},
    ),
    "GatedPrefix": (
        lambda model, **options: GatedPrefix(tensors(), tensors(), [torch.ones(4)] * 2, **options),
        {"dropout": 0.5, **TWO},
        {"dropout": np.float16(0.5), **NUMPY_TWO},
    ),
    "GatedPrefix.gated": (
        lambda model, **options: GatedPrefix.gated(Prefix(tensors(), tensors()), **options),
        {"num_heads": [4, 8]},
        {"num_heads": np.array([4, 8])},
    ),
    "ProjectedPrefix": (
        lambda model, shapes, **options: ProjectedPrefix(shapes, **options),
        {"shapes": SHAPES, "num_tokens": 5, "embedding_dim": 6, "hidden_dim": 7, "dropout": 0.5},
        {
            "shapes": np.array(SHAPES),
            "num_tokens": np.int64(5),
            "embedding_dim": np.uint8(6),
            "hidden_dim": np.int32(7),
            "dropout": np.float32(0.5),
        },
    ),
    "ExternalPrefix": (
        lambda model, shapes, **options: ExternalPrefix(shapes, **options),
        {"shapes": SHAPES, "num_tokens": 5, **TWO},
        {"shapes": np.array(SHAPES), "num_tokens": np.int64(5), **NUMPY_TWO},
    ),
    "Prefix.random": (
        Prefix.random,
        {"num_tokens": 5, "std": 0.5, "layers": [0, 2], "num_frozen_tokens": 1},
        {
            "num_tokens": np.int64(5),
            "std": np.float32(0.5),
            "layers": np.array([0, 2]),
            "num_frozen_tokens": np.int8(1),
        },
    ),
    "Prefix.from_text": (
        lambda model, **options: Prefix.from_text(model, torch.arange(5, 15), **options),
        {"num_tokens": 5, "layers": [1]},
        {"num_tokens": np.int64(5), "layers": (np.int64(1),)},
    ),
    "Prefix.from_random_text": (
        Prefix.from_random_text,
        {"num_tokens": 5},
        {"num_tokens": np.int64(5)},
    ),
    "ProjectedPrefix.for_model": (
        ProjectedPrefix.for_model,
        {"num_tokens": 5, "embedding_dim": 6, "hidden_dim": 7},
        {"num_tokens": np.int64(5), "embedding_dim": np.int64(6), "hidden_dim": np.int64(7)},
    ),
    "PrefixBank": (
        lambda model, **options: PrefixBank([Prefix(tensors(), tensors())], **options),
        {"capacity": 3, "budget_bytes": 10**6},
        {"capacity": np.int64(3), "budget_bytes": np.int64(10**6)},
    ),
    "move_prefix": (
        lambda model, by: move_prefix(Prefix(tensors(3), tensors(3)), model, by),
        {"by": 4},
        {"by": np.int64(4)},
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_prefixes_are_made_with_numpy_scalars(name: str, llama: Any, tmp_path: Path) -> None:
    make, python, numpy = MADE[name]
    found = []
    for numbers in (python, numpy):
        torch.manual_seed(0)
        found.append(make(llama, **numbers))
    states = [{name: x.clone() for name, x in each.state_dict().items()} for each in found]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert repr(found[0]) == repr(found[1])
    if isinstance(found[1], Prefix):  # JSON has no numbers of NumPy
        found[1].save_pretrained(tmp_path)
        assert repr(Prefix.from_pretrained(tmp_path)) == repr(found[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frozen_tokens": np.float32(1)}, "num_frozen_tokens must be in"),
        ({"num_frozen_tokens": torch.tensor(1)}, "num_frozen_tokens must be in"),
        ({"dropout": torch.tensor(0.5)}, "dropout must be in"),
        ({"dropout": np.bool_(False)}, "dropout must be in"),
        ({"dropout": "0.5"}, "dropout must be in"),
        ({"layers": np.array([0.0, 1.0]), "num_layers": 3}, "layers must be increasing integers"),
        ({"layers": torch.tensor([0, 1]), "num_layers": 3}, "layers must be increasing integers"),
        ({"layers": [0, 1], "num_layers": np.float64(3)}, "num_layers must be a positive integer"),
        ({"num_layers": torch.tensor(2)}, "num_layers must be a positive integer"),
    ],
)
def test_other_kinds_of_numbers_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Prefix(tensors(), tensors(), **options)


def test_shapes_that_are_none_are_refused() -> None:
    for shape, message in (((4, 8), "shapes[0] must be (num_heads"), ((4, 8, 0.5), "value_dim")):
        with pytest.raises(ValueError, match=re.escape(message)):
            ExternalPrefix([shape], 5)  # type: ignore[list-item]


def test_a_standard_deviation_that_is_none_is_refused(llama: Any) -> None:
    for std in ("1", float("nan"), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="std must be at least 0"):
            Prefix.random(llama, 5, std)  # type: ignore[arg-type]


def test_the_likeliest_tokens_are_counted_by_numpy() -> None:
    logits = torch.randn(2, 9)
    found, expected = top_k_targets(logits, np.int64(3)), top_k_targets(logits, 3)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


ROWS = {
    "an array": np.array([1, 0, -1]),
    "a tensor": torch.tensor([1, 0, -1]),
    "numpy scalars": [np.int64(1), np.uint8(0), np.int8(-1)],
    "tensors of one number": [torch.tensor(1), torch.tensor(0), torch.tensor(-1)],
    "arrays of one number": [np.array(1), np.array(0), np.array(-1)],
    "names": np.array(["1", "0", "-1"], dtype=object),
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_rows_of_a_bank(rows: Any) -> None:
    bank = PrefixBank([Prefix(tensors(), tensors()) for _ in range(2)])
    if isinstance(rows[0], str):
        rows = [None if name == "-1" else np.str_(name) for name in rows]
    with torch.no_grad(), bank.use([1, 0, -1]):
        expected = bank.batch()
        with bank.use(rows):
            found = bank.batch()
    assert torch.equal(found.index, expected.index)


@pytest.mark.parametrize(
    "row",
    [
        *(np.bool_(True), np.float32(1), torch.tensor(True), torch.tensor(1.0), np.array(True)),
        *(torch.tensor([0, 1]), np.array([0, 1])),
    ],
    ids=repr,
)
def test_rows_that_name_no_member_are_refused(row: Any) -> None:
    bank = PrefixBank([Prefix(tensors(), tensors()) for _ in range(2)])
    with pytest.raises(TypeError, match="a bank member must be given by place or name, got"):
        bank.use([row])
