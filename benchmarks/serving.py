"""Prefixes served under load: `python -m benchmarks.serving`, in vLLM's environment.

Four adapters are the keys and values of four texts of the standard library. Three of vLLM's servers
run beside each other: with the adapters, without any, and with the adapter's text in front of each
prompt. A round sends each of them as many requests at once; rounds are interleaved, and no prompt
is sent twice. Adapters and texts must answer alike, token for token, or nothing is reported.
"""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import psutil  # type: ignore[import-untyped]
import torch
import typer
from rich.console import Console
from rich.progress import Progress
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefixattn import Prefix
from prefixattn.bench import machine
from prefixattn.demo.base import train_tokenizer
from prefixattn.demo.text import library_root, read_library
from prefixattn.vllm import kv_transfer_config
from prefixattn.vllm.testing import Server
from prefixattn.vllm.versions import installed_version

ADAPTERS, PREFIX, PROMPT, ANSWER = 4, 512, 64, 32  # tokens of each
VOCABULARY = 2048
MODEL = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2}
LENGTH, BLOCK, BLOCKS, ROWS = 1024, 32, 2000, 32
WAYS = ("adapters", "no adapters", "text in context")
MIB = 2**20


@dataclass
class Work:
    """What is asked: prompts, which adapter each is for, and the adapters' texts."""

    texts: list[list[int]]
    prompts: list[list[int]]

    def body(self, way: str, number: int) -> dict[str, Any]:
        """Request ``number`` as ``way`` puts it."""
        prompt, chosen = self.prompts[number], number % ADAPTERS
        if way == "text in context":
            prompt = self.texts[chosen] + prompt
        named = f"adapter-{chosen}" if way == "adapters" else "base"
        asked = {"model": named, "prompt": prompt, "max_tokens": ANSWER, "temperature": 0}
        return asked | {"ignore_eos": True, "return_token_ids": True}


@dataclass
class Seen:
    """What one way came to, round by round."""

    seconds: list[float] = field(default_factory=list)
    latencies: list[list[float]] = field(default_factory=list)
    blocks: list[float] = field(default_factory=list)
    answers: dict[int, list[int]] = field(default_factory=dict)


def prepare(folder: Path, requests: int) -> Work:
    """A model, its adapters, and prompts: all from the standard library's text."""
    modules = read_library(library_root()).modules
    tokenizer: PreTrainedTokenizerFast = train_tokenizer(modules, VOCABULARY)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=LENGTH,
        initializer_range=0.06,  # answers differ
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **MODEL,
        **HEADS,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    enough = requests * PROMPT + ADAPTERS * PREFIX
    ids: list[int] = []
    for module in modules:
        ids += tokenizer(module.text).input_ids
        if len(ids) >= enough:
            break
    texts = [ids[i * PREFIX : (i + 1) * PREFIX] for i in range(ADAPTERS)]
    rest = ids[ADAPTERS * PREFIX :]
    for number, text in enumerate(texts):
        prefix = Prefix.from_text(model, torch.tensor([text]))
        prefix.save_pretrained(folder / "adapters" / f"adapter-{number}")
    return Work(texts, [rest[i * PROMPT : (i + 1) * PROMPT] for i in range(requests)])


def options(folder: Path, way: str) -> list[object]:
    """What a way's server is started with."""
    given: list[object] = ["--model", folder / "model", "--served-model-name", "base"]
    given += ["--dtype", "float32", "--max-model-len", LENGTH, "--max-num-seqs", ROWS]
    given += ["--block-size", BLOCK, "--num-gpu-blocks-override", BLOCKS, "--enforce-eager"]
    if way == "adapters":
        config = kv_transfer_config(folder / "adapters")
        given += ["--kv-transfer-config", json.dumps(config)]
        given += ["--middleware", "prefixattn.vllm.middleware.ChooseByModel"]
    return given


async def ask_all(server: Server, way: str, work: Work, numbers: Sequence[int], seen: Seen) -> None:
    """One round: all requests at once, and the cache's use while they are answered."""
    import httpx  # vLLM's environment has it; the pages are made without

    limits = httpx.Limits(max_connections=len(numbers) + 1)
    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as client:
        used = [0.0]

        async def watch() -> None:
            while True:
                used.append(_gauge((await client.get("/metrics")).text))
                await asyncio.sleep(0.2)

        async def ask(number: int) -> float:
            begun = time.perf_counter()
            answer = await client.post("/v1/completions", json=work.body(way, number))
            answer.raise_for_status()
            seen.answers[number] = answer.json()["choices"][0]["token_ids"]
            return time.perf_counter() - begun

        watcher = asyncio.create_task(watch())
        begun = time.perf_counter()
        latencies = await asyncio.gather(*(ask(number) for number in numbers))
        seen.seconds.append(time.perf_counter() - begun)
        watcher.cancel()
        seen.latencies.append(sorted(latencies))
        seen.blocks.append(max(used) * BLOCKS)


