"""Prefixes by themselves: what they accept, what trains, how they start."""

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers

from prefixattn import kept
from prefixattn.initialise import start_from_text
from prefixattn.layers import LayerShape, split_layers
from prefixattn.prefix import Prefix
from prefixattn.projected import ProjectedPrefix

P = 5
SHAPES = [LayerShape(2, 8, 8), LayerShape(3, 4, 6)]  # layers may differ


def some_prefix(**options: Any) -> Prefix:
    return Prefix(
        [torch.randn(s.num_heads, P, s.key_dim) for s in SHAPES],
        [torch.randn(s.num_heads, P, s.value_dim) for s in SHAPES],
        **options,
    )


@pytest.fixture
def llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config).double().eval()


def same(one: Prefix, other: Prefix) -> bool:
    return all(same_pair(left, right) for left, right in zip(one(), other(), strict=True))


def same_pair(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_shapes_and_parameters() -> None:
    prefix = some_prefix()
    assert (prefix.num_tokens, prefix.num_layers) == (P, 2)
    assert prefix.layer_shapes == SHAPES
    assert len(list(prefix.parameters())) == 4
    assert all(parameter.requires_grad for parameter in prefix.parameters())
    key, value = prefix()[1]
    assert (key.shape, value.shape) == ((3, P, 4), (3, P, 6))


def test_tensors_are_copied() -> None:
    key, value = torch.zeros(2, P, 8), torch.zeros(2, P, 8)
    prefix = Prefix([key], [value])
    key.fill_(1)
    assert not prefix.keys[0].any()


@pytest.mark.parametrize(
    ("keys", "values", "error", "message"),
    [
        ([], [], ValueError, "keys must hold one tensor per layer"),
        ([(2, P, 8)] * 2, [(2, P, 8)], ValueError, "values must be as many as keys, 2, got 1"),
        ([(2, 8)], [(2, P, 8)], ValueError, r"keys\[0\] must be \[H_kv, P, D\].*\(2, 8\)"),
        ([(2, 0, 8)], [(2, 0, 8)], ValueError, r"keys\[0\] must be"),
        ([(2, P, 8), (2, 4, 8)], [(2, P, 8), (2, 4, 8)], ValueError, r"keys\[1\] must hold P = 5"),
        ([(2, P, 8)], [(2, 4, 8)], ValueError, r"values\[0\] must begin.*\(2, 5\), got \(2, 4\)"),
        ([torch.long], [torch.long], TypeError, r"keys\[0\] must be floating point.*int64"),
        (["text"], ["text"], TypeError, r"keys\[0\] must be floating point, got a str"),
        ([(2, P, 8)], [torch.double], ValueError, r"values\[0\] must be torch.float32"),
    ],
)
def test_wrong_tensors(keys: Any, values: Any, error: type[Exception], message: str) -> None:
    def made(what: Any) -> Any:
        if isinstance(what, torch.dtype):
            return torch.zeros(2, P, 8, dtype=what)
        return what if isinstance(what, str) else torch.zeros(what)

    with pytest.raises(error, match=message):
        Prefix([made(key) for key in keys], [made(value) for value in values])


# What trains, and where


def test_frozen_tokens_never_move() -> None:
    """Not by weight decay either, nor after `requires_grad_(True)`, which un-freezes a LoRA's."""
    whole = some_prefix()
    prefix = Prefix(whole.keys, whole.values, num_frozen_tokens=2).requires_grad_(True)
    assert (prefix.num_tokens, prefix.keys[0].shape[1]) == (P, P - 2)
    assert same(prefix, whole)
    optimizer = torch.optim.AdamW(prefix.parameters(), lr=0.1, weight_decay=0.5)
    sum(x.square().sum() for pair in prefix() for x in pair).backward()
    optimizer.step()
    for (key, _), (before, _) in zip(prefix(), whole(), strict=True):
        assert torch.equal(key[:, :2], before[:, :2])
        assert not torch.isclose(key[:, 2:], before[:, 2:]).any()


@torch.no_grad()
def test_frozen_tokens_are_joined_once_in_a_text() -> None:
    prefix = some_prefix(num_frozen_tokens=1)
    with kept.forward(continues=False):
        first = prefix()[0][0]
    for _ in range(2):  # an optimizer may have run before a text begins, but not within it
        with kept.forward(continues=True):
            then = prefix()[0][0]
            assert prefix()[0][0] is then
            assert then is not first
    assert prefix()[0][0] is not then
    prefix.keys[0].add_(1)
    assert torch.equal(prefix()[0][0][:, 1:], prefix.keys[0])
    prefix.keys[0].data = torch.zeros(2, P - 1, 8)  # which autograd does not count
    assert torch.equal(prefix()[0][0][:, 1:], prefix.keys[0])
    prefix.values[1] = torch.nn.Parameter(torch.ones(3, P - 1, 6))
    assert torch.equal(prefix()[1][1][:, 1:], prefix.values[1])
    with torch.enable_grad():
        assert prefix()[0][0].requires_grad
    assert prefix.double()()[0][0].dtype == torch.float64


def test_dropout_is_for_training_forwards() -> None:
    torch.manual_seed(0)
    key = torch.ones(4, 50, 10)
    prefix = Prefix([key], [key], dropout=0.25)
    dropped = [x for pair in prefix.batch().pairs for x in pair]  # type: ignore[union-attr]
    for x in dropped:
        assert (x == 0).float().mean().item() == pytest.approx(0.25, abs=0.05)
        torch.testing.assert_close(x.max(), torch.tensor(1 / 0.75))
    assert not torch.equal(*dropped)
    assert torch.equal(prefix()[0][0], key)  # what is saved
    assert torch.equal(prefix.eval().batch().pairs[0][0][0], key)  # type: ignore[index]


def test_some_layers_only() -> None:
    prefix = some_prefix(layers=[0, 2], num_layers=4)
    assert (prefix.num_layers, prefix.layers) == (4, [0, 2])
    assert prefix.layer_shapes == [SHAPES[0], None, SHAPES[1], None]
    pairs = prefix.batch().pairs
    assert [pair is None for pair in pairs] == [False, True, False, True]
    assert pairs[2][0].shape == (1, 3, P, 4)  # type: ignore[index]
    assert len(prefix()) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frozen_tokens": P}, r"num_frozen_tokens must be in \[0, 5\), fewer than all, got 5"),
        ({"num_frozen_tokens": -1}, "got -1"),
        ({"num_frozen_tokens": True}, "got True"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": "half"}, "got 'half'"),
        ({"layers": [0, 2]}, "num_layers must be given with layers"),
        ({"layers": [0], "num_layers": 4}, "one layer for each of 2 keys"),
        ({"layers": [2, 0], "num_layers": 4}, "increasing integers"),
        ({"layers": [0, 0], "num_layers": 4}, "increasing integers"),
        ({"layers": [0, 4], "num_layers": 4}, r"layers must be in \[0, 4\)"),
        ({"layers": [-1, 0], "num_layers": 4}, r"layers must be in \[0, 4\)"),
        ({"num_layers": 3}, "one layer for each of 2 keys"),
        ({"layers": [0, 1], "num_layers": 0}, "num_layers must be a positive integer"),
    ],
)
def test_wrong_options(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        some_prefix(**options)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda prefix: pickle.loads(pickle.dumps(prefix))]
)
def test_copies_are_their_own(duplicate: Any) -> None:
    prefix = some_prefix(num_frozen_tokens=2, layers=[0, 3], num_layers=4)
    size = len(pickle.dumps(prefix))
    with torch.no_grad(), kept.forward(continues=True):
        before = prefix()[0][0]  # kept, and not copied
        assert len(pickle.dumps(prefix)) == size
        other = duplicate(prefix)
        assert same(other, prefix)
        other.load_state_dict({n: torch.zeros_like(t) for n, t in other.state_dict().items()})
        assert not any(x.any() for pair in other() for x in pair)
        assert prefix()[0][0] is before


