"""The short way of a plain call: a CPU, five tensors and no other feature.

An operator of 28 arguments costs some 80 us of checks and dispatch before any arithmetic, ten times
a small attention. What the checks look at (shapes, strides, dtypes) is the same for every layer and
mostly for every call, so that here they are made once for each. The operator itself serves whoever
watches operators: compilers, tracers, modes, profilers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from prefixattn.problem import Problem

PLAIN = {Tensor, Parameter}
MOST = 1024


class Run(Protocol):
    """A forward of the five tensors; lse is None unless asked for. `problem` is one such call's."""

    problem: Problem

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, /, *, with_lse: bool
    ) -> tuple[Tensor, Any]: ...


_runs: dict[object, Run | None] = {}


def unwatched() -> bool:
    """Whether nothing has to see operators now: compiler, tracer, mode, transform, profiler."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state()
        or torch._C._functorch.maybe_current_level() is not None
        or forward_ad._current_level >= 0
        or torch.autograd._profiler_enabled()
    )


def plain(tensor: Tensor) -> bool:
    """Whether the tensor is what its memory says: no subclass, no sign yet to be applied."""
    return type(tensor) in PLAIN and not tensor.is_neg()


def takes(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> bool:
    """Whether nothing but the numbers in the tensors' own memory is asked for, now and here."""
    if not unwatched() or torch.is_autocast_enabled("cpu"):
        return False
    # Written out: this runs at every call, and five calls of `plain` would cost a microsecond.
    if not {type(q), type(k), type(v), type(pk), type(pv)} <= PLAIN:
        return False
    if not (q.is_cpu and k.is_cpu and v.is_cpu and pk.is_cpu and pv.is_cpu):
        return False
    if q.is_nested or k.is_nested or v.is_nested or pk.is_nested or pv.is_nested:
        return False
    return not (q.is_neg() or k.is_neg() or v.is_neg() or pk.is_neg() or pv.is_neg())


def likeness(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> object:
    """What two calls have in common that one run serves: all but numbers and addresses."""
    return (
        (type(q), q.dtype, q.shape, q.stride(), k.dtype, k.shape, k.stride(), v.dtype, v.shape),
        (v.stride(), pk.dtype, pk.shape, pk.stride(), pv.dtype, pv.shape, pv.stride()),
        (type(k), type(v), type(pk), type(pv), q.is_neg(), k.is_neg(), v.is_neg()),
    )


def run_for(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pk: Tensor,
    pv: Tensor,
    options: tuple[object, ...],
    prepare: Callable[..., Run | None],
    runs: dict[object, Run | None] | None = None,
) -> Run | None:
    """What `prepare(q, ..., *options)` returned for such tensors; None: they have no short way.

    `runs` is where it is kept, for those of the caller whose options say something of single keys.
    Else it is for all calls, and for one query of any number of keys: decoding meets a new one at
    every step.
    """
    keys: object
    sizes, more = k.shape, v.shape
    if runs is None and q.ndim == len(sizes) == len(more) == 4 and q.shape[2] == 1:
        keys = (sizes[0], sizes[1], sizes[3], k.stride(3), more[0], more[1], more[3], v.stride(3))
        keys = (keys, sizes[2] == more[2], sizes[2] > 0, k.dtype, v.dtype)
    else:
        keys = (sizes, k.stride(), k.dtype, more, v.stride(), v.dtype)
    runs = _runs if runs is None else runs
    kinds = (
        (q.shape, q.stride(), q.dtype, pk.shape, pk.stride(), pk.dtype, pv.shape, pv.stride()),
        (pv.dtype, keys, options),
    )
    if kinds not in runs:
        if len(runs) >= MOST:
            runs.clear()
        runs[kinds] = prepare(q, k, v, pk, pv, *options)
    return runs.get(kinds)


def forget() -> None:
    """Forget all calls: which implementation runs here may have changed."""
    _runs.clear()
