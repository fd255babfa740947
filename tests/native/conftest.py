"""The instruction sets of the C++ kernels, for the tests that choose one."""

import pytest

from prefixattn import cpu

# Each better than those before it, of one kind of processor.
SETS = ("plain", "avx2", "avx512", "avx512bf16", "amx", "neon_bf16")


@pytest.fixture(scope="session")
def available() -> list[str]:
    """The instruction sets that the library can take here, the best one last."""
    use, before = cpu.library().prefixattn_use_instructions, cpu.instructions()
    found = [name for name in SETS if use(name.encode()) == 0]
    use(before.encode())
    return found
