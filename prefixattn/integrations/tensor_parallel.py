"""A model whose heads lie on several devices: its prefix is whole on each, and layers read a part.

So that a prefix is made, saved and loaded as for any other model, and every rank's copy has the
same gradient: each rank computes those of its own heads, and the backward puts them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefixattn.integrations.refusal import refusal
from prefixattn.layers import PrefixBatch

if TYPE_CHECKING:
    from prefixattn.integrations.boarding import Source
    from prefixattn.integrations.survey import Site

HEADS = 1  # dimension of keys and values


def whole_sites(model: PreTrainedModel, sites: list[Site]) -> list[Site]:
    """The sites as they would be on one device, where the model's heads lie on several.

    Raises:
        NotImplementedError: a layer's heads are neither all here nor evenly spread.
    """
    if not (getattr(model, "tp_size", None) or 1) > 1:
        return sites
    group = _group(model)
    world = dist.get_world_size(group)
    found = []
    for site in sites:
        config: Any = getattr(site.module, "config", model.config).get_text_config()
        if site.num_heads == config.num_attention_heads:
            found.append(site)
        elif world * site.num_heads == config.num_attention_heads:
            key, value = (_gathered(x, group) for x in (site.key, site.value))
            heads = world * site.num_heads
            found.append(replace(site, key=key, value=value, num_heads=heads, group=group))
        else:
            why = f"{site.name} has {site.num_heads} of {config.num_attention_heads} heads here"
            raise refusal(model, why)
    return found


def _group(model: PreTrainedModel) -> dist.ProcessGroup:
    """The processes that share the model's heads."""
    mesh: Any = model._device_mesh
    if "tp" in (mesh.mesh_dim_names or ()):
        mesh = mesh["tp"]
    group: dist.ProcessGroup = mesh.get_group()
    return group


def _gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, HEADS)


class OwnHeads:
    """What `source` gives, of it the heads that this rank's layers have.

    Args:
        source: of all heads.
        groups: for each layer the processes that share its heads; None: they are all here.
    """

    def __init__(self, source: Source, groups: Sequence[dist.ProcessGroup | None]) -> None:
        self.source = source
        self.groups = groups
        self._last: tuple[PrefixBatch, PrefixBatch] | None = None  # whole, and this rank's part

    def __call__(self) -> PrefixBatch | None:
        batch = self.source()
        if batch is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None if batch is None else self._part_of(batch)
        last = self._last
        if last is None or last[0] is not batch:
            self._last = last = batch, self._part_of(batch)
        return last[1]

    def __getstate__(self) -> dict[str, object]:
        """Copies and pickles need not hold what can be made again."""
        return vars(self) | {"_last": None}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Of the source."""
        return self.source.parameters

    @property
    def num_tokens(self) -> int:
        """Of the source."""
        return self.source.num_tokens

    def _part_of(self, batch: PrefixBatch) -> PrefixBatch:
        gates = batch.gates or [None] * len(batch.pairs)
        pairs: list[tuple[Tensor, Tensor] | None] = []
        own_gates: list[Tensor | None] = []
        for pair, gate, group in zip(batch.pairs, gates, self.groups, strict=True):
            if group is not None and pair is not None:
                key, value = _own(pair, HEADS, group)
                pair = key, value
            if group is not None and gate is not None:
                (gate,) = _own((gate,), 0, group)
            pairs.append(pair)
            own_gates.append(gate)
        return replace(batch, pairs=pairs, gates=own_gates if batch.gates else None)


def _own(tensors: Sequence[Tensor], dim: int, group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        found: tuple[Tensor, ...] = _Own.apply(dim, group, *tensors)
        return found
    return _parts(tensors, dim, group)


def _parts(tensors: Sequence[Tensor], dim: int, group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    return tuple(x.chunk(world, dim)[rank] for x in tensors)


class _Own(torch.autograd.Function):
    """Some of the heads; the backward gathers the gradients of all ranks' heads, in one message."""

    @staticmethod
    def forward(
        ctx: Any, dim: int, group: dist.ProcessGroup, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.dim, ctx.group = dim, group
        return _parts(tensors, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        mine = torch.cat([grad.flatten() for grad in grads])
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(ctx.group))]
        dist.all_gather(everyone, mine, group=ctx.group)
        split = [part.split([grad.numel() for grad in grads]) for part in everyone]
        whole = (
            torch.cat([part.view_as(grad) for part in parts], ctx.dim)
            for grad, parts in zip(grads, zip(*split, strict=True), strict=True)
        )
        return None, None, *whole
