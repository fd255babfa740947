"""Which implementation runs, and why, in words."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch

from prefixattn.problem import Problem


class Implementation(NamedTuple):
    """One way to compute the operation.

    `obstacle` says why it cannot run on this machine, `refusal` why it cannot take a problem (None:
    it can), `words` how it would compute one. `obstacle` is told whether it was asked for by name.
    `without_gradient` names the arguments whose gradients it does not compute.
    """

    name: str
    obstacle: Callable[[bool], str | None]
    refusal: Callable[[Problem], str | None]
    words: Callable[[Problem], str]
    built: bool = False  # the answer of `obstacle` may take a while: other questions come first
    without_gradient: tuple[str, ...] = ()


HAS_TRITON = find_spec("triton") is not None
WIDEST_HEAD = 256
LONGEST_STRIDE = 2**24  # a tile's offsets have 32 bits


def _triton_obstacle(by_name: bool) -> str | None:
    if not HAS_TRITON:
        return "the package triton is not installed"
    if _interpreted():
        return None if by_name else "TRITON_INTERPRET=1 interprets the kernels: slow, by name only"
    if not torch.cuda.is_available():
        return "torch finds no CUDA or ROCm device (TRITON_INTERPRET=1 interprets the kernels)"
    return None


def _triton_refusal(p: Problem) -> str | None:
    if p.query.dtype == torch.float64:
        return "its kernels take float16, bfloat16 and float32, not float64"
    if max(p.D, p.D_v) > WIDEST_HEAD:
        return f"its kernels take head dims up to {WIDEST_HEAD}, not {max(p.D, p.D_v)}"
    for name in ("query", "key", "value", "prefix_key", "prefix_value"):
        if getattr(p, name).stride(2) >= LONGEST_STRIDE:
            return f"its kernels take {name} with under 2^24 numbers from a token to the next"
    if _interpreted():
        return None
    device = p.query.device
    if device.type != "cuda":
        return f"its kernels take tensors on a CUDA or ROCm device, not on {device.type}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "its kernels need compute capability 8.0 or newer"
    return None


def _interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU, as Triton itself reads it."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def _cpu_obstacle(by_name: bool) -> str | None:
    """The first question builds the kernels, where that was not done yet."""
    from prefixattn import build

    return build.obstacle()


# What torch.compiler.assume_constant_result sets; the function itself would import dynamo here.
_cpu_obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _cpu_refusal(p: Problem) -> str | None:
    if p.query.device.type != "cpu":
        return f"its kernels take tensors on the CPU, not on {p.query.device.type}"
    return None


def _cpu_words(problem: Problem) -> str:
    from prefixattn import cpu

    return f"fused C++ kernels ({cpu.instructions()}): prefix and sequence, where they lie"


def _sdpa_words(problem: Problem) -> str:
    from prefixattn import sdpa

    return sdpa.describe(problem)


def _anything(problem: Problem) -> None:
    return None


# In the order of preference.
IMPLEMENTATIONS = (
    Implementation(
        "triton",
        _triton_obstacle,
        _triton_refusal,
        lambda problem: "fused Triton kernels: prefix and sequence in one loop, where they lie",
        without_gradient=("attn_mask", "prefix_bias"),
    ),
    Implementation("cpu", _cpu_obstacle, _cpu_refusal, _cpu_words, built=True),
    Implementation("sdpa", lambda by_name: None, _anything, _sdpa_words),
    Implementation(
        "reference",
        lambda by_name: None,
        _anything,
        lambda problem: "eager PyTorch that materialises all scores",
    ),
)
NAMES = tuple(found.name for found in IMPLEMENTATIONS)
AUTO_WITH_GRADIENTS = "auto with all gradients"
"""What a graph says in the place of "auto" where not every implementation has its gradients."""


def choose(implementation: str, problem: Problem | None = None) -> str:
    """The name of the implementation that runs: the first that can, or the one asked for.

    Args:
        implementation: "auto" or a name.
        problem: a checked problem; None asks about this machine alone.

    Raises:
        ValueError: `implementation` is no name of one.
        NotImplementedError: the one asked for cannot run, or not with this problem. It never falls
            back.
    """
    if implementation not in ("auto", *NAMES):
        raise ValueError(
            f"implementation: expected 'auto' or one of {', '.join(NAMES)}, got {implementation!r}"
        )
    for found in IMPLEMENTATIONS:
        if implementation == "auto" and _reason(found, problem, by_name=False) is None:
            return found.name
        if implementation == found.name:
            reason = _reason(found, problem, by_name=True)
            if reason is not None:
                raise NotImplementedError(
                    f"implementation: {implementation!r} cannot run here: {reason}"
                )
    return implementation


def recorded(implementation: str, problem: Problem) -> str:
    """What a graph says of its implementation: "auto" is chosen where it runs, a name stays a name.

    A graph that is traced, exported or compiled may run on another machine or device than this one.
    Only while it is made is it known which gradients it will be asked for.

    Raises:
        ValueError, NotImplementedError: as `choose` does, for a name.
    """
    if implementation != "auto":
        return choose(implementation, problem)
    partial = any(_missing_gradient(found, problem) for found in IMPLEMENTATIONS)
    return AUTO_WITH_GRADIENTS if partial else implementation


def resolve(recorded: str, problem: Problem) -> str:
    """The name of the implementation that an operator of a graph runs, forward and backward alike.

    Args:
        recorded: what `recorded` gave when the graph was made.
        problem: the operator's.

    Raises:
        NotImplementedError: the graph names one that cannot run here, or not with this problem.
    """
    if recorded != AUTO_WITH_GRADIENTS:
        return choose(recorded, problem)
    complete = [found for found in IMPLEMENTATIONS if not found.without_gradient]
    return next(found.name for found in complete if _reason(found, problem, by_name=False) is None)


def _missing_gradient(found: Implementation, problem: Problem) -> str | None:
    """The argument whose gradient is asked for and which the implementation does not compute."""
    if torch.is_grad_enabled():
        for name in found.without_gradient:
            argument = getattr(problem, name)
            if argument is not None and argument.requires_grad:
                return name
    return None


def _reason(found: Implementation, problem: Problem | None, by_name: bool) -> str | None:
    """Why an implementation cannot run; None if it can."""
    refused = problem is not None and found.built and found.refusal(problem)
    reason = refused or found.obstacle(by_name)
    if reason is None and problem is not None:
        reason = found.refusal(problem)
        if reason is None and (name := _missing_gradient(found, problem)):
            reason = f"its kernels have no gradient for {name}"
    return reason


def explanation(problem: Problem, implementation: str) -> str:
    """The choice in words, then a line for each implementation."""
    try:
        lines = [f"{choose(implementation, problem)} runs (implementation={implementation!r})"]
    except NotImplementedError as error:
        lines = [f"nothing runs: {error}"]
    for found in IMPLEMENTATIONS:
        reason = _reason(found, problem, by_name=implementation == found.name)
        if reason is None:
            lines.append(f"  {found.name} can: {found.words(problem)}")
        else:
            lines.append(f"  {found.name} cannot: {reason}")
    return "\n".join(lines)
