"""Prefixes among the weights of whole models: ChatGLM's, in several files, saved while attached."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from prefixattn import (
    EncoderDecoderPrefix,
    GatedPrefix,
    Prefix,
    PrefixBank,
    ProjectedPrefix,
    attach,
    cli,
)
from prefixattn.checkpoints import convert, load, recognise

P, LAYERS = 5, 3
State = dict[str, Tensor]


def drawn(shapes: dict[str, tuple[int, ...]]) -> State:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


# ChatGLM


class ChatGLM:
    """A configuration, what its prefix encoder is like, and keys and values by its own views."""

    def __init__(self, heads: int, dim: int, hidden: int, **config: int) -> None:
        self.heads, self.dim = heads, dim
        self.width = 2 * LAYERS * heads * dim
        self.hidden, self.config = hidden, {"model_type": "chatglm", "num_layers": LAYERS, **config}

    def past(self, flat: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Per layer key and value ``[H_kv, P, D]``."""
        parts = flat.view(1, P, 2 * LAYERS, self.heads, self.dim).permute(2, 1, 0, 3, 4).split(2)
        return [(part[0][:, 0].transpose(0, 1), part[1][:, 0].transpose(0, 1)) for part in parts]


MODELS = {
    "ChatGLM-6B": ChatGLM(4, 8, 32, num_attention_heads=4, hidden_size=32, pre_seq_len=P),
    # Fewer key heads than query heads, which are wider together than the model.
    "ChatGLM2-6B": ChatGLM(
        2,
        *(16, 32),
        num_attention_heads=4,
        hidden_size=32,
        pre_seq_len=P,
        multi_query_group_num=2,
        kv_channels=16,
    ),
    # GLM-4 also says what transformers expects; it means the same.
    "GLM-4": ChatGLM(
        2,
        *(16, 32),
        num_attention_heads=4,
        hidden_size=32,
        num_hidden_layers=LAYERS,
        multi_query_group_num=2,
        kv_channels=16,
    ),
}
ENCODER = "transformer.prefix_encoder."


@pytest.mark.parametrize("projection", [False, True], ids=["embedding", "network"])
@pytest.mark.parametrize("name", MODELS)
def test_chatglms_prefixes(name: str, projection: bool, tmp_path: Path) -> None:
    model = MODELS[name]
    narrow = model.hidden if name == "ChatGLM-6B" else model.width  # as wide as its embedding
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (P, model.width)}
    if projection:
        shapes = {"embedding.weight": (P, narrow), "trans.0.weight": (model.hidden, narrow)}
        shapes |= {"trans.0.bias": (model.hidden,), "trans.2.bias": (model.width,)}
        shapes["trans.2.weight"] = (model.width, model.hidden)
    state = drawn(shapes)
    flat = state["embedding.weight"]
    if projection:
        flat = torch.tanh(flat @ state["trans.0.weight"].T + state["trans.0.bias"])
        flat = flat @ state["trans.2.weight"].T + state["trans.2.bias"]
    (tmp_path / "config.json").write_text(json.dumps(model.config))
    torch.save({ENCODER + k: v for k, v in state.items()}, tmp_path / "pytorch_model.bin")
    assert recognise(tmp_path) == "ptuning-v2"
    prefix = load(tmp_path)
    assert isinstance(prefix, Prefix)
    assert prefix.positions == "keep"  # ChatGLM counts the text from 0
    for found, expected in zip(prefix(), model.past(flat), strict=True):
        for tensor, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(tensor, wanted)


def test_a_prefix_of_chatglm_is_converted(tmp_path: Path) -> None:
    model = MODELS["ChatGLM2-6B"]
    source = tmp_path / "checkpoint-3000"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(model.config))
    state = drawn({ENCODER + "embedding.weight": (P, model.width)})
    torch.save({name: x.half() for name, x in state.items()}, source / "pytorch_model.bin")
    done = CliRunner().invoke(
        cli.app, ["convert", str(source), str(tmp_path / "ours"), "--to", "prefixattn"]
    )
    assert done.exit_code == 0, done.output
    prefix = Prefix.from_pretrained(tmp_path / "ours")
    assert (prefix.num_tokens, prefix.positions) == (P, "keep")


