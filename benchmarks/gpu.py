"""Measure the Triton kernels on a GPU: `python -m benchmarks.gpu`, or `make bench-gpu`.

Verified before timed: a provider whose output differs from float32 attention has no time, and one
that cannot take a shape is left blank. CUDA events, interleaved rounds, medians; the L2 cache is
flushed before each call unless `--warm`. The file is written after every row, so that a run that
is stopped keeps what it has.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import triton
import typer
from rich.console import Console
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.measure import machine
from benchmarks.providers import (
    Shape,
    Tensors,
    cat_sdpa,
    concatenated,
    make_tensors,
    no_prefix,
    transformers_way,
)
from prefixattn import prefix_attention

DTYPE = torch.bfloat16
TOLERANCE = 2e-2  # of the largest output
ROOM = 0.6  # of free memory that one shape may take
HEADS, KEY_HEADS = 32, 8
Provider = Callable[[Tensors], Tensor]


class Job(NamedTuple):
    """One row: a suite's shape, and whether the backward is timed alone."""

    suite: str
    shape: Shape
    backward: bool


def ours(t: Tensors) -> Tensor:
    """prefix_attention, implementation="triton"."""
    out = prefix_attention(*t.all, is_causal=True, implementation="triton")
    assert isinstance(out, Tensor)
    return out


def cat_cudnn(t: Tensors) -> Tensor:
    """One concatenation a call, then cuDNN."""
    key, value = concatenated(t)
    m, n = t.query.shape[2], key.shape[2]
    if m not in (1, n):
        raise NotImplementedError("torch's cuDNN attention has no bottom-right causality")
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(
            t.query, key, value, is_causal=m == n and m > 1, enable_gqa=True
        )


def cat_flash(t: Tensors) -> Tensor:
    """One concatenation a call, then FlashAttention where it is installed."""
    from flash_attn import flash_attn_func  # type: ignore[import-not-found]

    key, value = concatenated(t)
    q, k, v = (x.transpose(1, 2) for x in (t.query, key, value))
    out: Tensor = flash_attn_func(q, k, v, causal=True)
    return out.transpose(1, 2)


def static_copies(t: Tensors) -> Provider:
    """A cache that already holds the prefix for each row: no concatenation is timed."""
    key, value = (x.detach().contiguous() for x in concatenated(t))
    return lambda t: scaled_dot_product_attention(t.query, key, value, enable_gqa=True)


PROVIDERS: dict[str, Provider] = {
    "ours": ours,
    "transformers": transformers_way,
    "cat": cat_sdpa,
    "cat+cudnn": cat_cudnn,
    "cat+flash": cat_flash,
    "floor": no_prefix,
}


def jobs() -> Iterator[Job]:
    """Every row, the most telling ones first."""
    for tokens in (128, 1024, 16, 8192):
        for context in (1024, 8192):
            for rows in (8, 1, 64):
                yield Job("decode", Shape(rows, HEADS, KEY_HEADS, 1, context, tokens, 128), False)
        for d in (128, 64, 256):
            for length in (2048, 8192, 512, 32768):
                for rows in (1, 8, 64):
                    if rows * length <= 2**17:
                        shape = Shape(rows, HEADS, KEY_HEADS, length, 0, tokens, d)
                        yield Job("forward", shape, False)
                        yield Job("backward", shape, True)


def main(
    suite: Annotated[list[str] | None, typer.Option(help="forward, backward, decode.")] = None,
    minutes: Annotated[float, typer.Option(help="Stop after so many.")] = 8.0,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.", min=3)] = 15,
    warm: Annotated[bool, typer.Option("--warm", help="Do not flush the L2 cache.")] = False,
    out: Annotated[Path, typer.Option(help="The results file.")] = Path("gpu-results.json"),
) -> None:
    """Time forward, backward and decode against what users run today."""
    if not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA or ROCm device: nothing to measure here.")
    end, console = time.monotonic() + 60 * minutes, Console(width=150)
    rows: list[dict[str, Any]] = []
    report: dict[str, Any] = {"machine": about(), "ceilings": ceilings(), "rows": rows}
    console.print(report["machine"], report["ceilings"])
    for job in jobs():
        if time.monotonic() > end:
            console.print(
                f"stopped after {minutes} minutes: the rows that are left have no figures"
            )
            break
        if suite and job.suite not in suite:
            continue
        rows.append(measure(job, rounds, flush=not warm))
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n")
        console.print(line_of(rows[-1]))
    console.print(f"wrote {out}")


