"""Says in a line why this Python cannot run the GPU's tests or benchmarks, or what it runs them on.

Usage: python3 check_gpu.py PACKAGE ...
"""

import sys
from importlib.util import find_spec


def check(packages: list[str]) -> str:
    """The machine and its versions in a line; exits with the reason where no GPU work can run."""
    missing = [name for name in ("torch", "triton", *packages) if find_spec(name) is None]
    if missing:
        sys.exit(
            f"{sys.executable} lacks {', '.join(missing)}: install them, name another Python with"
            " GPU_PYTHON, or name a folder that holds them in PYTHONPATH (see CONTRIBUTING.md)"
        )
    import torch
    import triton

    versions = f"torch {torch.__version__} and triton {triton.__version__} of {sys.executable}"
    if not torch.cuda.is_available():
        sys.exit(f"no CUDA or ROCm device found here by {versions}")
    return f"{torch.cuda.get_device_name()}: {versions}"


if __name__ == "__main__":
    print(check(sys.argv[1:]))
