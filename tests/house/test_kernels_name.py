"""transformers probes for a package named `kernels`; our folder of that name is never it."""

import importlib.util
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from patience import PATIENCE

ROOT = Path(__file__).resolve().parents[2]

# Imports a model as a user at the repository's root would (-c puts that folder first on sys.path)
# and prints whether transformers believes in `kernels`, and from which file it came.
PROBE = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import is_kernels_available
import transformers.integrations.hub_kernels
sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, vocab_size=16)
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
assert model(torch.arange(4)[None]).logits.isfinite().all()
import prefixattn
found = sys.modules.get("kernels")
print(is_kernels_available(), getattr(found, "__file__", None))
"""

# The names that transformers' integrations/hub_kernels.py takes from the package.
STAND_IN = """
def layer_decorator(name): return lambda cls: cls
use_kernel_forward_from_hub = use_kernelized_func = layer_decorator
class _Anything:
    def __init__(self, *args, **kwargs): pass
CUDAProperties = Device = KernelizeFallback = LayerRepository = LocalLayerRepository = _Anything
FuncRepository = LocalFuncRepository = Mode = ROCMProperties = _Anything
def _unused(*args, **kwargs): raise AssertionError("a test needs no hub kernel")
get_kernel = kernelize = register_kernel_mapping = replace_kernel_forward_from_hub = _unused
use_kernel_mapping = _unused
"""


def probe(*search_path: Path) -> list[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    env["PYTHONPATH"] = os.pathsep.join(map(str, search_path))
    result = subprocess.run(
        [sys.executable, "-c", PROBE],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_transformers_finds_no_kernels_package_of_ours() -> None:
    pytest.importorskip("transformers")
    if importlib.util.find_spec("kernels") and importlib.util.find_spec("kernels").origin:
        pytest.skip("Hugging Face's kernels package is installed here; the next test covers that")
    assert probe() == ["False", "None"]


def test_an_installed_kernels_package_is_found_past_our_folder(tmp_path: Path) -> None:
    utils = pytest.importorskip("transformers.utils.import_utils")
    package, info = (
        tmp_path / "kernels",
        tmp_path / f"kernels-{utils.KERNELS_MIN_VERSION}.dist-info",
    )
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text(STAND_IN)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: kernels\nVersion: {utils.KERNELS_MIN_VERSION}\n"
    )
    (info / "top_level.txt").write_text("kernels\n")
    (info / "RECORD").write_text("kernels/__init__.py,,\n")
    assert probe(tmp_path) == ["True", str(package / "__init__.py")]


def test_the_folder_is_no_package_and_the_symlink_leads_to_it() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "prefixattn" / "kernels").readlink() == Path("../kernels")


def test_the_installed_name_leads_to_the_folder() -> None:
    """Not to a copy of it: in an editable install both names are the same files."""
    spec = importlib.util.find_spec("prefixattn.kernels")
    if "site-packages" in str(importlib.util.find_spec("prefixattn").origin):
        pytest.skip("prefixattn is installed from a wheel here, which holds copies")
    places = [Path(path) for path in spec.submodule_search_locations]
    # setuptools adds a placeholder of its own, which is no folder.
    assert {place.resolve() for place in places if place.exists()} == {ROOT / "kernels"}


def test_pyproject_lists_every_package() -> None:
    """The list is explicit, because of the mapping; a folder left out would miss from the wheel."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent for path in (ROOT / "prefixattn").rglob("*.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(settings["packages"]) == names | {"prefixattn.kernels"}
    assert settings["package-dir"] == {"prefixattn.kernels": "kernels"}
