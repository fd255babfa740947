"""A small model, adapters in two formats, and what transformers and PEFT answer with them.

`python world.py FOLDER` makes it: this imports no vLLM, and the tests no transformers.
"""

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import prefixattn

NEW_TOKENS = 16
# name: tokens and format. Whole blocks of 32, not whole ones, several blocks, less than one.
ADAPTERS = {"ours-64": 64, "ours-40": 40, "peft-200": 200, "peft-7": 7}
PROMPTS = [
    "Hello there",
    "def add(a, b):\n    return a + b\n",
    "A",
    "Once upon a time there was a cache with many blocks, and in each block there were tokens, "
    "and each of them had a key and a value of its own.",
]


def tokenizer():
    """One token for each byte, and three special ones."""
    letters = {a: i for i, a in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(letters | {"<s>": 256, "</s>": 257, "<pad>": 258}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    made = PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return made


def base(seed=0):
    """Weights large enough that answers differ."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
    return model


def save_adapter(name, folder, seed):
    """Into ``folder``, in the format that the name begins with; random keys and values."""
    num_tokens = ADAPTERS.get(name.removesuffix("-new"), 16)
    model = base()
    torch.manual_seed(seed)  # behind the model, which has a seed of its own
    if name.startswith("peft"):
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=num_tokens)
        get_peft_model(model, config).save_pretrained(folder)
    else:
        prefixattn.Prefix.random(model, num_tokens).save_pretrained(folder)


def answer(model, ids):
    """Greedy tokens and their log-probabilities."""
    row = torch.tensor([ids])
    made = model.generate(
        input_ids=row,
        attention_mask=torch.ones_like(row),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = made.sequences[0, len(ids) :].tolist()
    scores = [torch.log_softmax(x[0].double(), -1) for x in made.logits]
    return {
        "tokens": tokens,
        "logprobs": [s[t].item() for s, t in zip(scores, tokens, strict=True)],
    }


def answers(folder, name):
    """Of the adapter in ``folder``: PEFT's for its own format, ours for ours."""
    ids = [tokenizer()(text)["input_ids"] for text in PROMPTS]
    if name.startswith("peft"):
        model = PeftModel.from_pretrained(base(), folder).eval()
        return [answer(model, each) for each in ids]
    model = base()
    if name != "base":
        prefixattn.attach(model, prefixattn.Prefix.from_pretrained(folder))
    return [answer(model, each) for each in ids]


def with_lora(folder, prefix):
    """What a LoRA adapter, which is made in ``folder``, answers without and with a prefix."""
    torch.manual_seed(7)
    targets = ["q_proj", "v_proj", "o_proj"]
    config = LoraConfig(r=8, lora_alpha=64, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(base(), config).eval()
    model.save_pretrained(folder)
    ids = [tokenizer()(text)["input_ids"] for text in PROMPTS]
    alone = [answer(model, each) for each in ids]
    prefixattn.attach(model.get_base_model(), prefixattn.Prefix.from_pretrained(prefix))
    return {"lora:base": alone, f"lora:{prefix.name}": [answer(model, each) for each in ids]}


def main(folder):
    base().save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    found = {"base": answers(None, "base")}
    for seed, name in enumerate(ADAPTERS, 1):
        save_adapter(name, folder / "adapters" / name, seed)
        found[name] = answers(folder / "adapters" / name, name)
        assert found[name] != found["base"], f"{name}: the oracle has lost its prefix"
    save_adapter("ours-40-new", folder / "spare" / "ours-40-new", 99)
    found["ours-40-new"] = answers(folder / "spare" / "ours-40-new", "ours-40-new")
    assert found["ours-40-new"] != found["ours-40"], "a replacement would not be seen"
    found |= with_lora(folder / "lora", folder / "adapters" / "ours-40")
    (folder / "expected.json").write_text(json.dumps({"prompts": PROMPTS, "answers": found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
