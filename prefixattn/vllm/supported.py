"""Engines in which a prefix could be lost, or served to others, are refused at their start."""

from __future__ import annotations

from typing import Any

from vllm.v1.kv_cache_interface import FullAttentionSpec

OWN_CACHE_FREE = ("ngram", "ngram_gpu", "suffix")  # speculation without a model of its own


def check_engine(vllm_config: Any, kv_cache_config: Any) -> None:
    """Refuse what has not been shown to keep prefixes whole (ValueError)."""
    transfer, parallel = vllm_config.kv_transfer_config, vllm_config.parallel_config
    if transfer.kv_load_failure_policy != "fail":
        raise ValueError(
            'kv_load_failure_policy must be "fail", got '
            f"{transfer.kv_load_failure_policy!r}: placeholders would be computed as text, and "
            "served to every later request of the adapter"
        )
    if transfer.kv_connector != "PrefixConnector":
        raise ValueError(
            f"kv_connector must be PrefixConnector alone, got {transfer.kv_connector!r}: other "
            "connectors take equal placeholders for equal text"
        )
    specs: list[Any] = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    kinds = [type(spec) for spec in specs]
    if kinds != [FullAttentionSpec]:  # a subclass is another kind of cache: latent, sinks, chunks
        names = [kind.__name__ for kind in kinds]
        raise ValueError(
            f"the model's cache must be of one kind, plain full attention, got {names}"
        )
    (spec,) = specs
    if spec.sliding_window is not None or spec.attention_chunk_size is not None:
        raise ValueError("the model's attention has a window, behind which a prefix would be lost")
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method not in OWN_CACHE_FREE:
        raise ValueError(
            f"speculative method must be one of {OWN_CACHE_FREE}, got {speculative.method!r}: a "
            "draft model has a cache of its own, without the prefix"
        )
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if (size := getattr(parallel, name, 1)) != 1:
            raise ValueError(f"{name} must be 1, got {size}: blocks are spread over ranks there")
