"""What the tests against a real vLLM share. Without vLLM they are skipped: `make test-vllm`."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE

HERE = Path(__file__).parent
ENGINE_TESTS = (
    "test_engine.py",
    "test_front_end.py",
    "test_guide.py",
    "test_server.py",
    "test_transformers_serve.py",
)


def pytest_collection_modifyitems(items):
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if item.path.parent == HERE and item.path.name in ENGINE_TESTS:
                item.add_marker(pytest.mark.skip(reason="needs vLLM: make test-vllm brings it"))


def script(name, *arguments, **env):
    """What a script of this folder prints last, from JSON."""
    done = subprocess.run(
        [sys.executable, HERE / name, *map(str, arguments)],
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | env,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    if done.returncode:
        raise AssertionError(f"{name} ended with {done.returncode}:\n{done.stderr[-6000:]}")
    lines = done.stdout.strip().splitlines()
    return json.loads(lines[-1]) if lines else None


@pytest.fixture(scope="session")
def made_world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    script("world.py", folder)
    return folder


@pytest.fixture
def world(made_world, tmp_path):
    """A copy of its own for each test, whose adapters may be spoilt."""
    shutil.copytree(made_world, tmp_path / "world", dirs_exist_ok=True)
    return tmp_path / "world"


@pytest.fixture
def transformers_serve(made_world):
    """`transformers_serve.py` with these options."""
    return lambda *options: script("transformers_serve.py", made_world / "model", *options)


@pytest.fixture
def battery(world):
    """`battery.py` with these options."""

    def run(env=None, **options):
        return script("battery.py", world, json.dumps(options), **(env or {}))

    return run
