"""Models that a library has spread over processes: what it must have been told of the prefix."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from prefixattn.ranks import on_several


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP, of either generation, has the module's parameters in its hands."""
    return any(
        kind.__name__ in ("FSDPModule", "FullyShardedDataParallel") for kind in type(module).__mro__
    )


class AsAttached:
    """A prefix's parameters as they were when it was attached; copies know nothing of theirs.

    FSDP2 puts others in the place of those that it reduces, and DistributedDataParallel lists them.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._known = {id(parameter): weakref.ref(parameter) for parameter in parameters}

    def check(self, stack: nn.Module, parameters: Callable[[], list[nn.Parameter]]) -> None:
        """Refuse to train what nothing would reduce over the ranks.

        Args:
            stack: what runs now, with gradients.
            parameters: gives the prefix's.

        Raises:
            RuntimeError: the model was wrapped before it had its prefix, or without it.
        """
        if not on_several():
            return
        trained = [parameter for parameter in parameters() if parameter.requires_grad]
        wrapper: Any = getattr(DistributedDataParallel, "_active_ddp_module", None)
        if wrapper is not None and any(module is stack for module in wrapper.modules()):
            reduced = {id(parameter) for parameter in wrapper._module_parameters}
            if any(id(parameter) not in reduced for parameter in trained):
                raise RuntimeError(
                    "DistributedDataParallel does not know this prefix, and would leave each rank "
                    "its own gradients: attach first, then wrap"
                )
        sharded = any(is_sharded(module) for module in stack.modules())
        if sharded and any(self._is_as_attached(parameter) for parameter in trained):
            raise RuntimeError(
                "fully_shard was given layers and not the model, and would leave each rank its own "
                "gradients of the prefix: fully_shard(model) too, once the prefix is attached"
            )

    def _is_as_attached(self, parameter: nn.Parameter) -> bool:
        known = self._known.get(id(parameter))
        return known is not None and known() is parameter

    def __reduce__(self) -> tuple[Any, ...]:
        return AsAttached, ((),)
