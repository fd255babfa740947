"""The operators `prefixattn::attention` and `prefixattn::attention_backward`.

One schema for all implementations: the fields of `Problem` and the implementation's name, or "auto"
where a graph was recorded that may run on another machine than the one it was made on. The
backward is an operator of its own, so that compilers and DTensor can see and dispatch it. It takes
the output and the log-sum-exp it starts from as arguments, which ring and context parallelism need;
`lse_rest` is what rounding took from `lse` (see `prefixattn.gradients`).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from prefixattn import quick
from prefixattn.choose import resolve
from prefixattn.operands import is_batched, readable
from prefixattn.problem import (
    DIFFERENTIABLE,
    FIELD_NAMES,
    TENSOR_FIELDS,
    Problem,
    schema_arguments,
)
from prefixattn.rules import check_values

NAMESPACE = "prefixattn"
BROADCAST = ("prefix_bias", "attn_mask")  # whose last dimension may have any stride, 0 too
FORWARD = {
    "triton": "prefixattn.kernels.forward",
    "cpu": "prefixattn.cpu",
    "sdpa": "prefixattn.sdpa",
    "reference": "prefixattn.reference",
}
BACKWARD = {
    "triton": "prefixattn.kernels.backward",
    "cpu": "prefixattn.cpu",
    "sdpa": "prefixattn.sdpa",
    "reference": "prefixattn.reference",
}

_library = torch.library.Library(NAMESPACE, "DEF")
_library.define(
    f"attention({schema_arguments()}, str implementation)"
    " -> (Tensor out, Tensor lse, Tensor lse_rest)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_OF_BACKWARD = (
    "Tensor? dout, Tensor? dlse, Tensor out, Tensor lse, Tensor lse_rest, "
    f"{schema_arguments()}, str implementation"
)
_library.define(
    f"attention_backward({_OF_BACKWARD}, str[] wanted) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# For upstream gradients that are batched (is_grads_batched=True, vectorised jacobians): torch calls
# an operator that returns one tensor once for each member of a batch, and refuses one of a list.
_library.define(f"attention_gradient({_OF_BACKWARD}, str wanted) -> Tensor")


def attention(problem: Problem, implementation: str) -> tuple[Tensor, Tensor, Tensor]:
    """Run the forward operator.

    Args:
        problem: a checked problem.
        implementation: what `choose.choose` or, for a graph, `choose.recorded` gave.

    Returns:
        `out [B, H, M, D_v]` and `lse [B, H, M]`, both differentiable, and `lse_rest [B, H, M]`.
    """
    tensors = [getattr(problem, name) for name in TENSOR_FIELDS]
    if quick.unwatched() and all(x is None or quick.plain(x) for x in tensors):
        return _Eager.apply(problem, implementation, *tensors)
    if not torch.compiler.is_compiling():
        _refuse_transforms(problem)
        if any(type(x).__name__ == "DTensor" for x in tensors):  # torch.distributed may be absent
            importlib.import_module("prefixattn.distributed.sharding").check(problem)
    return torch.ops.prefixattn.attention(*problem.arguments, implementation)


def _refuse_transforms(problem: Problem) -> None:
    """torch.func and forward-mode derivatives would fail deep inside torch, or give zeros."""
    if torch._C._functorch.maybe_current_level() is not None:
        raise NotImplementedError(
            "prefix_attention does not run under the transforms of torch.func (grad, vjp, jvp, "
            "vmap): use torch.autograd.grad, and the batch dimension B with prefix_index"
        )
    if forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(value).tangent is not None
        for value in problem.arguments
        if isinstance(value, Tensor)
    ):
        raise NotImplementedError("prefix_attention has no forward-mode derivative")


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    problem = Problem(*arguments[:-1])
    return _run_forward(problem, resolve(arguments[-1], problem))


def _run_forward(problem: Problem, implementation: str) -> tuple[Tensor, Tensor, Tensor]:
    problem = _readable(problem)
    check_values(problem)
    with _no_autocast(problem):
        out, *numbers = importlib.import_module(FORWARD[implementation]).forward(problem)
    lse, lse_rest = (x.contiguous() for x in numbers)
    return _laid_out(out, problem.output_strides), lse, lse_rest


def _backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    lse_rest: Tensor,
    *arguments: Any,
) -> list[Tensor]:
    upstream = (dout, dlse, out, lse, lse_rest)
    problem, (implementation, wanted) = Problem(*arguments[:-2]), arguments[-2:]
    return _run_backward(*upstream, problem, resolve(implementation, problem), wanted)


def _gradient(*arguments: Any) -> Tensor:
    return _backward(*arguments[:-1], [arguments[-1]])[0]


def _run_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    lse_rest: Tensor,
    problem: Problem,
    implementation: str,
    wanted: Sequence[str],
) -> list[Tensor]:
    # Upstream gradients may be expanded, as of a sum; ring attention merges results in float32.
    problem, dtype, wide = _readable(problem), problem.query.dtype, problem.accumulator
    dout = None if dout is None else readable("the gradient of the output", dout.to(dtype), True)
    dlse = None if dlse is None else readable("the gradient of lse", dlse.to(wide), False)
    out = readable("the output", out.to(dtype), True)
    lse, lse_rest = (readable("lse", x.to(wide), False) for x in (lse, lse_rest))
    with _no_autocast(problem):
        module = importlib.import_module(BACKWARD[implementation])
        grads = module.backward(problem, dout, dlse, out, lse, lse_rest, tuple(wanted))
    return [_like(grad, getattr(problem, name)) for name, grad in zip(wanted, grads, strict=True)]


def _no_autocast(problem: Problem) -> AbstractContextManager[object]:
    """Inputs were cast before; the float32 arithmetic inside stays float32."""
    device = problem.query.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def _readable(problem: Problem) -> Problem:
    """The problem with tensors that a kernel can read."""
    given = {name: getattr(problem, name) for name in TENSOR_FIELDS}
    found = {
        name: None if x is None else readable(name, x, in_rows=name not in BROADCAST)
        for name, x in given.items()
    }
    return problem if all(found[name] is given[name] for name in given) else problem.but(**found)


def _like(grad: Tensor, argument: Tensor) -> Tensor:
    """The gradient with the strides of `empty_like`: the argument's own, if that is dense."""
    if grad.stride() == argument.stride() and grad.untyped_storage().nbytes() == grad.nbytes:
        return grad
    return _laid_out(grad, torch.empty_like(argument, device="meta").stride())


