"""A user's script, started by `accelerate launch` and by `torchrun` on two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("launched.py")
# `accelerate launch --cpu` and a type of MULTI_CPU start one process, unless there is MPI; the type
# that starts several leaves it to the script's Accelerator(cpu=True) what they are. Port 0 is any
# that is free: the port it takes by itself may be another test run's.
CONFIG = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
num_machines: 1
num_processes: 2
main_process_port: 0
use_cpu: true
mixed_precision: 'no'
"""
LAUNCHERS = {
    "accelerate": "accelerate.commands.launch --config_file config.yaml",
    "trainer": "torch.distributed.run --standalone --nproc_per_node 2",
}


def run(folder, way, *launcher):
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG)
    done = subprocess.run(
        [sys.executable, *launcher, SCRIPT, way, folder],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    tensors = load_file(next((folder / "prefix").glob("*.safetensors")))
    found = json.loads((folder / "losses.json").read_text())
    return found["processes"], found["losses"], tensors


@pytest.mark.parametrize("way", LAUNCHERS)
def test_two_processes_train_as_one_does(tmp_path, way):
    one, alone, expected = run(tmp_path / "one", way)
    two, together, found = run(tmp_path / "two", way, "-m", *LAUNCHERS[way].split())
    assert (one, two) == (1, 2)
    assert len(alone) == 3
    assert together == pytest.approx(alone, abs=2e-3 if way == "trainer" else 1e-5)  # it rounds
    assert all((found[name] - tensor).abs().max() < 1e-4 for name, tensor in expected.items())
    assert alone[-1] != pytest.approx(alone[0], abs=1e-2)
