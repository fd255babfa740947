"""Parameters that a library has spread over ranks, whole for as long as something reads them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn


@contextmanager
def whole(module: nn.Module) -> Iterator[bool]:
    """Within, every parameter of ``module`` is whole; yields whether this rank is to write files.

    FSDP2 and tensor parallelism hold DTensors, DeepSpeed's ZeRO-3 empty tensors. Both are gathered,
    which every rank has to take part in; rank 0 writes, and the others wait for it. Where nothing
    is spread, nothing is done, and whoever asks writes.
    """
    parameters: list[Any] = list(module.parameters())
    if any(_is_parted(parameter) for parameter in parameters):
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters):
            yield dist.get_rank() == 0
        dist.barrier()
        return
    spread: list[tuple[nn.Module, str, Any]] = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if hasattr(parameter, "full_tensor")
    ]
    if not spread:
        yield True
        return
    found = [nn.Parameter(p.detach().full_tensor(), p.requires_grad) for _, _, p in spread]
    try:
        for (owner, name, _), parameter in zip(spread, found, strict=True):
            owner._parameters[name] = parameter
        yield dist.get_rank() == 0
    finally:
        for owner, name, parameter in spread:
            owner._parameters[name] = parameter
    dist.barrier()


def _is_parted(parameter: Any) -> bool:
    """Whether ZeRO-3 holds it, and not whole at the moment."""
    return hasattr(parameter, "ds_id") and parameter.ds_status.name == "NOT_AVAILABLE"
