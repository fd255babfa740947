"""An attached PeftModel generates from whatever its base model generates from."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import prefixattn.checkpoints

GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
BEAMS = GREEDY | {"num_beams": 3, "num_return_sequences": 2}


def tuned(base: Any, task: str, **lengths: int) -> Any:
    """A PeftModel with a prefix adapter of each name and length, whose numbers matter."""
    model = None
    for name, length in lengths.items():
        config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=length)
        if model is None:
            model = peft.get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    assert model is not None
    model.to(base.dtype).eval()
    for parameter in model.prompt_encoder.parameters():
        nn.init.normal_(parameter)
    return model


def padded(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens behind padding, and the mask that says so."""
    return nn.functional.pad(ids, (3, 0)), nn.functional.pad(torch.ones_like(ids), (3, 0))


def from_padded_embeddings(model: Any, ids: Tensor, embed: Any) -> Tensor:
    row, mask = padded(ids)
    return model.generate(inputs_embeds=embed(row), attention_mask=mask, **GREEDY)


class Stream:
    def __init__(self) -> None:
        self.tokens: list[Tensor] = []

    def put(self, value: Tensor) -> None:
        self.tokens.append(value.flatten())

    def end(self) -> None:
        """Nothing is left over."""


def streamed(model: Any, ids: Tensor, embed: Any) -> Tensor:
    rows = []
    for row in ids:
        stream = Stream()
        model.generate(row[None], streamer=stream, **GREEDY)
        rows.append(torch.cat(stream.tokens)[-GREEDY["max_new_tokens"] :])
    return torch.stack(rows)


def by_settings_of_its_own(model: Any, ids: Tensor, embed: Any) -> Tensor:
    model.generation_config = transformers.GenerationConfig(pad_token_id=0, **GREEDY)
    out = model.generate(ids)
    del model.generation_config
    return out


# Ways to ask for the same text: of PeftModel, tokens and what embeds them.
FORMS: dict[str, Callable[[Any, Tensor, Any], Tensor]] = {
    "embeddings": lambda m, ids, e: m.generate(inputs_embeds=e(ids), **GREEDY),
    "padded embeddings": from_padded_embeddings,
    "embeddings, static": lambda m, ids, e: m.generate(
        inputs_embeds=e(ids), cache_implementation="static", **GREEDY
    ),
    "embeddings, no cache": lambda m, ids, e: m.generate(
        inputs_embeds=e(ids), use_cache=False, **GREEDY
    ),
    "both": lambda m, ids, e: m.generate(input_ids=ids, inputs_embeds=e(ids), **GREEDY),
    "both, positional": lambda m, ids, e: m.generate(ids, inputs_embeds=e(ids), **GREEDY),
    "positional": lambda m, ids, e: m.generate(ids, **GREEDY),
    "inputs": lambda m, ids, e: m.generate(inputs=ids, **GREEDY),
    "settings": lambda m, ids, e: m.generate(
        ids, transformers.GenerationConfig(pad_token_id=0, decoder_start_token_id=2, **GREEDY)
    ),
    "processors": lambda m, ids, e: m.generate(
        ids, None, transformers.LogitsProcessorList(), **GREEDY
    ),
    "streamer": streamed,
}
CAUSAL = {"its own settings": by_settings_of_its_own}
# An encoder-decoder takes one of the two.
ENCODED = {
    "encoded": lambda m, ids, e: m.generate(encoder_outputs=m.get_encoder()(ids), **GREEDY),
    "encoded, and tokens": lambda m, ids, e: m.generate(
        ids, encoder_outputs=m.get_encoder()(ids), **GREEDY
    ),
    "begun": lambda m, ids, e: m.generate(
        ids, decoder_input_ids=torch.full((len(ids), 1), 2), **GREEDY
    ),
}


def said(tokens: Tensor) -> Tensor:
    """The new ones."""
    return tokens[:, -GREEDY["max_new_tokens"] :]


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_every_form_says_the_same(case: Callable[..., Any], attach: Any, name: str) -> None:
    given = case(name)
    ids, embed = given.input_ids, given.model.get_input_embeddings()
    plain = given.model.generate(input_ids=ids, **GREEDY)
    model = tuned(given.model, "CAUSAL_LM", one=5)
    before = given.model.generation_config
    attach(model)
    expected = model.generate(input_ids=ids, **GREEDY)
    assert not torch.equal(expected, plain)
    for form, say in (FORMS | CAUSAL).items():
        assert torch.equal(said(say(model, ids, embed)), said(expected)), form
    beams = model.generate(input_ids=ids, **BEAMS)
    assert torch.equal(said(model.generate(inputs_embeds=embed(ids), **BEAMS)), said(beams))
    with model.disable_adapter():
        assert torch.equal(model.generate(inputs_embeds=embed(ids), **GREEDY), said(plain))
    assert torch.equal(said(model.generate(inputs_embeds=embed(ids), **GREEDY)), said(expected))
    assert given.model.generation_config is before


