"""In the process that takes requests: placeholders in front of the text, or a clear refusal.

vLLM has no hook between a request and its engine, so `install` wraps the one function that every
request goes through, and the one before it that can wait: an adapter is read there, in a thread,
while the event loop serves other requests. Only a server with our connector is touched.
"""

from __future__ import annotations

from copy import copy
from functools import wraps
from http import HTTPStatus
from pathlib import Path
from typing import Any

import vllm.exceptions
from vllm.logger import init_logger
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor

from prefixattn.vllm.claim import NAMESPACE, PARAMETER, TRANSFER, Claim, name_of
from prefixattn.vllm.folder import UNREADABLE, AdapterFolder, FolderUnavailable, ModelShape
from prefixattn.vllm.reading import Readings

logger = init_logger(__name__)

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
    AsyncLLM.add_request = _reading_first(AsyncLLM.add_request)
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    for kind in (ChatCompletionRequest, CompletionRequest):
        kind.to_beam_search_params = _refusing(kind.to_beam_search_params)


def is_installed() -> bool:
    """Whether requests of this process go through ours."""
    return hasattr(InputProcessor.process_inputs, WRAPPED)


def _reading_first(original: Any) -> Any:
    """Requests reach `process_inputs`, which holds the event loop, with their adapter read."""

    @wraps(original)
    async def add_request(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        front = front_end(self.input_processor)
        if front and not isinstance(prompt, EngineCoreRequest):  # which has been through it
            params = await front.prepare(params)
        return await original(self, request_id, prompt, params, *args, **kwargs)

    return add_request


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
        self.readings = Readings(self.folder)
        self.max_model_len: int = vllm_config.model_config.max_model_len
        self.placeholder = placeholder_token_id(vllm_config)

    async def prepare(self, params: Any) -> Any:
        """The parameters of a request, with its adapter's claim in place of its name.

        Raises:
            VLLMValidationError, GracefulHTTPError: as `expand` does.
        """
        try:
            name = name_of(_transfer(params))
            if name is None:
                return params
            claim = await self.readings.claim(name)
        except (KeyError, *UNREADABLE) as error:
            raise _refusal(error) from error
        prepared = copy(params)  # the caller's may be for several requests
        prepared.extra_args = {**params.extra_args, TRANSFER: {PARAMETER: claim}}
        return prepared

    def expand(self, request: Any) -> Any:
        """The request with the placeholders of its adapter and their salt.

        Raises:
            VLLMValidationError: something is asked for that would lose the adapter or poison its
                blocks, or there is no such adapter.
            GracefulHTTPError: the folder of adapters is not there (503).
        """
        if (request.cache_salt or "").startswith(NAMESPACE):
            raise Refused(f"cache_salt must not begin with {NAMESPACE!r}")
        claim = self._claim(request.sampling_params)
        if claim is None:
            return request
        _check(request)
        length = claim.num_tokens + len(request.prompt_token_ids)
        if length >= self.max_model_len:
            raise Refused(
                f"the prompt has {len(request.prompt_token_ids)} tokens behind the "
                f"{claim.num_tokens} of adapter {claim.name!r}, and max_model_len "
                f"{self.max_model_len} counts both and at least one more"
            )
        request.prompt_token_ids = [self.placeholder] * claim.num_tokens + request.prompt_token_ids
        request.cache_salt = claim.salt(request.cache_salt)
        params = request.sampling_params
        params.extra_args = {**params.extra_args, TRANSFER: claim.parameters()}
        return request

    def _claim(self, params: Any) -> Claim | None:
        transfer = _transfer(params)
        if isinstance(transfer, dict) and isinstance(transfer.get(PARAMETER), Claim):
            prepared: Claim = transfer[PARAMETER]  # no client can write one
            return prepared
        try:
            name = name_of(transfer)
            return None if name is None else self.folder.claim(name)
        except (KeyError, *UNREADABLE) as error:
            raise _refusal(error) from error


def _transfer(params: Any) -> Any:
    """A client's ``kv_transfer_params``, or None."""
    return (getattr(params, "extra_args", None) or {}).get(TRANSFER)


def _refusal(error: Exception) -> Exception:
    """What vLLM answers with words: 503 where no adapter can be served, or 400."""
    text = str(error.args[0] if isinstance(error, KeyError) else error)
    graceful = getattr(vllm.exceptions, "GracefulHTTPError", None)  # not in 0.28
    if isinstance(error, FolderUnavailable) and graceful is not None:
        unavailable: Exception = graceful(text, HTTPStatus.SERVICE_UNAVAILABLE)
        return unavailable
    return Refused(text)


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
    folder = AdapterFolder(Path(path), model_shape(vllm_config.model_config))
    try:
        folder.check()
    except FolderUnavailable as error:
        logger.warning("prefixattn: %s", error)
    return folder


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