def test_sizes_of_chatglm_that_do_not_fit_are_named(tmp_path: Path) -> None:
    model = MODELS["ChatGLM2-6B"]
    torch.save(drawn({ENCODER + "embedding.weight": (P, 7)}), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(model.config))
    with pytest.raises(
        ValueError, match="a key and a value of 2 heads of 16 numbers for each of 3"
    ):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(model.config | {"kv_channels": None}))
    with pytest.raises(ValueError, match="kv_channels must be a positive integer, got None"):
        load(tmp_path)


# Several files

OTHERS = {"bert.pooler.bias": (32,), "classifier.weight": (3, 32)}
NETWORK = {
    "prefix_encoder.embedding.weight": (P, 32),
    "prefix_encoder.trans.0.weight": (12, 32),
    "prefix_encoder.trans.0.bias": (12,),
    "prefix_encoder.trans.2.weight": (192, 12),
    "prefix_encoder.trans.2.bias": (192,),
}
SIZES = {"num_hidden_layers": LAYERS, "num_attention_heads": 4, "hidden_size": 32}
KINDS = {
    "safetensors": ("model.safetensors", save_file),
    "pickles": ("pytorch_model.bin", torch.save),
}


def in_parts(folder: Path, state: State, kind: str, count: int = 3) -> dict[str, str]:
    """Write the tensors into several files, in turns, beside an index that is returned."""
    file, write = KINDS[kind]
    stem, _, ending = file.partition(".")
    places = {
        name: f"{stem}-{1 + i % count:05}-of-{count:05}.{ending}" for i, name in enumerate(state)
    }
    for place in set(places.values()):
        write({n: x for n, x in state.items() if places[n] == place}, folder / place)
    write_index(folder, kind, places)
    return places


def write_index(folder: Path, kind: str, places: Any) -> None:
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / f"{KINDS[kind][0]}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_in_several_files(kind: str, tmp_path: Path) -> None:
    state = drawn({**OTHERS, **NETWORK})
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(SIZES))
    file, write = KINDS[kind]
    write(state, tmp_path / "whole" / file)
    in_parts(tmp_path / "parts", state, kind)
    assert recognise(tmp_path / "parts") == "ptuning-v2"
    found, expected = load(tmp_path / "parts"), load(tmp_path / "whole")
    assert isinstance(found, Prefix)
    for pair in zip(found(), expected(), strict=True):
        assert all(torch.equal(*tensors) for tensors in zip(*pair, strict=True))
    convert(tmp_path / "parts", tmp_path / "ours", "prefixattn")
    assert recognise(tmp_path / "ours") == "prefixattn"


def test_shards_without_a_prefix_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    places = in_parts(tmp_path, drawn({**OTHERS, **NETWORK}), "pickles", count=7)
    for name in OTHERS:
        (tmp_path / places[name]).write_text("damaged")
    assert isinstance(load(tmp_path), Prefix)