# Initialisation


def test_from_text_is_what_the_cache_holds(llama: Any) -> None:
    ids = torch.randint(0, 97, (P,))
    cache = llama(ids[None], use_cache=True).past_key_values
    for given in (ids, ids[None]):
        prefix = Prefix.from_text(llama, given)
        for (key, value), layer in zip(prefix(), cache.layers, strict=True):
            torch.testing.assert_close(key, layer.keys[0])
            torch.testing.assert_close(value, layer.values[0])
    assert prefix.keys[0].is_leaf


def test_from_text_in_inference_mode_still_trains(llama: Any) -> None:
    with torch.inference_mode():
        prefix = Prefix.from_text(llama, torch.arange(P))
    prefix.keys[0].square().sum().backward()
    assert prefix.keys[0].grad is not None


def test_from_text_keeps_every_token_of_a_sliding_layer() -> None:
    config = transformers.Gemma2Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
    )
    prefix = Prefix.from_text(transformers.Gemma2ForCausalLM(config), torch.arange(9))
    assert prefix.num_tokens == 9


def test_from_the_first_tokens_of_a_text_in_some_layers(llama: Any) -> None:
    ids = torch.arange(9)
    prefix = Prefix.from_text(
        llama, ids, num_tokens=4, layers=[1], num_frozen_tokens=1, dropout=0.1
    )
    assert same_pair(prefix()[0], Prefix.from_text(llama, ids[:4])()[1])
    assert prefix.layer_shapes == [None, LayerShape(2, 8, 8)]
    assert (prefix.num_frozen_tokens, prefix.dropout) == (1, 0.1)
    with pytest.raises(ValueError, match="at least num_tokens = 10 tokens, got 9"):
        Prefix.from_text(llama, ids, num_tokens=10)
    with pytest.raises(ValueError, match=r"layers must be in \[0, 2\), got \[2\]"):
        Prefix.from_text(llama, ids, layers=[2])
    with pytest.raises(ValueError, match=r"part must be one of \['self'\].*got 'encoder'"):
        Prefix.from_text(llama, ids, part="encoder")


