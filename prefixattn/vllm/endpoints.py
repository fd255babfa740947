"""Which of the server's endpoints can answer with an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from prefixattn.vllm.versions import installed_version

Use = Literal["adapter", "text", "refused"]

TOKENS = "/inference/v1/generate"
ADAPTER = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/responses",
    "/v1/messages",
    TOKENS,
    "/cohere/v2/chat",
)
"""They hand ``kv_transfer_params`` to the engine. What renders a prompt for them loses it."""

TEXT = (
    "/tokenize",
    "/detokenize",
    "/v1/messages/count_tokens",
    "/v1/chat/completions/derender",
    "/v1/completions/derender",
)
"""They answer about the text alone, which an adapter does not change."""

INVOCATIONS = "/invocations"  # of a kind that its body says
MODELS = "/v1/models"
LOAD_LORA = "/v1/load_lora_adapter"


def ends_in(path: str, *endpoints: str) -> bool:
    """Whether ``path`` is one of these endpoints, behind a root path or where an app is mounted."""
    return any(path.endswith(endpoint) for endpoint in endpoints)


def use_of(path: str, asked: Mapping[str, Any]) -> Use:
    """What the endpoint at ``path`` does with an adapter that a request names."""
    if ends_in(path, TOKENS) and installed_version().startswith("0.28."):
        return "refused"  # it takes kv_transfer_params there, and drops them
    generates = "messages" in asked or "prompt" in asked
    if ends_in(path, *ADAPTER) or (ends_in(path, INVOCATIONS) and generates):
        return "adapter"
    return "text" if ends_in(path, *TEXT) else "refused"
