"""A user's script, started by `accelerate launch` and by `torchrun` on two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("launched.py")
LAUNCHERS = {
    "accelerate": "accelerate.commands.launch --cpu --num_processes 2 --num_machines 1 "
    "--mixed_precision no --dynamo_backend no --main_process_port 0",
    "trainer": "torch.distributed.run --standalone --nproc_per_node 2",
}


def run(folder, way, *launcher):
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, *launcher, SCRIPT, way, folder],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    tensors = load_file(next((folder / "prefix").glob("*.safetensors")))
    return json.loads((folder / "losses.json").read_text()), tensors


@pytest.mark.parametrize("way", LAUNCHERS)
def test_two_processes_train_as_one_does(tmp_path, way):
    alone, expected = run(tmp_path / "one", way)
    together, found = run(tmp_path / "two", way, "-m", *LAUNCHERS[way].split())
    assert len(alone) == 3
    assert together == pytest.approx(alone, abs=2e-3 if way == "trainer" else 1e-5)  # it rounds
    assert all((found[name] - tensor).abs().max() < 1e-4 for name, tensor in expected.items())
    assert alone[-1] != pytest.approx(alone[0], abs=1e-2)
