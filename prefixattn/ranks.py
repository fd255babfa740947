"""What several processes that share one prefix do together: whole parameters, equal gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def on_several() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class WithZeros(torch.autograd.Function):
    """The identity of its first input, with zeros as the gradients of the others."""

    @staticmethod
    def forward(ctx: Any, key: Tensor, *idle: Tensor) -> Tensor:
        ctx.idle = [(x.shape, x.dtype, x.device) for x in idle]
        return key.view_as(key)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        zeros = (torch.zeros(s, dtype=dtype, device=device) for s, dtype, device in ctx.idle)
        return grad, *zeros


@contextmanager
def whole(module: nn.Module) -> Iterator[bool]:
    """Within, every parameter of ``module`` is whole; yields whether this rank is to write files.

    FSDP2 and tensor parallelism hold DTensors, DeepSpeed's ZeRO-3 empty tensors. Both are gathered,
    which every rank has to take part in; rank 0 writes, and the others wait for it. Where nothing
    is spread, nothing is done, and whoever asks writes.

    Raises:
        RuntimeError: on the other ranks, where one of them failed within.
    """
    parameters: list[Any] = list(module.parameters())
    if any(_is_parted(parameter) for parameter in parameters):
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters), _together(parameters[0].device):
            yield dist.get_rank() == 0
    elif any(_is_sharded(parameter) for parameter in parameters):
        with _gathered(module), _together(parameters[0].device):
            yield dist.get_rank() == 0
    else:
        yield True


@contextmanager
def _gathered(module: nn.Module) -> Iterator[None]:
    """Within, whole tensors stand where DTensors were."""
    places = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if _is_sharded(parameter)
    ]
    found: list[Any] = [parameter for _, _, parameter in places]
    found = [nn.Parameter(p.detach().full_tensor(), p.requires_grad) for p in found]
    try:
        for (owner, name, _), parameter in zip(places, found, strict=True):
            owner._parameters[name] = parameter
        yield
    finally:
        for owner, name, sharded in places:
            owner._parameters[name] = sharded


@contextmanager
def _together(device: torch.device) -> Iterator[None]:
    """No rank leaves before all have come to the end, or hears that one of them did not."""
    failed = torch.ones((), dtype=torch.int32, device=device)
    own = True
    try:
        yield
        failed.zero_()
        own = False
    finally:
        dist.all_reduce(failed, dist.ReduceOp.MAX)
        if failed and not own:
            raise RuntimeError("another rank could not save: its own error says why")


def _is_sharded(parameter: Any) -> bool:
    return hasattr(parameter, "full_tensor")


def _is_parted(parameter: Any) -> bool:
    """Whether ZeRO-3 holds it, and not whole at the moment."""
    return hasattr(parameter, "ds_id") and parameter.ds_status.name == "NOT_AVAILABLE"
