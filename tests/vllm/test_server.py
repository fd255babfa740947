"""A real server: adapters by name over HTTP, hostile clients, adapters that come and go."""

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE

from prefixattn.vllm.testing import Server
from prefixattn.vllm.versions import installed_version

httpx = pytest.importorskip("httpx", reason="needs vLLM's environment: make test-vllm brings it")

NAMES = ("base", "ours-40", "ours-64", "peft-200", "peft-7")
KEY = "a key that nobody guesses"


class Served(Server):
    """A server over a folder of adapters of its own."""

    def __init__(self, world, log, *options, **env):
        self.world, self.adapters = world, world / "adapters"
        held = json.loads((world / "expected.json").read_text())
        self.prompts, self.expected = held["prompts"], held["answers"]
        configure = [Path(sys.executable).with_name("prefixattn"), "vllm", self.adapters]
        config = subprocess.run(configure, capture_output=True, text=True, check=True).stdout
        own = ["--model", world / "model", "--served-model-name", "base"]
        own += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "640"]
        own += ["--block-size", "32", "--num-gpu-blocks-override", "300", "--seed", "0"]
        own += ["--kv-transfer-config", config.strip()]
        if installed_version() >= "0.30":  # tokens in and out, which were always served before
            own += ["--enable-scale-out"]
        own += ["--middleware", "prefixattn.vllm.middleware.ChooseByModel", *options]
        super().__init__(own, log, env=env)
        self.client = httpx.Client(base_url=self.url, timeout=PATIENCE)

    def body(self, number, model="base", **more):
        given = {"model": model, "prompt": self.prompts[number], "temperature": 0}
        wanted = {"max_tokens": 16, "ignore_eos": True, "return_token_ids": True}
        return given | wanted | more

    def post(self, path="/v1/completions", **body):
        return self.client.post(path, json=body)

    def wrong(self):
        """Which adapters answer otherwise than they should, by `model`."""
        found = set()
        for name in NAMES:
            for number in range(len(self.prompts)):
                answer = self.post(**self.body(number, name))
                assert answer.status_code == 200, answer.text
                tokens = answer.json()["choices"][0]["token_ids"]
                if tokens != self.expected[name][number]["tokens"]:
                    found.add(name)
        return sorted(found)


