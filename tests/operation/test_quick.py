"""The short way of plain calls: the operator's own bits, and never where the operator is needed."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from patience import PATIENCE

from prefixattn import prefix_attention, quick
from prefixattn.api import Repeated

SIZES = {
    "causal": (2, 4, 2, 5, 7, 3, 8),
    "one": (1, 1, 1, 1, 1, 1, 1),
    "empty": (2, 4, 4, 3, 0, 0, 8),
}


@pytest.fixture(autouse=True)
def forgotten() -> None:
    quick.forget()


def tensors(name: str = "causal", dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    b, h, h_kv, m, n, p, d = SIZES[name]
    sizes = ((b, m, h, d), (b, n, h_kv, d), (b, n, h_kv, d), (1, p, h_kv, d), (1, p, h_kv, d))
    return tuple(torch.randn(size).to(dtype).transpose(1, 2) for size in sizes)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows by one with every call that goes through the operator."""
    calls: list[object] = []
    attention = prefix_attention.__globals__["attention"]
    monkeypatch.setitem(
        prefix_attention.__globals__,
        "attention",
        lambda *args: calls.append(args) or attention(*args),
    )
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", SIZES)
def test_it_gives_the_operators_bits(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = tensors(name, dtype)
    calls = counted(monkeypatch)
    for options in ({}, {"is_causal": True}, {"scale": -0.5}):
        for _ in range(2):  # the second call is the prepared one
            out, lse = prefix_attention(*inputs, return_lse=True, **options)
        assert not calls
        same, same_lse = prefix_attention(*inputs, return_lse=True, deterministic=False, **options)
        assert len(calls) == 1
        calls.clear()
        assert torch.equal(out, same)
        assert torch.equal(lse, same_lse)
        assert (out.stride(), lse.stride()) == (same.stride(), same_lse.stride())
        assert torch.equal(prefix_attention(*inputs, **options), out)


class Tagged(torch.Tensor):
    """A subclass, whose own functions have to be called."""


def _grad() -> dict[str, Any]:
    return {"key": tensors()[1].requires_grad_()}


NEEDS_THE_OPERATOR = {
    "a-gradient": _grad,
    "a-subclass": lambda: {"query": tensors()[0].as_subclass(Tagged)},
    "a-feature": lambda: {"softcap": 2.0},
    "another-implementation": lambda: {"implementation": "sdpa"},
}


@pytest.mark.parametrize("name", NEEDS_THE_OPERATOR)
def test_what_needs_the_operator_gets_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("query", "key", "value", "prefix_key", "prefix_value")
    calls = counted(monkeypatch)
    prefix_attention(**dict(zip(names, tensors(), strict=True)))
    assert not calls
    prefix_attention(**(dict(zip(names, tensors(), strict=True)) | NEEDS_THE_OPERATOR[name]()))
    assert len(calls) == 1


def test_contexts_that_watch_operators_see_one(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = tensors()
    calls = counted(monkeypatch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert prefix_attention(*inputs).dtype == torch.bfloat16
    with torch.profiler.profile() as profile:
        prefix_attention(*inputs)
    assert any("prefixattn::attention" in event.name for event in profile.events())
    assert len(calls) == 2
    with torch.no_grad():
        prefix_attention(inputs[0].requires_grad_(), *inputs[1:])
    assert len(calls) == 2


WRONG = (
    ({"is_causal": 1}, TypeError, "is_causal: expected a bool"),
    ({"scale": True}, TypeError, "scale: expected a number"),
    ({"scale": float("nan")}, ValueError, "scale: expected a finite number"),
    ({"return_lse": 1}, TypeError, "return_lse: expected a bool"),
    ({"implementation": "CPU"}, ValueError, "implementation: expected"),
    ({"dropout_p": False}, TypeError, "dropout_p: expected a number"),
    ({"prefix_in_window": "never"}, ValueError, "prefix_in_window: expected"),
    ({"prefix_key": torch.randn(1, 3, 3, 8)}, ValueError, "prefix_key: expected shape"),
    ({"value": torch.randn(2, 2, 7, 8).half()}, TypeError, "value: expected a tensor of float32"),
)


@pytest.mark.parametrize(
    ("change", "error", "message"), WRONG, ids=lambda x: x if isinstance(x, str) else ""
)
def test_wrong_input_raises_though_its_like_was_prepared(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    names = ("query", "key", "value", "prefix_key", "prefix_value")
    inputs = dict(zip(names, tensors(), strict=True))
    for right in ({}, {"is_causal": True}, {"scale": 1.0}, {"return_lse": True}):
        prefix_attention(**inputs, **right)
    with pytest.raises(error, match=message):
        prefix_attention(**(inputs | change))


def test_threads_share_what_is_prepared() -> None:
    """Each call has a record of its own."""
    batches = [tensors() for _ in range(8)]
    expected = [prefix_attention(*inputs) for inputs in batches]
    wrong = []

    def work(number: int) -> None:
        for _ in range(200):
            if not torch.equal(prefix_attention(*batches[number]), expected[number]):
                wrong.append(number)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(len(batches))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(PATIENCE)
    assert not wrong


def test_one_query_is_prepared_once_for_every_number_of_keys() -> None:
    """Decoding: the cache grows, and what lies in it is strided as it may be."""
    query, prefix = torch.randn(2, 4, 1, 8), torch.randn(1, 2, 3, 8)
    room = torch.randn(2, 2, 40, 8)
    for length in (1, 2, 9, 40):
        for keys in (room[:, :, :length], room[:, :, :length].clone()):
            inputs = (query, keys, keys.flip(2), prefix, prefix)
            found = prefix_attention(*inputs, is_causal=True)
            same = prefix_attention(*inputs, is_causal=True, deterministic=False)
            assert torch.equal(found, same)
    assert len(quick._runs) == 1
    prefix_attention(query, room[:, :, :0], room[:, :, :0], prefix, prefix, is_causal=True)
    with pytest.raises(ValueError, match="value"):
        prefix_attention(query, room, room[:, :, 1:], prefix, prefix, is_causal=True)
    with pytest.raises(ValueError, match="contiguous last dimension"):
        prefix_attention(query, room, room.mT.contiguous().mT, prefix, prefix, is_causal=True)


def test_repeated_calls_follow_the_rows_that_read_a_prefix() -> None:
    """What is prepared for one choice of entries is not used for another, nor for a changed one."""
    repeated = Repeated()
    query, keys, bank = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 6, 8), torch.randn(3, 2, 3, 8)
    index = torch.tensor([0, -1])
    with torch.no_grad():
        for change in ([2, 1], [-1, -1], None, [0, 2]):
            if change is None:
                index = torch.tensor([1, 0])
            else:
                index[:] = torch.tensor(change)
            for length in (3, 6):
                half = keys[:, :, :length]
                inputs = (query, half, half, bank, bank)
                found = repeated(*inputs, prefix_index=index, is_causal=True)
                expected = prefix_attention(*inputs, prefix_index=index, is_causal=True)
                assert torch.equal(found, expected)
        index[0] = 3
        with pytest.raises(ValueError, match="prefix_index"):
            repeated(query, keys, keys, bank, bank, prefix_index=index, is_causal=True)


@torch.no_grad()
def test_what_a_forwards_layers_repeat_follows_every_change() -> None:
    """The last call is made again only where nothing but numbers and addresses are new."""
    repeated = Repeated()
    room = torch.randn(2, 2, 9, 8)
    calls: list[tuple[Any, ...]] = []
    for length in (6, 6, 9):
        for keys in (room[:, :, :length], room[:, :, :length].clone()):
            for queries in (1, 3):
                for prefix in (torch.randn(1, 2, 3, 8), torch.randn(1, 2, 4, 8)):
                    query = torch.randn(2, queries, 4, 8).transpose(1, 2)
                    calls.append((query, keys, keys.flip(1), prefix, prefix))
    for tensors in calls:
        for causal, scale in ((True, None), (True, 0.5), (False, 0.5)):
            for inputs in (tensors, tuple(x.bfloat16() for x in tensors)):
                found = repeated.plainly(*inputs, causal, scale, "auto")
                options: dict[str, Any] = {"is_causal": causal, "scale": scale}
                assert torch.equal(found, prefix_attention(*inputs, **options))
    negative = (calls[0][0], *(torch._neg_view(x) for x in calls[0][1:3]), *calls[0][3:])
    repeated.plainly(*calls[0], True, None, "auto")
    found = repeated.plainly(*negative, True, None, "auto")
    assert torch.equal(found, prefix_attention(*negative, is_causal=True))


def test_it_does_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick, "MOST", 3)
    for length in range(1, 9):
        query = torch.randn(1, 1, length, 4)
        prefix_attention(query, query, query, query[:, :, :0], query[:, :, :0])
        assert len(quick._runs) <= 3