def _laid_out(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The tensor with the strides that the fake kernel promised to compilers."""
    if tensor.stride() == strides:
        return tensor
    return tensor.new_empty_strided(tensor.shape, strides).copy_(tensor)


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return Problem(*arguments[:-1]).empty_output()


def _fake_backward(*arguments: Any) -> list[Tensor]:
    problem, wanted = Problem(*arguments[5:-2]), arguments[-1]
    return [torch.empty_like(getattr(problem, name)) for name in wanted]


def _save(ctx: Any, *tensors: Tensor | None) -> None:
    """Save as autograd saves: what is packed away or changed since is noticed."""
    ctx.save_for_backward(*tensors)
    ctx.kinds = [None if x is None else (x.shape, x.dtype, x.device) for x in tensors]


def _saved(ctx: Any) -> tuple[Any, ...]:
    """What `_save` saved, as hooks give it back; in other strides at most."""
    tensors: tuple[Any, ...] = ctx.saved_tensors
    for tensor, kind in zip(tensors, ctx.kinds, strict=True):
        if tensor is not None and (tensor.shape, tensor.dtype, tensor.device) != kind:
            raise RuntimeError(
                "saved_tensors_hooks: expected the tensor that was packed, "
                f"{kind[1]} {list(kind[0])} on {kind[2]}, "
                f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
    return tensors


def _call_backward(
    upstream: Sequence[Tensor | None], arguments: Sequence[Any], wanted: list[str]
) -> list[Tensor]:
    """The backward operator; `arguments` are the forward operator's."""
    operators = torch.ops.prefixattn
    if not torch.compiler.is_compiling() and any(x is not None and is_batched(x) for x in upstream):
        return [operators.attention_gradient(*upstream, *arguments, name) for name in wanted]
    grads: list[Tensor] = operators.attention_backward(*upstream, *arguments, wanted)
    return grads


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # an unused lse must not receive zeros
    ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
    ctx.others = [value for value in inputs if not isinstance(value, Tensor)]
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    ctx.mark_non_differentiable(output[2])
    _save(ctx, *output, *tensors)


def _autograd_backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: None) -> tuple:
    out, lse, lse_rest, *tensors = _saved(ctx)
    sources = {True: iter(tensors), False: iter(ctx.others)}
    inputs = [next(sources[is_tensor]) for is_tensor in ctx.is_tensor]
    places = [FIELD_NAMES.index(name) for name in DIFFERENTIABLE]
    wanted = [
        name for name, at in zip(DIFFERENTIABLE, places, strict=True) if ctx.needs_input_grad[at]
    ]
    grads: list[Tensor | None] = [None] * len(inputs)
    if dout is None and dlse is None:
        return tuple(grads)
    upstream = (dout, dlse, out, lse, lse_rest)
    found = _call_backward(upstream, inputs, wanted)
    for name, grad in zip(wanted, found, strict=True):
        grads[FIELD_NAMES.index(name)] = grad
    return tuple(grads)