Damage = Callable[[Path, dict[str, str]], object]
EMBEDDING = "prefix_encoder.embedding.weight"
DAMAGES: dict[str, tuple[Damage, type[Exception], str]] = {
    "a shard is missing": (
        lambda folder, places: (folder / places[EMBEDDING]).unlink(),
        FileNotFoundError,
        "no model-.*safetensors in",
    ),
    "a shard is cut": (
        lambda folder, places: (folder / places[EMBEDDING]).write_bytes(b"cut"),
        ValueError,
        "truncated",
    ),
    "a shard of another state": (
        lambda folder, places: save_file({"x": torch.zeros(1)}, folder / places[EMBEDDING]),
        ValueError,
        r"must hold \['prefix_encoder",
    ),
    "a file elsewhere": (
        lambda folder, places: write_index(
            folder, "safetensors", places | {EMBEDDING: "../model.safetensors"}
        ),
        ValueError,
        "must name files beside it, got '../model.safetensors'",
    ),
    "an index of something else": (
        lambda folder, places: write_index(folder, "safetensors", [1]),
        ValueError,
        "weight_map must name a file for each tensor",
    ),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_parts_are_named(what: str, tmp_path: Path) -> None:
    spoil, error, message = DAMAGES[what]
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    places = in_parts(tmp_path, drawn({**OTHERS, **NETWORK}), "safetensors")
    spoil(tmp_path, places)
    with pytest.raises(error, match=message):
        load(tmp_path)


# Saved while attached

UNSAID = "do not say how its prefix was attached"


def llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


KINDS_OF_PREFIX: dict[str, Callable[[Any], Prefix]] = {
    "plain": lambda model: Prefix.random(model, P),
    "with frozen tokens": lambda model: Prefix.random(model, P, num_frozen_tokens=2),
    "projected": lambda model: ProjectedPrefix.for_model(model, P, hidden_dim=7, embedding_dim=6),
    "gated": lambda model: GatedPrefix.random(model, P),
}


def same(one: Prefix, other: Prefix) -> bool:
    pairs = zip(one(), other(), strict=True)
    alike = all(torch.equal(*tensors) for pair in pairs for tensors in zip(*pair, strict=True))
    return alike and type(one) is type(other) and repr(one) == repr(other)


@pytest.mark.parametrize("parts", [False, True], ids=["one file", "several"])
@pytest.mark.parametrize("kind", KINDS_OF_PREFIX)
def test_a_prefix_that_was_saved_with_its_model(kind: str, parts: bool, tmp_path: Path) -> None:
    model = llama()
    prefix = KINDS_OF_PREFIX[kind](model)
    if isinstance(prefix, GatedPrefix):
        torch.nn.init.normal_(prefix.gates[0])
    attach(model, prefix)
    ids = torch.arange(7)[None]
    expected = model(ids).logits
    model.save_pretrained(tmp_path, max_shard_size="20KB" if parts else "1GB")
    assert (tmp_path / "model.safetensors").exists() != parts
    with pytest.warns(UserWarning, match=UNSAID) as warned:
        found = Prefix.from_pretrained(tmp_path)
    assert warned[0].filename == __file__
    assert same(found, prefix)
    assert found.positions == prefix.positions
    other = llama()
    attach(other, found)
    assert torch.equal(other(ids).logits, expected)
    assert recognise(tmp_path) == "attached-model"
    with pytest.warns(UserWarning, match=UNSAID):
        convert(tmp_path, tmp_path / "ours", "prefixattn")
    assert same(Prefix.from_pretrained(tmp_path / "ours"), prefix)


def test_a_checkpoint_of_the_trainer(tmp_path: Path) -> None:
    model = llama().requires_grad_(False)
    prefix = Prefix.random(model, P)
    attach(model, prefix)
    rows = [{"input_ids": torch.arange(6), "labels": torch.arange(6)} for _ in range(2)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=1, use_cpu=True, report_to=[], disable_tqdm=True
    )
    transformers.Trainer(model, arguments, train_dataset=rows).train()
    with pytest.warns(UserWarning, match="positions='shift', for all of 3 layers, and without"):
        found = Prefix.from_pretrained(tmp_path / "checkpoint-2")
    assert same(found, prefix)


def test_weights_that_were_pickled_or_compiled(tmp_path: Path) -> None:
    model = llama()
    prefix = Prefix.random(model, P)
    attach(model, prefix)
    state = {f"_orig_mod.{name}": x for name, x in model.state_dict().items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.warns(UserWarning, match=UNSAID):
        assert same(Prefix.from_pretrained(tmp_path), prefix)


def bart() -> Any:
    sizes = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers",)}
    sizes |= {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
    config = transformers.BartConfig(
        vocab_size=97, d_model=32, encoder_ffn_dim=40, decoder_ffn_dim=40, **sizes
    )
    return transformers.BartForConditionalGeneration(config).eval()


def test_the_prefixes_of_an_encoder_decoder(tmp_path: Path) -> None:
    model = bart()
    prefixes = EncoderDecoderPrefix.random(model, P)
    attach(model, prefixes)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=UNSAID):
        found = EncoderDecoderPrefix.from_pretrained(tmp_path)
    assert list(found.parts) == list(prefixes.parts)
    for name, prefix in prefixes.parts.items():
        assert same(found.parts[name], prefix)  # type: ignore[arg-type]
    with (
        pytest.warns(UserWarning, match=UNSAID),
        pytest.raises(ValueError, match="by EncoderDecoderPrefix.from_pretrained"),
    ):
        Prefix.from_pretrained(tmp_path)


def test_what_weights_do_not_say_enough_of_is_refused(tmp_path: Path) -> None:
    model = llama()
    handle = attach(model, PrefixBank([Prefix.random(model, P)]))
    model.save_pretrained(tmp_path / "bank")
    handle.detach()
    with pytest.raises(ValueError, match="holds a PrefixBank.*save it by PrefixBank.save_pretr"):
        Prefix.from_pretrained(tmp_path / "bank")
    attach(model, ProjectedPrefix.for_model(model, P))
    model.save_pretrained(tmp_path / "network")
    config = tmp_path / "network" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 2}))
    with pytest.raises(
        ValueError, match="the network of a ProjectedPrefix, which gives 96 numbers"
    ):
        Prefix.from_pretrained(tmp_path / "network")


