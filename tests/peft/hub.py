"""A Hugging Face cache with the models that PEFT's tests ask the hub for, tiny and built here.

Each is of the class its name says, with random weights that depend on nothing but its name.
"""

import zlib
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

REVISION = "0" * 40
PEFT, HF, TRL = "peft-internal-testing", "hf-internal-testing", "trl-internal-testing"

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BASE: dict[str, Any] = IDS | {
    "vocab_size": 512,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
}
GQA = BASE | {"num_key_value_heads": 2}
GPT = IDS | {"vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
OPT = {k: v for k, v in BASE.items() if k != "intermediate_size"}
GEMMA = GQA | {"head_dim": 8, "sliding_window": 64}
DISENTANGLED = BASE | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}

Recipe = tuple[str, str, dict[str, Any]]
MODELS: dict[str, Recipe] = {
    f"{PEFT}/tiny-random-OPTForCausalLM": (
        "OPTForCausalLM",
        "OPTConfig",
        OPT | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    ),
    f"{PEFT}/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", "GPT2Config", GPT),
    f"{HF}/tiny-random-gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT),
    f"{PEFT}/tiny-random-GPTJForCausalLM": (
        "GPTJForCausalLM",
        "GPTJConfig",
        GPT | {"rotary_dim": 4, "tie_word_embeddings": False},
    ),
    f"{TRL}/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "LlamaConfig", GQA),
    f"{PEFT}/tiny-dummy-qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GQA),
    f"{TRL}/tiny-Qwen3ForCausalLM": ("Qwen3ForCausalLM", "Qwen3Config", GQA | {"head_dim": 16}),
    f"{HF}/tiny-random-MistralForCausalLM": ("MistralForCausalLM", "MistralConfig", GQA),
    f"{HF}/tiny-random-Gemma3ForCausalLM": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        GEMMA | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    f"{PEFT}/tiny-random-gemma4-E2B": (
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        GEMMA
        | {
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 512,
        },
    ),
    f"{PEFT}/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": 512,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
    ),
    f"{PEFT}/tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration",
        "BartConfig",
        IDS
        | {
            "vocab_size": 512,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "max_position_embeddings": 512,
            "decoder_start_token_id": 2,
        },
    ),
    f"{PEFT}/tiny-random-BertModel": ("BertModel", "BertConfig", BASE),
    f"{PEFT}/tiny-random-RobertaModel": ("RobertaModel", "RobertaConfig", BASE),
    f"{PEFT}/tiny-random-DebertaModel": ("DebertaModel", "DebertaConfig", DISENTANGLED),
    f"{PEFT}/tiny-random-DebertaV2Model": ("DebertaV2Model", "DebertaV2Config", DISENTANGLED),
    f"{PEFT}/tiny-random-BertForSequenceClassification": (
        "BertForSequenceClassification",
        "BertConfig",
        BASE,
    ),
    f"{PEFT}/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        BASE,
    ),
    f"{TRL}/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        "LlamaConfig",
        GQA,
    ),
}


def build(cache: Path) -> None:
    """Write every model that is not there yet into the Hugging Face cache at ``cache``."""
    transformers.logging.disable_progress_bar()
    tokenizer = byte_tokenizer()
    for name, (model_class, config_class, options) in MODELS.items():
        repository = cache / f"models--{name.replace('/', '--')}"
        if (repository / "refs" / "main").exists():
            continue
        folder = repository / "snapshots" / REVISION
        torch.manual_seed(zlib.crc32(name.encode()))
        config = getattr(transformers, config_class)(**options)
        getattr(transformers, model_class)(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(REVISION)  # last: what has it is whole


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token for each byte."""
    alphabet = [*SPECIAL.values(), *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[])
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **SPECIAL)