def test_from_random_text_without_special_tokens(llama: Any, monkeypatch: Any) -> None:
    llama.config.update({"bos_token_id": 0, "eos_token_id": list(range(1, 90)), "vocab_size": 93})
    drawn = []

    def start(model: Any, ids: Any, *rest: Any) -> Any:
        drawn.append(ids)
        return start_from_text(model, ids, *rest)

    monkeypatch.setattr("prefixattn.prefix.start_from_text", start)
    draws = [
        Prefix.from_random_text(llama, 40, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    ]
    assert set(drawn[0].tolist()) == {90, 91, 92}
    assert same(*draws)
    assert same(draws[0], Prefix.from_text(llama, drawn[0]))
    llama.config.eos_token_id = list(range(93))
    with pytest.raises(ValueError, match="tokens that are not special"):
        Prefix.from_random_text(llama, 2)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.long), ValueError, r"\[P\] or \[1, P\].*\(2, 3\)"),
        (torch.zeros(0, dtype=torch.long), ValueError, "P >= 1"),
        (torch.zeros(3), TypeError, "integer tensor, got torch.float32"),
        ([1, 2], TypeError, "integer tensor, got a list"),
    ],
)
def test_wrong_text(llama: Any, ids: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Prefix.from_text(llama, ids)


def test_zeros_and_random(llama: Any) -> None:
    zeros = Prefix.zeros(llama, 3)
    assert zeros.layer_shapes == [LayerShape(2, 8, 8)] * 2
    assert not any(parameter.any() for parameter in zeros.parameters())
    assert zeros.keys[0].dtype == torch.float64
    draws = [
        Prefix.random(llama, 64, std=0.5, generator=torch.Generator().manual_seed(7))
        for _ in range(2)
    ]
    assert same(*draws)
    assert not same(draws[0], Prefix.random(llama, 64, std=0.5))
    assert draws[0].keys[0].std().item() == pytest.approx(0.5, rel=0.15)
    assert Prefix.random(llama.bfloat16(), 2).keys[0].dtype == torch.float32
    with pytest.raises(ValueError, match="num_tokens must be a positive integer, got 0"):
        Prefix.zeros(llama, 0)
    with pytest.raises(ValueError, match="std must be at least 0, got -1"):
        Prefix.random(llama, 2, std=-1)


def test_projection(llama: Any) -> None:
    prefix = ProjectedPrefix.for_model(llama, P, hidden_dim=12)
    assert prefix.layer_shapes == [LayerShape(2, 8, 8)] * 2
    assert prefix.embedding.weight.shape == (P, 16)
    loss = sum((key.sum() + 2 * value.sum()) for key, value in prefix())
    loss.backward()
    assert all(parameter.grad is not None for parameter in prefix.parameters())
    folded = prefix.folded()
    assert type(folded) is Prefix
    assert same(folded, prefix)
    some = ProjectedPrefix.for_model(llama, P, layers=[1], dropout=0.5)
    assert some.folded().layer_shapes == some.layer_shapes == [None, LayerShape(2, 8, 8)]
    assert some.folded().dropout == 0.5
    with pytest.raises(NotImplementedError, match="use ProjectedPrefix.for_model"):
        ProjectedPrefix.zeros(llama, P)


def test_split_is_pefts_order() -> None:
    flat = torch.arange(P * 2 * 2 * 3 * 4.0).view(P, -1)  # two layers of three heads of four
    pairs = split_layers(flat, [LayerShape(3, 4, 4)] * 2)
    cube = flat.view(P, 4, 3, 4)
    for layer, (key, value) in enumerate(pairs):
        assert torch.equal(key, cube[:, 2 * layer].transpose(0, 1))
        assert torch.equal(value, cube[:, 2 * layer + 1].transpose(0, 1))
