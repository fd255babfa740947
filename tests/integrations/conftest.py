"""Tiny transformers models whose weights are scaled up, so that a prefix matters to them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import prefixattn.integrations
from prefixattn.prefix import Prefix

P = 5
LENGTH = 11
PAD = 0
DROPOUTS = (
    "dropout attention_dropout activation_dropout hidden_dropout_prob embd_pdrop attn_pdrop "
    "resid_pdrop attention_probs_dropout_prob hidden_dropout"
).split()

BASE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 96,
}
GQA = BASE | {"intermediate_size": 48, "num_key_value_heads": 2}
SLIDING = GQA | {"head_dim": 8, "sliding_window": 9}
GPT2 = {
    "vocab_size": 97,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 96,
}

BLOOM = {
    "vocab_size": 97,
    "hidden_size": 32,
    "n_layer": 2,
    "n_head": 4,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 96,
    "tie_word_embeddings": False,
}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**GQA),
    "qwen3": lambda: transformers.Qwen3Config(**GQA, head_dim=8),
    "mistral": lambda: transformers.MistralConfig(**SLIDING),  # a window in every layer
    "gemma2": lambda: transformers.Gemma2Config(**SLIDING, query_pre_attn_scalar=8),  # softcap
    "gpt2": lambda: transformers.GPT2Config(**GPT2),  # learned positions
    "opt": lambda: transformers.OPTConfig(**BASE, ffn_dim=48, word_embed_proj_dim=32),
    "bert": lambda: transformers.BertConfig(**BASE, intermediate_size=48, num_labels=3),
    "roberta": lambda: transformers.RobertaConfig(**BASE, intermediate_size=48, num_labels=3),
    "modernbert": lambda: transformers.ModernBertConfig(  # a window with two sides
        **(BASE | {"num_hidden_layers": 1}),
        intermediate_size=48,
        local_attention=12,
        layer_types=["sliding_attention"],
    ),
    "qwen2": lambda: transformers.Qwen2Config(**GQA),
    "phi3": lambda: transformers.Phi3Config(**GQA),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **(SLIDING | {"num_hidden_layers": 3}),
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "olmo2": lambda: transformers.Olmo2Config(**GQA),
    "cohere2": lambda: transformers.Cohere2Config(**SLIDING, logit_scale=1.0),
    "gemma3n": lambda: transformers.Gemma3nTextConfig(  # the last layer has its keys from the first
        **(SLIDING | {"num_hidden_layers": 3}),
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        num_kv_shared_layers=1,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=97,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 3,
    ),
    "nemotron": lambda: transformers.NemotronConfig(**GQA),  # keywords end at its layers
    "stablelm": lambda: transformers.StableLmConfig(**GQA),  # so they do here
    # These bypass the attention interface.
    "bloom": lambda: transformers.BloomConfig(**BLOOM),
    "falcon": lambda: transformers.FalconConfig(**BASE, bias=True),
    "falcon_alibi": lambda: transformers.FalconConfig(**BASE, alibi=True, multi_query=False),
    "gptj": lambda: transformers.GPTJConfig(**GPT2, rotary_dim=4),
    "codegen": lambda: transformers.CodeGenConfig(**GPT2, rotary_dim=4),
    "gpt_neo": lambda: transformers.GPTNeoConfig(  # every other layer has a window
        **BASE, attention_types=[[["local", "global"], 1]], window_size=9
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**BASE, intermediate_size=48),
    # These multiply by grouped matrices, which torch has in single precision only.
    "phimoe": lambda: transformers.PhimoeConfig(  # a window that only its mask tells of
        **{key: value for key, value in SLIDING.items() if key != "head_dim"},
        num_local_experts=4,
    ),
    "llama4_text": lambda: transformers.Llama4TextConfig(  # chunks, and layers without positions
        **(GQA | {"num_hidden_layers": 3}),
        head_dim=8,
        intermediate_size_mlp=48,
        attention_chunk_size=7,
        layer_types=["chunked_attention", "full_attention", "chunked_attention"],
        no_rope_layers=[1, 0, 1],
        num_local_experts=2,
        moe_layers=[],
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(  # sinks
        **SLIDING, num_local_experts=4, num_experts_per_tok=2
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(  # head dims of key and value differ
        **(GQA | {"num_key_value_heads": 4}),
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=12,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
    ),
}
SINGLE_PRECISION = {"gpt_oss", "deepseek_v3", "phimoe"}
PROMISED = ("llama", "qwen3", "gemma2", "gpt2", "opt")  # the causal models the issue names
OTHERS = (
    "mistral qwen2 phi3 gemma3 olmo2 cohere2 gemma3n gpt_neox phimoe gpt_oss deepseek_v3 "
    "llama4_text nemotron stablelm bloom falcon falcon_alibi gptj codegen gpt_neo"
).split()


def build(name: str, auto: Any = transformers.AutoModelForCausalLM, **changes: Any) -> Any:
    """The model ``name`` in float64 where it can be, in evaluation mode, without dropout."""
    torch.manual_seed(sum(map(ord, name)))
    config = CONFIGS[name]()
    for key in DROPOUTS:
        if hasattr(config, key):
            setattr(config, key, 0.0)
    for key, value in changes.items():
        setattr(config, key, value)
    # Older versions of transformers give Gemma2 an sdpa that drops its softcap.
    implementation = {"attn_implementation": "eager"} if name == "gemma2" else {}
    model = auto.from_config(config, **implementation).eval()
    if name not in SINGLE_PRECISION:
        model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model


@dataclass
class Case:
    """A model, a text that becomes its prefix, an input, and what the model says of both."""

    name: str
    model: Any
    text: Tensor  # [1, P]
    input_ids: Tensor  # [2, LENGTH]
    logits: Tensor  # [2, LENGTH, V] of the input behind the text, without any of our code
    plain: Tensor  # [2, LENGTH, V] of the input alone

    @property
    def tolerance(self) -> float:
        """Rounding, in units of the largest logit; some models round to float32 on the way."""
        scale = float(self.logits.abs().max())
        return scale * (5e-5 if self.name in SINGLE_PRECISION else 2e-6)

    def prefix(self) -> Prefix:
        return Prefix.from_text(self.model, self.text)

    def joined(self) -> Tensor:
        return torch.cat([self.text.expand(2, -1), self.input_ids], dim=1)

    def assert_close(self, logits: Tensor, expected: Tensor | None = None) -> None:
        """``logits`` are the joined model's, and nowhere near those without the prefix."""
        expected = self.logits if expected is None else expected
        assert (logits - expected).abs().max() <= self.tolerance
        assert (self.logits - self.plain).abs().max() > 1e4 * self.tolerance


def make_case(name: str, **changes: Any) -> Case:
    model = build(name, **changes)
    text = torch.randint(2, 90, (1, P))
    input_ids = torch.randint(2, 90, (2, LENGTH))
    joined = torch.cat([text.expand(2, -1), input_ids], dim=1)
    with torch.no_grad():
        logits, plain = model(joined).logits[:, P:], model(input_ids).logits
    return Case(name, model, text, input_ids, logits, plain)


@pytest.fixture(params=PROMISED)
def promised(request: pytest.FixtureRequest) -> Case:
    return make_case(request.param)


@pytest.fixture(params=[*PROMISED, *OTHERS])
def causal(request: pytest.FixtureRequest) -> Case:
    return make_case(request.param)


@pytest.fixture
def case() -> Callable[..., Case]:
    return make_case


@pytest.fixture
def model_of() -> Callable[..., Any]:
    return build


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()


@pytest.fixture
def attach() -> Any:
    return prefixattn.integrations.attach
