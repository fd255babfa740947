"""What serving does without an engine: adapters, claims, a worker's memory, versions."""

import os
import shutil

import pytest
import torch

from prefixattn import Prefix
from prefixattn.checkpoints import save_peft
from prefixattn.vllm import kv_transfer_config
from prefixattn.vllm.cache import AdapterCache
from prefixattn.vllm.claim import Claim, claim_of, name_of
from prefixattn.vllm.folder import AdapterFolder, ModelShape
from prefixattn.vllm.versions import check_version

SHAPE = ModelShape(num_layers=3, num_heads=2, head_dim=8)


def prefix(num_tokens=5, layers=3):
    torch.manual_seed(num_tokens)
    return Prefix(*torch.randn(2, layers, 2, num_tokens, 8))


def kept(made):
    made.positions = "keep"
    return made


@pytest.fixture
def folder(tmp_path):
    prefix().save_pretrained(tmp_path / "ours")
    save_peft(prefix(7), tmp_path / "peft")
    (tmp_path / "a file").touch()
    return AdapterFolder(tmp_path, SHAPE)


def test_adapters_are_folders_in_either_format(folder):
    assert list(folder) == ["ours", "peft"]
    assert [folder.claim(name).num_tokens for name in folder] == [5, 7]
    for name, made in (("ours", prefix()), ("peft", prefix(7))):
        for found, wanted in zip(folder.pairs(folder.claim(name)), made(), strict=True):
            torch.testing.assert_close(found, wanted)


def test_the_digest_is_of_the_content(folder, tmp_path):
    before = folder.claim("ours")
    assert folder.claim("ours") is before  # not read again
    shutil.copytree(tmp_path / "ours", tmp_path / "copy")
    assert folder.claim("copy").digest == before.digest
    prefix(6).save_pretrained(tmp_path / "ours")
    after = folder.claim("ours")
    assert after.digest != before.digest
    with pytest.raises(ValueError, match="was replaced while a request of it waited"):
        folder.pairs(before)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "x/y", "a file", "gone", ".hid", "a\0b", 3]
)
def test_what_names_no_adapter(folder, tmp_path, name):
    (tmp_path / ".hid").mkdir()
    assert name not in folder
    with pytest.raises(KeyError, match="no adapter"):
        folder.claim(name)


WRONG = {
    "layers": (lambda: prefix(layers=2), "a prefix in 2 layers, and the model has 3"),
    "shape": (lambda: Prefix(*torch.randn(2, 3, 2, 4, 9)), r"\(2, 4, 8\) for this model, got"),
    "NaN": (lambda: Prefix(*torch.full((2, 3, 2, 4, 8), torch.nan)), "NaN or infinity"),
    "some layers": (
        lambda: Prefix(*torch.randn(2, 2, 2, 5, 8), layers=[0, 1], num_layers=3),
        "in layers",
    ),
    "positions": (lambda: kept(prefix()), "positions='keep'"),
}


@pytest.mark.parametrize(("make", "text"), WRONG.values(), ids=WRONG.keys())
def test_an_adapter_that_does_not_fit(folder, tmp_path, make, text):
    make().save_pretrained(tmp_path / "wrong")
    with pytest.raises(ValueError, match=text):
        folder.claim("wrong")


def test_a_folder_must_be_there(tmp_path):
    with pytest.raises(NotADirectoryError, match="adapters: "):
        AdapterFolder(tmp_path / "none", SHAPE)


def test_a_claim_survives_the_way_to_the_scheduler():
    claim = Claim("summaries", "ab12", 5)
    assert claim_of(claim.salt(None), claim.parameters()) == claim
    assert claim_of(claim.salt("a tenant: 7"), claim.parameters()) == claim
    assert claim.salt("a") != claim.salt("b")
    assert claim_of(None, None) is None
    assert claim_of("a client's", None) is None


@pytest.mark.parametrize(
    ("salt", "parameters"),
    [
        (None, Claim("x", "ab", 5).parameters()),
        ("prefixattn:ab", None),
        ("prefixattn:ab", Claim("x", "cd", 5).parameters()),
        ("prefixattn:ab", {"prefixattn": "x"}),
    ],
)
def test_a_claim_that_the_front_end_never_wrote(salt, parameters):
    with pytest.raises(RuntimeError):
        claim_of(salt, parameters)


@pytest.mark.parametrize("wrong", [{}, [], "x", {"prefixattn": None}, {"prefixattn": "x", "y": 1}])
def test_what_a_client_may_ask(wrong):
    assert name_of(None) is None
    assert name_of({"prefixattn": "x"}) == "x"
    with pytest.raises(ValueError, match="the name of an adapter"):
        name_of(wrong)


def layers(num_bytes):
    return {"layer": (torch.zeros(num_bytes // 2, dtype=torch.uint8),) * 2}


def test_a_workers_memory_is_bounded():
    cache = AdapterCache(100)
    for digest, size in (("a", 40), ("b", 40), ("a", 0), ("c", 40), ("huge", 400), ("b", 40)):
        cache.get(digest, lambda size=size: layers(size))
        assert cache.num_bytes <= 100
    # c put b out, which was used before a; then b put a out
    assert list(cache.held) == ["c", "b"]
    assert cache.counts == {"hits": 1, "misses": 5, "evictions": 2}


@pytest.mark.parametrize("version", ["0.28.0", "0.30.1.dev3+cpu", "0.32.0"])
def test_versions_that_were_tested(version):
    check_version(version)


@pytest.mark.parametrize("version", ["", "0.27.9", "0.33.0", "1.0", "nightly"])
def test_versions_that_were_not(version):
    with pytest.raises(RuntimeError, match=r"serves on vLLM 0\.28 to 0\.32"):
        check_version(version)


def test_the_configuration_names_the_connector(tmp_path):
    made = kv_transfer_config(tmp_path, cache_bytes=7, placeholder_token_id=3)
    assert made["kv_load_failure_policy"] == "fail"
    assert made["kv_connector_extra_config"] == {
        "adapters": os.fspath(tmp_path),
        "cache_bytes": 7,
        "placeholder_token_id": 3,
    }
