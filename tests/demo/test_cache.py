"""The demo's cache: whole or not there, and never trusted blindly."""

import json

import pytest

from prefixattn.demo.cache import MANIFEST, cached, damage_of, default_folder


class Builder:
    """Writes two files, counting how often it was asked to."""

    def __init__(self, interrupt: bool = False) -> None:
        self.calls = 0
        self.interrupt = interrupt

    def __call__(self, folder):
        self.calls += 1
        (folder / "weights").write_bytes(b"\x01" * 1000)
        if self.interrupt:
            raise KeyboardInterrupt
        (folder / "config").write_text("{}")


@pytest.fixture
def said():
    return []


def test_the_second_call_builds_nothing(tmp_path, said):
    build = Builder()
    first = cached(tmp_path, "base", {"seed": 0}, build, said.append)
    second = cached(tmp_path, "base", {"seed": 0}, build, said.append)
    assert build.calls == 1
    assert first == second
    assert said == [f"base: taken from {first}"]
    assert json.loads((first / MANIFEST).read_text())["key"] == {"seed": 0}


def test_another_key_is_another_folder(tmp_path, said):
    build = Builder()
    folders = {cached(tmp_path, "base", {"seed": seed}, build, said.append) for seed in (0, 1)}
    assert len(folders) == build.calls == 2


def test_an_interruption_leaves_nothing_behind(tmp_path, said):
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, "base", {"seed": 0}, Builder(interrupt=True), said.append)
    assert list(tmp_path.iterdir()) == []
    build = Builder()
    folder = cached(tmp_path, "base", {"seed": 0}, build, said.append)
    assert build.calls == 1
    assert damage_of(folder) is None


def test_an_interrupted_rebuild_keeps_no_half_of_it(tmp_path, said):
    folder = cached(tmp_path, "base", {}, Builder(), said.append)
    (folder / "config").unlink()
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, "base", {}, Builder(interrupt=True), said.append)
    assert damage_of(folder) == "config is missing"
    cached(tmp_path, "base", {}, Builder(), said.append)
    assert damage_of(folder) is None
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "weights").write_bytes(b"\x01" * 999), "weights is not what was written"),
        (lambda f: (f / "weights").unlink(), "weights is missing"),
        (lambda f: (f / MANIFEST).unlink(), f"{MANIFEST} is missing"),
        (lambda f: (f / MANIFEST).write_text("{"), f"{MANIFEST} cannot be read"),
        (lambda f: (f / MANIFEST).write_text("[]"), f"{MANIFEST} cannot be read"),
    ],
    ids=["cut", "file missing", "manifest missing", "manifest cut", "manifest foreign"],
)
def test_damage_is_told_and_repaired(tmp_path, said, damage, words):
    build = Builder()
    folder = cached(tmp_path, "base", {}, build, said.append)
    damage(folder)
    assert cached(tmp_path, "base", {}, build, said.append) == folder
    assert build.calls == 2
    assert said == [f"base: {folder} is damaged ({words}); building it again"]
    assert damage_of(folder) is None


def test_the_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "prefixattn" / "demo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "prefixattn" / "demo"
