"""Choosing an adapter by ``model``, without an engine: an application stands for the server's."""

import asyncio
import json
import threading
from types import SimpleNamespace

import pytest

from prefixattn.vllm import middleware
from prefixattn.vllm.folder import AdapterFolder, ModelShape
from prefixattn.vllm.middleware import NOTE, ChooseByModel

PATH = "/v1/completions"


class Answer(Exception):
    """Stands for fastapi's HTTPException, which is not installed everywhere."""

    def __init__(self, status, words):
        super().__init__(words)
        self.status = status


@pytest.fixture(autouse=True)
def answers(monkeypatch):
    monkeypatch.setattr(middleware, "refusal", Answer)


class Server:
    """Reads a body and answers 200, as an application that may be mounted below another."""

    def __init__(self, names=("base",), loras=(), **models):
        paths = [SimpleNamespace(name=name) for name in names]
        self.models = SimpleNamespace(
            base_model_paths=paths, lora_requests=dict.fromkeys(loras), **models
        )
        self.state = SimpleNamespace(openai_serving_models=self.models)
        self.asked = []

    async def __call__(self, scope, receive, send):
        scope["app"] = self
        if scope["method"] == "POST":
            self.asked.append(json.loads((await receive())["body"]))
        own = [{"id": path.name, "root": "x"} for path in self.models.base_model_paths]
        own += [{"id": name, "parent": "base"} for name in self.models.lora_requests]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps({"data": own}).encode()})


@pytest.fixture
def adapters(tmp_path):
    (tmp_path / "adapters" / "brief").mkdir(parents=True)
    (tmp_path / "adapters" / "both").mkdir()
    return AdapterFolder(tmp_path / "adapters", ModelShape(1, 1, 8))


def choosing(server, adapters):
    chooser = ChooseByModel(server)
    chooser._folder = adapters
    return chooser


async def call(app, body=None, path=PATH, **scope):
    """What a client gets: headers and the JSON of the answer."""
    sent = []

    async def receive():
        return {"type": "http.request", "body": json.dumps(body).encode()}

    async def send(message):
        sent.append(message)

    method = "GET" if body is None else "POST"
    held = {"type": "http", "method": method, "path": path, "headers": [], "app": None}
    await app(held | scope, receive, send)
    return dict(sent[0]["headers"]), json.loads(sent[1]["body"])


def ask(server, adapters, name, **more):
    headers, _ = asyncio.run(call(choosing(server, adapters), {"model": name}, **more))
    return server.asked[-1], headers


