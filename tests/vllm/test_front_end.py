"""Where vLLM takes a request: its adapter is read before anything holds the event loop."""

import asyncio
from http import HTTPStatus
from types import SimpleNamespace

import pytest
import torch

from prefixattn import Prefix
from prefixattn.vllm.claim import Claim
from prefixattn.vllm.folder import AdapterFolder, ModelShape
from prefixattn.vllm.reading import Readings

SHAPE = ModelShape(num_layers=2, num_heads=1, head_dim=8)


@pytest.fixture
def front(tmp_path):
    from prefixattn.vllm.front_end import FrontEnd

    Prefix(*torch.randn(2, 2, 1, 5, 8)).save_pretrained(tmp_path / "adapters" / "brief")
    made = object.__new__(FrontEnd)
    made.folder = AdapterFolder(tmp_path / "adapters", SHAPE)
    made.readings = Readings(made.folder)
    made.max_model_len, made.placeholder = 64, 0
    return made


def params(transfer={"prefixattn": "brief"}):  # noqa: B006
    from vllm import SamplingParams

    return SamplingParams(extra_args={"kv_transfer_params": transfer, "other": 1})


def request(sampling):
    return SimpleNamespace(
        sampling_params=sampling,
        prompt_token_ids=[7, 8],
        cache_salt=None,
        prompt_embeds=None,
        mm_features=None,
    )


def test_what_was_read_is_not_read_on_the_event_loop(front):
    given = params()
    prepared = asyncio.run(front.prepare(given))
    assert given.extra_args == {"kv_transfer_params": {"prefixattn": "brief"}, "other": 1}
    front.folder = None  # whoever looks at it fails
    expanded = front.expand(request(prepared.clone()))
    assert expanded.prompt_token_ids == [0] * 5 + [7, 8]
    held = expanded.sampling_params.extra_args["kv_transfer_params"]["prefixattn"]
    assert expanded.cache_salt == "prefixattn:" + Claim(**held).digest


def test_a_request_without_an_adapter_touches_no_folder(front):
    front.folder = front.readings = None
    for sampling in (params(None), None):
        assert asyncio.run(front.prepare(sampling)) is sampling
        assert front.expand(request(sampling)).prompt_token_ids == [7, 8]


def test_requests_of_the_asynchronous_engine_are_prepared():
    from vllm.v1.engine.async_llm import AsyncLLM

    from prefixattn.vllm import front_end

    front_end.install()
    assert hasattr(AsyncLLM.add_request, "__wrapped__")
    taken = []

    async def original(self, request_id, prompt, params, *more, priority=0):
        taken.append((request_id, prompt, params, more, priority))

    async def prepare(sampling):
        return "prepared"

    config = SimpleNamespace(kv_transfer_config=SimpleNamespace(kv_connector="PrefixConnector"))
    processor = SimpleNamespace(vllm_config=config)
    setattr(processor, front_end.WRAPPED, SimpleNamespace(prepare=prepare))
    engine = SimpleNamespace(input_processor=processor)
    asyncio.run(front_end._reading_first(original)(engine, "1", "text", "given", 5, priority=2))
    config.kv_transfer_config = None
    asyncio.run(front_end._reading_first(original)(engine, "2", "text", params="given"))
    assert taken == [("1", "text", "prepared", (5,), 2), ("2", "text", "given", (), 0)]


def test_the_words_and_the_status_of_a_refusal(front, tmp_path):
    from prefixattn.vllm.front_end import Refused, _refusal

    front.folder.path.rename(tmp_path / "away")
    for use in (
        lambda: front.expand(request(params())),
        lambda: asyncio.run(front.prepare(params())),
    ):
        with pytest.raises(Exception, match="folder of adapters .* cannot be read") as said:
            use()
        status = getattr(said.value, "http_status", None)  # 0.28 knows the client's errors alone
        assert status == HTTPStatus.SERVICE_UNAVAILABLE or isinstance(said.value, Refused)
    forbidden = _refusal(PermissionError(13, "Permission denied", "prefix.safetensors"))
    assert "Permission denied: 'prefix.safetensors'" in str(forbidden)
    assert str(_refusal(KeyError("no adapter 'x'"))) == "no adapter 'x'"
