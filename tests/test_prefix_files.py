"""Prefixes in files: what comes back, how training resumes, and files that are refused."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prefixattn.bank import PrefixBank
from prefixattn.checkpoints import load
from prefixattn.encoder_decoder import EncoderDecoderPrefix
from prefixattn.gated import GatedPrefix
from prefixattn.layers import LayerShape
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


def same(one: Prefix, other: Prefix) -> bool:
    return all(same_pair(left, right) for left, right in zip(one(), other(), strict=True))


def same_pair(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


SOME = {"layers": [1, 3], "num_layers": 5, "dropout": 0.1}
KINDS = {
    "plain": some_prefix,
    "all options": lambda: some_prefix(num_frozen_tokens=2, **SOME),
    "projected": lambda: ProjectedPrefix(SHAPES, P, 6, 7),
    "projected, some layers": lambda: ProjectedPrefix(SHAPES, P, 6, 7, **SOME),
    "gated": lambda: GatedPrefix(
        some_prefix().keys, some_prefix().values, [torch.randn(4), torch.randn(6)], **SOME
    ),
}


@pytest.fixture(params=KINDS)
def kept(request: pytest.FixtureRequest) -> Prefix:
    made: Prefix = KINDS[request.param]()
    return made


def test_round_trip(kept: Prefix, tmp_path: Path) -> None:
    kept.save_pretrained(tmp_path / "new" / "folder")
    back = Prefix.from_pretrained(tmp_path / "new" / "folder")
    assert type(back) is type(kept)
    assert same(back, kept)
    mine, theirs = kept.state_dict(), back.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    for name in ("num_tokens", "num_layers", "layers", "num_frozen_tokens", "dropout"):
        assert getattr(back, name) == getattr(kept, name)
    tensors = load_file(tmp_path / "new" / "folder" / "prefix.safetensors")
    assert torch.equal(tensors[f"layers.{kept.layers[1]}.key"], kept()[1][0])
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == [
        "prefix.safetensors",
        "prefix_config.json",
    ]


def test_a_plain_prefix_is_written_as_ever(tmp_path: Path) -> None:
    """Files of earlier versions load, and theirs load ours."""
    some_prefix().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "prefix_config.json").read_text()) == {
        "format": "prefixattn",
        "version": 1,
        "kind": "prefix",
        "num_tokens": P,
        "num_layers": 2,
    }


@pytest.mark.parametrize("kind", ["all options", "projected", "gated"])
def test_training_resumes(kind: str, tmp_path: Path) -> None:
    def trained(prefix: Prefix, optimizer: Any, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = sum(x.square().sum() for pair in prefix() for x in pair)
            gates = prefix.gates if isinstance(prefix, GatedPrefix) else []
            (loss + sum(gate.square().sum() for gate in gates)).backward()
            optimizer.step()

    prefix = KINDS[kind]()
    optimizer = torch.optim.AdamW(prefix.parameters(), lr=0.1)
    trained(prefix, optimizer, 2)
    prefix.save_pretrained(tmp_path)
    back = Prefix.from_pretrained(tmp_path)
    resumed = torch.optim.AdamW(back.parameters(), lr=0.1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    trained(prefix, optimizer, 2)
    trained(back, resumed, 2)
    for mine, theirs in zip(prefix.parameters(), back.parameters(), strict=True):
        assert torch.equal(mine, theirs)


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


def as_earlier_versions_did(folder: Path) -> None:
    """Have the tensors not say what they were saved with."""
    save_file(load_file(folder / "prefix.safetensors"), folder / "prefix.safetensors")


def test_files_of_two_saves_are_refused(tmp_path: Path, monkeypatch: Any) -> None:
    """Saving was interrupted between the two: what is frozen now would train."""
    some_prefix().save_pretrained(tmp_path)

    def broken(path: Path, content: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("prefixattn.prefix.write_json", broken)
    second = some_prefix(num_frozen_tokens=3)
    with pytest.raises(OSError, match="disk full"):
        second.save_pretrained(tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"prefix_config.json is not what .* was saved with") as e:
        Prefix.from_pretrained(tmp_path)
    said = str(e.value).partition("It must be ")[2]
    (tmp_path / "prefix_config.json").write_text(said)
    back = Prefix.from_pretrained(tmp_path)
    assert same(back, second)
    assert back.num_frozen_tokens == 3


def test_files_of_earlier_versions_load(kept: Prefix, tmp_path: Path) -> None:
    kept.save_pretrained(tmp_path)
    as_earlier_versions_did(tmp_path)
    assert same(Prefix.from_pretrained(tmp_path), kept)


def test_a_prefix_over_an_encoder_decoders(tmp_path: Path) -> None:
    EncoderDecoderPrefix(encoder=some_prefix(), cross=some_prefix()).save_pretrained(tmp_path)
    prefix = some_prefix()
    prefix.save_pretrained(tmp_path)
    back = load(tmp_path)
    assert isinstance(back, Prefix)
    assert same(back, prefix)


def test_an_encoder_decoders_over_a_prefix(tmp_path: Path) -> None:
    some_prefix().save_pretrained(tmp_path)
    EncoderDecoderPrefix(decoder=some_prefix()).save_pretrained(tmp_path)
    assert isinstance(load(tmp_path), EncoderDecoderPrefix)
    with pytest.raises(FileNotFoundError, match="no prefix_config.json"):
        Prefix.from_pretrained(tmp_path)


def test_a_bank_over_a_prefix_as_a_part(tmp_path: Path) -> None:
    EncoderDecoderPrefix(decoder=some_prefix()).save_pretrained(tmp_path)
    bank = PrefixBank([some_prefix(), some_prefix()])
    EncoderDecoderPrefix(decoder=bank).save_pretrained(tmp_path)
    back = EncoderDecoderPrefix.from_pretrained(tmp_path).parts["decoder"]
    assert isinstance(back, PrefixBank)
    assert back.names == bank.names


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
            config["kind"] = "magic"
        elif what == "no kind":
            config["kind"] = []
        elif what == "absurd":
            config["num_layers"] = 10**12
        elif what == "absurd subset":
            config |= {"num_layers": 10**12, "layers": [0, 10**11]}
        elif what == "another subset":
            config |= {"num_layers": 3, "layers": [0, 2]}
        elif what == "layers that are none":
            config["layers"] = "01"
        elif what == "all frozen":
            config["num_frozen_tokens"] = P
        elif what == "all dropped":
            config["dropout"] = 1
        elif what == "a flat key":
            tensors["layers.0.key"] = tensors["layers.0.key"].flatten()
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
        ("absurd subset", ValueError, "at most 10000 layers, got list of 1000000000000"),
        ("another subset", ValueError, r"missing: \['layers.2.key', 'layers.2.value'\]"),
        ("layers that are none", ValueError, "layers must be a list"),
        ("all frozen", ValueError, r"num_frozen_tokens must be in \[0, 5\), got 5"),
        ("all dropped", ValueError, r"dropout must be in \[0, 1\), got 1"),
        ("a flat key", ValueError, r"layer 0 must hold a key \[H_kv, P, D\]"),
    ],
)
def test_damaged_files(tmp_path: Path, what: str, error: type[Exception], message: str) -> None:
    some_prefix().save_pretrained(tmp_path)
    damaged(tmp_path, what)
    with pytest.raises(error, match=message):
        Prefix.from_pretrained(tmp_path)


def test_a_damaged_projection(tmp_path: Path) -> None:
    prefix = ProjectedPrefix(SHAPES, P, 6, 7)
    prefix.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "prefix.safetensors")
    tensors["projection.transform.0.bias"][2] = torch.inf
    save_file(tensors, tmp_path / "prefix.safetensors")
    with pytest.raises(ValueError, match="projection.transform.0.bias holds NaN or infinity"):
        Prefix.from_pretrained(tmp_path)


def test_a_projection_of_another_size(tmp_path: Path) -> None:
    ProjectedPrefix(SHAPES, P, 6, 7).save_pretrained(tmp_path)
    file = tmp_path / "prefix_config.json"
    as_earlier_versions_did(tmp_path)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden_dim": 8}))
    with pytest.raises(ValueError, match="the projection must be"):
        Prefix.from_pretrained(tmp_path)
