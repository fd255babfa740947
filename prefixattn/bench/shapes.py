"""What is measured: attention layers of real models, in named suites, sized by device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Model:
    """The attention layer of a published model: query heads, key heads, head dim, score cap."""

    H: int
    H_kv: int
    D: int
    softcap: float | None = None


MODELS = {
    "GPT-2": Model(12, 12, 64),
    "SmolLM2-135M": Model(9, 3, 64),
    "Qwen3-0.6B": Model(16, 8, 128),
    "Llama-3.2-1B": Model(32, 8, 64),
    "Llama-3.1-8B": Model(32, 8, 128),
    "Gemma-2-2B": Model(8, 4, 256, softcap=50.0),
    "Phi-3-mini": Model(32, 32, 96),
}
UNITS = {
    "B": "rows of the batch",
    "M": "new tokens (queries) a row",
    "C": "cached tokens a row",
    "P": "prefix tokens",
    "R": "different prefixes, row b reads number b mod R",
    "H": "query heads",
    "H_kv": "key/value heads",
    "D": "head dim",
}
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16",)}


@dataclass(frozen=True)
class Shape:
    """One attention call in a layer of `model`; see `UNITS` for the letters."""

    model: str
    B: int
    M: int
    P: int
    C: int = 0
    R: int = 1
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Refuse a model that is not in `MODELS` and more prefixes than rows (ValueError)."""
        if self.model not in MODELS:
            raise ValueError(f"model: expected one of {', '.join(MODELS)}, got {self.model!r}")
        if not 1 <= self.R <= self.B:
            raise ValueError(f"R: expected 1 to B={self.B} different prefixes, got {self.R}")

    @property
    def H(self) -> int:
        """Query heads."""
        return MODELS[self.model].H

    @property
    def H_kv(self) -> int:
        """Key and value heads."""
        return MODELS[self.model].H_kv

    @property
    def D(self) -> int:
        """Head dim, of keys and values alike."""
        return MODELS[self.model].D

    @property
    def softcap(self) -> float | None:
        """`softcap * tanh(scores / softcap)`; None: no cap."""
        return MODELS[self.model].softcap

    @property
    def N(self) -> int:
        """Sequence keys a row: cached and new."""
        return self.C + self.M

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch knows it."""
        found = getattr(torch, self.dtype)
        assert isinstance(found, torch.dtype)
        return found

    @property
    def name(self) -> str:
        """What `--shape` takes; letters that are at their default are left out."""
        letters = {"B": self.B, "M": self.M, "C": self.C, "P": self.P}
        parts = [f"{letter}{number}" for letter, number in letters.items() if number]
        parts += [f"R{self.R}"] if self.R > 1 else []
        return f"{self.model}:{','.join([*parts, self.dtype])}"


@dataclass(frozen=True)
class Case:
    """A shape in a suite; `passes` is "fwd" or "fwd+bwd", `axis` the letter of a growth curve."""

    suite: str
    shape: Shape
    passes: str = "fwd"
    axis: str = ""

    @property
    def name(self) -> str:
        """The shape's name, and where a suite has more of it the axis it belongs to."""
        return f"{self.shape.name}{f':{self.axis}-{self.passes}' if self.axis else ''}"


def _listed(suite: str, passes: str, device: str, shapes: dict[str, list[Shape]]) -> Iterator[Case]:
    for dtype in DTYPES[device]:
        for shape in shapes[device]:
            yield Case(suite, replace(shape, dtype=dtype), passes)


