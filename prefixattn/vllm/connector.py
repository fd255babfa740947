"""The KV connector: "the first P tokens of this request are computed already".

The scheduler's half counts them; the worker's half writes them where the engine put their blocks.
A load that fails is reported by block, and with the failure policy "fail" the engine ends the
requests that hold these blocks and forgets them: placeholders are never computed as text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)

from prefixattn.vllm import front_end
from prefixattn.vllm.claim import Claim, claim_of
from prefixattn.vllm.metrics import PrefixMetrics, PrefixStats
from prefixattn.vllm.supported import check_engine
from prefixattn.vllm.versions import check_version, installed_version
from prefixattn.vllm.waiting import Errand, Waiting
from prefixattn.vllm.worker import Worker


@dataclass(frozen=True)
class Load:
    """One prefix to write: tokens ``start`` to ``P``, into blocks that begin at token 0."""

    claim: Claim
    start: int
    block_ids: list[int]


@dataclass
class Loads(KVConnectorMetadata):
    """What workers write before the next step, and what they read meanwhile."""

    loads: list[Load] = field(default_factory=list)
    errand: Errand = field(default_factory=Errand)


@dataclass
class Held(KVConnectorWorkerMetadata):
    """By how many more workers, or fewer, adapters are held: digests and changes."""

    changes: dict[str, int]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Held:
        """Of both workers."""
        assert isinstance(other, Held)
        names = self.changes.keys() | other.changes.keys()
        return Held({n: self.changes.get(n, 0) + other.changes.get(n, 0) for n in names})


class PrefixConnector(KVConnectorBase_V1):
    """Serves a folder of prefixes (`prefixattn.vllm.kv_transfer_config` names it)."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        """Raises RuntimeError or ValueError for an engine that could serve wrong answers."""
        super().__init__(vllm_config, role, kv_cache_config)
        check_version(installed_version())
        if not front_end.is_installed():
            raise RuntimeError(
                "prefixattn's front end is not installed, and adapters would be ignored: "
                "VLLM_PLUGINS must contain prefixattn, or not be set"
            )
        check_engine(vllm_config, kv_cache_config)
        self._block_size: int = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        self._scheduled = Loads()
        self._waiting = Waiting(vllm_config.parallel_config.world_size)
        front_end.placeholder_token_id(vllm_config)  # else each request would be refused
        folder = front_end.adapter_folder(vllm_config)
        self._worker = (
            Worker(vllm_config, kv_cache_config, folder) if role == KVConnectorRole.WORKER else None
        )

    # The scheduler's half

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """What the prefix has beyond the tokens whose blocks the engine still holds.

        None: the workers read it, and the request is passed over until they have.
        """
        claim = _claim(request)
        missing = max(0, claim.num_tokens - num_computed_tokens) if claim else 0
        if claim and missing and not self._waiting.is_ready(request.request_id, claim):
            return None, False
        return missing, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Note what is to be written, now that it has blocks."""
        claim = _claim(request)
        if claim is None:
            return
        if getattr(request, "skip_reading_prefix_cache", False):
            raise RuntimeError("an adapter's request that skips the cache passed the front end")
        if num_external_tokens:
            count = -(-claim.num_tokens // self._block_size)
            (block_ids,) = blocks.get_block_ids()
            start = claim.num_tokens - num_external_tokens
            self._scheduled.loads.append(Load(claim, start, list(block_ids[:count])))
            self._waiting.written(claim)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """This step's loads, for the workers."""
        loads, self._scheduled = self._scheduled, Loads()
        loads.errand = self._waiting.take_errand()
        return loads

    def update_connector_output(self, connector_output: Any) -> None:
        """What the workers hold now."""
        held = connector_output.kv_connector_worker_meta
        if isinstance(held, Held):
            self._waiting.reported(held.changes)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, None]:
        """A request ended, also one that waited for its adapter; its blocks are free."""
        if (claim := _claim(request)) is not None:
            self._waiting.finished(request.request_id, claim)
        return False, None

    # The worker's half

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Write all prefixes of this step; the forward comes after, on the same stream."""
        metadata = self._get_connector_metadata()
        assert self._worker is not None
        assert isinstance(metadata, Loads)
        self._worker.run(metadata.errand)
        for load in metadata.loads:
            first = load.start // self._block_size
            self._worker.write(load.claim, load.start, load.block_ids, first)
        self._worker.forget(load.claim.digest for load in metadata.loads)

    def build_connector_worker_meta(self) -> Held | None:
        """What has changed of the adapters that this worker holds."""
        changes = self._worker.take_changes() if self._worker else {}
        return Held(changes) if changes else None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """The blocks that were not written, since the last look."""
        assert self._worker is not None
        return self._worker.take_failed()

    def get_kv_connector_stats(self) -> PrefixStats | None:
        """A worker's counts since the last look."""
        counts = self._worker.take_counts() if self._worker else {}
        return PrefixStats(counts) if counts else None

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: `start_load_kv` has written them."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing: prefixes are read, and never written."""

    def wait_for_save(self) -> None:
        """Nothing: see `save_kv_layer`."""

    # Metrics

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> PrefixStats:
        """Counts as they came from another process."""
        return PrefixStats(data or {})

    @classmethod
    def build_prom_metrics(cls, *args: Any) -> PrefixMetrics:
        """The counters among vLLM's metrics."""
        return PrefixMetrics(*args)


def _claim(request: Any) -> Claim | None:
    return claim_of(request.cache_salt, request.kv_transfer_params)
