"""Models of which only one side reads text, and single stacks of an encoder-decoder."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from prefixattn import EncoderDecoderPrefix, Prefix, PrefixBank

P = 5
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "attention_dropout": 0.0,
}
# Where a text sees all of itself, what stands behind it changes its keys from the second layer on.
TEXT = SIZES | {"vocab_size": 97, "max_position_embeddings": 64, "num_hidden_layers": 1}
IMAGE = SIZES | {"num_hidden_layers": 2, "image_size": 8, "patch_size": 4}
MIXED = transformers.VisionTextDualEncoderConfig.from_vision_text_configs
DUAL: dict[str, Callable[[], Any]] = {
    "clip": lambda: transformers.CLIPModel(  # causal
        transformers.CLIPConfig(
            text_config=TEXT | {"num_hidden_layers": 2, "eos_token_id": 96}, vision_config=IMAGE
        )
    ),
    "siglip": lambda: transformers.SiglipModel(
        transformers.SiglipConfig(text_config=TEXT, vision_config=IMAGE)
    ),
    "altclip": lambda: transformers.AltCLIPModel(  # positions as RoBERTa counts them
        transformers.AltCLIPConfig(text_config=TEXT | {"project_dim": 32}, vision_config=IMAGE)
    ),
    "chinese clip": lambda: transformers.ChineseCLIPModel(
        transformers.ChineseCLIPConfig(text_config=TEXT, vision_config=IMAGE)
    ),
    "vit and bert": lambda: transformers.VisionTextDualEncoderModel(
        MIXED(transformers.ViTConfig(**IMAGE), transformers.BertConfig(**TEXT))
    ),
}


def sharpened(model: Any) -> Any:
    """In float64, without dropout, with weights that let every token matter."""
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model


def build(make: Callable[[], Any]) -> Any:
    torch.manual_seed(1)
    return sharpened(make())


def draw(*shape: int) -> Tensor:
    return torch.randint(3, 90, shape, generator=torch.Generator().manual_seed(shape[-1]))


def behind(text: Tensor, ids: Tensor) -> Tensor:
    return torch.cat([text.expand(len(ids), -1), ids], dim=1)


@pytest.mark.parametrize("name", DUAL)
def test_the_text_side_of_a_dual_encoder(name: str, attach: Any) -> None:
    model = build(DUAL[name])
    text, ids = draw(1, P), draw(2, 9)
    ids[:, -1] = 96  # where CLIP looks for what a text says
    pixels = torch.randn(2, 3, 8, 8, dtype=torch.double)
    with torch.no_grad():
        joined = model(input_ids=behind(text, ids), pixel_values=pixels)
        expected = joined.text_model_output.last_hidden_state[:, P:]
        plain = model(input_ids=ids, pixel_values=pixels)
    model.requires_grad_(False)
    prefix = Prefix.from_text(model, text)
    handle = attach(model, prefix)
    out = model(input_ids=ids, pixel_values=pixels)
    found = out.text_model_output.last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert (plain.text_model_output.last_hidden_state - expected).abs().max() > 0.1
    torch.testing.assert_close(out.image_embeds, plain.image_embeds)
    if name in ("clip", "siglip"):  # which look at the last token; others look at the first
        torch.testing.assert_close(out.logits_per_text, joined.logits_per_text)
    features = model.get_text_features(input_ids=ids).pooler_output
    scaled = features / features.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(scaled, out.text_embeds)
    model.get_image_features(pixel_values=pixels)
    model(input_ids=ids, pixel_values=pixels, return_loss=True).loss.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in prefix.parameters())
    handle.detach()
    again = model(input_ids=ids, pixel_values=pixels)
    torch.testing.assert_close(again.logits_per_text, plain.logits_per_text)


def test_a_text_that_is_causal_at_times_is_refused(attach: Any) -> None:
    """AIMv2 builds its causal mask where it is given a mask, and sees everything elsewhere."""
    config = transformers.Aimv2Config(text_config=TEXT | {"eos_token_id": 96}, vision_config=IMAGE)
    model = build(lambda: transformers.Aimv2Model(config))
    for side in (model, model.text_model):
        with pytest.raises(NotImplementedError, match="only where an attention_mask is given"):
            Prefix.random(side, P)


@torch.no_grad()
def test_padding_of_the_text_side(attach: Any) -> None:
    model = build(DUAL["clip"])
    text, ids = draw(1, P), draw(2, 9)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    full = torch.nn.functional.pad(mask, (P, 0), value=1)
    expected = model.get_text_features(behind(text, ids), full).last_hidden_state[:, P:]
    attach(model, Prefix.from_text(model, text))
    found = model.get_text_features(ids, mask).last_hidden_state
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-9, atol=1e-9)


CHOICES = {
    "bert": transformers.BertConfig(**TEXT),
    "roberta": transformers.RobertaConfig(**TEXT, pad_token_id=1),
}


@pytest.mark.parametrize("name", CHOICES)
def test_multiple_choice(name: str, attach: Any) -> None:
    """Choices are rows of their own, which a prefix stands before."""
    auto: Any = transformers.AutoModelForMultipleChoice
    model = build(lambda: auto.from_config(CHOICES[name]))
    ids = draw(2, 3, 7)
    mask = torch.ones_like(ids)
    mask[0, 1, 5:] = 0
    ids[0, 1, 5:] = 1
    prefix = Prefix.random(model, P)
    handle = attach(model, prefix)
    out = model(input_ids=ids, attention_mask=mask, labels=torch.tensor([0, 2]))
    rows = zip(ids.flatten(0, 1), mask.flatten(0, 1), strict=True)
    alone = [model(input_ids=i[None, None], attention_mask=m[None, None]).logits for i, m in rows]
    torch.testing.assert_close(out.logits, torch.cat(alone).view(2, 3), rtol=1e-9, atol=1e-9)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in prefix.parameters())
    handle.detach()

    bank = PrefixBank([prefix, Prefix.random(model, 2)])
    attach(model, bank)
    with bank.use([0, 0, 0, 1, 1, 1]):
        named = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(named[0], out.logits[0], rtol=1e-9, atol=1e-9)
    with torch.no_grad(), bank.use([0, 1]):
        torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, named)
    with bank.use([0, 1]), pytest.raises(ValueError, match="chosen for 2 rows.* has 6"):
        model(input_ids=ids, attention_mask=mask)


def test_choices_that_reach_the_layers_are_refused(attach: Any) -> None:
    config = transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    model = build(lambda: transformers.GPT2DoubleHeadsModel(config))
    attach(model, Prefix.random(model, P))
    ids = draw(2, 3, 7)
    with pytest.raises(ValueError, match=r"must be \[B, N\] .* \(2, 3, 7\): give each choice"):
        model(input_ids=ids)
    assert model(input_ids=ids.flatten(0, -2)).mc_logits.shape == (6,)


TOKENS = {
    "vocab_size": 97,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 96,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
LAYERS = TOKENS | {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "dropout": 0.0,
}
# Its own cache has as many layers as the encoder that it does not have.
BY_ITSELF = LAYERS | {"encoder_layers": 3, "is_decoder": True, "is_encoder_decoder": False}
WHISPER = LAYERS | {
    "num_mel_bins": 8,
    "max_source_positions": 10,
    "max_target_positions": 64,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
SPEECH = LAYERS | {
    "input_feat_per_channel": 8,
    "max_source_positions": 64,
    "max_target_positions": 64,
    "num_conv_layers": 1,
    "conv_kernel_sizes": [3],
    "conv_channels": 8,
}
DECODER = transformers.BertConfig(
    **(TEXT | {"num_hidden_layers": 3}),
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    is_decoder=True,
    add_cross_attention=True,
)
TROCR = TOKENS | {
    "d_model": 32,
    "decoder_layers": 3,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "is_decoder": True,
}
OF_IMAGES: Any = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs
OTHERS: dict[str, tuple[Callable[[], Any], str, tuple[int, ...]]] = {
    "whisper": (
        lambda: transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**WHISPER)),
        "input_features",
        (8, 20),
    ),
    "speech to text": (
        lambda: transformers.Speech2TextForConditionalGeneration(
            transformers.Speech2TextConfig(**SPEECH)
        ),
        "input_features",
        (24, 8),
    ),
    "vit and bert": (
        lambda: transformers.VisionEncoderDecoderModel(
            OF_IMAGES(transformers.ViTConfig(**(IMAGE | {"hidden_size": 24})), DECODER)
        ),
        "pixel_values",
        (3, 8, 8),
    ),
    "vit and trocr": (  # whose attention goes through the interface by a forward of ours
        lambda: transformers.VisionEncoderDecoderModel(
            OF_IMAGES(
                transformers.ViTConfig(**(IMAGE | {"hidden_size": 24})),
                transformers.TrOCRConfig(
                    **TROCR, add_cross_attention=True, cross_attention_hidden_size=24
                ),
            )
        ),
        "pixel_values",
        (3, 8, 8),
    ),
    "moonshine": (
        lambda: transformers.MoonshineForConditionalGeneration(
            transformers.MoonshineConfig(
                **TOKENS,
                hidden_size=32,
                intermediate_size=48,
                encoder_num_hidden_layers=2,
                decoder_num_hidden_layers=3,
                encoder_num_attention_heads=4,
                decoder_num_attention_heads=4,
            )
        ),
        "input_values",
        (1200,),
    ),
}


def of_others(name: str) -> tuple[Any, dict[str, Tensor]]:
    """A model, and its input: two rows that are the same."""
    make, key, shape = OTHERS[name]
    model = build(make)
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id, config.pad_token_id = 1, 0
    model.generation_config.update(eos_token_id=None, forced_eos_token_id=None)
    source = torch.randn(1, *shape, dtype=torch.double, generator=torch.Generator().manual_seed(2))
    return model, {key: source.repeat(2, *[1] * len(shape))}


@pytest.mark.parametrize("name", OTHERS)
def test_a_decoder_of_what_is_no_text(name: str, attach: Any) -> None:
    model, source = of_others(name)
    text, target = draw(1, P), draw(2, 6)
    text[:, 0] = target[:, 0] = 1
    joined = behind(text, target)
    arguments = {"max_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        expected = model(**source, decoder_input_ids=joined).logits[:, P:]
        plain = model(**source, decoder_input_ids=target).logits
        tokens = model.generate(**source, decoder_input_ids=joined, **arguments)[:, -6:]
        cache = model(**source, decoder_input_ids=text.expand(2, -1), use_cache=True)
    cached = cache.past_key_values.self_attention_cache.layers
    prefix = Prefix([x.keys[0] for x in cached], [x.values[0] for x in cached])
    handle = attach(model.requires_grad_(False), prefix)
    out = model(**source, decoder_input_ids=target)
    torch.testing.assert_close(out.logits, expected, rtol=1e-9, atol=1e-9)
    assert (expected - plain).abs().max() > 0.1
    out.logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in prefix.parameters())
    with torch.no_grad():
        pad = torch.zeros(2, 3, dtype=torch.long)
        mask = torch.cat([pad, torch.ones_like(target)], dim=1)
        left = torch.cat([pad, target], dim=1)
        padded = model(**source, decoder_input_ids=left, decoder_attention_mask=mask)
        torch.testing.assert_close(padded.logits[:, 3:], expected, rtol=1e-9, atol=1e-9)
        for options in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
            found = model.generate(**source, decoder_input_ids=target, **arguments, **options)
            assert torch.equal(found[:, -6:], tokens), options
    handle.detach()
    with torch.no_grad():
        assert torch.equal(model(**source, decoder_input_ids=target).logits, plain)


@torch.no_grad()
def test_what_stands_beside_the_encoders_output(attach: Any) -> None:
    """A cross prefix of Whisper, which is as many more states to look at."""
    model, source = of_others("whisper")
    target = draw(2, 6)
    states = model.get_encoder()(**source).last_hidden_state
    more = torch.cat([states, states.flip(1)[:, :P]], dim=1)
    out = model(encoder_outputs=(more,), decoder_input_ids=target, use_cache=True)
    cached = out.past_key_values.cross_attention_cache.layers
    length = states.shape[1]
    prefix = Prefix(
        [x.keys[0, :, length:] for x in cached], [x.values[0, :, length:] for x in cached]
    )
    attach(model, EncoderDecoderPrefix(cross=prefix))
    found = model(**source, decoder_input_ids=target).logits
    torch.testing.assert_close(found, out.logits, rtol=1e-9, atol=1e-9)


def test_what_an_encoder_does_not_read_is_refused(attach: Any) -> None:
    model, _ = of_others("whisper")
    assert Prefix.from_text(model, draw(1, P)).num_tokens == P
    assert len(Prefix.zeros(model, 2, part="cross").keys) == 3
    with pytest.raises(ValueError, match=r"does not read \(it reads input_features\), got 'cross'"):
        Prefix.from_text(model, draw(1, P), part="cross")
    with pytest.raises(ValueError, match=r"one of \['cross', 'decoder'\] .* got 'encoder'"):
        Prefix.random(model, 2, part="encoder")
    with pytest.raises(NotImplementedError, match="its input is input_features, not text"):
        Prefix.random(model.get_encoder(), 2)


STACKS: dict[str, Callable[[], Any]] = {
    "bart's decoder": lambda: transformers.BartModel(
        transformers.BartConfig(**LAYERS)
    ).get_decoder(),
    "whisper's decoder": lambda: transformers.WhisperModel(
        transformers.WhisperConfig(**WHISPER)
    ).get_decoder(),
    "t5's decoder": lambda: transformers.T5Model(
        transformers.T5Config(
            **TOKENS, d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=2, num_decoder_layers=3
        )
    ).get_decoder(),
    "bart's, with a head": lambda: transformers.BartForCausalLM(
        transformers.BartConfig(**BY_ITSELF)
    ),
    "trocr": lambda: transformers.TrOCRForCausalLM(transformers.TrOCRConfig(**TROCR)),
    "trocr's sinusoids": lambda: transformers.TrOCRForCausalLM(
        transformers.TrOCRConfig(**TROCR, use_learned_position_embeddings=False)
    ),
    "whisper's, with a head": lambda: transformers.WhisperForCausalLM(
        transformers.WhisperConfig(**WHISPER)
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("states", [0, 4], ids=["alone", "beside an encoder's output"])
@pytest.mark.parametrize("name", STACKS)
def test_a_decoder_by_itself(name: str, states: int, attach: Any) -> None:
    model = build(STACKS[name])
    text, ids = draw(1, P), draw(2, 8)
    beside = {}
    if states:
        outer = "encoder_outputs" if name.startswith("whisper's,") else "encoder_hidden_states"
        memory = torch.randn(2, states, 32, dtype=torch.double).clone()
        memory[1] = memory[0]
        beside = {outer: (memory,) if outer == "encoder_outputs" else memory}
    expected = model(input_ids=behind(text, ids), **beside)[0][:, P:]
    plain = model(input_ids=ids, **beside)[0]
    of_text = {k: v[:1] if isinstance(v, Tensor) else (v[0][:1],) for k, v in beside.items()}
    cache = model(input_ids=text, use_cache=True, **of_text).past_key_values
    layers = getattr(cache, "self_attention_cache", cache).layers
    prefix = Prefix([x.keys[0] for x in layers], [x.values[0] for x in layers])
    assert len(prefix.keys) == 3
    if not states:
        for key, own in zip(prefix.keys, Prefix.from_text(model, text).keys, strict=True):
            torch.testing.assert_close(own, key)
    handle = attach(model, prefix)
    torch.testing.assert_close(model(input_ids=ids, **beside)[0], expected, rtol=1e-9, atol=1e-9)
    assert (expected - plain).abs().max() > 0.1
    first = model(input_ids=ids[:, :5], use_cache=True, **beside)
    second = model(
        input_ids=ids[:, 5:], use_cache=True, past_key_values=first.past_key_values, **beside
    )
    found = torch.cat([first[0], second[0]], dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    handle.detach()
    assert torch.equal(model(input_ids=ids, **beside)[0], plain)
