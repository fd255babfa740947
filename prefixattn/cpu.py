"""The C++ kernels: from a `Problem` to their arguments, and what is composed of several calls.

The library (see `csrc/`) knows nothing of torch: it is handed addresses, strides and numbers in one
record, `csrc/arguments.h`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from struct import Struct

import torch
from torch import Tensor

from prefixattn import build
from prefixattn.gradients import Upstream, sink_gradient
from prefixattn.operands import readable, rows
from prefixattn.problem import TENSORS, Problem, room_like

DTYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.float16: 2,
    torch.bfloat16: 3,
    torch.bool: 4,
}
# `Arguments`: sizes and flags, three floats, indices, tensors, biases, then those of the backward.
RECORD = Struct("=17q3d10q24q2q12q24qq12q")
# The same record in pieces: threads, order, addresses and what is known of the keys' length apart
# from what lies between them.
PIECES = Struct(f"=qqq32sq{22 * 8}s" + "q24s" + "qqqq" * 2 + "q24s" * 3 + f"q{50 * 8}s")
NO_TENSOR = (0, 0, 0, 0)
NO_BIAS = (0, 0, 0, 0, 0, 0)
NO_BACKWARD = (*NO_TENSOR * 6, 0, *NO_BIAS * 2)
BIASES = ("prefix_bias", "attn_mask")
OF_PREFIX = ("prefix_key", "prefix_value", "prefix_bias")
NO_MEMORY = 1


def forward(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[B, H, M, D_v]` in the query's dtype, `lse` and `lse_rest [B, H, M]`."""
    if problem.prefix_gate is not None:
        (out, lse, lse_rest), (prefix_out, *_) = (forward(half) for half in _halves(problem))
        gate = problem.prefix_gate.to(lse.dtype)[:, None, None]
        wide = torch.addcmul(out.to(lse.dtype), gate, prefix_out.to(lse.dtype))
        return wide.to(out.dtype), lse, lse_rest
    # Packed, there may be queries of no segment.
    results = problem.no_output() if problem.packed else problem.empty_output()
    _call("prefixattn_forward", problem, *results, NO_BACKWARD)
    return results


def backward(
    problem: Problem,
    dout: Tensor | None,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    lse_rest: Tensor,
    wanted: tuple[str, ...],
) -> list[Tensor]:
    """Gradients of the `wanted` arguments."""
    up = Upstream(torch.zeros_like(out) if dout is None else dout, out, lse, lse_rest, dlse)
    if problem.prefix_gate is not None:
        grads = _gated_backward(problem, up, wanted)
    else:
        grads = _backward(problem, up, wanted)
    return [grads[name] for name in wanted]


def _backward(problem: Problem, up: Upstream, wanted: Iterable[str]) -> dict[str, Tensor]:
    p, dlse = problem, up.dlse
    grads = {name: _empty_gradient(p, name) for name in wanted if name in (*TENSORS, *BIASES)}
    if dlse is not None:
        dlse = dlse.to(up.lse.dtype).contiguous()
    lse, lse_rest = up.lse.contiguous(), up.lse_rest.contiguous()
    tensors = [_tensor(x) for x in (up.dout, *(grads.get(name) for name in TENSORS))]
    biases = [_bias(grads.get(name), _size(p, name)) for name in BIASES]
    places = (*_joined(tensors), 0 if dlse is None else dlse.data_ptr(), *_joined(biases))
    if grads:
        _call("prefixattn_backward", p, up.out, lse, lse_rest, places)
    for name in BIASES:
        if name in grads:
            grads[name] = grads[name].to(getattr(p, name).dtype)
    if "sinks" in wanted:
        assert p.sinks is not None
        grads["sinks"] = sink_gradient(p.sinks, up).to(p.sinks.dtype)
    return grads


def _size(p: Problem, bias: str) -> tuple[int, ...]:
    return (p.B, p.H, p.M, p.P if bias == "prefix_bias" else p.N)


def _empty_gradient(p: Problem, name: str) -> Tensor:
    """Room for a gradient; zeros where the kernels add to it or need not write all of it."""
    like = getattr(p, name)
    if name in BIASES:  # summed in the accumulating dtype
        return torch.zeros(like.shape, dtype=p.accumulator, device=like.device)
    room = room_like(like)
    return room.zero_() if p.packed or name.startswith("prefix") else room


