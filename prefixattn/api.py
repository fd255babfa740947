"""The public operation: one softmax over a prefix and a sequence that stay where they are."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from prefixattn import quick, scalars
from prefixattn.choose import choose, explanation, recorded
from prefixattn.operands import check_layout
from prefixattn.ops import attention
from prefixattn.philox import new_seed
from prefixattn.problem import TENSORS, Problem
from prefixattn.rules import check, check_values


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    prefix_index: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    prefix_gate: Tensor | None = None,
    prefix_bias: Tensor | None = None,
    is_causal: bool = False,
    query_offset: int | Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_start: Tensor | None = None,
    key_length: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    scale: float | None = None,
    window: int | None = None,
    prefix_in_window: Literal["visible", "positions"] = "visible",
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    implementation: str = "auto",
    deterministic: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend to a prefix and a sequence in one softmax, without concatenating or copying them.

    Sizes: batch `B`, query heads `H = group * H_kv`, queries `M`, sequence keys `N`, bank entries
    `R`, prefix tokens `P`, head dims `D` and `D_v`; "rows" are the batch rows, or the segments of a
    packed batch. Any strides with a contiguous last dimension.

    Args:
        query: `[B, H, M, D]`, float16, bfloat16, float32 or float64.
        key: `[B, H_kv, N, D]`, dtype and device as query.
        value: `[B, H_kv, N, D_v]`.
        prefix_key: `[R, H_kv, P, D]`. Visible to every query, before and beside causality.
        prefix_value: `[R, H_kv, P, D_v]`.
        prefix_index: int `[rows]`, each row's bank entry, -1 for none. None: `R == 1` is shared by
            all rows, `R == rows` is one each.
        prefix_lengths: int `[R]`, used tokens of each entry, at most `P`.
        prefix_gate: float `[H]`, the form of LLaMA-Adapter (Zhang et al., 2023): two softmaxes,
            `sequence + gate * prefix`; sinks and lse then belong to the sequence half.
        prefix_bias: additive float, broadcastable to `[B, H, M, P]`.
        is_causal: query `i` sees the sequence keys at positions up to its own.
        query_offset: position of query 0 (key `j` is at `j`): an int, or an int tensor `[]` or
            `[rows]`. None: `N - M`, the last query meets the last key; in each segment if packed.
        attn_mask: bool (true: attend) or additive float, broadcastable to `[B, H, M, N]`; it
            concerns the sequence half only.
        key_start: int `[B]`, first slot in use (left padding).
        key_length: int `[B]`, one past the last slot in use, counted from slot 0 (right padding,
            or a cache with room). Slots outside may hold anything.
        cu_seqlens_q: int `[segments + 1]`, where packed sequences begin and end; then `B == 1`.
        cu_seqlens_k: int `[segments + 1]`, the same for keys.
        max_seqlen_q: the longest segment's queries, if known.
        max_seqlen_k: the longest segment's keys, if known.
        scale: factor on the scores. None: `D ** -0.5`.
        window: a query at position `p` sees the keys at positions `> p - window`.
        prefix_in_window: "visible": the window does not concern the prefix. "positions": token `j`
            of a prefix of `n` sits at `key_start + j - n`, right before the text.
        softcap: `softcap * tanh(scores / softcap)`, prefix included.
        sinks: float `[H]`, a logit per head that enters the denominator once.
        alibi_slopes: float `[H]`, `-slope * |distance|` is added; for the prefix only under
            "positions". It has no gradient.
        dropout_p: probability with which an attention weight is dropped, in `[0, 1)`.
        return_lse: whether to return the log-sum-exp too.
        implementation: "auto", or "triton", "cpu", "sdpa", "reference"; by name it never
            falls back.
        deterministic: the same bits each run. None: as
            `torch.are_deterministic_algorithms_enabled()`.

    Returns:
        The output `[B, H, M, D_v]`, and with `return_lse` also lse `[B, H, M]`: natural log,
        float32 (float64 for float64 input). A row that sees no key gives zeros and `-inf`.
        Differentiable in query, key, value, prefix_key, prefix_value, prefix_gate, prefix_bias, a
        float attn_mask and sinks, through both. Autocast casts the first five to its dtype.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, a device, a number or a combination of arguments is wrong.
        NotImplementedError: the implementation asked for cannot take this call.
    """
    plain = (
        prefix_index is prefix_lengths is prefix_gate is prefix_bias is query_offset is attn_mask  # type: ignore[comparison-overlap]
        is key_start is key_length is cu_seqlens_q is cu_seqlens_k is max_seqlen_q is max_seqlen_k
        is window is softcap is sinks is alibi_slopes is deterministic is None
    )  # fmt: skip
    plain = plain and type(dropout_p) is float and dropout_p == 0 and type(is_causal) is bool
    if plain and prefix_in_window == "visible":
        tensors = (query, key, value, prefix_key, prefix_value)
        options = (is_causal, scale, implementation)
        known = type(return_lse) is bool and type(implementation) is str
        known = known and (scale is None or type(scale) is float)
        if known and quick.takes(*tensors):
            run = quick.run_for(*tensors, options, _prepare_plain)
            if run is not None:
                if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
                    fields = dict(zip(TENSORS, tensors, strict=True))
                    strict = torch.are_deterministic_algorithms_enabled()
                    problem = run.problem.but(**fields, deterministic=strict)
                    out, lse, _ = attention(problem, "cpu")
                else:
                    out, lse = run(*tensors, with_lse=return_lse)
                return (out, lse) if return_lse else out
    # Not before the short way: a dictionary of all arguments costs half a microsecond.
    arguments: dict[str, Any] = dict(zip(ARGUMENTS, map(locals().get, ARGUMENTS), strict=True))
    return_lse = scalars.plain(return_lse)
    if not isinstance(return_lse, bool):
        raise TypeError(f"return_lse: expected a bool, got {scalars.kind(return_lse)}")
    problem = make_problem(**arguments)
    if problem.dropout_p > 0:
        problem = replace(problem, dropout_seed=new_seed(query.device))
    find = choose if quick.unwatched() else recorded
    out, lse, _ = attention(problem, find(implementation, problem))
    return (out, lse) if return_lse else out