def about() -> dict[str, Any]:
    """The machine and the versions."""
    return machine("benchmarks.gpu") | {
        "gpu": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "triton": triton.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
    }


def measure(job: Job, rounds: int, flush: bool) -> dict[str, Any]:
    """One row: median, 10th and 90th percentile in microseconds for every provider."""
    shape = job.shape
    row: dict[str, Any] = {"suite": job.suite, "shape": shape.name, "us": {}, "absent": {}}
    size = 2 * shape.B * (shape.M * shape.H + 2 * (shape.C + shape.M + shape.P) * shape.H) * shape.D
    if 6 * size > ROOM * torch.cuda.mem_get_info()[0]:
        return row | {"absent": {"all": "not enough memory"}}
    tensors = make_tensors(shape, DTYPE, device="cuda")
    runs: dict[str, Callable[[], object]] = {}
    found = dict(PROVIDERS)
    if job.suite == "decode":
        found["static copies"] = static_copies(tensors)
    with torch.no_grad():
        truth = truth_of(tensors)
    for name, provider in found.items():
        try:
            runs[name] = prepared(provider, tensors, truth, name, job.backward)
        except (NotImplementedError, ImportError, RuntimeError, ValueError) as error:
            row["absent"][name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    for name, times in timed(runs, rounds, flush).items():
        times.sort()
        at = [times[int(share * (len(times) - 1))] for share in (0.5, 0.1, 0.9)]
        row["us"][name] = dict(zip(("median", "p10", "p90"), at, strict=True))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    if "ours" in runs:
        runs["ours"]()
        row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        row["host_us"] = host_cost(runs["ours"])
        row |= rates(job, row["us"]["ours"]["median"])
    return row


def truth_of(tensors: Tensors) -> Tensor:
    """The same attention in float32, by concatenation."""
    group = tensors.query.shape[1] // tensors.key.shape[1]
    query, *others = (x.detach().float() for x in tensors.all)
    return cat_sdpa(Tensors(query, *(x.repeat_interleave(group, 1) for x in others)))


def prepared(
    provider: Provider, tensors: Tensors, truth: Tensor, name: str, backward: bool
) -> Callable[[], object]:
    """What is timed of a provider, once its output is right."""
    with torch.no_grad():
        error = (provider(tensors).float() - truth).abs().max() / truth.abs().max()
    if name != "floor" and not error < TOLERANCE:
        raise ValueError(f"wrong by {error:.2e} of the largest output")
    if not backward:

        def forward() -> None:
            with torch.no_grad():
                provider(tensors)

        return forward
    out = provider(tensors)
    upstream = torch.randn_like(out)
    return lambda: torch.autograd.grad(
        out, tensors.all, upstream, retain_graph=True, allow_unused=True
    )


def timed(
    runs: dict[str, Callable[[], object]], rounds: int, flush: bool
) -> dict[str, list[float]]:
    """Microseconds of each call, round by round."""
    buffer = torch.empty(2**28, dtype=torch.int8, device="cuda")  # larger than any L2 cache
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
    for _ in range(3 + rounds):
        for name, run in runs.items():
            if flush:
                buffer.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            events[name].append((start, end))
        torch.cuda.synchronize()
    return {
        name: [1e3 * start.elapsed_time(end) for start, end in pairs[3:]]
        for name, pairs in events.items()
    }


def host_cost(run: Callable[[], object]) -> float:
    """Microseconds that the CPU spends on a call, which the device works off later."""
    spent = []
    for _ in range(30):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        spent.append(1e6 * (time.perf_counter() - start))
    return statistics.median(spent)


def rates(job: Job, us: float) -> dict[str, float]:
    """Useful TFLOP/s, or for decode TB/s of the bytes that must be read once."""
    s = job.shape
    if job.suite == "decode":
        read = 4 * s.H_kv * s.D * (s.B * (s.C + s.M) + s.P)
        return {"TB/s": read / us / 1e6}
    flops = 4 * s.B * s.H * s.D * (s.M * s.P + s.M * (s.M + 1) / 2)
    return {"TFLOP/s": (2.5 if job.backward else 1.0) * flops / us / 1e6}


def ceilings() -> dict[str, float]:
    """What this card does at best, and what KERNELS.md leaves open."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=DTYPE) for _ in range(2))
    far = torch.empty(2**30, dtype=torch.int8, device="cuda")
    near = torch.empty(2**24, dtype=torch.int8, device="cuda")
    square = make_tensors(Shape(1, HEADS, KEY_HEADS, 8192, 0, 0, 128), DTYPE, device="cuda")
    short = make_tensors(Shape(8, HEADS, KEY_HEADS, 512, 0, 0, 128), DTYPE, device="cuda")
    prefixed = make_tensors(Shape(1, HEADS, KEY_HEADS, 2048, 0, 1024, 128), DTYPE, device="cuda")

    def attention(backend: SDPBackend, t: Tensors) -> Callable[[], object]:
        # Repeated key heads: not every backend groups them.
        k, v = (x.detach().repeat_interleave(HEADS // KEY_HEADS, 1) for x in (t.key, t.value))

        def run() -> None:
            with torch.no_grad(), sdpa_kernel(backend):
                scaled_dot_product_attention(t.query, k, v, is_causal=True)

        return run

    def cat() -> None:
        with torch.no_grad():
            cat_sdpa(prefixed)

    runs: dict[str, tuple[Callable[[], object], float, bool]] = {
        "matmul TFLOP/s": (lambda: a @ b, 2 * 8192**3, True),
        "copy TB/s": (lambda: far[: 2**29].copy_(far[2**29 :]), 2**30, True),
        "L2 copy TB/s": (lambda: near[: 2**23].copy_(near[2**23 :]), 2**24, False),
        "efficient attention 8k TFLOP/s": (
            attention(SDPBackend.EFFICIENT_ATTENTION, square),
            2 * HEADS * 128 * 8192 * 8193,
            True,
        ),
        "flash 512 TFLOP/s": (
            attention(SDPBackend.FLASH_ATTENTION, short),
            16 * HEADS * 128 * 512 * 513,
            True,
        ),
        "cudnn 512 TFLOP/s": (
            attention(SDPBackend.CUDNN_ATTENTION, short),
            16 * HEADS * 128 * 512 * 513,
            True,
        ),
        "cat 2k, cold L2, us": (cat, 0, True),
        "cat 2k, warm L2, us": (cat, 0, False),
    }
    found = {}
    for name, (run, work, flush) in runs.items():
        try:
            us = statistics.median(timed({name: run}, 15, flush)[name])
        except RuntimeError:
            continue  # this card or build has no such kernel
        found[name] = work / us / 1e6 if work else us
    return found


def line_of(row: dict[str, Any]) -> str:
    """A row as text."""
    times = {name: us["median"] for name, us in row["us"].items()}
    mine = times.get("ours")
    parts = [f"{row['suite']:8} {row['shape']:34}"]
    for name, us in times.items():
        parts.append(f"{name} {us:.0f}us" + (f" ({us / mine:.2f}x)" if mine else ""))
    parts += [f"{row[unit]:.3g} {unit}" for unit in ("TFLOP/s", "TB/s") if unit in row]
    return "  ".join(parts + [f"no {name}: {why[:60]}" for name, why in row["absent"].items()])


if __name__ == "__main__":
    typer.run(main)
