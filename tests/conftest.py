"""What every test gets: fixed seeds, and a skip with its reason where a device is missing."""

import random
import zlib

import hypothesis
import numpy as np
import pytest
import torch

# Two busy cores make any single example late now and then; that says nothing about the code.
hypothesis.settings.register_profile("prefixattn", deadline=None, print_blob=True)
hypothesis.settings.load_profile("prefixattn")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            reason = "needs a CUDA or ROCm device, and torch finds none here"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """Each test starts from a seed of its own, whatever ran before it and on which worker."""
    seed = zlib.crc32(request.node.name.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