def _gauge(metrics: str) -> float:
    """The share of the paged cache that is in use."""
    lines = [x for x in metrics.splitlines() if x.startswith("vllm:kv_cache_usage_perc{")]
    return float(lines[0].rpartition(" ")[2])


def resident(server: Server) -> int:
    """Bytes of memory that a server's processes have to themselves."""
    first = psutil.Process(server.process.pid)
    return sum(each.memory_full_info().uss for each in [first, *first.children(recursive=True)])


def check(seen: dict[str, Seen]) -> None:
    """Adapters and texts answer alike, and otherwise than the bare model (RuntimeError)."""
    ours, plain, context = (seen[way].answers for way in WAYS)
    if wrong := [number for number in ours if ours[number] != context[number]]:
        raise RuntimeError(f"{len(wrong)} of {len(ours)} answers differ from the text in context")
    same = sum(ours[number] == plain[number] for number in ours)
    if same > len(ours) // 10:
        raise RuntimeError(f"{same} of {len(ours)} answers are those without adapters")


def rows_of(seen: dict[str, Seen], memory: dict[str, int], requests: int) -> list[dict[str, Any]]:
    """One row for each way: the first round by itself, and the median of the later ones."""
    found = []
    for way, made in seen.items():
        later = sorted(x for round in made.latencies[1:] for x in round)
        seconds = median(made.seconds[1:])
        found.append(
            {
                "way": way,
                "first_seconds": made.seconds[0],
                "seconds": seconds,
                "requests_per_second": requests / seconds,
                "tokens_per_second": requests * ANSWER / seconds,
                "latency_median": median(later),
                "latency_95": later[int(0.95 * len(later))],
                "blocks": max(made.blocks),
                "mib": memory[way] / MIB,
                "rounds": made.seconds,
            }
        )
    return found


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table of rows."""
    lines = [
        "| | first round, s | later rounds, s | requests/s | tokens/s "
        "| latency, median and 95 %, s | blocks in use, most | MiB of the server |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row['way']} | {row['first_seconds']:.2f} | {row['seconds']:.2f} "
        f"| {row['requests_per_second']:.0f} | {row['tokens_per_second']:.0f} "
        f"| {row['latency_median']:.2f}, {row['latency_95']:.2f} "
        f"| {row['blocks']:.0f} | {row['mib']:.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main(
    requests: Annotated[int, typer.Option(min=1, help="At once, in each round.")] = 100,
    rounds: Annotated[int, typer.Option(min=2, help="For each way; the first is cold.")] = 6,
    out: Annotated[Path | None, typer.Option(help="Write a JSON file.")] = None,
) -> None:
    """Serve adapters under load, beside a server without and one with their text in context."""
    console = Console(stderr=True)
    seen = {way: Seen() for way in WAYS}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work = prepare(folder, requests * rounds)
        progress = stack.enter_context(Progress(console=console))
        bar = progress.add_task("starting servers", total=rounds * len(WAYS))
        servers = {
            way: stack.enter_context(Server(options(folder, way), folder / f"{way}.log"))
            for way in WAYS
        }
        for number in range(rounds):
            numbers = range(number * requests, (number + 1) * requests)
            for way, server in servers.items():
                progress.update(bar, description=f"round {number + 1}, {way}")
                asyncio.run(ask_all(server, way, work, numbers, seen[way]))
                progress.advance(bar)
        memory = {way: resident(server) for way, server in servers.items()}
    check(seen)
    rows = rows_of(seen, memory, requests)
    print(markdown(rows))
    if out is not None:
        command = shlex.join(["make", "bench-serving", f"ARGS={shlex.join(sys.argv[1:])}"])
        sizes = {"prefix": PREFIX, "prompt": PROMPT, "answer": ANSWER, "rows": ROWS, "block": BLOCK}
        head = machine.facts("cpu", command) | {"vllm": installed_version(), "sizes": sizes}
        out.write_text(json.dumps(head | {"requests": requests, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
