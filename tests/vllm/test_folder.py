"""What serving does without an engine: adapters, claims, a worker's memory, versions."""

import os
import shutil

import pytest
import torch

from prefixattn import Prefix
from prefixattn.checkpoints import save_peft
from prefixattn.vllm import folder as folder_module
from prefixattn.vllm import kv_transfer_config
from prefixattn.vllm.cache import AdapterCache
from prefixattn.vllm.claim import Claim, claim_of, name_of
from prefixattn.vllm.folder import AdapterFolder, FolderUnavailable, ModelShape
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


@pytest.mark.parametrize("name", ["x" * 256, "x" * 5000, "\ud800"], ids=["256", "5000", "half"])
def test_a_name_that_no_file_can_have_names_no_adapter(folder, name):
    assert name not in folder
    with pytest.raises(KeyError, match="no adapter 'x*.*' in"):
        folder.claim(name)


GONE = {
    "not there": lambda path: path.rename(path.with_name("away")),
    "a file": lambda path: (path.rename(path.with_name("away")), path.touch()),
    "a link to nothing": lambda path: (path.rename(path.with_name("away")), path.symlink_to("x")),
}


@pytest.mark.parametrize("spoil", GONE.values(), ids=GONE.keys())
def test_a_folder_that_is_not_there_is_said_at_each_use(tmp_path, spoil):
    path = tmp_path / "adapters"
    prefix().save_pretrained(path / "ours")
    folder = AdapterFolder(path, SHAPE)
    before = folder.claim("ours")
    spoil(path)
    for use in (
        lambda: "ours" in folder,
        lambda: list(folder),
        lambda: folder.claim("ours"),
        lambda: folder.known("ours"),
        lambda: folder.pairs(before),
        folder.check,
    ):
        with pytest.raises(FolderUnavailable, match="folder of adapters .* cannot be read"):
            use()
    if path.is_symlink() or path.exists():
        path.unlink()
    (tmp_path / "away").rename(path)
    assert folder.claim("ours") == before


def test_a_folder_may_come_later(tmp_path):
    folder = AdapterFolder(tmp_path / "adapters", SHAPE)
    prefix().save_pretrained(tmp_path / "adapters" / "ours")
    assert folder.claim("ours").num_tokens == 5


def rewrite(path):
    """Other numbers in the same file, with the size and the times that it had."""
    file = path / "prefix.safetensors"
    before = file.stat()
    with file.open("r+b") as written:
        written.seek(-64, os.SEEK_END)
        written.write(bytes(64))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_another_content_is_seen_behind_the_times_of_the_old(folder, tmp_path):
    old = folder.claim("ours")
    rewrite(tmp_path / "ours")
    assert folder.claim("ours").digest != old.digest


def test_another_content_is_seen_within_one_tick_of_the_clock(folder, tmp_path, monkeypatch):
    """A file system may give two writes the same time: what was just written is read again."""
    stamp = folder_module._stamp(tmp_path / "ours")
    monkeypatch.setattr(folder_module, "_stamp", lambda path: stamp)
    old = folder.claim("ours")
    assert folder.known("ours") is None
    rewrite(tmp_path / "ours")
    assert folder.claim("ours").digest != old.digest


def test_what_lies_for_a_while_is_not_read_again(folder, monkeypatch):
    monkeypatch.setattr(folder_module, "SETTLED_NS", -(10**18))
    claim = folder.claim("ours")
    monkeypatch.setattr(folder_module, "_digest", None)  # it would fail
    assert folder.known("ours") is claim
    assert folder.claim("ours") is claim


def test_a_content_that_changes_while_it_is_read_is_not_taken_for_the_old(
    folder, tmp_path, monkeypatch
):
    """Its digest would be the old's, and its numbers the new's."""
    load = folder_module.load

    def replaced_first(path):
        rewrite(path)
        return load(path)

    stamp = folder_module._stamp(tmp_path / "ours")
    monkeypatch.setattr(folder_module, "_stamp", lambda path: stamp)
    monkeypatch.setattr(folder_module, "load", replaced_first)
    claim = folder.claim("ours")
    assert claim.digest == folder_module._digest(tmp_path / "ours", stamp)


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
