"""Every provider computes the same numbers, or says why it cannot."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from prefixattn import prefix_attention
from prefixattn.bench import providers, verify
from prefixattn.bench.inputs import Tensors, make_tensors
from prefixattn.bench.providers import FLOOR, PROVIDERS
from prefixattn.bench.shapes import Case, Shape
from prefixattn.bench.support import Attention, Unsupported
from prefixattn.bench.verify import Oracle
from prefixattn.bench.work import flops, least_bytes

OURS = {"ours-cpu", "ours-sdpa", "ours-reference"}
CAT = {"transformers", "cat+math", "cat+flash", "cat+flex"}
PROMPT = {"B": 3, "M": 5, "P": 4}
DECODE = {"B": 8, "M": 1, "C": 9, "P": 4}
# The letters of a case, and what a CPU times of it.
CASES = {
    "a prompt": (PROMPT, OURS | CAT | {"copied+sdpa", "merge", FLOOR}),
    "one token over a cache": (DECODE, OURS | CAT | {"copied+sdpa", "merge", FLOOR}),
    "a few tokens over a cache": (DECODE | {"M": 3}, OURS | CAT | {"copied+sdpa", FLOOR}),
    "two prefixes": (DECODE | {"R": 2}, OURS | CAT | {"copied+sdpa", "merge", FLOOR}),
    "a softcap": (PROMPT | {"model": "capped"}, OURS | {"transformers", "cat+flex", FLOOR}),
    "training": (PROMPT | {"passes": "fwd+bwd"}, OURS | CAT - {"cat+flex"} | {FLOOR}),
    "training, two prefixes": (
        PROMPT | {"R": 2, "passes": "fwd+bwd"},
        OURS | CAT - {"cat+flex"} | {FLOOR},
    ),
}


def make_case(passes: str = "fwd", model: str = "tiny", **letters: Any) -> Case:
    return Case("", Shape(model, **letters), passes)


@pytest.mark.usefixtures("quick_flex")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("letters", "wanted"), CASES.values(), ids=CASES.keys())
def test_what_runs_is_right_and_the_rest_says_why(
    letters: dict[str, Any], wanted: set[str]
) -> None:
    case = make_case(**letters)
    tensors = make_tensors(case, "cpu")
    right, reasons = set(), {}
    for name, provider in PROVIDERS.items():
        try:
            fault = Oracle(case, tensors, name != FLOOR).fault(
                provider(case.shape, tensors, case.passes)
            )
        except Unsupported as reason:
            reasons[name] = str(reason)
            continue
        assert fault == "", name
        right.add(name)
    assert right == wanted
    assert all(reasons.values())


def wrong_scale(t: Tensors, right: Attention) -> Attention:
    """As if the scale were 1 % off."""
    query = t.query.detach().clone()

    def run() -> Tensor:
        with torch.no_grad():
            t.query.mul_(1.01)
            try:
                return right()
            finally:
                t.query.copy_(query)

    return run


def wrong_gradient(t: Tensors, right: Attention) -> Attention:
    """Right values, and twice the gradient of everything."""

    def run() -> Tensor:
        out = right()
        return 2 * out - out.detach()

    return run


def wrong_last_row(t: Tensors, right: Attention) -> Attention:
    """Only the last head of the last row is off."""

    def run() -> Tensor:
        out = right().clone()
        out[-1, -1] *= 1.01
        return out

    return run


def wrong_gain(t: Tensors, right: Attention) -> Attention:
    """Everything is 1 % too large."""
    return lambda: right() * 1.01


def wrong_gradients_gain(t: Tensors, right: Attention) -> Attention:
    """Right values, and gradients that are 1 % too large."""

    def run() -> Tensor:
        out = right()
        return (1.01 * out.float() - 0.01 * out.detach().float()).to(out)

    return run


def without(lost: str) -> Callable[[Tensors, Attention], Attention]:
    """One call of `ours` on tensors that lack something at an edge, with its gradients."""

    def corrupt(t: Tensors, right: Attention) -> Attention:
        sides = {"key": ("key", "value"), "token": ("prefix_key", "prefix_value")}
        part, place = {
            "first token": ("token", slice(1)),
            "last token": ("token", slice(-1, None)),
            "block": ("token", slice(500, 532)),
            "oldest key": ("key", slice(1)),
            "own key": ("key", slice(-1, None)),
        }[lost]
        given = dict(t.leaves)
        for name in sides[part]:
            kept = torch.ones(given[name].shape[2], dtype=torch.bool)
            kept[place] = False
            given[name] = given[name][:, :, kept]
        return lambda: prefix_attention(**given, prefix_index=t.index, is_causal=lost != "own key")

    return corrupt


def no_softcap(t: Tensors, right: Attention) -> Attention:
    """The scores as they are."""
    return lambda: prefix_attention(**t.leaves, prefix_index=t.index, is_causal=True)


def no_gradient_of_the_last_key(t: Tensors, right: Attention) -> Attention:
    """Right values, and zeros for what only the last query sees."""

    def run() -> Tensor:
        t.leaves["value"].register_hook(lambda grad: zeroed(grad))
        return right()

    def zeroed(grad: Tensor) -> Tensor:
        grad = grad.clone()
        grad[:, :, -1] = 0
        return grad

    return run


LONG = {"B": 8, "M": 1, "C": 255, "P": 512, "dtype": "bfloat16"}
HALF = {"B": 8, "M": 1, "C": 40, "P": 20, "dtype": "bfloat16"}
TRAINING = PROMPT | {"B": 8, "passes": "fwd+bwd"}
FAULTS = {
    "a scale": (DECODE, wrong_scale, "ours-cpu", "budget"),
    "a scale, of the floor": (DECODE, wrong_scale, FLOOR, "budget"),
    "a gradient": (TRAINING, wrong_gradient, "ours-cpu", "budget"),
    "one head of one row": (DECODE, wrong_last_row, "cat+flash", "budget"),
    "a scale, below bfloat16's rounding": (HALF, wrong_scale, "ours-cpu", "as if the scale were"),
    "a gain of everything, below it too": (HALF, wrong_gain, "ours-cpu", "out: .* too large"),
    "a gain of the gradients alone": (
        HALF | {"passes": "fwd+bwd", "C": 0, "M": 9},
        wrong_gradients_gain,
        "ours-cpu",
        "dkey: .* too large",
    ),
    # In bfloat16 each of these is less than rounding in every number.
    "a prefix that lacks its first token": (
        LONG,
        without("first token"),
        "ours-cpu",
        "the prefix's first token",
    ),
    "a prefix that lacks its last": (LONG, without("last token"), "ours-cpu", "last token"),
    "a prefix that lacks 32 of 2,048": (
        LONG | {"P": 2048},
        without("block"),
        "ours-cpu",
        "mean square",
    ),
    "the oldest key": (LONG, without("oldest key"), "ours-cpu", "saw the first key"),
    "a query's own key": (LONG, without("own key"), "ours-cpu", "its own key"),
    "a softcap": (LONG | {"model": "capped"}, no_softcap, "ours-cpu", "no softcap"),
    "the last key's gradient": (
        TRAINING | {"M": 64, "P": 128, "dtype": "bfloat16"},
        no_gradient_of_the_last_key,
        "ours-cpu",
        "dvalue: as if token 63",
    ),
}


@pytest.mark.parametrize("largest", [verify.LARGEST, 100], ids=["whole", "a part"])
@pytest.mark.parametrize(
    ("letters", "corrupt", "name", "words"), FAULTS.values(), ids=FAULTS.keys()
)
def test_a_fault_is_found(
    letters: dict[str, Any],
    corrupt: Callable[[Tensors, Attention], Attention],
    name: str,
    words: str,
    largest: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(verify, "LARGEST", largest)
    case = make_case(**letters)
    tensors = make_tensors(case, "cpu")
    oracle = Oracle(case, tensors, name != FLOOR)
    assert (len(oracle.parts) == 1) == (largest > 100)
    call = PROVIDERS[name](case.shape, tensors, case.passes)
    assert oracle.fault(call) == ""
    assert re.search(words, oracle.fault(corrupt(tensors, call)))


def test_every_row_and_head_of_a_large_case_is_in_one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    for largest in (1, 100, 300, 2**25):
        monkeypatch.setattr(verify, "LARGEST", largest)
        case = make_case(**TRAINING)
        pairs = [(r, h) for rows, heads in verify._parts(case) for r in rows for h in heads]
        assert sorted(pairs) == list(product(range(case.shape.B), range(case.shape.H_kv)))


@pytest.mark.parametrize("name", ["ours-reference", "ours-sdpa"])
def test_the_operations_own_default_of_the_scale_is_checked(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefixattn import api

    case = make_case(**TRAINING)
    tensors = make_tensors(case, "cpu")
    right = api.make_problem

    def wrong(*given: Any, **options: Any) -> Any:
        if options.get("scale") is None:
            options["scale"] = 1.3 * options["query"].shape[-1] ** -0.5
        return right(*given, **options)

    call = PROVIDERS[name](case.shape, tensors, case.passes)
    assert Oracle(case, tensors).fault(call) == ""
    monkeypatch.setattr(api, "make_problem", wrong)
    monkeypatch.setattr(verify, "make_problem", wrong)
    oracle = Oracle(case, tensors)
    assert "as if the scale were" in oracle.fault(call)
    peer = PROVIDERS["cat+flash"](case.shape, tensors, case.passes)
    assert oracle.fault(peer) == ""


def test_a_prefix_gradient_that_misses_a_row_is_found_in_a_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(verify, "LARGEST", 300)
    case = make_case(**TRAINING)
    tensors = make_tensors(case, "cpu")
    oracle = Oracle(case, tensors)
    right = PROVIDERS["cat+flash"](case.shape, tensors, "fwd+bwd")
    assert len(oracle.parts) > 1
    assert oracle.fault(right) == ""

    def run() -> Tensor:
        out = right()
        with torch.no_grad():
            values = out[0].clone()
        return torch.cat([values[None], out[1:]])  # no gradient comes from row 0

    assert "dprefix_key" in oracle.fault(run)


def test_scores_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefixattn.bench.machine.free_memory", lambda device: 1000)
    case = make_case(**DECODE)
    with pytest.raises(Unsupported, match="materialises scores"):
        PROVIDERS["ours-reference"](case.shape, make_tensors(case, "cpu"), "fwd")


def test_an_implementation_that_is_missing_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise NotImplementedError("no compiler")

    monkeypatch.setattr(providers, "choose", missing)
    case = make_case(**DECODE)
    with pytest.raises(Unsupported, match="no compiler"):
        PROVIDERS["ours-cpu"](case.shape, make_tensors(case, "cpu"), "fwd")


def installed(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    """A module of that name, and a GPU for it: what is tested is how we call it."""
    module = ModuleType(name)
    module.__dict__.update(contents)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("prefixattn.bench.outside.need_gpu", lambda t, package: None)


def test_flash_attention_is_called_as_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    def flash_attn_func(
        query: Tensor, key: Tensor, value: Tensor, causal: bool, softcap: float
    ) -> Tensor:
        """Tokens before heads, causal from the bottom right."""
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        empty = key[:, :, :0]
        from prefixattn import prefix_attention

        out = prefix_attention(query, key, value, empty, empty, is_causal=causal)
        assert isinstance(out, Tensor)
        return out.transpose(1, 2)

    installed(monkeypatch, "flash_attn", flash_attn_func=flash_attn_func)
    for case in (make_case(**DECODE), make_case(**TRAINING)):
        tensors = make_tensors(case, "cpu")
        call = PROVIDERS["flash-attn"](case.shape, tensors, case.passes)
        assert Oracle(case, tensors).fault(call) == ""


def test_the_work_of_a_case() -> None:
    # Two rows of three queries over two cached keys, five prefix tokens; 4 heads of 16.
    case = make_case(B=2, M=3, C=2, P=5, dtype="bfloat16")
    visible = 3 * (2 + 5) + (1 + 2 + 3)
    assert flops(case) == 4 * 2 * 4 * 16 * visible
    assert flops(case, with_prefix=False) == 4 * 2 * 4 * 16 * (visible - 15)
    queries, keys, prefix = 2 * 2 * 4 * 3 * 16, 2 * 2 * 2 * 5 * 16, 2 * 2 * 5 * 16
    assert least_bytes(case) == 2 * (queries + keys + prefix)
    training = replace(case, passes="fwd+bwd")
    assert flops(training) == 3.5 * flops(case)
    assert least_bytes(training) == 3 * least_bytes(case)
