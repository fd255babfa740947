"""A large adapter comes while others are served: `python -m benchmarks.serving_cold`, in its venv.

Clients ask the base for a few tokens, one request behind the other, and for ``/health``, which the
event loop alone answers. Meanwhile an adapter that the server has not read yet is asked for, again
and again. What counts is how long the others wait: beside it stands the same without adapters.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM

from prefixattn import Prefix
from prefixattn.vllm import kv_transfer_config
from prefixattn.vllm.testing import Server

LAYERS, HEADS, HEAD_DIM, TOKENS = 24, 8, 64, 3072  # 288 MiB in float32
LENGTH, BLOCK = 4096, 128


def prepare(folder: Path) -> list[object]:
    """A model of many layers that computes little, and the options of its server."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=LENGTH,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    (folder / "adapters").mkdir()
    given: list[object] = ["--model", folder / "model", "--served-model-name", "base"]
    given += ["--skip-tokenizer-init", "--dtype", "float32", "--enforce-eager"]
    given += ["--max-model-len", LENGTH, "--block-size", BLOCK, "--num-gpu-blocks-override", 64]
    given += ["--kv-transfer-config", json.dumps(kv_transfer_config(folder / "adapters"))]
    return [*given, "--middleware", "prefixattn.vllm.middleware.ChooseByModel"]


def add(folder: Path, number: int) -> str:
    """Another adapter, written elsewhere and moved into place; its name."""
    torch.manual_seed(number)
    prefix = Prefix(*torch.randn(2, LAYERS, HEADS, TOKENS, HEAD_DIM))
    shutil.rmtree(folder / "ready", ignore_errors=True)
    prefix.save_pretrained(folder / "ready")
    (folder / "ready").rename(folder / "adapters" / f"adapter-{number}")
    return f"adapter-{number}"


def body(model: str) -> dict[str, Any]:
    """A short request."""
    asked = {"model": model, "prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True}
    return asked | {"detokenize": False, "return_token_ids": True}


async def waits(ask: Callable[[], Awaitable[Any]], done: asyncio.Event) -> list[float]:
    """How long each answer took, until ``done``."""
    found = []
    while not done.is_set():
        begun = time.perf_counter()
        await ask()
        found.append(time.perf_counter() - begun)
    return sorted(found)


async def measure(server: Server, name: str | None, seconds: float) -> dict[str, float]:
    """The longest waits of the others while ``name`` is asked for; None: for as long, nobody."""
    import httpx  # vLLM's environment has it; the pages are made without

    async with httpx.AsyncClient(base_url=server.url, timeout=600) as client:

        async def answer(model: str) -> None:
            (await client.post("/v1/completions", json=body(model))).raise_for_status()

        done, begun = asyncio.Event(), time.perf_counter()
        health = asyncio.create_task(waits(lambda: client.get("/health"), done))
        base = asyncio.create_task(waits(lambda: answer("base"), done))
        await (asyncio.sleep(seconds) if name is None else answer(name))
        taken = time.perf_counter() - begun
        done.set()
        return {"seconds": taken, "health": (await health)[-1], "base": (await base)[-1]}


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Adapters that come.")] = 5,
) -> None:
    """Print how long others wait while an adapter of 288 MiB is read."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        options = prepare(folder)
        print("| | seconds | longest wait for /health | longest wait for the base |")
        print("|---|--:|--:|--:|")
        with Server(options, folder / "log") as server:
            asyncio.run(measure(server, None, 1))  # its first requests are slow
            for number in range(rounds):
                found = asyncio.run(measure(server, add(folder, number), 0))
                alone = asyncio.run(measure(server, None, found["seconds"]))
                for way, row in (("adapter comes", found), ("nobody comes", alone)):
                    print(f"| {way} | " + " | ".join(f"{x:.2f}" for x in row.values()) + " |")


if __name__ == "__main__":
    typer.run(main)
