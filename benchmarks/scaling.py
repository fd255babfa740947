"""What training over many GPUs costs, on paper: `python -m benchmarks.scaling`.

Two costs are compared with the compute that could hide them, for a frozen model whose prefix is
trained:

- data parallelism: each step's all-reduce of the prefix's gradients, in float32, against a forward
  and a backward of the model, which has no gradients of weights to make;
- context parallelism: each message of the ring, keys and values of one rank's tokens, against the
  attention that is computed meanwhile; and what is not hidden: before, the ranks agree on their
  shapes, and behind the backward they sum the prefix's gradients.

Nothing here was measured. Every assumption is a field of `Cluster` or `Job`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import typer

GPUS = (8, 64, 256, 1024)
BF16, FP32 = 2, 4  # bytes


@dataclass(frozen=True)
class Cluster:
    """H100-like GPUs, eight to a node. Rates are what is reached, not what is printed."""

    flops: float = 400e12  # of a matrix product in bfloat16, a second
    attention: float = 350e12  # of attention, forward and backward
    inside: float = 300e9  # bytes/s from a GPU to its neighbour in the node, one way
    between: float = 40e9  # the same, to a neighbour in another node
    node: int = 8
    hop_inside: float = 3e-6  # seconds until a message's first byte is there
    hop_between: float = 8e-6

    def latency(self, gpus: int) -> float:
        """Of what goes to all: up a tree of nodes and back, as NCCL does it from two nodes on."""
        hops = math.ceil(math.log2(min(gpus, self.node)))
        nodes = math.ceil(math.log2(max(1, gpus / self.node)))
        return 2 * (hops * self.hop_inside + nodes * self.hop_between)

    def hop(self, gpus: int) -> float:
        """To the neighbour in a ring, over its slowest link."""
        return self.hop_inside if gpus <= self.node else self.hop_between

    def bandwidth(self, gpus: int) -> float:
        """Of the slowest link in a ring."""
        return self.inside if gpus <= self.node else self.between


@dataclass(frozen=True)
class Job:
    """Llama-3.1-8B with a prefix; `tokens` are each GPU's in a step, whatever their number."""

    parameters: float = 8.0e9
    layers: int = 32
    heads: int = 32
    key_heads: int = 8
    head_dim: int = 128
    prefix: int = 1024
    tokens: int = 8192

    @property
    def prefix_bytes(self) -> float:
        """The gradients of all layers' keys and values."""
        return 2 * self.layers * self.key_heads * self.prefix * self.head_dim * FP32

    @property
    def layer_bytes(self) -> float:
        """The gradients of one layer's."""
        return self.prefix_bytes / self.layers

    @property
    def weight_bytes(self) -> float:
        """The gradients of all weights, as full fine-tuning reduces them."""
        return self.parameters * BF16


def all_reduce(size: float, gpus: int, cluster: Cluster) -> float:
    """Seconds: each GPU sends `2 (W - 1) / W` of the size, and waits for the tree."""
    return 2 * (gpus - 1) / gpus * size / cluster.bandwidth(gpus) + cluster.latency(gpus)


def step(job: Job, cluster: Cluster) -> float:
    """Seconds of forward and backward: 2 FLOP a weight and token each, none for weights' own."""
    return 4 * job.parameters * job.tokens / cluster.flops


def data_parallel(job: Job, cluster: Cluster) -> Iterator[tuple[str, ...]]:
    """GPUs, MB each one sends, ms of the all-reduce, its part of the step; full fine-tuning's."""
    compute = step(job, cluster)
    for gpus in GPUS:
        sent = 2 * (gpus - 1) / gpus * job.prefix_bytes
        seconds = all_reduce(job.prefix_bytes, gpus, cluster)
        full = all_reduce(job.weight_bytes, gpus, cluster) / (1.5 * compute)
        yield (
            f"{gpus:,}",
            f"{sent / 1e6:.0f}",
            f"{1e3 * seconds:.1f}",
            f"{seconds / compute:.1%}",
            f"{full:.0%}",
        )


def ring(job: Job, cluster: Cluster) -> Iterator[tuple[str, ...]]:
    """GPUs that share a sequence: its length, message against attention, what is not hidden.

    A causal ring with head and tail computes half of the products. Backward: keys, values and
    their float32 gradients travel, and the attention is 2.5 times the forward's.
    """
    for gpus in GPUS:
        numbers = 2 * job.key_heads * job.tokens * job.head_dim
        flops = 4 * job.heads * job.head_dim * job.tokens**2 / 2
        sent = [
            cluster.hop(gpus) + numbers * size / cluster.bandwidth(gpus)
            for size in (BF16, BF16 + FP32)
        ]
        computed = [part * flops / cluster.attention for part in (1.0, 2.5)]
        ratios = [s / c for s, c in zip(sent, computed, strict=True)]
        # Half of a tree there and back: numbers are gathered, not summed.
        exposed = [cluster.latency(gpus) / 2, all_reduce(job.layer_bytes, gpus, cluster)]
        layer = gpus * sum(computed)  # a step for each rank's keys
        yield (
            f"{gpus:,}",
            f"{gpus * job.tokens / 1e3:,.0f}k",
            f"{1e3 * sent[0]:.2f} / {1e3 * computed[0]:.2f}",
            f"{ratios[0]:.0%}",
            f"{ratios[1]:.0%}",
            f"{round(job.tokens * max(ratios)):,}",
            f"{1e3 * exposed[0]:.2f} + {1e3 * exposed[1]:.2f}",
            f"{sum(exposed) / layer:.2%}",
        )


def markdown(job: Job | None = None, cluster: Cluster | None = None) -> str:
    """Both tables."""
    job, cluster = job or Job(), cluster or Cluster()
    heads = ("GPUs", "MB sent a step", "ms", "of the step", "full fine-tuning's")
    more = ("hidden from, tokens a GPU", "not hidden, ms a layer", "of its attention")
    ring_heads = ("GPUs", "tokens in all", "ms: message / attention", "forward", "backward")
    parts = [
        _table(heads, data_parallel(job, cluster)),
        _table((*ring_heads, *more), ring(job, cluster)),
    ]
    return "\n\n".join(parts)


def _table(heads: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(heads)} |", "|" + "--:|" * len(heads)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def main() -> None:
    """Print both tables."""
    typer.echo(markdown())


if __name__ == "__main__":
    typer.run(main)
