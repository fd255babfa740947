"""Chats behind a system text: the prefix is that text, and nobody can tell the difference."""

import threading
from typing import Any

import peft
import pytest
import torch
import transformers
from patience import PATIENCE
from torch import Tensor

import prefixattn
from prefixattn import Prefix

GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
QUESTIONS = ["What is a frame?", "And a stack?", "Why?"]


@pytest.fixture
def model(make_model: Any) -> Any:
    return make_model().double()


@pytest.fixture
def system(tokenizer: Any) -> Tensor:
    return encode(tokenizer, [{"role": "system", "content": "Be brief."}])


def encode(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> Tensor:
    found = tokenizer.apply_chat_template(
        messages, return_tensors="pt", return_dict=True, **options
    )
    ids: Tensor = found["input_ids"]
    return ids


def chat(model: Any, tokenizer: Any, before: Tensor) -> list[str]:
    """The whole history through the template, in every turn."""
    history: list[dict[str, str]] = []
    for question in QUESTIONS:
        history.append({"role": "user", "content": question})
        ids = encode(tokenizer, history, add_generation_prompt=True)
        ids = torch.cat([before, ids], dim=1)
        answer = tokenizer.decode(model.generate(ids, **GREEDY)[0, ids.shape[1] :])
        history.append({"role": "assistant", "content": answer})
    return [message["content"] for message in history[1::2]]


def cached_chat(model: Any, tokenizer: Any, ids: Tensor) -> list[str]:
    """The cache of each turn handed to the next."""
    cache, answers = None, []
    for question in QUESTIONS:
        turn = tokenizer(f"user: {question}\nassistant: ", return_tensors="pt").input_ids
        ids = torch.cat([ids, turn], dim=1)
        out = model.generate(ids, past_key_values=cache, return_dict_in_generate=True, **GREEDY)
        answers.append(tokenizer.decode(out.sequences[0, ids.shape[1] :]))
        ids, cache = out.sequences, out.past_key_values
    return answers


@pytest.mark.parametrize("talk", [chat, cached_chat])
def test_turns(model: Any, tokenizer: Any, system: Tensor, talk: Any) -> None:
    nothing = system[:, :0]
    expected, alone = talk(model, tokenizer, system), talk(model, tokenizer, nothing)
    prefixattn.attach(model, Prefix.from_text(model, system))
    assert talk(model, tokenizer, nothing) == expected != alone


def test_streaming_from_a_thread(model: Any, tokenizer: Any, system: Tensor) -> None:
    ids = tokenizer("user: What is a frame?", return_tensors="pt").input_ids
    joined = torch.cat([system, ids], dim=1)
    expected = tokenizer.decode(model.generate(joined, **GREEDY)[0, joined.shape[1] :])
    prefixattn.attach(model, Prefix.from_text(model, system))
    streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=PATIENCE)
    options = {"input_ids": ids, "streamer": streamer, **GREEDY}
    thread = threading.Thread(target=model.generate, kwargs=options)
    thread.start()
    assert "".join(streamer) == expected
    thread.join(PATIENCE)


def test_a_stop_string(model: Any, tokenizer: Any, system: Tensor) -> None:
    ids = tokenizer("user: What is a frame?", return_tensors="pt").input_ids
    joined = torch.cat([system, ids], dim=1)
    whole = model.generate(joined, **GREEDY)[0, joined.shape[1] :]
    pieces = [tokenizer.decode(token) for token in whole[:-1]]
    stop = next(x for x in reversed(pieces) if "\N{REPLACEMENT CHARACTER}" not in x)
    options = GREEDY | {"tokenizer": tokenizer, "stop_strings": [stop]}
    expected = model.generate(joined, **options)[0, joined.shape[1] :]
    prefixattn.attach(model, Prefix.from_text(model, system))
    stopped = model.generate(ids, **options)[0, ids.shape[1] :]
    assert stopped.tolist() == expected.tolist()
    assert len(stopped) < len(whole)


def test_pipeline(model: Any, tokenizer: Any, system: Tensor) -> None:
    prompts = ["user: What is a frame?", "user: And?"]
    expected = []
    for prompt in prompts:
        ids = torch.cat([system, tokenizer(prompt, return_tensors="pt").input_ids], dim=1)
        expected.append(tokenizer.decode(model.generate(ids, **GREEDY)[0, ids.shape[1] :]))
    prefixattn.attach(model, Prefix.from_text(model, system))
    tokenizer.padding_side = "left"
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    batched = pipe(prompts, batch_size=2, return_full_text=False, **GREEDY)
    assert [found[0]["generated_text"] for found in batched] == expected
    (talked,) = pipe([{"role": "user", "content": "And?"}], **GREEDY)
    assert talked["generated_text"][-1]["role"] == "assistant"


def test_pipeline_of_a_peft_model(model: Any, tokenizer: Any) -> None:
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = peft.get_peft_model(model, config).double().eval()
    stock = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    expected = stock("user: And?", **GREEDY)
    prefixattn.attach(model)
    ours = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    assert ours("user: And?", **GREEDY) == expected
