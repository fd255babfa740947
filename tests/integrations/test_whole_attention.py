"""Our attention function where no carrier comes: what transformers' own gives, in every cache."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from prefixattn import EncoderDecoderPrefix, Prefix
from prefixattn.integrations.transformers import NAME, attention_forward, register

NEW = 7
SIZES = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
DECODER = SIZES | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
SLIDING = DECODER | {"head_dim": 8, "sliding_window": 5}
BART = SIZES | {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
T5 = SIZES | {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER)),
    # A window in every layer, in every other one, and chunks.
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SLIDING)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            **SLIDING, layer_types=["sliding_attention", "full_attention"]
        )
    ),
    "llama4": lambda: transformers.Llama4ForCausalLM(
        transformers.Llama4TextConfig(
            **DECODER,
            head_dim=8,
            intermediate_size_mlp=48,
            attention_chunk_size=5,
            layer_types=["chunked_attention", "full_attention"],
            no_rope_layers=[1, 0],
            num_local_experts=2,
            moe_layers=[],
        )
    ),
    "bart": lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**BART)),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(**T5, decoder_start_token_id=0)
    ),
}
CACHES: dict[str, dict[str, Any]] = {
    "none": {"use_cache": False},
    "dynamic": {},  # of sliding layers, too, where the model has such
    "static": {"cache_implementation": "static"},
    "offloaded": {"cache_implementation": "offloaded"},
    "offloaded static": {"cache_implementation": "offloaded_static"},
}


def loud(model: Any) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "position" not in name:
                parameter.mul_(8)
    return model.double().eval()


@torch.no_grad()
def generated(model: Any, rows: str, cache: str) -> Tensor:
    """``[NEW, B, V]``: the logits of a greedy text behind rows with or without padding."""
    ids = torch.randint(3, 95, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if rows == "padded":
        mask[0, :4] = 0
    out = model.generate(
        ids.masked_fill(mask == 0, 0),
        attention_mask=mask,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        disable_compile=True,
        **CACHES[cache],
    )
    return torch.stack(out.logits)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("rows", ["whole", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_names_us_and_has_no_prefix(name: str, rows: str, cache: str) -> None:
    if cache.startswith("offloaded") and not torch.cuda.is_available():
        pytest.skip("transformers moves an offloaded cache to a GPU, and there is none")
    register()
    torch.manual_seed(0)
    model = loud(MODELS[name]())
    expected = generated(model, rows, cache)
    model.set_attn_implementation(NAME)
    difference = (generated(model, rows, cache) - expected).abs().max()
    assert difference <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_chunks_of_a_text_that_a_static_cache_holds(name: str) -> None:
    """Several queries behind others, beside slots that are still empty."""
    register()
    torch.manual_seed(0)
    model = loud(MODELS[name]())
    ids = torch.randint(3, 95, (2, 9), generator=torch.Generator().manual_seed(0))
    said = []
    for implementation in ("sdpa", NAME):
        model.set_attn_implementation(implementation)
        cache = transformers.StaticCache(config=model.config, max_cache_len=16)
        with torch.no_grad():
            parts = [model(x, past_key_values=cache).logits for x in ids.split([4, 3, 1, 1], dim=1)]
        said.append(torch.cat(parts, dim=1))
    torch.testing.assert_close(said[1], said[0], rtol=0, atol=1e-5 * float(said[0].abs().max()))


class Rounded(transformers.cache_utils.QuantizedLayer):
    """A quantized layer whose numbers are short by themselves: it rounds to float16."""

    def _quantize(self, tensor: Tensor, axis: int) -> Tensor:
        return tensor.half()

    def _dequantize(self, q_tensor: Tensor) -> Tensor:
        return q_tensor.double()


def test_a_quantized_cache(attach: Any) -> None:
    register()
    torch.manual_seed(0)
    model = loud(MODELS["llama"]())
    ids = torch.randint(3, 95, (2, 9), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def in_parts() -> Tensor:
        cache = transformers.Cache(layers=[Rounded(residual_length=4) for _ in range(2)])
        parts = ids.split([5, 1, 1, 1, 1], dim=1)
        return torch.cat([model(part, past_key_values=cache).logits for part in parts], dim=1)

    expected = in_parts()
    model.set_attn_implementation(NAME)
    torch.testing.assert_close(in_parts(), expected)
    model.set_attn_implementation("sdpa")
    attach(model, Prefix.random(model, 4).double())
    whole = model(ids, use_cache=False).logits
    assert (in_parts() - whole).abs().max() < 0.02 * whole.abs().max()
    assert (expected - whole).abs().max() > 0.2 * whole.abs().max()


# The function alone, beside transformers' own.

M, N = 4, 7
MASKS: dict[str, tuple[int, Callable[[], Tensor | None]]] = {
    "none, as many keys": (M, lambda: None),
    "none, more keys: an empty static cache": (N, lambda: None),
    "bool": (N, lambda: torch.ones(2, 1, M, N, dtype=torch.bool).tril(2)),
    "bool, one for all rows and queries": (N, lambda: torch.arange(N)[None, None, None] < 5),
    "bool, by head": (N, lambda: torch.rand(2, 4, M, N) < 0.8),
    "infinite": (N, lambda: torch.zeros(2, 1, M, N).masked_fill(_far(), -torch.inf)),
    "lowest": (
        N,
        lambda: torch.zeros(2, 1, M, N).masked_fill(_far(), torch.finfo(torch.float32).min),
    ),
    "a bias": (N, lambda: torch.randn(2, 4, M, N)),
}


def _far() -> Tensor:
    return torch.ones(M, N, dtype=torch.bool).triu(4)


@pytest.mark.parametrize("queries", [M, 1])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("form", MASKS)
def test_every_form_of_mask(form: str, biased: bool, causal: bool, queries: int) -> None:
    torch.manual_seed(0)
    num_keys, make = MASKS[form]
    query = torch.randn(2, 4, queries, 8)
    key, value = torch.randn(2, 2, 2, num_keys, 8).unbind(0)
    mask = make()
    if mask is not None and mask.shape[2] != 1:
        mask = mask[:, :, :queries]
    module: Any = SimpleNamespace(num_key_value_groups=2, is_causal=causal, training=False)
    extra = {"position_bias": torch.randn(1, 4, queries, num_keys)} if biased else {}
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, **extra)
    ours = nn.Module()
    vars(ours).update(vars(module))
    out, _ = attention_forward(ours, query, key, value, mask, **extra)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


# Modules of an attached model that have no prefix of their own.


@pytest.mark.parametrize("cache", ["none", "dynamic", "static"])
@pytest.mark.parametrize("rows", ["whole", "padded"])
@pytest.mark.parametrize("parts", [["encoder"], ["cross"], ["encoder", "cross"], ["decoder"]])
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_parts_of_an_encoder_decoder_without_a_prefix(
    name: str, parts: list[str], rows: str, cache: str, attach: Any
) -> None:
    """Two prefixes of nothing that anybody sees, and a real one, say the same in every cache."""
    torch.manual_seed(0)
    model = loud(MODELS[name]())
    prefixes = {part: Prefix.random(model, 4, part=part).double() for part in parts}
    attach(model, EncoderDecoderPrefix(**prefixes))
    with torch.no_grad():
        source = torch.randint(3, 95, (2, 9), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(source)
        if rows == "padded":
            mask[0, :4] = 0
        text = generated(model, rows, "dynamic").argmax(-1).T  # [B, NEW]
        start = torch.full((2, 1), model.config.decoder_start_token_id)
        ids = torch.cat([start, text[:, :-1]], dim=1)
        whole = model(
            source.masked_fill(mask == 0, 0), attention_mask=mask, decoder_input_ids=ids
        ).logits
    found = generated(model, rows, cache).transpose(0, 1)
    assert (found - whole).abs().max() <= 1e-5 * whole.abs().max()


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_padding_of_the_decoders_text_is_not_the_encoders(name: str, attach: Any) -> None:
    """A static cache's masks are made before, and say nothing of padding any more."""
    torch.manual_seed(0)
    model = loud(MODELS[name]())
    attach(model, Prefix.random(model, 4).double())
    source = torch.randint(3, 95, (2, 9), generator=torch.Generator().manual_seed(0))
    mask, target = torch.ones_like(source), source[:, :4].clone()
    mask[0, :4] = 0
    shown = torch.ones_like(target)
    target[1, :2] = shown[1, :2] = 0
    said = []
    for cache in ({}, {"cache_implementation": "static", "disable_compile": True}):
        out = model.generate(
            source,
            attention_mask=mask,
            decoder_input_ids=target,
            decoder_attention_mask=shown,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **cache,
        )
        said.append(torch.stack(out.logits))
    torch.testing.assert_close(said[1], said[0], rtol=0, atol=1e-5 * float(said[0].abs().max()))