def _halves(problem: Problem) -> tuple[Problem, Problem]:
    """The sequence without the prefix, and the prefix without the sequence."""
    p = replace(problem, prefix_gate=None)
    none = torch.full((p.rows,), -1)
    nothing = torch.zeros(p.rows, dtype=torch.long)
    return replace(p, prefix_index=none), replace(p, key_length=nothing, sinks=None)


def _gated_backward(problem: Problem, up: Upstream, wanted: tuple[str, ...]) -> dict[str, Tensor]:
    """Each half by its own softmax, whose output is computed once more."""
    p, wide = problem, up.lse.dtype
    assert p.prefix_gate is not None
    sequence, prefix = _halves(p)
    (out, *_), (prefix_out, *prefix_numbers) = forward(sequence), forward(prefix)
    gate = p.prefix_gate.to(wide)[:, None, None]
    of_sequence = [name for name in wanted if not name.startswith("prefix")]
    of_prefix = [name for name in wanted if name in ("query", *OF_PREFIX)]
    grads = _backward(sequence, replace(up, out=out), of_sequence)
    prefix_dout = rows((gate * up.dout.to(wide)).to(up.dout.dtype))
    prefix_up = Upstream(prefix_dout, prefix_out, prefix_numbers[0], prefix_numbers[1], None)
    prefix_grads = _backward(prefix, prefix_up, of_prefix)
    if "query" in grads:
        grads["query"] = grads["query"] + prefix_grads.pop("query")
    if "prefix_gate" in wanted:
        taken = (up.dout.to(wide) * prefix_out.to(wide)).sum((0, 2, 3))
        grads["prefix_gate"] = taken.to(p.prefix_gate.dtype)
    return grads | prefix_grads


def _call(
    function: str,
    problem: Problem,
    out: Tensor,
    lse: Tensor,
    lse_rest: Tensor,
    backward: tuple[int, ...],
) -> None:
    vectors = _vectors(problem)
    results = (*_tensor(out), lse.data_ptr(), lse_rest.data_ptr())
    _run(function, _record(problem, vectors, results, backward))


def _vectors(p: Problem) -> list[Tensor | None]:
    """The arguments by row and by head, in the record's order and dtypes."""
    offsets = None if p.query_offsets is None else p.query_offsets.expand(p.rows)
    packing = (p.cu_seqlens_q, p.cu_seqlens_k, offsets, p.dropout_seed)
    of_rows = [
        None if x is None else x.long().contiguous()
        for x in (p.prefix_index, p.prefix_lengths, p.key_start, p.key_length, *packing)
    ]
    heads = [None if x is None else x.double().contiguous() for x in (p.sinks, p.alibi_slopes)]
    return [*of_rows, *heads]


def _record(
    p: Problem,
    vectors: Iterable[Tensor | None],
    results: tuple[int, ...],
    backward: tuple[int, ...],
) -> bytes:
    return RECORD.pack(
        DTYPES[p.query.dtype],
        torch.get_num_threads(),
        p.deterministic,
        *(p.rows, p.H, p.H_kv, p.M, p.N, p.R, p.P, p.D, p.D_v),
        p.is_causal,
        -1 if p.window is None else p.window,
        p.windowed_prefix,
        p.query_offset is not None,
        p.query_offset or 0,
        *(p.scale, p.softcap or 0.0, p.dropout_p),
        *(0 if x is None else x.data_ptr() for x in vectors),
        *_joined(_tensor(getattr(p, name)) for name in TENSORS),
        *results,
        *_bias(p.prefix_bias, _size(p, "prefix_bias")),
        *_bias(p.attn_mask, _size(p, "attn_mask")),
        *backward,
    )


def _run(function: str, record: bytes) -> None:
    if getattr(library(), function)(record) == NO_MEMORY:
        raise MemoryError(f"{function}: no memory for its workspaces")


