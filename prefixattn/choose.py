"""Which implementation runs, and why, in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from prefixattn.problem import Problem


class Implementation(NamedTuple):
    """One way to compute the operation.

    `obstacle` says why it cannot run on this machine (None: it can), `words` how it would compute
    a problem.
    """

    name: str
    obstacle: Callable[[], str | None]
    words: Callable[[Problem], str]


def _sdpa_words(problem: Problem) -> str:
    from prefixattn import sdpa

    return sdpa.describe(problem)


# In the order of preference.
IMPLEMENTATIONS = (
    Implementation(
        "triton",
        lambda: "the Triton kernels are not part of this version",
        lambda problem: "fused Triton kernels",
    ),
    Implementation(
        "cpu",
        lambda: "the C++ kernels are not part of this version",
        lambda problem: "fused C++ kernels",
    ),
    Implementation("sdpa", lambda: None, _sdpa_words),
    Implementation(
        "reference", lambda: None, lambda problem: "eager PyTorch that materialises all scores"
    ),
)
NAMES = tuple(found.name for found in IMPLEMENTATIONS)


def choose(implementation: str) -> str:
    """The name of the implementation that runs: the first usable one, or the one asked for.

    Raises:
        ValueError: `implementation` is no name of one.
        NotImplementedError: the one asked for cannot run. It never falls back.
    """
    if implementation not in ("auto", *NAMES):
        raise ValueError(
            f"implementation: expected 'auto' or one of {', '.join(NAMES)}, got {implementation!r}"
        )
    for name, obstacle, _ in IMPLEMENTATIONS:
        if implementation == "auto" and obstacle() is None:
            return name
        if implementation == name and (reason := obstacle()) is not None:
            raise NotImplementedError(f"implementation: {name!r} cannot run here: {reason}")
    return implementation


def explanation(problem: Problem, implementation: str) -> str:
    """The choice in words, then a line for each implementation."""
    try:
        lines = [f"{choose(implementation)} runs (implementation={implementation!r})"]
    except NotImplementedError as error:
        lines = [f"nothing runs: {error}"]
    for name, obstacle, words in IMPLEMENTATIONS:
        reason = obstacle()
        lines.append(
            f"  {name} can: {words(problem)}" if reason is None else f"  {name} cannot: {reason}"
        )
    return "\n".join(lines)
