"""Inputs, float64 truth and the error budget, for tests and benchmarks.

The budget is derived, never tuned: against float64 truth an implementation may err twice as much
(gradients: three times) as plain eager attention computed in the same precision does. It is
FlashAttention's rule. Eager's error counts as two units in the last place (gradients: four) more
than it happens to be: on a tiny problem it can vanish by luck.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prefixattn import reference
from prefixattn.api import make_problem, prefix_attention
from prefixattn.problem import DIFFERENTIABLE, Problem

Inputs = dict[str, Any]
# How many times eager's error, and how many units in the last place that error counts for at least;
# a gradient subtracts two sums, each with its own rounding.
OUTPUT, GRADIENT = (2.0, 2.0), (3.0, 4.0)


@dataclass(frozen=True)
class Case:
    """Sizes and features of one attention call; `make_inputs` fills it with random numbers.

    `index`, `lengths`, `starts`, `stops`, `offset` are the values of `prefix_index`,
    `prefix_lengths`, `key_start`, `key_length`, `query_offset`; `segments` are the (queries, keys)
    of packed sequences; `mask` and `bias` are shapes, `mask_dtype` "bool" or "float".
    """

    name: str
    B: int = 2
    H: int = 4
    H_kv: int = 2
    M: int = 7
    N: int = 7
    P: int = 5
    R: int = 1
    D: int = 16
    D_v: int | None = None
    causal: bool = True
    index: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    starts: tuple[int, ...] | None = None
    stops: tuple[int, ...] | None = None
    offset: int | tuple[int, ...] | None = None
    segments: tuple[tuple[int, int], ...] | None = None
    mask: tuple[int, ...] | None = None
    mask_dtype: str = "bool"
    bias: tuple[int, ...] | None = None
    gate: bool = False
    sinks: bool = False
    alibi: bool = False
    window: int | None = None
    positions: bool = False
    softcap: float | None = None
    scale: float | None = None


def make_inputs(
    case: Case,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    seed: int = 0,
    poison: bool = True,
) -> Inputs:
    """The arguments of `prefix_attention` for a case.

    Args:
        case: what to make.
        dtype: of query, key, value and prefix; the other float tensors are float32 or wider.
        device: where the tensors go.
        seed: of the numbers.
        poison: fill slots that the case says nobody may read with NaN.

    Returns:
        Keyword arguments; query, key and value are transposed views of `[B, S, H, D]`.
    """
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    def integers(values: tuple[int, ...] | None) -> Tensor | None:
        return None if values is None else torch.tensor(values, device=device)

    c, d_v = case, case.D_v or case.D
    inputs: Inputs = {
        "query": normal(c.B, c.M, c.H, c.D).transpose(1, 2),
        "key": normal(c.B, c.N, c.H_kv, c.D).transpose(1, 2),
        "value": normal(c.B, c.N, c.H_kv, d_v).transpose(1, 2),
        "prefix_key": normal(c.R, c.H_kv, c.P, c.D),
        "prefix_value": normal(c.R, c.H_kv, c.P, d_v),
        "prefix_index": integers(c.index),
        "prefix_lengths": integers(c.lengths),
        "key_start": integers(c.starts),
        "key_length": integers(c.stops),
        "query_offset": integers(c.offset) if isinstance(c.offset, tuple) else c.offset,
        "is_causal": c.causal,
        "window": c.window,
        "prefix_in_window": "positions" if c.positions else "visible",
        "softcap": c.softcap,
        "scale": c.scale,
    }
    if c.gate:
        inputs["prefix_gate"] = normal(c.H, dtype=wide)
    if c.sinks:
        inputs["sinks"] = normal(c.H, dtype=wide)
    if c.alibi:
        inputs["alibi_slopes"] = (2.0 ** -torch.arange(1, c.H + 1)).to(wide).to(device)
    if c.bias is not None:
        inputs["prefix_bias"] = normal(*c.bias, dtype=wide)
    if c.mask is not None:
        mask = normal(*c.mask, dtype=wide)
        inputs["attn_mask"] = mask > -0.5 if c.mask_dtype == "bool" else mask
    if c.segments is not None:
        for side, name in enumerate(("cu_seqlens_q", "cu_seqlens_k")):
            lengths = torch.tensor([0, *(segment[side] for segment in c.segments)])
            inputs[name] = lengths.cumsum(0).to(torch.int32).to(device)
    if poison:
        _poison(case, inputs)
    return inputs


def _poison(case: Case, inputs: Inputs) -> None:
    """NaN in every slot that nobody may read."""
    sequence, prefix = ("key", "value"), ("prefix_key", "prefix_value")
    for row in range(case.B):
        for name in sequence:
            if case.starts is not None:
                inputs[name][row, :, : case.starts[row]] = torch.nan
            if case.stops is not None:
                inputs[name][row, :, case.stops[row] :] = torch.nan
    for entry, tokens in enumerate(case.lengths or ()):
        for name in prefix:
            inputs[name][entry, :, tokens:] = torch.nan
    if case.segments is not None:
        for name in sequence:
            inputs[name][:, :, sum(keys for _, keys in case.segments) :] = torch.nan


@dataclass(frozen=True)
class Results:
    """A call's output, lse and gradients by argument name."""

    out: Tensor
    lse: Tensor
    grads: dict[str, Tensor]


