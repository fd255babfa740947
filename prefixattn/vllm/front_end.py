"""In the process that takes requests: placeholders in front of the text, or a clear refusal.

vLLM has no hook between a request and its engine, so `install` wraps the one function that every
request goes through. Only a server with our connector is touched.
"""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Any

import vllm.exceptions
from vllm.v1.engine.input_processor import InputProcessor

from prefixattn.vllm.claim import NAMESPACE, TRANSFER, name_of
from prefixattn.vllm.folder import UNREADABLE, AdapterFolder, ModelShape

OURS = "PrefixConnector"
WRAPPED = "_prefixattn"
Refused: type[Exception] = getattr(vllm.exceptions, "VLLMValidationError", ValueError)


def install() -> None:
    """Wrap `InputProcessor.process_inputs`, and what would lose an adapter before it. Once."""
    if is_installed():
        return
    original = InputProcessor.process_inputs

    @wraps(original)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(self, *args, **kwargs)
        front = front_end(self)
        return front.expand(request) if front else request

    setattr(process_inputs, WRAPPED, True)
    InputProcessor.process_inputs = process_inputs
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    for kind in (ChatCompletionRequest, CompletionRequest):
        kind.to_beam_search_params = _refusing(kind.to_beam_search_params)


def is_installed() -> bool:
    """Whether requests of this process go through ours."""
    return hasattr(InputProcessor.process_inputs, WRAPPED)


def _refusing(original: Any) -> Any:
    """Beam search makes new requests of its own, and would drop the adapter."""

    @wraps(original)
    def to_beam_search_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "prefixattn" in (self.kv_transfer_params or {}):
            raise Refused("use_beam_search cannot be combined with an adapter: it would lose it")
        return original(self, *args, **kwargs)

    return to_beam_search_params


def front_end(processor: Any) -> FrontEnd | None:
    """The front end of this processor, made at its first request; None: no connector of ours."""
    transfer = processor.vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector != OURS:
        return None
    made: FrontEnd | None = getattr(processor, WRAPPED, None)
    if made is None:
        made = FrontEnd(processor.vllm_config)
        setattr(processor, WRAPPED, made)
    return made


class FrontEnd:
    """Requests on their way to the engine."""

    def __init__(self, vllm_config: Any) -> None:
        self.folder = adapter_folder(vllm_config)
        self.max_model_len: int = vllm_config.model_config.max_model_len
        self.placeholder = placeholder_token_id(vllm_config)

    def expand(self, request: Any) -> Any:
        """The request with the placeholders of its adapter and their salt.

        Raises:
            VLLMValidationError: something is asked for that would lose the adapter or poison its
                blocks, or there is no such adapter.
        """
        if (request.cache_salt or "").startswith(NAMESPACE):
            raise Refused(f"cache_salt must not begin with {NAMESPACE!r}")
        params = request.sampling_params
        extra = (params.extra_args or {}) if params else {}
        try:
            name = name_of(extra.get(TRANSFER))
            claim = None if name is None else self.folder.claim(name)
        except (KeyError, *UNREADABLE) as error:
            raise Refused(str(error.args[0] if error.args else error)) from error
        if claim is None:
            return request
        _check(request)
        length = claim.num_tokens + len(request.prompt_token_ids)
        if length >= self.max_model_len:
            raise Refused(
                f"the prompt has {len(request.prompt_token_ids)} tokens behind the "
                f"{claim.num_tokens} of adapter {name!r}, and max_model_len {self.max_model_len} "
                "counts both and at least one more"
            )
        request.prompt_token_ids = [self.placeholder] * claim.num_tokens + request.prompt_token_ids
        request.cache_salt = claim.salt(request.cache_salt)
        params.extra_args = {**extra, TRANSFER: claim.parameters()}
        return request


def _check(request: Any) -> None:
    """Refuse what vLLM serves past its connectors, or with positions of its own."""
    params = request.sampling_params
    for wrong, what in (
        (params.prompt_logprobs is not None, "prompt_logprobs, and echo with logprobs,"),
        (params.skip_reading_prefix_cache, "skip_reading_prefix_cache"),
        (request.prompt_embeds is not None, "a prompt of embeddings"),
        (request.mm_features, "a prompt with images, audio or video"),
        (getattr(request, "resumable", False), "a resumable request"),
    ):
        if wrong:
            raise Refused(f"{what} cannot be combined with an adapter")


def adapter_folder(vllm_config: Any) -> AdapterFolder:
    """The folder that ``--kv-transfer-config`` names (ValueError where it names none)."""
    extra = vllm_config.kv_transfer_config.kv_connector_extra_config
    if not isinstance(path := extra.get("adapters"), str):
        raise ValueError(
            "kv_connector_extra_config must have adapters, a folder of adapters, got "
            f"{sorted(extra)}"
        )
    return AdapterFolder(Path(path), model_shape(vllm_config.model_config))


def model_shape(model_config: Any) -> ModelShape:
    """The whole model's, whatever part of it a worker has."""
    return ModelShape(
        model_config.get_total_num_hidden_layers(),
        model_config.get_total_num_kv_heads(),
        model_config.get_head_size(),
    )


def placeholder_token_id(vllm_config: Any) -> int:
    """The token that stands for the prefix: one that a model is not expected to generate."""
    chosen = vllm_config.kv_transfer_config.kv_connector_extra_config.get("placeholder_token_id")
    vocab_size: int = vllm_config.model_config.get_vocab_size()
    if chosen is None:
        config = vllm_config.model_config.hf_text_config
        pad, eos = getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)
        ends = eos if isinstance(eos, list) else [eos]
        chosen = pad if isinstance(pad, int) and pad not in ends and pad >= 0 else vocab_size - 1
    if not isinstance(chosen, int) or not 0 <= chosen < vocab_size:
        raise ValueError(f"placeholder_token_id must be in [0, {vocab_size}), got {chosen!r}")
    return chosen