def _prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    *,
    implementation: str = "auto",
    **options: Any,
) -> quick.Run | None:
    """The short way of calls like this one, if it is the C++ kernels that would run."""
    problem = make_problem(query, key, value, prefix_key, prefix_value, **options)
    plain = problem.prefix_gate is None and problem.dropout_p == 0
    if not plain or choose(implementation, problem) != "cpu":
        return None
    check_values(problem)
    from prefixattn.cpu import Prepared

    return Prepared(problem)


def _prepare_plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    is_causal: bool,
    scale: float | None,
    implementation: str,
) -> quick.Run | None:
    tensors = (query, key, value, prefix_key, prefix_value)
    return _prepare(*tensors, implementation=implementation, is_causal=is_causal, scale=scale)


class Repeated:
    """`prefix_attention` for calls that differ in their five tensors alone: a forward's layers.

    Where no gradients are computed, what such calls have in common is checked and prepared once.
    The other tensors must stay as they are for as long as this object is used.
    """

    def __init__(self) -> None:
        self._runs: dict[object, quick.Run | None] = {}  # a run keeps its tensors, and so their ids
        self._last: tuple[object, quick.Run] | None = None  # of plain calls: what they were like

    def plainly(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prefix_key: Tensor,
        prefix_value: Tensor,
        is_causal: bool,
        scale: float | None,
        implementation: str,
    ) -> Tensor:
        """`prefix_attention` without any other argument.

        What watches operators is looked for once: it does not come or go within a forward.
        """
        tensors = (query, key, value, prefix_key, prefix_value)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            options: dict[str, Any] = {"is_causal": is_causal, "scale": scale}
            out = prefix_attention(*tensors, implementation=implementation, **options)
            assert isinstance(out, Tensor)  # and not the pair that return_lse gives
            return out
        like = quick.likeness(*tensors), is_causal, scale
        last = self._last  # which another thread may replace
        if last is not None and last[0] == like:
            return last[1](*tensors, with_lse=False)[0]
        run = None
        if quick.takes(*tensors):
            given = (is_causal, scale, implementation)
            run = quick.run_for(*tensors, given, _prepare_plain)
        if run is None:
            return self(*tensors, is_causal=is_causal, scale=scale, implementation=implementation)
        self._last = like, run
        return run(*tensors, with_lse=False)[0]

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prefix_key: Tensor,
        prefix_value: Tensor,
        **arguments: Any,
    ) -> Tensor:
        """As `prefix_attention`."""
        tensors = (query, key, value, prefix_key, prefix_value)
        run = None
        if not torch.is_grad_enabled() and quick.takes(*tensors):

            def prepare(*_: object) -> quick.Run | None:
                return _prepare(*tensors, **arguments)

            given, lasts = [], True
            for name, argument in arguments.items():
                if not isinstance(argument, Tensor):
                    given.append((name, argument))
                    lasts = lasts and (argument is None or name != "query_offset")
                elif name in OF_ROWS and not argument.is_inference():
                    given.append((name, (id(argument), argument._version)))
                else:
                    given.append((name, id(argument)))
                    lasts = False
            run = quick.run_for(*tensors, tuple(given), prepare, None if lasts else self._runs)
        if run is None:
            out = prefix_attention(*tensors, **arguments)
            assert isinstance(out, Tensor)  # and not the pair that return_lse gives
            return out
        return run(*tensors, with_lse=False)[0]


