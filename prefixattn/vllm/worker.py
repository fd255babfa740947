"""In each worker: its layers and heads of a prefix, written by the attention backend itself."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index

from prefixattn.vllm import CACHE_BYTES
from prefixattn.vllm.cache import AdapterCache, Layers
from prefixattn.vllm.claim import Claim
from prefixattn.vllm.folder import AdapterFolder
from prefixattn.vllm.waiting import Errand

logger = init_logger(__name__)


class Worker:
    """Writes prefixes into the paged cache of one rank."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any, folder: AdapterFolder) -> None:
        self.folder = folder
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        budget = extra.get("cache_bytes", CACHE_BYTES)
        if not isinstance(budget, int) or budget < 0:
            raise ValueError(f"cache_bytes must be a number of bytes, got {budget!r}")
        self.cache = AdapterCache(budget)
        self.dtype: torch.dtype = vllm_config.model_config.dtype
        (group,) = kv_cache_config.kv_cache_groups
        self.block_size: int = group.kv_cache_spec.block_size
        layers = vllm_config.compilation_config.static_forward_context
        self.layers: dict[str, Any] = {name: layers[name] for name in group.layer_names}
        self._reader = _reader()
        self._ready: dict[str, Future[Layers]] = {}  # by digest: read for requests that wait
        self._reported: set[str] = set()
        self._failed: set[int] = set()
        self._counts: dict[str, int] = {}

    def run(self, errand: Errand) -> None:
        """Begin to read adapters that requests wait for; the engine goes on meanwhile."""
        self.forget(errand.forget)
        for claim in errand.read:
            if claim.digest in self.cache.held:
                kept: Future[Layers] = Future()
                kept.set_result(self.cache.held[claim.digest])
                self._ready[claim.digest] = kept
            else:
                self._ready[claim.digest] = self._reader.submit(self._read, claim)

    def forget(self, digests: Iterable[str]) -> None:
        """Keep what was read for requests no longer, but for the memory of adapters used last."""
        for digest in digests:
            self._ready.pop(digest, None)

    def take_changes(self) -> dict[str, int]:
        """Adapters that are held now (1) and no longer (-1), since this was last asked."""
        ready = {digest for digest, made in self._ready.items() if made.done()}
        held = ready | set(self.cache.held)
        before, self._reported = self._reported, held
        return dict.fromkeys(held - before, 1) | dict.fromkeys(before - held, -1)

    def write(self, claim: Claim, start: int, block_ids: list[int], first: int) -> None:
        """Tokens ``start`` to ``P`` into their slots; a failure is logged and its blocks kept.

        Args:
            claim: the adapter.
            start: the first token that is not in the cache yet.
            block_ids: the blocks from token 0 on.
            first: the index of the first block that is written into.
        """
        try:
            made = self._ready.get(claim.digest)
            read = made.result if made else partial(self._read, claim)
            layers = self.cache.get(claim.digest, read)
            self._write(layers, claim.num_tokens, start, block_ids)
        except Exception as error:  # whatever it is: this request ends, and no other
            logger.error("prefixattn: adapter %r cannot be loaded: %s", claim.name, error)
            self._failed.update(block_ids[first:])
            self._count("failures", 1)
        else:
            self._count("writes", 1)
            self._count("tokens", claim.num_tokens - start)

    def take_failed(self) -> set[int]:
        """Blocks that were not written, since this was last asked."""
        failed, self._failed = self._failed, set()
        return failed

    def take_counts(self) -> dict[str, int]:
        """Counts since this was last asked."""
        counts = self._counts | self.cache.counts
        self._counts, self.cache.counts = {}, {}
        return counts

    def _count(self, name: str, number: int) -> None:
        self._counts[name] = self._counts.get(name, 0) + number

    def _read(self, claim: Claim) -> Layers:
        """This rank's layers on the host: keys, values ``[P, H_rank, D]`` in the model's dtype."""
        pairs = self.folder.pairs(claim)
        pin = torch.cuda.is_available()

        def part(tensor: Tensor, heads: slice) -> Tensor:
            mine = tensor[heads].to(self.dtype).transpose(0, 1).contiguous()
            return mine.pin_memory() if pin else mine

        found = {}
        for name, layer in self.layers.items():
            key, value = pairs[extract_layer_index(name)]
            heads = heads_of_rank(key.shape[0], layer.num_kv_heads)
            found[name] = part(key, heads), part(value, heads)
        return found

    def _write(self, layers: Layers, num_tokens: int, start: int, block_ids: list[int]) -> None:
        tokens = torch.arange(start, num_tokens)
        blocks = torch.tensor(block_ids)[tokens // self.block_size]
        slots = blocks * self.block_size + tokens % self.block_size
        for name, (key, value) in layers.items():
            layer = self.layers[name]
            device = layer.kv_cache.device
            layer.impl.do_kv_cache_update(
                layer,
                key[start:].to(device, non_blocking=True),
                value[start:].to(device, non_blocking=True),
                layer.kv_cache,
                slots.to(device, non_blocking=True),
            )


def _reader() -> ThreadPoolExecutor:
    """One thread: two readings at once would hold twice the memory, and end no sooner."""
    if not torch.cuda.is_available():
        return ThreadPoolExecutor(1, "prefixattn-read")
    device = (torch.cuda.current_device(),)  # pinned memory belongs to this rank's
    return ThreadPoolExecutor(1, "prefixattn-read", torch.cuda.set_device, device)


def heads_of_rank(total: int, own: int) -> slice:
    """Which of the model's key/value heads this tensor-parallel rank has; ranks may share one."""
    rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    first = rank * own if total >= size else rank * total // size
    return slice(first, first + own)