@torch.no_grad()
@pytest.mark.parametrize("settings", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_embeddings_for_adapters_by_row(
    case: Callable[..., Any], attach: Any, settings: dict[str, Any]
) -> None:
    given = case("llama")
    ids, embed = given.input_ids, given.model.get_input_embeddings()
    plain = given.model.generate(input_ids=ids, **settings)
    model = tuned(given.model, "CAUSAL_LM", one=5, two=3)
    attach(model)
    names = ["two", "__base__"]
    expected = said(model.generate(input_ids=ids, adapter_names=names, **settings))
    for inputs in ({}, {"input_ids": ids}):
        found = model.generate(inputs_embeds=embed(ids), adapter_names=names, **inputs, **settings)
        assert torch.equal(said(found), expected)
    half = len(expected) // 2
    assert torch.equal(expected[half:], said(plain)[half:])
    assert not torch.equal(expected[:half], said(plain)[:half])
    with pytest.raises(ValueError, match="chosen for 1 rows, but the input has 2"):
        model.generate(inputs_embeds=embed(ids), adapter_names=["two"], **settings)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_every_form_of_an_encoder_decoder(attach: Any, kind: str) -> None:
    shared: dict[str, Any] = {
        "vocab_size": 97,
        "d_model": 32,
        "decoder_start_token_id": 2,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    config: Any = transformers.T5Config(
        **shared, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    if kind == "bart":
        sides = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}
        both = {f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in sides.items()}
        config = transformers.BartConfig(
            **shared, **both, max_position_embeddings=64, forced_eos_token_id=None
        )
    torch.manual_seed(0)
    base = transformers.AutoModelForSeq2SeqLM.from_config(config).double().eval()
    for parameter in base.parameters():
        if parameter.ndim > 1:
            parameter.mul_(8)
    ids, embed = torch.randint(2, 90, (2, 11)), base.get_input_embeddings()
    plain = base.generate(ids, **GREEDY)
    model = tuned(base, "SEQ_2_SEQ_LM", one=5)
    attach(model)
    expected = model.generate(input_ids=ids, **GREEDY)
    assert not torch.equal(expected, plain)
    forms = {
        k: v
        for k, v in FORMS.items()
        if not {"both", "static", "padded"} & set(re.findall(r"\w+", k))
    }
    for form, say in (forms | ENCODED).items():
        assert torch.equal(said(say(model, ids, embed)), said(expected)), form
    encoded = base.get_encoder()(ids)
    named = model.generate(encoder_outputs=encoded, adapter_names=["one", "one"], **GREEDY)
    assert torch.equal(named, expected)
    with pytest.raises(ValueError, match="chosen for 1 rows, but the input has 2"):
        model.generate(encoder_outputs=encoded, adapter_names=["one"], **GREEDY)
    beams = model.generate(input_ids=ids, **BEAMS)
    assert torch.equal(model.generate(inputs_embeds=embed(ids), **BEAMS), beams)


IN_PLACE: dict[str, tuple[str, Any]] = {
    "llama": ("CAUSAL_LM", transformers.AutoModelForCausalLM),
    "gpt2": ("CAUSAL_LM", transformers.AutoModelForCausalLM),
    "opt": ("CAUSAL_LM", transformers.AutoModelForCausalLM),
    "gemma2": ("CAUSAL_LM", transformers.AutoModelForCausalLM),
    "bert": ("SEQ_CLS", transformers.AutoModelForSequenceClassification),
    "roberta": ("SEQ_CLS", transformers.AutoModelForSequenceClassification),
}


@torch.no_grad()
@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_and_from_its_file_are_one(
    model_of: Callable[..., Any], attach: Any, name: str, tmp_path: Path
) -> None:
    """Without stock PEFT, which loses its prefix where transformers is newer than it."""
    task, auto = IN_PLACE[name]
    base = model_of(name, auto)
    other = copy.deepcopy(base)
    row, mask = padded(torch.randint(2, 90, (2, 9)))
    prompt = {"input_ids": row, "attention_mask": mask}
    without = base(input_ids=row[:, 3:]).logits
    ways = (GREEDY, BEAMS, GREEDY | {"cache_implementation": "static"})
    ways = ways if task == "CAUSAL_LM" else ()
    model = tuned(base, task, default=5)
    model.save_pretrained(tmp_path)
    attach(model)
    in_place = model(**prompt).logits
    tokens = [model.generate(**prompt, **way) for way in ways]
    attach(other, prefixattn.checkpoints.load(tmp_path, model=other).to(other.dtype))
    assert torch.equal(other(**prompt).logits, in_place)
    for way, expected in zip(ways, tokens, strict=True):
        assert torch.equal(other.generate(**prompt, **way), expected)
    assert (in_place[:, -1] - without[:, -1]).abs().max() > 1e-3
