"""Prefixes by themselves: what they accept, how they start, how they are kept."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from prefixattn.layers import LayerShape, split_layers
from prefixattn.prefix import Prefix, ProjectedPrefix

P = 5
SHAPES = [LayerShape(2, 8, 8), LayerShape(3, 4, 6)]  # layers may differ


def some_prefix() -> Prefix:
    return Prefix(
        [torch.randn(s.num_heads, P, s.key_dim) for s in SHAPES],
        [torch.randn(s.num_heads, P, s.value_dim) for s in SHAPES],
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
    pairs = zip(one(), other(), strict=True)
    return all(torch.equal(a, b) for left, right in pairs for a, b in zip(left, right, strict=True))


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


def test_split_is_pefts_order() -> None:
    flat = torch.arange(P * 2 * 2 * 3 * 4.0).view(P, -1)  # two layers of three heads of four
    pairs = split_layers(flat, [LayerShape(3, 4, 4)] * 2)
    cube = flat.view(P, 4, 3, 4)
    for layer, (key, value) in enumerate(pairs):
        assert torch.equal(key, cube[:, 2 * layer].transpose(0, 1))
        assert torch.equal(value, cube[:, 2 * layer + 1].transpose(0, 1))


# Files


@pytest.fixture(params=["plain", "projected"])
def kept(request: pytest.FixtureRequest) -> Prefix:
    return some_prefix() if request.param == "plain" else ProjectedPrefix(SHAPES, P, 6, 7)


def test_round_trip(kept: Prefix, tmp_path: Path) -> None:
    kept.save_pretrained(tmp_path / "new" / "folder")
    back = Prefix.from_pretrained(tmp_path / "new" / "folder")
    assert type(back) is type(kept)
    assert same(back, kept)
    mine, theirs = kept.state_dict(), back.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    tensors = load_file(tmp_path / "new" / "folder" / "prefix.safetensors")
    assert torch.equal(tensors["layers.1.key"], kept()[1][0])
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == [
        "prefix.safetensors",
        "prefix_config.json",
    ]


def test_one_token(tmp_path: Path) -> None:
    """Views of one token's row share their memory, which safetensors does not take."""
    kept = ProjectedPrefix([LayerShape(1, 4, 4)] * 2, 1, 3, 3)
    kept.save_pretrained(tmp_path)
    assert same(Prefix.from_pretrained(tmp_path), kept)


def test_saving_over_another(tmp_path: Path) -> None:
    some_prefix().save_pretrained(tmp_path)
    second = some_prefix()
    second.save_pretrained(str(tmp_path))
    assert same(Prefix.from_pretrained(str(tmp_path)), second)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: Any) -> None:
    first = some_prefix()
    first.save_pretrained(tmp_path)

    def broken(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("prefixattn.files.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        some_prefix().save_pretrained(tmp_path)
    monkeypatch.undo()
    assert same(Prefix.from_pretrained(tmp_path), first)
    assert len(os.listdir(tmp_path)) == 2


def damaged(folder: Path, what: str) -> None:
    tensors_file, config_file = folder / "prefix.safetensors", folder / "prefix_config.json"
    config, tensors = json.loads(config_file.read_text()), load_file(tensors_file)
    if what == "no tensors":
        tensors_file.unlink()
    elif what == "no config":
        config_file.unlink()
    elif what == "truncated":
        tensors_file.write_bytes(tensors_file.read_bytes()[:-20])
    elif what == "not JSON":
        config_file.write_text("{")
    else:
        if what == "a layer short":
            del tensors["layers.1.value"]
        elif what == "NaN":
            tensors["layers.0.key"][0, 0, 0] = torch.nan
        elif what == "another length":
            config["num_tokens"] = P + 1
        elif what == "no number":
            config["num_layers"] = "two"
        elif what == "another format":
            config["version"] = 99
        elif what == "another kind":
            config["kind"] = "gated"
        elif what == "no kind":
            config["kind"] = []
        elif what == "absurd":
            config["num_layers"] = 10**12
        elif what == "integers":
            tensors["layers.0.key"] = tensors["layers.0.key"].long()
        save_file(tensors, tensors_file)
        config_file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("no tensors", FileNotFoundError, "prefix.safetensors"),
        ("no config", FileNotFoundError, "prefix_config.json"),
        ("truncated", ValueError, "truncated or not a safetensors file"),
        ("not JSON", ValueError, "not valid JSON"),
        ("a layer short", ValueError, "num_layers is 2, but the file holds 3 layer tensors"),
        ("absurd", ValueError, "num_layers is 1000000000000, but the file holds 4 layer tensors"),
        ("NaN", ValueError, "layers.0.key holds NaN"),
        ("another length", ValueError, "num_tokens is 6, but the tensors hold 5"),
        ("no number", ValueError, "num_layers must be a positive integer, got 'two'"),
        ("another format", ValueError, "version 99"),
        ("another kind", ValueError, "kind must be one of"),
        ("no kind", ValueError, "kind must be one of"),
        ("integers", ValueError, "layers.0.key must be floating point"),
    ],
)
def test_damaged_files(tmp_path: Path, what: str, error: type[Exception], message: str) -> None:
    some_prefix().save_pretrained(tmp_path)
    damaged(tmp_path, what)
    with pytest.raises(error, match=message):
        Prefix.from_pretrained(tmp_path)


def test_a_projection_of_another_size(tmp_path: Path) -> None:
    ProjectedPrefix(SHAPES, P, 6, 7).save_pretrained(tmp_path)
    file = tmp_path / "prefix_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden_dim": 8}))
    with pytest.raises(ValueError, match="the projection must be"):
        Prefix.from_pretrained(tmp_path)
