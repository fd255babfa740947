"""Prefixes on vLLM: a folder of adapters, served by the engine itself.

A prefix's keys and values are the blocks of as many placeholder tokens in front of the text. The
connector writes them once into vLLM's paged cache; the engine's prefix cache shares them among all
requests of the adapter. docs/serving.md is the guide.

Importing this loads no vLLM.
"""

from pathlib import Path
from typing import Any

from prefixattn.vllm.versions import check_version, installed_version

__all__ = ["kv_transfer_config", "register"]

CONNECTOR = "PrefixConnector"
CACHE_BYTES = 2**30


def kv_transfer_config(
    adapters: str | Path, *, cache_bytes: int = CACHE_BYTES, placeholder_token_id: int | None = None
) -> dict[str, Any]:
    """What ``--kv-transfer-config`` takes, or ``LLM(kv_transfer_config=KVTransferConfig(**…))``.

    Args:
        adapters: a folder of folders, one for each adapter, whose name is the adapter's; in any
            format that `prefixattn.checkpoints.load` reads without a model.
        cache_bytes: what each worker keeps of loaded adapters in host memory.
        placeholder_token_id: the token that stands for the prefix in prompts; None: the model's
            padding token, or the last of its vocabulary.
    """
    extra: dict[str, Any] = {"adapters": str(Path(adapters).absolute()), "cache_bytes": cache_bytes}
    if placeholder_token_id is not None:
        extra["placeholder_token_id"] = placeholder_token_id
    return {
        "kv_connector": CONNECTOR,
        "kv_connector_module_path": "prefixattn.vllm.connector",
        "kv_role": "kv_consumer",
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": extra,
    }


def register() -> None:
    """The entry point of ``vllm.general_plugins``: every process of vLLM calls it, maybe twice.

    A server without our connector stays as it is; so does one of an untested version, in which the
    connector then refuses to start.
    """
    try:
        check_version(installed_version())
    except RuntimeError:
        return
    from prefixattn.vllm.front_end import install

    install()