def _prefill(device: str) -> Iterator[Case]:
    shapes = {
        "cpu": [
            Shape("GPT-2", B=1, M=128, P=16),
            Shape("GPT-2", B=8, M=256, P=32),
            Shape("SmolLM2-135M", B=4, M=256, P=1024),
            Shape("Qwen3-0.6B", B=1, M=1024, P=128),
            Shape("Llama-3.2-1B", B=1, M=512, P=2048),
            Shape("Gemma-2-2B", B=1, M=256, P=128),
            Shape("Phi-3-mini", B=1, M=256, P=100),  # no tile size divides these
        ],
        "cuda": [
            Shape("GPT-2", B=64, M=1024, P=32),
            Shape("Llama-3.2-1B", B=8, M=2048, P=128),
            Shape("Llama-3.1-8B", B=1, M=8192, P=1024),
            Shape("Llama-3.1-8B", B=8, M=2048, P=16),
            Shape("Llama-3.1-8B", B=8, M=512, P=8192),
            Shape("Gemma-2-2B", B=8, M=2048, P=128),
            Shape("Phi-3-mini", B=8, M=1000, P=100),
        ],
    }
    return _listed("prefill", "fwd", device, shapes)


def _training(device: str) -> Iterator[Case]:
    shapes = {
        "cpu": [
            Shape("GPT-2", B=8, M=128, P=20),
            Shape("SmolLM2-135M", B=4, M=256, P=128),
            Shape("SmolLM2-135M", B=1, M=1024, P=1024),
            Shape("Qwen3-0.6B", B=2, M=256, P=512),
            Shape("Gemma-2-2B", B=1, M=256, P=128),
            Shape("Phi-3-mini", B=1, M=200, P=100),
        ],
        "cuda": [
            Shape("GPT-2", B=64, M=512, P=20),
            Shape("Llama-3.2-1B", B=8, M=2048, P=128),
            Shape("Llama-3.1-8B", B=1, M=8192, P=1024),
            Shape("Llama-3.1-8B", B=8, M=1024, P=2048),
            Shape("Gemma-2-2B", B=4, M=2048, P=128),
            Shape("Phi-3-mini", B=4, M=1000, P=100),
        ],
    }
    return _listed("training", "fwd+bwd", device, shapes)


def _decode(device: str) -> Iterator[Case]:
    shapes = {
        "cpu": [
            Shape("GPT-2", B=1, M=1, C=15, P=16),  # what a call costs by itself
            Shape("GPT-2", B=1, M=1, C=511, P=20),
            Shape("SmolLM2-135M", B=8, M=1, C=1023, P=128),
            Shape("Llama-3.2-1B", B=1, M=1, C=4095, P=2048),
            Shape("Qwen3-0.6B", B=4, M=1, C=511, P=512),
            Shape("Gemma-2-2B", B=1, M=1, C=1023, P=128),
            Shape("Llama-3.2-1B", B=1, M=5, C=1023, P=128),  # speculative: a few at a time
        ],
        "cuda": [
            Shape("GPT-2", B=1, M=1, C=15, P=16),
            Shape("Llama-3.2-1B", B=1, M=1, C=1023, P=128),
            Shape("Llama-3.1-8B", B=1, M=1, C=8191, P=1024),
            Shape("Llama-3.1-8B", B=64, M=1, C=1023, P=128),
            Shape("Gemma-2-2B", B=8, M=1, C=2047, P=128),
            Shape("Llama-3.1-8B", B=8, M=5, C=1023, P=128),
        ],
    }
    return _listed("decode", "fwd", device, shapes)


def _shared_prefix(device: str) -> Iterator[Case]:
    """Many rows decode over a long prefix that they share, or a few of them do."""
    shapes = {
        "cpu": [
            Shape("SmolLM2-135M", B=16, M=1, C=127, P=2048),
            Shape("Llama-3.2-1B", B=8, M=1, C=511, P=2048),
            Shape("Qwen3-0.6B", B=16, M=1, C=127, P=1024),
            Shape("SmolLM2-135M", B=16, M=1, C=127, P=2048, R=4),
            Shape("Qwen3-0.6B", B=8, M=64, C=0, P=1024),
        ],
        "cuda": [
            Shape("Llama-3.2-1B", B=64, M=1, C=511, P=8192),
            Shape("Llama-3.1-8B", B=64, M=1, C=127, P=8192),
            Shape("Llama-3.1-8B", B=64, M=1, C=1023, P=2048),
            Shape("Llama-3.1-8B", B=64, M=1, C=127, P=2048, R=8),
            Shape("Llama-3.1-8B", B=32, M=64, C=0, P=4096),
        ],
    }
    return _listed("shared-prefix", "fwd", device, shapes)


