"""Encoder-decoders: stock PEFT for the decoder's prefix, the model itself for all three."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

import prefixattn.checkpoints
from prefixattn import EncoderDecoderPrefix, Prefix

P = 5
SOURCE, TARGET = 9, 6
TOKENS = {
    "vocab_size": 97,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 96,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
LAYERS = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,  # of another number, to tell the two apart
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "dropout": 0.0,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2, "dropout_rate": 0.0}
CONFIGS: dict[str, Callable[[], Any]] = {
    "bart": lambda: transformers.BartConfig(**TOKENS, **LAYERS),  # learned positions
    "m2m_100": lambda: transformers.M2M100Config(  # positions that count the padding
        **TOKENS, **LAYERS, encoder_layerdrop=0.0, decoder_layerdrop=0.0
    ),
    "t5": lambda: transformers.T5Config(**TOKENS, **T5),  # shared biases
    "umt5": lambda: transformers.UMT5Config(**TOKENS, **T5),  # each layer its own bias
}


def build(name: str, **changes: int) -> Any:
    torch.manual_seed(sum(map(ord, name)))
    config = CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    # In transformers 5.17 UMT5's decoder says that it is not causal, which sdpa takes for granted.
    kind = {"attn_implementation": "eager"} if name == "umt5" else {}
    model = transformers.AutoModelForSeq2SeqLM.from_config(config, **kind).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model


def draw(*shape: int) -> Tensor:
    return torch.randint(2, 90, shape, generator=torch.Generator().manual_seed(shape[-1]))


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_the_decoder_continues_a_text(name: str, attach: Any) -> None:
    model = build(name)
    source, text, target = draw(1, SOURCE).expand(2, -1), draw(1, P), draw(2, TARGET)
    target[:, 0] = 1
    joined = torch.cat([text.expand(2, -1), target], dim=1)
    expected = model(input_ids=source, decoder_input_ids=joined).logits[:, P:]
    plain = model(input_ids=source, decoder_input_ids=target).logits
    cache = model(input_ids=source[:1], decoder_input_ids=text).past_key_values
    layers = cache.self_attention_cache.layers
    prefix = Prefix([x.keys[0] for x in layers], [x.values[0] for x in layers])

    handle = attach(model, prefix)
    found = model(input_ids=source, decoder_input_ids=target).logits
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert (expected - plain).abs().max() > 0.1
    pad = torch.zeros(2, 3, dtype=torch.long)
    mask = torch.cat([pad, torch.ones_like(target)], dim=1)
    left = torch.cat([pad, target], dim=1)
    padded = model(input_ids=source, decoder_input_ids=left, decoder_attention_mask=mask)
    torch.testing.assert_close(padded.logits[:, 3:], expected, rtol=1e-9, atol=1e-9)
    first = model(input_ids=source, decoder_input_ids=target[:, :4], use_cache=True)
    second = model(
        encoder_outputs=(first.encoder_last_hidden_state,),
        decoder_input_ids=target[:, 4:],
        past_key_values=first.past_key_values,
    )
    pieces = torch.cat([first.logits, second.logits], dim=1)
    torch.testing.assert_close(pieces, expected, rtol=1e-9, atol=1e-9)
    handle.detach()
    assert torch.equal(model(input_ids=source, decoder_input_ids=target).logits, plain)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_equals_peft(name: str, attach: Any) -> None:
    """PEFT gives decoder layers its own choice of the layers in its file."""
    config = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P)
    stock = peft.get_peft_model(build(name, decoder_layers=2), config).double().eval()
    torch.nn.init.normal_(stock.prompt_encoder["default"].embedding.weight)
    ours = copy.deepcopy(stock)
    attach(ours)
    inputs = {"input_ids": draw(2, SOURCE), "labels": draw(2, TARGET)}
    outs = [model(**inputs) for model in (stock, ours)]
    torch.testing.assert_close(outs[1].logits, outs[0].logits, rtol=1e-9, atol=1e-9)
    for out in outs:
        out.loss.backward()
    grads = [m.prompt_encoder["default"].embedding.weight.grad for m in (stock, ours)]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-7, atol=1e-9)
    assert grads[0].abs().max() > 1e-4
    for options in ({"num_beams": 1}, {"num_beams": 3}):
        tokens = [
            model.generate(input_ids=inputs["input_ids"], max_new_tokens=6, **options)
            for model in (stock, ours)
        ]
        assert torch.equal(tokens[1], tokens[0])


@torch.no_grad()
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_in_place_and_from_its_file_are_one(name: str, attach: Any, tmp_path: Path) -> None:
    """Without stock PEFT, which loses its prefix where transformers is newer than it."""
    config = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P)
    base, other = build(name, decoder_layers=2), build(name, decoder_layers=2)
    model = peft.get_peft_model(base, config).double().eval()
    torch.nn.init.normal_(model.prompt_encoder["default"].embedding.weight)
    model.save_pretrained(tmp_path)
    inputs = {"input_ids": draw(2, SOURCE), "decoder_input_ids": draw(2, TARGET)}
    without = other(**inputs).logits
    attach(model)
    attach(other, prefixattn.checkpoints.load(tmp_path, model=other).double())
    found = model(**inputs).logits
    assert torch.equal(other(**inputs).logits, found)
    assert (found - without).abs().max() > 0.1
    for beams in (1, 3):
        tokens = [
            each.generate(input_ids=inputs["input_ids"], max_new_tokens=6, num_beams=beams)
            for each in (model, other)
        ]
        assert torch.equal(*tokens)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_the_cross_attention_has_more_to_look_at(name: str, attach: Any) -> None:
    """As many memory slots more, of which every layer reads its own keys."""
    model = build(name)
    source, target = draw(1, SOURCE), draw(1, TARGET)
    memory = model.get_encoder()(input_ids=source).last_hidden_state
    more = torch.cat([memory, memory.flip(1)[:, :P]], dim=1)
    expected = model(encoder_outputs=(more,), decoder_input_ids=target).logits
    keys, values = [], []
    cache = model(encoder_outputs=(more,), decoder_input_ids=target).past_key_values
    for layer in cache.cross_attention_cache.layers:
        keys.append(layer.keys[0, :, SOURCE:])
        values.append(layer.values[0, :, SOURCE:])
    attach(model, EncoderDecoderPrefix(cross=Prefix(keys, values)))
    found = model(input_ids=source, decoder_input_ids=target).logits
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    tokens = model.generate(input_ids=source, max_new_tokens=5, num_beams=2)
    assert tokens.shape[0] == 1


def test_three_parts_train_and_are_saved(attach: Any, tmp_path: Path) -> None:
    model = build("t5").requires_grad_(False)
    prefix = EncoderDecoderPrefix.random(model, 3)
    source, target = draw(2, SOURCE), draw(2, TARGET)
    attach(model.train(), prefix)
    expected = model(input_ids=source, labels=target)
    expected.loss.backward()
    grads = [parameter.grad.clone() for parameter in prefix.parameters()]
    assert len(grads) == 2 * (2 + 2 + 2)
    assert all(grad.abs().max() > 1e-6 for grad in grads)
    model.gradient_checkpointing_enable()
    prefix.zero_grad()
    model(input_ids=source, labels=target).loss.backward()
    for parameter, grad in zip(prefix.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad)
    prefix.save_pretrained(tmp_path)
    again = EncoderDecoderPrefix.from_pretrained(tmp_path)
    model.prefixattn = again
    torch.testing.assert_close(model(input_ids=source, labels=target).logits, expected.logits)


def test_what_is_refused(attach: Any, model_of: Any) -> None:
    model = build("bart")
    with pytest.raises(ValueError, match=r"prefix \(encoder\) must have 2 layers .* got 3"):
        attach(model, EncoderDecoderPrefix(encoder=Prefix.random(model, 2)))
    with pytest.raises(ValueError, match="LlamaForCausalLM is no encoder-decoder"):
        attach(model_of("llama"), EncoderDecoderPrefix.random(model, 2))
    with pytest.raises(ValueError, match="encoder, decoder, cross must be given"):
        EncoderDecoderPrefix()
    with pytest.raises(TypeError, match="cross must be a Prefix"):
        EncoderDecoderPrefix(cross=torch.nn.Linear(1, 1))  # type: ignore[arg-type]