@pytest.fixture(scope="module")
def server(made_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    shutil.copytree(made_world, folder / "world")
    with Served(folder / "world", folder / "log") as started:
        yield started


def test_an_adapter_is_chosen_by_model(server):
    assert server.wrong() == []


def test_an_adapter_is_chosen_by_kv_transfer_params(server):
    for name in NAMES[1:]:
        answer = server.post(**server.body(1, kv_transfer_params={"prefixattn": name})).json()
        assert answer["choices"][0]["token_ids"] == server.expected[name][1]["tokens"]


def test_chat_and_streaming(server):
    wanted = server.expected["peft-200"][3]["tokens"]
    messages = [{"role": "user", "content": server.prompts[3]}]
    body = server.body(3, "peft-200") | {"messages": messages}
    del body["prompt"]
    said = server.post("/v1/chat/completions", **body).json()
    assert said["choices"][0]["token_ids"] == wanted
    with server.client.stream(
        "POST", "/v1/completions", json=server.body(3, "peft-200", stream=True)
    ) as lines:
        parts = [line[6:] for line in lines.iter_lines() if line.startswith("data: {")]
    assert [t for x in parts for t in json.loads(x)["choices"][0]["token_ids"] or ()] == wanted


def generated(server, path, **body):
    """Text that an endpoint answers an adapter's first prompt with, and what it says instead."""
    limits = {"max_tokens": 16, "temperature": 0, "ignore_eos": True}
    answer = server.post(path, **({"model": "ours-40"} | limits | body))
    return answer.status_code, answer.json()


def test_endpoints_that_generate_answer_with_the_adapter(server):
    text = server.post(**server.body(1, "ours-40")).json()["choices"][0]["text"]
    assert text != server.post(**server.body(1)).json()["choices"][0]["text"]
    prompt, wanted = server.prompts[1], server.expected["ours-40"][1]["tokens"]
    messages = [{"role": "user", "content": prompt}]
    status, said = generated(server, "/v1/chat/completions/batch", messages=[messages, messages])
    assert (status, [c["message"]["content"] for c in said["choices"]]) == (200, [text] * 2)
    limits = {"max_output_tokens": 16, "input": messages, "max_tokens": None}
    status, said = generated(server, "/v1/responses", **limits)
    assert (status, said["output"][0]["content"][0]["text"]) == (200, text)
    status, said = generated(server, "/v1/messages", messages=messages)
    assert (status, said["content"][0]["text"]) == (200, text)
    sampling = {"max_tokens": 16, "temperature": 0, "ignore_eos": True}
    ids = server.post("/tokenize", model="ours-40", prompt=prompt).json()["tokens"]
    status, said = generated(
        server, "/inference/v1/generate", token_ids=ids, sampling_params=sampling
    )
    if installed_version().startswith("0.28."):  # which would drop it
        assert (status, "cannot answer with" in said["error"]["message"]) == (400, True)
    else:
        assert (status, said["choices"][0]["token_ids"]) == (200, wanted)
    assert server.wrong() == []


def test_an_endpoint_that_would_lose_the_adapter_refuses_it(server):
    named = {"kv_transfer_params": {"prefixattn": "ours-40"}}
    for asked in ({"model": "ours-40"}, {"model": "base"} | named):
        answer = server.post("/v1/completions/render", prompt="Hello", **asked)
        assert answer.status_code == 400
        assert "/v1/completions/render cannot answer with" in answer.text
    assert server.post("/v1/completions/render", model="base", prompt="Hello").status_code == 200


def test_a_folder_that_is_away_concerns_requests_with_adapters_alone(server):
    away = server.adapters.with_name("away")
    server.adapters.rename(away)
    by_parameter = server.body(0, kv_transfer_params={"prefixattn": "peft-7"})
    words_alone = installed_version().startswith("0.28.")
    for body, status in (
        (server.body(0, "ours-40"), 503),
        (by_parameter, 400 if words_alone else 503),
    ):
        answer = server.post(**body)
        assert answer.status_code == status
        assert "requests with an adapter are answered once it is there" in answer.text
    answer = server.post(**server.body(0)).json()
    assert answer["choices"][0]["token_ids"] == server.expected["base"][0]["tokens"]
    listed = server.client.get("/v1/models").json()["data"]
    assert [model["id"] for model in listed] == ["base"]
    away.rename(server.adapters)
    assert server.wrong() == []


def test_usage_counts_the_prefix(server):
    alone = server.post(**server.body(0)).json()["usage"]["prompt_tokens"]
    assert server.post(**server.body(0, "ours-40")).json()["usage"]["prompt_tokens"] == alone + 40


def test_several_answers_and_several_prompts_of_one_request(server):
    body = server.body(0, "ours-64", n=2, temperature=1, top_k=1) | {
        "prompt": [server.prompts[0], server.prompts[3]]
    }
    tokens = [choice["token_ids"] for choice in server.post(**body).json()["choices"]]
    first, last = (server.expected["ours-64"][number]["tokens"] for number in (0, 3))
    assert tokens == [first, first, last, last]


def test_the_models_list_names_the_adapters(server):
    listed = server.client.get("/v1/models").json()["data"]
    assert {model["id"] for model in listed} == set(NAMES)
    assert {model["parent"] for model in listed if model["id"] != "base"} == {"base"}


SALT = "prefixattn:" + "0" * 32
HOSTILE = {
    "an unknown model": ({"model": "nobody"}, 404),
    "a way out": ({"model": "../adapters/ours-40"}, 404),
    "a long name": ({"model": "x" * 300}, 404),
    "a name with a slash": ({"model": "org/ours-40"}, 404),
    "a long adapter": ({"kv_transfer_params": {"prefixattn": "x" * 5000}}, 400),
    "an unknown adapter": ({"kv_transfer_params": {"prefixattn": "nobody"}}, 400),
    "a path": ({"kv_transfer_params": {"prefixattn": "/etc"}}, 400),
    "a made up claim": (
        {"kv_transfer_params": {"prefixattn": {"name": "x", "digest": "y", "num_tokens": 9}}},
        400,
    ),
    "a salt of ours": ({"cache_salt": SALT}, 400),
    "a salt of ours for an adapter": ({"model": "ours-40", "cache_salt": SALT}, 400),
    "prompt_logprobs": ({"model": "ours-40", "prompt_logprobs": 1}, 400),
    "echo with logprobs": ({"model": "ours-40", "echo": True, "logprobs": 1}, 400),
    "beam search": ({"model": "ours-40", "use_beam_search": True, "n": 2}, 400),
    "both ways": ({"model": "ours-40", "kv_transfer_params": {"prefixattn": "peft-7"}}, 400),
    "too long": ({"model": "peft-200", "prompt": "x" * 500}, 400),
    "an empty prompt": ({"model": "ours-40", "prompt": ""}, 400),
    "a number for a name": ({"model": 7}, 400),
}


@pytest.mark.parametrize(("body", "status"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_request_is_refused_and_poisons_nothing(server, body, status):
    answer = server.post(**server.body(0) | body)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]
    assert server.wrong() == []


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[" * 10_000, b"\xff\xfe", b"[]", b"null"], ids=repr
)
def test_what_is_no_request_is_the_servers_to_refuse(server, content):
    headers = {"content-type": "application/json"}
    for path in ("/v1/completions", "/v1/chat/completions"):
        status = server.client.post(path, content=content, headers=headers).status_code
        assert 400 <= status < 500
    assert server.client.get("/health").status_code == 200


def test_clients_that_leave_poison_nothing(server):
    for number in range(8):
        body = server.body(number % 4, NAMES[1 + number % 4], stream=True, max_tokens=200)
        with server.client.stream("POST", "/v1/completions", json=body) as lines:
            next(lines.iter_lines())
    assert server.wrong() == []


def test_adapters_come_go_and_are_replaced_while_it_runs(server):
    new, wanted = server.world / "spare" / "ours-40-new", server.expected["ours-40-new"]

    def tokens(name):
        answer = server.post(**server.body(1, name)).json()
        return answer["choices"][0]["token_ids"]

    shutil.copytree(new, server.adapters / "added")
    assert tokens("added") == wanted[1]["tokens"]
    held = server.adapters / "ours-64"
    held.rename(server.world / "before")
    (server.adapters / "added").rename(held)
    assert tokens("ours-64") == wanted[1]["tokens"]
    assert server.post(**server.body(0, "added")).status_code == 404
    held.rename(server.world / "after")
    (server.world / "before").rename(held)
    assert server.wrong() == []


def test_a_replacement_under_load_is_never_unseen(server):
    """Who asks after someone has had the new content's answer never gets the old content's."""
    wanted = {v: server.expected[f"ours-40{v}"][1]["tokens"] for v in ("", "-new")}
    for version, source in (("", server.adapters), ("-new", server.world / "spare")):
        shutil.copytree(source / f"ours-40{version}", server.world / f"content{version}")
    link, spare = server.adapters / "swapped", server.world / "swapped"
    link.symlink_to(server.world / "content")
    spare.symlink_to(server.world / "content-new")
    seen = {"": 0, "-new": 0}

    async def client(http):
        while seen["-new"] < 30:
            new_before = seen["-new"]
            answer = await http.post("/v1/completions", json=server.body(1, "swapped"))
            if answer.status_code != 200:  # accepted with the old content, and it was gone
                assert not new_before, answer.text
                continue
            tokens = answer.json()["choices"][0]["token_ids"]
            (version,) = [v for v in wanted if wanted[v] == tokens]
            assert version == "-new" or not new_before
            seen[version] += 1
            if seen[""] == 30 and spare.is_symlink():
                spare.replace(link)  # in one step: it is there at every moment

    async def clients():
        async with httpx.AsyncClient(base_url=server.url, timeout=300) as http:
            await asyncio.gather(*(client(http) for _ in range(12)))

    asyncio.run(clients())
    link.unlink()
    assert server.wrong() == []


def test_a_damaged_adapter_ends_its_own_requests(server):
    broken = server.adapters / "broken"
    shutil.copytree(server.adapters / "ours-40", broken)
    file = next(broken.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-64])
    answer = server.post(**server.body(0, "broken"))
    assert answer.status_code == 400
    assert "truncated" in answer.json()["error"]["message"]
    shutil.rmtree(broken)
    assert server.wrong() == []


def test_a_hundred_clients_at_once(server):
    async def all_at_once():
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as client:
            asked = [(NAMES[n % 5], n // 5 % 4) for n in range(100)]
            bodies = [server.body(number, name) for name, number in asked]
            sent = [client.post("/v1/completions", json=body) for body in bodies]
            return asked, await asyncio.gather(*sent)

    for (name, number), answer in zip(*asyncio.run(all_at_once()), strict=True):
        assert answer.status_code == 200
        wanted = server.expected[name][number]["tokens"]
        assert answer.json()["choices"][0]["token_ids"] == wanted, (name, number)


def test_the_counters_are_among_the_metrics(server):
    text = server.client.get("/metrics").text
    values = {
        line.split("{")[0]: float(line.split()[-1])
        for line in text.splitlines()
        if line.startswith("vllm:prefixattn_") and "_created" not in line
    }
    names = ("writes", "tokens", "failures", "hits", "misses", "evictions")
    assert set(values) == {f"vllm:prefixattn_{name}_total" for name in names}
    assert values["vllm:prefixattn_writes_total"] > 0
    assert values["vllm:prefixattn_failures_total"] == 0


def test_two_engines_behind_one_server(made_world, tmp_path):
    """And clients without its key learn nothing, and leave nothing."""
    shutil.copytree(made_world, tmp_path / "world")
    options = ["--data-parallel-size", "2", "--api-key", KEY]
    two = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    with Served(tmp_path / "world", tmp_path / "log", *options, **two) as server:
        asked = [server.body(0, name) for name in ("ours-40", "nobody")]
        asked += [server.body(0, "ours-40", kv_transfer_params={"prefixattn": "x"})]
        said = [server.post(**body) for body in asked] + [server.client.get("/v1/models")]
        assert {(answer.status_code, answer.text) for answer in said} == {(401, said[0].text)}
        server.client.headers["authorization"] = f"Bearer {KEY}"
        assert server.wrong() == []


def test_names_of_lora_adapters_are_the_servers(made_world, tmp_path):
    """Below a root path, with LoRA from the start and later, and a folder that comes later."""
    shutil.copytree(made_world, tmp_path / "world")
    lora = tmp_path / "world" / "lora"
    options = ["--root-path", "/llm", "--enable-lora", "--max-lora-rank", 8]
    options += ["--lora-modules", f"peft-7={lora}"]
    env = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with Served(tmp_path / "world", tmp_path / "log", *options, **env) as server:

        def asked(name, path):
            answer = server.post(path, **server.body(2, name))
            note = answer.headers.get("x-prefixattn-note", "")
            for of, answers in server.expected.items():
                if answer.json()["choices"][0]["token_ids"] == answers[2]["tokens"]:
                    return of, "kv_transfer_params" in note
            return answer.text, note

        for path in ("/v1/completions", "/llm/v1/completions"):
            assert asked("base", path) == ("base", False)
            assert asked("ours-40", path) == ("ours-40", False)
            assert asked("peft-7", path) == ("lora:base", True)
        listed = server.client.get("/llm/v1/models").json()["data"]
        assert sorted(model["id"] for model in listed) == sorted(NAMES)
        load = {"lora_name": "ours-40", "lora_path": str(lora)}
        said = server.post("/v1/load_lora_adapter", **load)
        assert (said.status_code, "x-prefixattn-note" in said.headers) == (200, True)
        assert asked("ours-40", path) == ("lora:base", True)
        (server.adapters / "ours-40").rename(tmp_path / "away")
        assert asked("ours-40", path) == ("lora:base", False)
        (tmp_path / "away").rename(server.adapters / "ours-40")
        assert server.post("/v1/unload_lora_adapter", **load).status_code == 200
        assert asked("ours-40", path) == ("ours-40", False)
        log = (tmp_path / "log").read_text()
    assert log.count("is not reached by model") == 2  # once for each
