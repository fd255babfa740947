"""The connector's counters, in vLLM's log and among its metrics."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

COUNTERS = {
    "writes": "Prefixes written into the paged cache.",
    "tokens": "Prefix tokens written into the paged cache.",
    "failures": "Prefixes that could not be written; their requests ended with an error.",
    "hits": "Writes whose adapter lay in a worker's memory.",
    "misses": "Writes whose adapter was read from disk.",
    "evictions": "Adapters that made room in a worker's memory.",
}


class PrefixStats(KVConnectorStats):
    """Counts since the last look, summed over workers."""

    def reset(self) -> None:
        """Begin again."""
        self.data.clear()

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Both."""
        for name, count in other.data.items():
            self.data[name] = self.data.get(name, 0) + count
        return self

    def reduce(self) -> dict[str, int | float]:
        """What the log shows."""
        return {f"prefixattn {name}": count for name, count in sorted(self.data.items())}

    def is_empty(self) -> bool:
        """Whether there is nothing to tell."""
        return not self.data


class PrefixMetrics(KVConnectorPromMetrics):
    """``vllm:prefixattn_*_total``, one of each for every engine."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        labels = self._labelnames
        counters = {
            name: self._counter_cls(
                name=f"vllm:prefixattn_{name}", documentation=text, labelnames=labels
            )
            for name, text in COUNTERS.items()
        }
        self._of_engine = {
            engine: {name: counter.labels(*values) for name, counter in counters.items()}
            for engine, values in self.per_engine_labelvalues.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add counts to an engine's counters."""
        for name, count in transfer_stats_data.items():
            self._of_engine[engine_idx][name].inc(count)