Run = Callable[[Inputs], tuple[Tensor, Tensor]]


def evaluate(
    inputs: Inputs,
    run: Run,
    with_lse_gradient: bool = True,
    seed: int = 1,
    frozen: tuple[str, ...] = (),
) -> Results:
    """Run forward and backward, with random upstream gradients that depend on `seed` only.

    Args:
        inputs: the arguments of `prefix_attention`.
        run: from inputs to output and lse.
        with_lse_gradient: whether a gradient comes through lse too.
        seed: of the upstream gradients, drawn in float64.
        frozen: differentiable arguments that take no gradient this time.
    """
    leaves = {
        name: value.detach().requires_grad_()
        for name, value in inputs.items()
        if name in DIFFERENTIABLE
        and name not in frozen
        and isinstance(value, Tensor)
        and value.is_floating_point()
    }
    out, lse = run({**inputs, **leaves})
    generator = torch.Generator().manual_seed(seed)
    dout, dlse = (
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype).to(x.device)
        for x in (out, lse)
    )
    outputs, upstream = ([out, lse], [dout, dlse]) if with_lse_gradient else ([out], [dout])
    grads = torch.autograd.grad(outputs, list(leaves.values()), upstream, allow_unused=True)
    found = {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }
    return Results(out.detach(), lse.detach(), found)


def run_implementation(name: str) -> Run:
    """A `run` of `evaluate` through the public function."""

    def run(inputs: Inputs) -> tuple[Tensor, Tensor]:
        out, lse = prefix_attention(**inputs, implementation=name, return_lse=True)
        return out, lse

    return run


def widest(implementation: str) -> torch.dtype:
    """The most precise dtype an implementation takes."""
    return torch.float32 if implementation == "triton" else torch.float64


def truth(inputs: Inputs, with_lse_gradient: bool = True) -> Results:
    """The reference in float64 on exactly these numbers."""
    wide = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    return evaluate(wide, _eager(None), with_lse_gradient)


def eager(inputs: Inputs, with_lse_gradient: bool = True) -> Results:
    """Plain attention with every step in the inputs' own precision: the yardstick of errors."""
    return evaluate(inputs, _eager(inputs["query"].dtype), with_lse_gradient)


def _eager(dtype: torch.dtype | None) -> Run:
    return lambda inputs: reference.forward(make_problem(**inputs), dtype)[:2]


def assert_within_budget(got: Results, inputs: Inputs, with_lse_gradient: bool = True) -> None:
    """Raise an AssertionError that names what errs more than the budget allows.

    Args:
        got: results of the implementation under test on `inputs`.
        inputs: the arguments of `prefix_attention`.
        with_lse_gradient: as `got` was made.
    """
    exact, plain = truth(inputs, with_lse_gradient), eager(inputs, with_lse_gradient)
    dtype = inputs["query"].dtype
    faults = [
        over_budget("out", got.out, exact.out, plain.out, dtype, OUTPUT),
        over_budget("lse", got.lse, exact.lse, plain.lse, dtype, OUTPUT),
    ]
    for name, grad in got.grads.items():
        faults.append(
            over_budget(f"d{name}", grad, exact.grads[name], plain.grads[name], dtype, GRADIENT)
        )
    found = [fault for fault in faults if fault]
    assert not found, "; ".join(found)


def over_budget(
    name: str,
    got: Tensor,
    exact: Tensor,
    plain: Tensor,
    dtype: torch.dtype,
    allowed: tuple[float, float],
) -> str:
    """Words for an error over the budget; empty when all is well."""
    if got.shape != exact.shape:
        return f"{name}: shape {list(got.shape)}, expected {list(exact.shape)}"
    if got.numel() == 0:
        return ""
    blind = exact == -torch.inf
    if not torch.equal(got == -torch.inf, blind):
        return f"{name}: -inf in other places than the truth"
    got, exact, plain = (x.double().masked_fill(blind, 0) for x in (got, exact, plain))
    if not got.isfinite().all():
        return f"{name}: {int((~got.isfinite()).sum())} numbers are not finite"
    error = (got - exact).abs().max().item()
    plain_error = (plain - exact).abs().nan_to_num(0).max().item()
    # Sums end in the accumulator's rounding even where the eager error happens to vanish.
    # In float64 the truth rounds as the implementation does: any two orders of summation agree.
    unit = 1e-12 if dtype == torch.float64 else torch.finfo(dtype).eps
    factor, units = allowed
    budget = factor * (plain_error + units * unit * max(1.0, exact.abs().max().item()))
    return "" if error <= budget else f"{name}: error {error:.2e}, budget {budget:.2e}"


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within, every fresh allocation of torch is filled with NaN: an unwritten output shows.

    It turns deterministic algorithms on, which fill uninitialised memory.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def with_dropout(inputs: Inputs, dropout_p: float, seed: int, implementation: str) -> Run:
    """A `run` with a fixed dropout seed, through one implementation's operator."""
    from prefixattn.ops import attention

    fixed = torch.tensor([seed, 0], device=inputs["query"].device)

    def run(arguments: Inputs) -> tuple[Tensor, Tensor]:
        problem: Problem = make_problem(**arguments)
        problem = replace(problem, dropout_p=dropout_p, dropout_seed=fixed)
        return attention(problem, implementation)[:2]

    return run