class Prepared:
    """A forward of five tensors whose checks and record were made once for all calls like it.

    It is for calls without gate and dropout. What other tensors hold is read from them in each
    call, or was copied from them at the start. The keys may have another length ``N`` and other
    strides than those it was made for.
    """

    def __init__(self, problem: Problem) -> None:
        out, lse, _ = problem.empty_output()
        self._vectors = _vectors(problem)  # the record has their addresses
        record = _record(problem, self._vectors, (*_tensor(out), 0, 0), NO_BACKWARD)
        self.problem = problem.but(**dict.fromkeys(TENSORS))
        pieces = PIECES.unpack(record)
        self._fixed = tuple(pieces[place] for place in (0, 3, 5, 7, 17, 19, 21, 23))
        self._out, self._lse = (out.shape, out.stride()), (lse.shape, lse.dtype)
        self._query, self._prefix = _extent(problem.query), _extent(problem.prefix_key)
        self._prefix_value, self._sizes = _extent(problem.prefix_value), (problem.B, problem.H_kv)
        self._function = library().prefixattn_forward

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prefix_key: Tensor,
        prefix_value: Tensor,
        /,
        *,
        with_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Output and, if asked for, lse."""
        k, v, keys = key.stride(), value.stride(), key.shape[2]
        rows, heads, last = *self._sizes, keys - 1
        of_keys = of_values = 0
        if keys > 0 and rows > 0:
            of_keys = (rows - 1) * k[0] + (heads - 1) * k[1] + last * k[2] + key.shape[3]
            of_values = (rows - 1) * v[0] + (heads - 1) * v[1] + last * v[2] + value.shape[3]
        if not (
            _is_stored(query, self._query)
            and _is_stored(key, of_keys)
            and _is_stored(value, of_values)
            and _is_stored(prefix_key, self._prefix)
            and _is_stored(prefix_value, self._prefix_value)
        ):
            tensors = (query, key, value, prefix_key, prefix_value)
            found = (readable(*each, in_rows=True) for each in zip(TENSORS, tensors, strict=True))
            return self(*found, with_lse=with_lse)
        out = query.new_empty_strided(*self._out)
        lse = torch.empty(self._lse[0], dtype=self._lse[1]) if with_lse else None
        dtype, before, after, q, pk, pv, o, rest = self._fixed
        record = PIECES.pack(
            dtype,
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            before,
            keys,
            after,
            *(query.data_ptr(), q),
            *(key.data_ptr(), *k[:3], value.data_ptr(), *v[:3]),
            *(prefix_key.data_ptr(), pk, prefix_value.data_ptr(), pv, out.data_ptr(), o),
            0 if lse is None else lse.data_ptr(),
            rest,
        )
        if self._function(record) == NO_MEMORY:
            raise MemoryError("prefixattn_forward: no memory for its workspaces")
        return out, lse


def _extent(tensor: Tensor) -> int:
    """How many numbers of its storage lie between a tensor's first and last, these included."""
    if tensor.numel() == 0:
        return 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in steps)


def _is_stored(tensor: Tensor, extent: int) -> bool:
    """`operands.is_stored` for a known extent, and none of `torch._efficientzerotensor`'s kind."""
    if extent == 0:
        return True
    bytes_left = tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.itemsize
    return bytes_left >= extent * tensor.itemsize and tensor.data_ptr() != 0


def _tensor(tensor: Tensor | None) -> tuple[int, ...]:
    return NO_TENSOR if tensor is None else (tensor.data_ptr(), *tensor.stride()[:3])


def _bias(bias: Tensor | None, size: tuple[int, ...]) -> tuple[int, ...]:
    if bias is None:
        return NO_BIAS
    return (bias.data_ptr(), DTYPES[bias.dtype], *bias.expand(size).stride())


def _joined(parts: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(number for part in parts for number in part)


@cache
def library() -> ctypes.CDLL:
    """The loaded library; builds it where that has not been done yet.

    Raises:
        BuildError: there is none, and none can be built.
    """
    return load(build.library())


def load(path: Path) -> ctypes.CDLL:
    """The library at `path`, its functions declared.

    Raises:
        BuildError: it is of another version of this file.
    """
    loaded = ctypes.CDLL(str(path))
    for name in ("prefixattn_forward", "prefixattn_backward"):
        getattr(loaded, name).argtypes = [ctypes.c_char_p]
    loaded.prefixattn_instructions.restype = ctypes.c_char_p
    size = loaded.prefixattn_arguments_size()
    if size != RECORD.size:
        raise build.BuildError(
            f"{loaded._name} expects a record of {size} bytes and this version has {RECORD.size}: "
            "remove it to have it built again"
        )
    return loaded


def instructions() -> str:
    """The instruction set in use: plain, avx2, avx512, avx512bf16, amx or neon_bf16."""
    found: bytes = library().prefixattn_instructions()
    return found.decode()


def tiles_refused() -> bool:
    """Whether the processor has AMX and the system does not let this process use it."""
    return bool(library().prefixattn_tiles_refused())