def _memory(device: str) -> Iterator[Case]:
    """A training step over more and more rows: what a copy of the prefix for each row costs."""
    model, rows = ("SmolLM2-135M", (1, 4, 16)) if device == "cpu" else ("Llama-3.1-8B", (1, 8, 64))
    for B in rows:
        shape = Shape(model, B=B, M=128, P=2048, dtype=DTYPES[device][0])
        yield Case("memory", shape, "fwd+bwd")


def _growth(device: str) -> Iterator[Case]:
    """One letter grows and the others stay: in training for all four, in decoding for B, P, R."""
    small = device == "cpu"
    dtype = DTYPES[device][0]
    model = "SmolLM2-135M" if small else "Llama-3.1-8B"
    train = Shape(model, B=4, M=256 if small else 1024, P=128, dtype=dtype)
    decode = Shape(model, B=16 if small else 64, M=1, C=255 if small else 1023, P=512, dtype=dtype)
    tokens = (16, 64, 256, 1024, 4096) if small else (16, 128, 1024, 4096, 16384)
    lengths = (64, 128, 256, 512, 1024) if small else (256, 512, 1024, 2048, 4096)
    rows = (1, 2, 4, 8, 16) if small else (1, 4, 16, 64)
    for P in tokens:
        yield Case("growth", replace(train, P=P), "fwd+bwd", "P")
        yield Case("growth", replace(decode, P=P), "fwd", "P")
    for M in lengths:
        yield Case("growth", replace(train, M=M), "fwd+bwd", "M")
    for B in rows:
        yield Case("growth", replace(train, B=B), "fwd+bwd", "B")
        yield Case("growth", replace(decode, B=B), "fwd", "B")
    for R in rows:
        yield Case("growth", replace(train, B=max(rows), R=R, M=64), "fwd+bwd", "R")
        yield Case("growth", replace(decode, B=max(rows), R=R), "fwd", "R")


def _quick(device: str) -> Iterator[Case]:
    """One case of each kind, in under a minute."""
    dtype = DTYPES[device][-1]
    for passes, shape in (
        ("fwd", Shape("GPT-2", B=2, M=128, P=20)),
        ("fwd+bwd", Shape("SmolLM2-135M", B=2, M=128, P=64)),
        ("fwd", Shape("SmolLM2-135M", B=8, M=1, C=255, P=512)),
        ("fwd", Shape("SmolLM2-135M", B=8, M=1, C=255, P=128, R=4)),
        ("fwd", Shape("Gemma-2-2B", B=1, M=64, P=20)),
    ):
        yield Case("quick", replace(shape, dtype=dtype), passes)


SUITES: dict[str, Callable[[str], Iterator[Case]]] = {
    "prefill": _prefill,
    "training": _training,
    "decode": _decode,
    "shared-prefix": _shared_prefix,
    "memory": _memory,
    "growth": _growth,
    "quick": _quick,
}
DEFAULT = tuple(suite for suite in SUITES if suite != "quick")


def cases(suite: str, device: str) -> list[Case]:
    """The cases of a suite, sized for "cpu" or "cuda".

    Raises:
        ValueError: there is no suite or device of that name; the known ones are named.
    """
    for argument, got, known in (("suite", suite, SUITES), ("device", device, DTYPES)):
        if got not in known:
            raise ValueError(f"{argument}: expected one of {', '.join(known)}, got {got!r}")
    return list(SUITES[suite](device))