class _Eager(torch.autograd.Function):
    """The operator without its dispatch, which costs more than a small attention itself."""

    @staticmethod
    def forward(
        ctx: Any, problem: Problem, implementation: str, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        results = _run_forward(problem, implementation)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(results[2])
        # Every tensor is saved, and nothing else keeps it alive.
        ctx.problem = problem.but(**dict.fromkeys(TENSOR_FIELDS))
        ctx.implementation = implementation
        _save(ctx, *results, *tensors)
        return results

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: None) -> tuple[Any, ...]:
        out, lse, lse_rest, *tensors = _saved(ctx)
        problem = ctx.problem.but(**dict(zip(TENSOR_FIELDS, tensors, strict=True)))
        needed = dict(zip(TENSOR_FIELDS, ctx.needs_input_grad[2:], strict=True))
        wanted = [name for name in DIFFERENTIABLE if needed[name]]
        if dout is None and dlse is None:
            return (None,) * len(ctx.needs_input_grad)
        upstream = (dout, dlse, out, lse, lse_rest)
        watched = not quick.unwatched() or any(x is not None and is_batched(x) for x in upstream)
        if torch.is_grad_enabled() or watched:  # the operator says what it cannot
            grads = _call_backward(upstream, [*problem.arguments, ctx.implementation], wanted)
        else:
            grads = _run_backward(*upstream, problem, ctx.implementation, wanted)
        found = dict(zip(wanted, grads, strict=True))
        return (None, None, *(found.get(name) for name in TENSOR_FIELDS))


def _no_double_backward(ctx: Any, *grads: Tensor) -> NoReturn:
    raise NotImplementedError(
        "prefix_attention has no second derivative: its backward cannot be differentiated "
        "(create_graph=True)"
    )


for _name, _run, _fake in (
    ("attention", _forward, _fake_forward),
    ("attention_backward", _backward, _fake_backward),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=_library)
torch.library.register_autograd(
    f"{NAMESPACE}::attention", _autograd_backward, setup_context=_setup_context, lib=_library
)
torch.library.register_autograd(
    f"{NAMESPACE}::attention_backward", _no_double_backward, lib=_library
)
_library.impl("attention_gradient", _gradient, "CompositeExplicitAutograd")
