"""An engine in a process of its own: `python battery.py WORLD OPTIONS`, JSON in and out.

It answers every prompt with every adapter and with none, in one batch, and says what it answered;
``"scenario"`` names something to do besides.
"""

import json
import os
import random
import shutil
import sys
import threading
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}

from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig

from prefixattn.vllm import kv_transfer_config


class Engine:
    def __init__(self, world, options):
        self.world, self.folder = world, world / "adapters"
        held = json.loads((world / "expected.json").read_text())
        self.prompts, self.expected = held["prompts"], held["answers"]
        self.names = ["base", *sorted(p.name for p in self.folder.iterdir())]
        transfer = kv_transfer_config(self.folder, **options.get("adapters", {}))
        transfer |= options.get("transfer", {})
        engine = {"dtype": "float32", "enforce_eager": True, "max_model_len": 640, "seed": 0}
        engine |= {"block_size": 32, "num_gpu_blocks_override": 200, "disable_log_stats": False}
        self.llm = LLM(
            str(world / "model"),
            kv_transfer_config=KVTransferConfig(**transfer),
            **(engine | options.get("engine", {})),
        )

    def params(self, name, **more):
        extra = None if name == "base" else {"kv_transfer_params": {"prefixattn": name}}
        tokens = len(self.expected["base"][0]["tokens"])
        given = {"temperature": 0, "max_tokens": tokens, "logprobs": 8, "ignore_eos": True}
        return SamplingParams(**({"extra_args": extra} | given | more))

    def ask(self, pairs, lora=None, **more):
        """Answers to (adapter, number of a prompt), all in one batch and with LoRA or without."""
        prompts = [self.prompts[number] for _, number in pairs]
        params = [self.params(name, **more) for name, _ in pairs]
        outputs = self.llm.generate(prompts, params, use_tqdm=False, lora_request=lora)
        return [self.answer(output) for output in outputs]

    def answer(self, output):
        made = output.outputs[0]
        tops = [{token: entry.logprob for token, entry in at.items()} for at in made.logprobs or ()]
        tokens = list(made.token_ids)
        return {
            "tokens": tokens,
            "logprobs": [top[token] for top, token in zip(tops, tokens, strict=True)],
            "first": tops[0] if tops else {},
            "reason": made.finish_reason,
            "prompt_tokens": len(output.prompt_token_ids),
        }

    def all(self, times=1, seed=0):
        pairs = [(n, i) for n in self.names for i in range(len(self.prompts))] * times
        random.Random(seed).shuffle(pairs)
        return [
            {"adapter": n, "prompt": i} | a
            for (n, i), a in zip(pairs, self.ask(pairs), strict=True)
        ]

    def wrong(self):
        """Of a whole round: the adapters that answered otherwise than they should."""
        return sorted(
            {
                row["adapter"]
                for row in self.all()
                if row["tokens"] != self.expected[row["adapter"]][row["prompt"]]["tokens"]
            }
        )

    def counters(self):
        return {m.name: m.value for m in self.llm.get_metrics() if hasattr(m, "value")}


def refusals(engine):
    """Everything that must be refused, and whether all adapters still answer right after each."""
    folder, spare = engine.folder, engine.world / "broken"
    good = {"prefixattn": "ours-40"}

    def broken(name, spoil):
        shutil.copytree(folder / "ours-40", spare / name, dirs_exist_ok=True)
        spoil(spare / name)
        shutil.copytree(spare / name, folder / name)
        return {"prefixattn": name}

    def shorter(path):
        file = next(path.glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:-64])

    def empty(path):
        for file in path.iterdir():
            file.unlink()

    def ask(transfer=good, prompt="Hello", **more):
        given = engine.params("base", **more)
        given.extra_args = {"kv_transfer_params": transfer}
        engine.llm.generate([prompt], [given], use_tqdm=False)

    salted = {"prompt": "Hello", "cache_salt": "prefixattn:" + "0" * 32}
    attempts = {
        "unknown adapter": lambda: ask({"prefixattn": "nobody"}),
        "a way out of the folder": lambda: ask({"prefixattn": "../adapters/ours-40"}),
        "no name": lambda: ask({"prefixattn": 7}),
        "another connector's parameters": lambda: ask(good | {"do_remote_prefill": True}),
        "no mapping": lambda: ask(["ours-40"]),
        "a salt of ours": lambda: engine.llm.generate([salted], use_tqdm=False),
        "prompt_logprobs": lambda: ask(prompt_logprobs=1),
        "skip_reading_prefix_cache": lambda: ask(skip_reading_prefix_cache=True),
        "too long": lambda: ask(prompt="x" * 620),
        "empty prompt": lambda: ask(prompt={"prompt_token_ids": []}),
        "truncated file": lambda: ask(broken("truncated", shorter)),
        "empty folder": lambda: ask(broken("empty", empty)),
        "another model's": lambda: ask(broken("other", other_model)),
    }
    said = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            said[name] = {"error": None}
        except Exception as error:
            said[name] = {"error": f"{type(error).__name__}: {error}"}
        for added in set(os.listdir(folder)) - set(engine.names):
            shutil.rmtree(folder / added)
        said[name]["wrong"] = engine.wrong()
    return said