SPOILT: dict[str, tuple[Callable[[State], object], str]] = {
    "a value is missing": (lambda state: state.pop("prefixattn.values.1"), "do not fit"),
    "something more": (lambda state: state.update({"prefixattn.x": torch.ones(1)}), "do not fit"),
    "another shape": (
        lambda state: state.update({"prefixattn.keys.1": torch.ones(2, 4, 8)}),
        "do not fit: .*tokens",
    ),
    "no number": (
        lambda state: state["prefixattn.keys.0"].fill_(torch.nan),
        "prefixattn.keys.0 holds NaN",
    ),
    "two models": (
        lambda state: state.update({"b.prefixattn.keys.0": torch.ones(2, P, 8)}),
        "several modules are named prefixattn",
    ),
}


@pytest.mark.parametrize("what", SPOILT)
def test_spoilt_weights_are_named(what: str, tmp_path: Path) -> None:
    spoil, message = SPOILT[what]
    model = llama()
    attach(model, Prefix.random(model, P))
    state = {name: x.clone() for name, x in model.state_dict().items()}
    spoil(state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}.*{message}"):
        Prefix.from_pretrained(tmp_path)


def test_a_model_without_a_prefix_is_none(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"prefixattn\.checkpoints\.load reads other"):
        Prefix.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="none of the formats"):
        recognise(tmp_path)
    with pytest.raises(ValueError, match="holds no prefix: none was attached"):
        load(tmp_path, "attached-model")


# Prefixes that are shared


def test_one_prefix_as_two_parts_is_refused() -> None:
    prefix = Prefix([torch.randn(4, P, 8)] * 2, [torch.randn(4, P, 8)] * 2)
    bank = PrefixBank([prefix])
    for parts in ({"encoder": prefix, "decoder": prefix}, {"decoder": bank, "cross": prefix}):
        with pytest.raises(ValueError, match="must be prefixes of their own.*copy.deepcopy"):
            EncoderDecoderPrefix(**parts)
    apart = EncoderDecoderPrefix(encoder=prefix, decoder=copy.deepcopy(prefix))
    assert list(apart.parts) == ["encoder", "decoder"]
    apart.cross = prefix  # by hand: no part is lost
    assert list(apart.parts) == ["encoder", "decoder", "cross"]


def test_a_folder_that_has_its_prefix_beside_says_where(tmp_path: Path) -> None:
    Prefix([torch.randn(4, P, 8)], [torch.randn(4, P, 8)]).save_pretrained(tmp_path / "prefix")
    with pytest.raises(FileNotFoundError, match=f"there is one in {tmp_path / 'prefix'}"):
        Prefix.from_pretrained(tmp_path)
