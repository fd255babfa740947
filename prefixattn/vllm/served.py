"""What a server serves by itself, read from its application's state."""

from __future__ import annotations

from typing import Any


def base_names(state: Any) -> list[str]:
    """The names of the base model, the first of which answers carry."""
    models = getattr(state, "openai_serving_models", None)
    return [path.name for path in getattr(models, "base_model_paths", ())]


def serves(state: Any, name: str) -> bool:
    """Whether ``name`` is the base model's or that of a LoRA adapter that is loaded."""
    models = getattr(state, "openai_serving_models", None)
    return name in base_names(state) or name in (getattr(models, "lora_requests", None) or {})


async def would_serve(state: Any, name: str) -> bool:
    """Whether the server has this name now, or takes it as a LoRA adapter when it is asked for it.

    vLLM's LoRA resolvers load an adapter at the first request of its name.
    """
    if serves(state, name):
        return True
    models: Any = getattr(state, "openai_serving_models", None)
    if not getattr(models, "lora_resolvers", None) or not _loads_at_run_time():
        return False
    found = await models.resolve_lora(name)
    error = getattr(found, "error", None)
    return error is None or error.code != 404  # what is found and broken is the server's to refuse


def vllm_config(state: Any) -> Any:
    """The engine's configuration, where the application has an engine with our connector."""
    config = getattr(getattr(state, "engine_client", None), "vllm_config", None)
    transfer = getattr(config, "kv_transfer_config", None)
    return config if getattr(transfer, "kv_connector", None) == "PrefixConnector" else None


def _loads_at_run_time() -> bool:
    from vllm import envs

    return bool(envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING)
