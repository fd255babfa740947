"""PaliGemma, which counts its places from 1 and lets an image and its prompt see each other."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from prefixattn import Prefix

P, LENGTH = 5, 11
COUNT = torch.arange(LENGTH)

# The text model in PaliGemma, and transformers' own attention where the prefix is not.
PALIGEMMAS: dict[str, tuple[type[Any], str | None]] = {
    "gemma, eager": (transformers.GemmaConfig, "eager"),
    "gemma, sdpa": (transformers.GemmaConfig, "sdpa"),
    # With windows. What transformers chooses by itself: sdpa in 5.17, which drops the softcap.
    "gemma2": (transformers.Gemma2Config, None),
}


def paligemma(kind: type[Any], implementation: str | None) -> Any:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    text = kind(
        vocab_size=97,
        **shape,
        num_hidden_layers=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=None,
    )
    if hasattr(text, "sliding_window"):
        text.sliding_window = 7
    vision = shape | {"num_hidden_layers": 1, "image_size": 32, "patch_size": 16}
    config = transformers.PaliGemmaConfig(
        vision_config=vision | {"model_type": "siglip_vision_model", "projection_dim": 32},
        text_config=text.to_dict(),
        image_token_index=95,
        projection_dim=32,
        hidden_size=32,
    )
    torch.manual_seed(0)
    kind_of_model: Any = transformers.PaliGemmaForConditionalGeneration
    model = kind_of_model._from_config(config, attn_implementation=implementation).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model


def plain_paligemma(kind: type[Any]) -> Any:
    """The oracle has eager attention: under sdpa transformers contradicts itself.

    For a text without padding and token types its sdpa mask is None, which leaves causality to the
    module, and PaliGemma's modules say that they have none. Each token then sees the whole text,
    and no window. With padding, with token types, in eager attention and token by token, which is
    how ``generate`` goes on, the text is causal. Behind a prefix it is, in all of these.
    """
    return paligemma(kind, "eager")


@torch.no_grad()
@pytest.mark.parametrize(("kind", "implementation"), PALIGEMMAS.values(), ids=PALIGEMMAS)
def test_paligemma_counts_from_one(
    attach: Any, kind: type[Any], implementation: str | None
) -> None:
    plain, model = plain_paligemma(kind), paligemma(kind, implementation)
    text, ids = torch.randint(2, 90, (1, P)), torch.randint(2, 90, (2, LENGTH))
    ones = torch.ones_like(ids)
    expected = plain(torch.cat([text.expand(2, -1), ids], 1)).logits[:, P:]
    scale = expected.abs().max()
    attach(model, Prefix.from_text(model, text))

    def assert_same(found: Tensor) -> None:
        assert (found - expected).abs().max() <= 1e-5 * scale  # Gemma turns keys in float32

    assert_same(model(ids).logits)
    assert_same(model(ids, attention_mask=ones).logits)
    assert_same(model(ids, position_ids=COUNT[None] + 1).logits)
    left, mask = (nn.functional.pad(x, (3, 0)) for x in (ids, ones))
    assert_same(model(left, attention_mask=mask).logits[:, 3:])
    cache = transformers.DynamicCache(config=model.config.get_text_config())
    steps = [
        model(left[:, a:b], attention_mask=mask[:, :b], past_key_values=cache, use_cache=True)
        for a, b in ((0, 6), (6, 7), (7, 3 + LENGTH))
    ]
    assert_same(torch.cat([out.logits for out in steps], 1)[:, 3:])
    said = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
    for row, seen in ((ids, ones), (left, mask)):
        out = model.generate(input_ids=row, attention_mask=seen, do_sample=False, **said)
        assert (out.logits[0] - expected[:, -1]).abs().max() <= 1e-5 * scale
    # Its own dense mask, made before the stack: packed rows, and a place that jumps.
    apart = torch.cat([model(x).logits for x in ids[:1].split([4, 7], 1)], 1)
    places = torch.tensor([[*range(1, 5), *range(1, 8)]])
    assert (model(ids[:1], position_ids=places).logits - apart).abs().max() <= 1e-5 * scale
    jump = COUNT[None] + 16 * (COUNT >= 4) + 1
    one = model(ids, position_ids=jump, attention_mask=ones).logits
    for way in ({}, {"use_cache": False}):
        assert (model(ids, position_ids=jump, **way).logits - one).abs().max() <= 1e-5 * scale


@torch.no_grad()
@pytest.mark.parametrize(("kind", "implementation"), PALIGEMMAS.values(), ids=PALIGEMMAS)
def test_paligemma_sees_the_whole_block_that_token_types_name(
    attach: Any, kind: type[Any], implementation: str | None
) -> None:
    """Tokens of type 0, an image and its prompt, see each other; the prefix sees none of them."""
    plain, model = plain_paligemma(kind), paligemma(kind, implementation)
    text, ids = torch.randint(2, 90, (1, P)), torch.randint(2, 90, (2, LENGTH))
    types = (COUNT >= 4).long().expand(2, -1)
    joined = torch.cat([text.expand(2, -1), ids], 1)
    kinds = nn.functional.pad(types, (P, 0), value=1)
    ones = torch.ones_like(joined)
    expected = plain(joined, attention_mask=ones, token_type_ids=kinds).logits[:, P:]
    causal = plain(joined, attention_mask=ones).logits[:, P:]
    scale = expected.abs().max()
    assert (expected - causal).abs().max() > 0.1 * scale
    attach(model, Prefix.from_text(model, text))
    ones = ones[:, P:]
    whole_text = model(ids, attention_mask=ones, token_type_ids=types).logits
    cache = transformers.DynamicCache(config=model.config.get_text_config())
    steps = [
        model(
            ids[:, a:b],
            attention_mask=ones[:, :b],
            token_type_ids=types[:, a:b],
            past_key_values=cache,
        ).logits
        for a, b in ((0, 6), (6, 7), (7, LENGTH))
    ]
    for found in (whole_text, torch.cat(steps, 1)):
        assert (found - expected).abs().max() <= 1e-5 * scale