def other_model(path):
    """A prefix of two layers where four are wanted."""
    import torch

    from prefixattn import Prefix

    shutil.rmtree(path)
    Prefix(*torch.randn(2, 2, 2, 5, 32)).save_pretrained(path)


def failed_load(engine):
    """A worker's read fails once, in a batch with others of the same adapter."""
    from prefixattn.vllm.folder import AdapterFolder

    read, failures = AdapterFolder.pairs, ["peft-200"]

    def fails_once(self, claim):
        if claim.name in failures:
            failures.remove(claim.name)
            raise OSError("the disk is on fire")
        return read(self, claim)

    AdapterFolder.pairs = fails_once
    pairs = [("peft-200", 0), ("ours-40", 1), ("peft-200", 2), ("base", 0)]
    reasons = [row["reason"] for row in engine.ask(pairs)]
    return {"reasons": reasons, "wrong": engine.wrong(), "counters": engine.counters()}


def others_go_on(engine):
    """A worker's read of an adapter, which lasts until a request without one is answered."""
    from prefixattn.vllm.folder import AdapterFolder

    read, step, answered = AdapterFolder.pairs, engine.llm.llm_engine.step, threading.Event()

    def lasting(self, claim):
        if not answered.wait(60):
            raise TimeoutError("nobody was answered while an adapter was read")
        return read(self, claim)

    def watched():
        outputs = step()
        if any(output.finished for output in outputs):
            answered.set()
        return outputs

    AdapterFolder.pairs, engine.llm.llm_engine.step = lasting, watched
    pairs = [("ours-40", 1), ("peft-7", 0), ("base", 0), ("ours-40", 2)]
    answers = zip(pairs, engine.ask(pairs), strict=True)
    return {"rows": [{"adapter": n, "prompt": i} | a for (n, i), a in answers]}


def replaced(engine):
    """An adapter is replaced by another content while the engine runs, and put back."""
    old, new = engine.folder / "ours-40", engine.world / "spare" / "ours-40-new"
    engine.wrong()
    kept = engine.expected["ours-40"]
    old.rename(engine.world / "spare" / "before")
    shutil.copytree(new, old)
    engine.expected["ours-40"] = engine.expected["ours-40-new"]
    said = {"new": engine.wrong()}
    shutil.rmtree(old)
    (engine.world / "spare" / "before").rename(old)
    engine.expected["ours-40"] = kept
    return said | {"old": engine.wrong()}


def beside_lora(engine):
    """A prefix and a LoRA adapter in one request; and nothing of it in the others that follow."""
    from vllm.lora.request import LoRARequest

    request = LoRARequest("lora", 1, str(engine.world / "lora"))
    pairs = [(name, i) for name in ("base", "ours-40") for i in range(len(engine.prompts))] * 2
    rows = [
        {"adapter": f"lora:{name}", "prompt": i} | a
        for (name, i), a in zip(pairs, engine.ask(pairs, request), strict=True)
    ]
    return {"rows": rows, "wrong": engine.wrong()}


def recompute(engine):
    """A control: with the policy that is refused, a failed load poisons what comes after."""
    return failed_load(engine)


RUNS = (refusals, failed_load, others_go_on, replaced, beside_lora, recompute)
SCENARIOS = {f.__name__: f for f in RUNS}


def main():
    world, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    if options.get("unchecked"):
        from prefixattn.vllm import connector

        connector.check_engine = lambda *given: None
    engine = Engine(world, options)
    if scenario := options.get("scenario"):
        print(json.dumps(SCENARIOS[scenario](engine)))
    else:
        rows = engine.all(options.get("times", 1)) + engine.all(seed=1)
        print(json.dumps({"rows": rows, "counters": engine.counters()}))


if __name__ == "__main__":
    main()
