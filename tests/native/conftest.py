"""The instruction sets of the C++ kernels, for the tests that choose one."""

from collections.abc import Callable, Iterator

import pytest

from prefixattn import cpu

SETS = ("plain", "avx2", "avx512", "avx512bf16")  # each better than those before it
REFUSALS = {1: "this processor lacks it", 2: "the library was built without it"}


@pytest.fixture
def use_instructions() -> Iterator[Callable[[str], None]]:
    """A function that takes an instruction set for this test, or skips the test by its name."""
    before = cpu.instructions()

    def use(name: str) -> None:
        status = cpu.library().prefixattn_use_instructions(name.encode())
        if status:
            pytest.skip(f"{name}: {REFUSALS[status]}")

    yield use
    cpu.library().prefixattn_use_instructions(before.encode())


@pytest.fixture(scope="session")
def available() -> list[str]:
    """The instruction sets that the library can take here, the best one last."""
    use, before = cpu.library().prefixattn_use_instructions, cpu.instructions()
    found = [name for name in SETS if use(name.encode()) == 0]
    use(before.encode())
    return found
