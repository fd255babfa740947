"""`python transformers_serve.py MODEL [batching] [begun]`: what transformers' own server answers.

Without a prefix, with one attached to the model that it serves, and once that is detached; and what
``generate`` says with the prefix. Prints a line of JSON.
"""

import json
import sys
import time
import urllib.error
import urllib.request

import torch
from transformers.cli.serve import Serve

import prefixattn
from prefixattn.vllm.testing import free_port

PROMPT, TOKENS = "def add(a, b):", 8


def main():
    folder, batching = sys.argv[1], "batching" in sys.argv
    port = free_port()
    serve = Serve(
        force_model=folder,
        non_blocking=True,
        port=port,
        device="cpu",
        dtype="float32",
        continuous_batching=batching,
        log_level="error",
    )
    address = f"http://127.0.0.1:{port}"
    while True:  # whoever started this ends what hangs
        try:
            urllib.request.urlopen(f"{address}/health")
            break
        except OSError:
            time.sleep(0.1)

    def ask():
        asked = {"model": folder, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(
            f"{address}/v1/completions", json.dumps(asked).encode(), headers
        )
        try:
            with urllib.request.urlopen(request) as answer:
                return json.load(answer)["choices"][0]["text"]
        except urllib.error.HTTPError as error:
            return f"{error.code}: {error.read().decode()}"

    manager = serve._model_manager
    model, tokenizer = manager.load_model_and_processor(manager.process_model_name(folder))
    begun = not batching or "begun" in sys.argv
    said = {"before": ask()} if begun else {}
    prefix = prefixattn.Prefix.random(model, 6, 2.0, torch.Generator().manual_seed(0))
    handle = prefixattn.attach(model, prefix)
    said["attached"] = ask()
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)
    said["generate"] = tokenizer.decode(out[0, ids.shape[1] :])
    handle.detach()
    if not batching:
        said["detached"] = ask()
    serve.kill_server()
    print(json.dumps(said))


if __name__ == "__main__":
    main()
