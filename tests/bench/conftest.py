"""A suite of tiny cases, and records as a run would have written them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from prefixattn.bench import measure, run, shapes
from prefixattn.bench.measure import Rates
from prefixattn.bench.shapes import Case, Model, Shape

Record = dict[str, Any]


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model and a suite of two cases, a small flushed buffer, and rates that nobody measures."""
    monkeypatch.setitem(shapes.MODELS, "tiny", Model(4, 2, 16))
    monkeypatch.setitem(shapes.MODELS, "capped", Model(4, 2, 16, softcap=5.0))

    def suite(device: str) -> Iterator[Case]:
        yield Case("tiny", Shape("tiny", B=2, M=5, P=3), "fwd+bwd")
        yield Case("tiny", Shape("tiny", B=2, M=1, C=6, P=3))

    monkeypatch.setitem(shapes.SUITES, "tiny", suite)
    monkeypatch.setattr(measure, "SMALLEST_BUFFER", {"cpu": 4, "cuda": 4})
    monkeypatch.setattr(measure, "last_level_cache", lambda device: 4)
    monkeypatch.setattr(run, "measure_rates", lambda device, dtype: Rates(1e12, 1e10))


@pytest.fixture
def quick_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """flex_attention as it is, for compiling it takes half a minute."""
    from torch.nn.attention.flex_attention import flex_attention

    from prefixattn.bench import providers

    monkeypatch.setattr(providers, "_compiled_flex", lambda: flex_attention)


@pytest.fixture
def header() -> Record:
    """A run's header."""
    return {
        "kind": "run",
        "run": 0,
        "date": "2026-01-01T00:00:00+00:00",
        "command": "prefixattn bench --suite decode",
        "device": "cpu",
        "processor": "a processor",
        "instructions": "AVX512",
        "threads": 2,
        "gpu": None,
        "torch": torch.__version__,
        "prefixattn": "0.1.0",
        "commit": "abc123",
    }


@pytest.fixture
def made() -> Callable[..., Record]:
    """Makes a row: of a case and provider, timed unless `state` says otherwise."""

    def make(provider: str, ms: float = 1.0, spread: float = 0.01, **others: Any) -> Record:
        found: Record = {
            "kind": "row",
            "run": 0,
            "suite": "decode",
            "case": "m:B2,M1,P8,float32",
            "passes": "fwd",
            "axis": "",
            "model": "m",
            "dtype": "float32",
            "B": 2,
            "M": 1,
            "C": 0,
            "P": 8,
            "R": 1,
            "H": 4,
            "H_kv": 2,
            "D": 16,
            "softcap": None,
            "warm": False,
            "provider": provider,
            "reason": "",
            "state": "timed",
            "command": f"prefixattn bench --provider {provider}",
        } | others
        if found["state"] == "timed":
            found |= {"ms": [ms, ms * (1 - spread), ms * (1 + spread)], "rounds": 9}
            found |= {"flops": 1e6, "bytes": 1e5, "peak": others.get("peak", 2**20)}
            found |= {"rates": {"matmul": 1e11, "copy": 1e10}}
            found |= {"of_matmul": 0.5, "of_copy": 0.1, "of_floor": 1.2}
        return found

    return make