CHOSEN = {"model": "base", "kv_transfer_params": {"prefixattn": "brief"}}
PLACES = {
    "as it is": {"path": PATH},
    "a root path that a proxy leaves in": {"path": f"/llm{PATH}", "root_path": "/llm"},
    "a root path that a proxy takes away": {"path": PATH, "root_path": "/llm"},
    "an application that is mounted": {"path": f"/a/b{PATH}", "root_path": ""},
    "chat": {"path": "/v1/chat/completions"},
    "chat in batches": {"path": "/v1/chat/completions/batch"},
    "responses": {"path": "/v1/responses"},
    "Anthropic's messages": {"path": "/v1/messages"},
    "tokens in and out": {"path": "/inference/v1/generate"},
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
def test_an_adapter_is_chosen_wherever_the_server_answers(adapters, place):
    assert ask(Server(), adapters, "brief", **place)[0] == CHOSEN


def test_a_request_behind_sagemaker_goes_by_what_it_asks_for(adapters):
    server = Server()
    chooser = choosing(server, adapters)
    asyncio.run(call(chooser, {"model": "brief", "prompt": "x"}, "/invocations"))
    assert server.asked == [CHOSEN | {"prompt": "x"}]
    with pytest.raises(Answer, match="/invocations cannot answer with"):
        asyncio.run(call(chooser, {"model": "brief", "input": "x"}, "/invocations"))


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/v1/messages/count_tokens"])
def test_what_is_about_the_text_alone_goes_to_the_base(adapters, path):
    assert ask(Server(), adapters, "brief", path=path)[0] == {"model": "base"}


LOSING = ["/v1/embeddings", "/pooling", "/v1/score", "/rerank", "/classify", "/v1/systemone"]
LOSING += ["/v1/completions/render", "/v1/chat/completions/render"]


@pytest.mark.parametrize("path", LOSING)
def test_an_endpoint_that_would_lose_the_adapter_refuses_it(adapters, path):
    server = Server()
    chooser = choosing(server, adapters)
    for body in (
        {"model": "brief"},
        {"model": "base", "kv_transfer_params": {"prefixattn": "brief"}},
    ):
        with pytest.raises(Answer, match=f"adapter, which {path} cannot answer with") as said:
            asyncio.run(call(chooser, body, path))
        assert said.value.status == 400
    asyncio.run(call(chooser, {"model": "base"}, path))
    assert server.asked == [{"model": "base"}]


def test_an_endpoint_that_loses_the_adapter_in_an_old_version(adapters, monkeypatch):
    path = "/inference/v1/generate"
    monkeypatch.setattr("prefixattn.vllm.endpoints.installed_version", lambda: "0.28.0")
    with pytest.raises(Answer, match=f"{path} cannot answer with"):
        ask(Server(), adapters, "brief", path=path)
    assert ask(Server(), adapters, "brief")[0] == CHOSEN


NO_ADAPTERS = {
    "unknown": "nobody",
    "longer than a file's name may be": "x" * 300,
    "longer than a path may be": "x" * 5000,
    "with a slash": "org/brief",
    "with a slash behind it": "brief/",
    "a way out": "../adapters/brief",
    "half a character": "\ud800",
    "a zero": "a\0b",
    "empty": "",
    "a number": 7,
    "a list": ["brief"],
    "nothing": None,
}


@pytest.mark.parametrize("name", NO_ADAPTERS.values(), ids=NO_ADAPTERS.keys())
def test_what_names_no_adapter_is_the_servers_to_answer(adapters, name):
    assert ask(Server(), adapters, name)[0] == {"model": name}


@pytest.mark.parametrize("name", ["Zürich", "短い", "with space", "v1.2", "x" * 255])
def test_names_as_folders_have_them(adapters, name):
    (adapters.path / name).mkdir()
    asked, _ = ask(Server(), adapters, name)
    assert asked["kv_transfer_params"] == {"prefixattn": name}
    _, listed = asyncio.run(call(choosing(Server(), adapters), path="/v1/models"))
    assert name in [card["id"] for card in listed["data"]]


SERVED = {
    "a LoRA adapter": Server(loras=["both"]),
    "the base model": Server(names=["base", "both"]),
}


@pytest.mark.parametrize("server", SERVED.values(), ids=SERVED.keys())
def test_a_name_that_the_server_serves_is_the_servers(adapters, caplog, server):
    asked, headers = ask(server, adapters, "both")
    assert asked == {"model": "both"}
    assert b"kv_transfer_params" in headers[NOTE]
    assert "the prefix adapter of that name is not reached" in caplog.text
    assert NOTE not in ask(server, adapters, "base")[1]
    _, listed = asyncio.run(call(choosing(server, adapters), path="/v1/models"))
    assert sorted(card["id"] for card in listed["data"]) == ["base", "both", "brief"]


def test_a_lora_adapter_comes_and_goes_beside_a_prefix(adapters, caplog):
    server = Server()
    chooser = choosing(server, adapters)

    async def run():
        body, prefix = {"model": "both"}, CHOSEN | {"kv_transfer_params": {"prefixattn": "both"}}
        await call(chooser, body)
        headers, _ = await call(chooser, {"lora_name": "both"}, "/v1/load_lora_adapter")
        assert b"kv_transfer_params" in headers[NOTE]
        server.models.lora_requests["both"] = object()
        headers, _ = await call(chooser, body)
        assert NOTE in headers
        await call(chooser, body)
        (adapters.path / "both").rename(adapters.path / "away")
        headers, _ = await call(chooser, body)
        assert NOTE not in headers
        (adapters.path / "away").rename(adapters.path / "both")
        del server.models.lora_requests["both"]
        await call(chooser, body)
        assert [x for x in server.asked if "model" in x] == [prefix, body, body, body, prefix]

    asyncio.run(run())
    assert len(caplog.records) == 1


FOUND = {
    "found": (SimpleNamespace(lora_name="both"), True),
    "found and broken": (SimpleNamespace(error=SimpleNamespace(code=400)), True),
    "not found": (SimpleNamespace(error=SimpleNamespace(code=404)), False),
}


@pytest.mark.parametrize(("found", "own"), FOUND.values(), ids=FOUND.keys())
def test_a_lora_adapter_that_the_server_would_find(adapters, monkeypatch, found, own):
    async def resolve(name):
        return found

    monkeypatch.setattr("prefixattn.vllm.served._loads_at_run_time", lambda: True)
    server = Server(lora_resolvers=[object()], resolve_lora=resolve)
    asked, _ = ask(server, adapters, "both")
    assert asked["model"] == ("both" if own else "base")


def test_a_folder_that_is_not_there_concerns_requests_with_adapters_alone(adapters, caplog):
    server = Server(loras=["both"])
    chooser = choosing(server, adapters)
    away = adapters.path.with_name("away")
    adapters.path.rename(away)
    for name in ("base", "both", None):
        asyncio.run(call(chooser, {"model": name}))
        assert server.asked[-1] == {"model": name}
    with pytest.raises(
        Answer, match=r"folder of adapters .* cannot be read \(No such file"
    ) as said:
        asyncio.run(call(chooser, {"model": "brief"}))
    assert said.value.status == 503
    _, listed = asyncio.run(call(chooser, path="/v1/models"))
    assert [card["id"] for card in listed["data"]] == ["base", "both"]
    assert "no adapters among the models" in caplog.text
    away.rename(adapters.path)
    asyncio.run(call(chooser, {"model": "brief"}))
    assert server.asked[-1] == CHOSEN


def test_a_server_without_our_connector_is_as_it_was():
    server = Server()
    for config in (None, SimpleNamespace(kv_transfer_config=None)):
        server.state.engine_client = SimpleNamespace(vllm_config=config)
        assert ask(server, None, "brief")[0] == {"model": "brief"}
    _, listed = asyncio.run(call(choosing(server, None), path="/v1/models"))
    assert [card["id"] for card in listed["data"]] == ["base"]


def test_a_disk_that_hangs_holds_the_first_request_to_the_base_alone(adapters, monkeypatch):
    monkeypatch.setattr(middleware, "LOOK_SECONDS", 0.01)
    release, server = threading.Event(), Server()

    class Hanging:
        def __contains__(self, name):
            return release.wait()

    async def run():
        chooser = choosing(server, Hanging())
        for _ in range(3):
            headers, _ = await call(chooser, {"model": "base"})
            assert NOTE not in headers
        (look,) = chooser._looks.values()
        release.set()
        await look

    asyncio.run(run())
    assert len(server.asked) == 3