def explain(*args: Any, **kwargs: Any) -> str:
    """Say in words which implementation `prefix_attention` would run for this call, and why.

    Args:
        *args: the arguments of `prefix_attention`.
        **kwargs: the same, by name.

    Returns:
        One line with the choice, then a line for each implementation.

    Raises:
        TypeError, ValueError: as `prefix_attention` does.
    """
    bound = inspect.signature(prefix_attention).bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = bound.arguments
    arguments.pop("return_lse")
    implementation = arguments.pop("implementation")
    problem = make_problem(**arguments)
    check_values(problem)
    return explanation(problem, implementation)


def make_problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    **options: Any,
) -> Problem:
    """The checked problem of a call of `prefix_attention`: defaults filled in, autocast applied.

    Args:
        query: as there, as are key, value, prefix_key and prefix_value.
        **options: its other arguments, but for return_lse and implementation.

    Raises:
        TypeError, ValueError: as `prefix_attention` does.
    """
    options = DEFAULTS | options
    tensors: dict[str, Any] = _autocast(
        {
            "query": query,
            "key": key,
            "value": value,
            "prefix_key": prefix_key,
            "prefix_value": prefix_value,
        }
    )
    _check_numbers(options)
    offset, width = options.pop("query_offset"), query.shape[-1] if query.ndim else 0
    by_row = isinstance(offset, Tensor)
    if options["scale"] is None:
        options["scale"] = (width or 1) ** -0.5  # `check` refuses a width of 0
    if options["deterministic"] is None:
        options["deterministic"] = torch.are_deterministic_algorithms_enabled()
    problem = Problem(
        **tensors,
        **options,
        query_offset=None if by_row else offset,
        query_offsets=offset if by_row else None,
        dropout_seed=None,
    )
    check(problem)
    return problem


def _check_numbers(options: dict[str, Any]) -> None:
    """Hold the numbers to their types; those of NumPy become Python's."""
    whole = int | torch.SymInt
    for names, types, what in (
        (("scale", "softcap"), int | float | None, "a number or None"),
        (("dropout_p",), int | float, "a number"),
        (("window", "max_seqlen_q", "max_seqlen_k"), whole | None, "an int or None"),
        (("query_offset",), whole | Tensor | None, "an int, an int tensor or None"),
    ):
        for name in names:
            option = options[name] = scalars.plain(options[name])
            if isinstance(option, bool) or not isinstance(option, types):
                raise TypeError(f"{name}: expected {what}, got {scalars.kind(option)}")
            if isinstance(option, int) and not -(2**62) < option < 2**62:
                raise ValueError(f"{name}: expected a number within 2^62, got {option}")
    for name in ("is_causal", "deterministic"):
        option = options[name] = scalars.plain(options[name])
        if not isinstance(option, bool) and not (option is None and name == "deterministic"):
            raise TypeError(f"{name}: expected a bool, got {scalars.kind(option)}")


def _autocast(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in autocast's dtype where it is on, as for `scaled_dot_product_attention`."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        check_layout(name, tensor)
    device = tensors["query"].device.type
    if tensors["query"].dtype == torch.float64:
        return tensors
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}


OF_ROWS = ("prefix_index", "prefix_lengths")
"""The tensor arguments that say nothing of the sequence."""

ARGUMENTS = {
    name: parameter.default
    for name, parameter in inspect.signature(prefix_attention).parameters.items()
    if name not in ("return_lse", "implementation")
}
DEFAULTS = {
    name: default for name, default in ARGUMENTS.items() if default is not inspect.Parameter.empty
}
