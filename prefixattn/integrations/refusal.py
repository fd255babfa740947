"""The error for a model that cannot carry a prefix."""

from torch import nn


def refusal(model: nn.Module, reason: str) -> NotImplementedError:
    """Names the model and says why."""
    return NotImplementedError(f"{type(model).__name__} cannot carry a prefix: {reason}")
