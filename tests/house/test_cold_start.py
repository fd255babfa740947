"""Fresh interpreters: what `import prefixattn` needs, and what it leaves alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE

# Hides packages the way an environment without them does: no finder knows them.
HIDE = """
import sys
class Without:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, *rest):
        return None if name.partition(".")[0] in HIDDEN else self.finder.find_spec(name, *rest)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""

# Two sequence keys seen causally, three prefix keys seen always: against one softmax by hand.
ATTEND = """
import torch, prefixattn
torch.manual_seed(0)
query, key, value = (torch.randn(2, 4, 2, 8, dtype=torch.float64) for _ in range(3))
prefix_key, prefix_value = (torch.randn(1, 4, 3, 8, dtype=torch.float64) for _ in range(2))
out = prefixattn.prefix_attention(query, key, value, prefix_key, prefix_value, is_causal=True)
keys, values = (
    torch.cat([prefix.expand(2, -1, -1, -1), own], dim=2)
    for prefix, own in ((prefix_key, key), (prefix_value, value))
)
hidden = torch.ones(2, 2).triu(1).bool()
scores = query @ keys.mT / 8**0.5
scores[..., 3:].masked_fill_(hidden, float("-inf"))
torch.testing.assert_close(out, scores.softmax(-1) @ values)
"""


def run_fresh(code: str, cwd: Path, **env: str) -> str:
    """What `code` prints in an interpreter of its own, started in `cwd` as a user would."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**inherited, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **env},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("hidden", ["triton", "transformers", "peft", "triton transformers peft"])
def test_the_operation_runs_without(hidden: str, tmp_path: Path) -> None:
    absent = "\nassert not HIDDEN & {name.partition('.')[0] for name in sys.modules}"
    run_fresh(f"HIDDEN = set({hidden.split()})" + HIDE + ATTEND + absent, tmp_path)


def test_hidden_packages_cannot_be_imported(tmp_path: Path) -> None:
    probe = "\ntry:\n    import peft\nexcept ModuleNotFoundError:\n    print('hidden')"
    assert run_fresh("HIDDEN = {'peft'}" + HIDE + probe, tmp_path) == "hidden\n"


def test_import_loads_no_framework_and_no_plotting(tmp_path: Path) -> None:
    code = """
import sys, torch
before = set(sys.modules)
import prefixattn
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""
    added = set(run_fresh(code, tmp_path).split())
    heavy = {"accelerate", "matplotlib", "peft", "rich", "tokenizers", "transformers", "triton"}
    assert added & heavy == set()


def test_import_compiles_nothing(tmp_path: Path) -> None:
    """torch._dynamo and torch._inductor cost seconds; torch loads them when something compiles."""
    code = """
import sys, torch
before = set(sys.modules)
import prefixattn
print(*sorted(set(sys.modules) - before))
"""
    added = run_fresh(code, tmp_path).split()
    assert [name for name in added if name in {"torch._dynamo", "torch._inductor"}] == []


def test_import_has_no_side_effects(tmp_path: Path) -> None:
    code = """
import os, random, sys, threading, warnings
import numpy, torch
def state():
    return {
        "environment": dict(os.environ),
        "threads": (threading.active_count(), torch.get_num_threads()),
        "defaults": (torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()),
        "precision": (torch.get_float32_matmul_precision(), torch.is_grad_enabled()),
        "random": (random.getstate(), torch.get_rng_state().tolist()),
        "numpy": str(numpy.random.get_state()),
        "search path": list(sys.path),
        "files": sorted(os.path.join(*each) for each in os.walk(os.environ["HOME"]) for each in
                        [(each[0], name) for name in each[1] + each[2]]),
    }
before = state()
with warnings.catch_warnings():
    warnings.simplefilter("error")
    import prefixattn
after = state()
for name in before:
    assert before[name] == after[name], name
"""
    places = ("HOME", "TMPDIR", "XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    assert run_fresh(code, tmp_path, **dict.fromkeys(places, str(tmp_path))) == ""
    assert list(tmp_path.iterdir()) == []


def test_the_integrations_need_no_peft(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    code = """
from transformers import LlamaConfig, LlamaForCausalLM
import prefixattn
assert callable(prefixattn.attach)
sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, vocab_size=16)
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
prefix = prefixattn.Prefix([torch.randn(1, 3, 8)], [torch.randn(1, 3, 8)])
plain, ids = model(torch.arange(4)[None]).logits, torch.arange(4)[None]
handle = prefixattn.attach(model, prefix)
assert not torch.allclose(model(ids).logits, plain)
handle.detach()
torch.testing.assert_close(model(ids).logits, plain)
assert "peft" not in sys.modules
"""
    run_fresh("HIDDEN = {'peft'}" + HIDE + "import torch\n" + code, tmp_path)
