"""The work of a case: floating-point operations and bytes that no implementation can do without."""

from __future__ import annotations

from prefixattn.bench.shapes import Case


def flops(case: Case, with_prefix: bool = True) -> float:
    """Operations of the products over visible keys; a training step has seven for every two.

    Forward: scores and values. Backward: the scores again, and four gradients' products.
    """
    s = case.shape
    visible = s.M * (s.C + (s.M + 1) / 2 + (s.P if with_prefix else 0))
    return 4 * s.B * s.H * s.D * visible * (1.0 if case.passes == "fwd" else 3.5)


def least_bytes(case: Case, with_prefix: bool = True) -> float:
    """Bytes of each tensor touched once; in training read twice, and its gradient written or read.

    A prefix counts once, however many rows read it.
    """
    s = case.shape
    queries = 2 * s.B * s.H * s.M  # and outputs
    keys = 2 * s.B * s.H_kv * s.N
    prefix = 2 * s.R * s.H_kv * s.P if with_prefix else 0
    numbers = s.D * (queries + keys + prefix)
    return numbers * s.torch_dtype.itemsize * (1.0 if case.passes == "fwd" else 3.0)
