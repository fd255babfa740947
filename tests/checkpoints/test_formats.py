"""Every format: what goes out comes back, what would be lost is refused, what is bad is named."""

import copy
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from prefixattn import EncoderDecoderPrefix, GatedPrefix, Prefix, ProjectedPrefix, attach, cli
from prefixattn.checkpoints import FORMATS, convert, load, recognise, save

P, LAYERS = 5, 3
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
}
WRITTEN = [name for name, found in FORMATS.items() if found.save is not None]


def built(config: Any, auto: Any = transformers.AutoModelForCausalLM) -> Any:
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model


def llama(heads: int = 2) -> Any:
    return built(transformers.LlamaConfig(**SIZES, num_key_value_heads=heads))


def bart(decoder_layers: int) -> Any:
    config = transformers.BartConfig(
        vocab_size=97,
        d_model=32,
        encoder_layers=3,
        decoder_layers=decoder_layers,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
    )
    return built(config, transformers.AutoModelForSeq2SeqLM)


def plain(frozen: int = 0, heads: int = 4) -> Prefix:
    generator = torch.Generator().manual_seed(0)
    pairs = [[torch.randn(heads, P, 8, generator=generator) for _ in range(2)] for _ in range(3)]
    return Prefix(*zip(*pairs, strict=True), num_frozen_tokens=frozen)


def place(folder: Path, name: str) -> Path:
    return folder / ("prefix.pt" if name == "cartridge" else name)


@pytest.mark.parametrize("name", WRITTEN)
def test_bits_survive(tmp_path: Path, name: str) -> None:
    prefix, path = plain(), place(tmp_path, name)
    if name == "adapterhub":
        prefix.positions = "keep"
    save(prefix, path, name)
    assert recognise(path) == name
    back = load(path, model=llama(4))
    assert isinstance(back, Prefix)
    assert back.positions == prefix.positions
    for one, other in zip(back(), prefix(), strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


@pytest.mark.parametrize("name", ["cartridge", "peft-cartridge", "prefixattn"])
def test_frozen_tokens_stay_frozen(tmp_path: Path, name: str) -> None:
    path = place(tmp_path, name)
    save(plain(frozen=2), path, name)
    back = load(path)
    assert isinstance(back, Prefix)
    assert back.num_frozen_tokens == 2
    assert torch.equal(back()[0][0], plain()()[0][0])


@torch.no_grad()
def test_peft_reads_our_cartridge(tmp_path: Path) -> None:
    model, ids = llama(), torch.randint(2, 90, (2, 7))
    prefix = plain(frozen=1, heads=2)
    save(prefix, tmp_path, "peft-cartridge", model)
    stock = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    assert stock.prompt_encoder["default"].num_frozen_tokens == 1
    attach(model, prefix)
    expected = stock(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("layers", [2, 3])
def test_peft_and_a_decoder(tmp_path: Path, layers: int) -> None:
    """PEFT reads number 2 i mod L for layer i: its own files come in so, ours go out so."""
    model, ids = bart(layers), torch.randint(2, 90, (2, 7))
    inputs = {"input_ids": ids, "decoder_input_ids": ids.flip(1)[:, :4]}
    config = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P)
    stock = peft.get_peft_model(copy.deepcopy(model), config).eval()
    stock.save_pretrained(tmp_path / "theirs")
    mine = copy.deepcopy(model)
    attach(mine, load(tmp_path / "theirs", model=model))
    expected = stock(**inputs).logits
    torch.testing.assert_close(mine(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    assert (model(**inputs).logits - expected).abs().max() > 0.1

    prefix = Prefix.random(model, P)
    save(prefix, tmp_path / "ours", "peft", model)
    stock = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    attach(model, prefix)
    expected = stock(**inputs).logits
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_llama_adapter(tmp_path: Path, family: str) -> None:
    kind = {"llama": transformers.LlamaConfig, "mistral": transformers.MistralConfig}[family]
    model = built(kind(**SIZES, num_key_value_heads=2))
    config = peft.AdaptionPromptConfig(adapter_len=P, adapter_layers=2, task_type="CAUSAL_LM")
    stock = peft.get_peft_model(copy.deepcopy(model), config).eval()
    for name, parameter in stock.named_parameters():
        if "adaption_gate" in name:
            parameter.fill_(0.7)
    stock.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model must be given"):
        load(tmp_path)
    prefix = load(tmp_path, model=model)
    assert isinstance(prefix, GatedPrefix)
    assert prefix.layers == [1, 2]
    ids = torch.randint(2, 90, (2, 7))
    before = model(input_ids=ids).logits
    attach(model, prefix)
    expected = stock(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert (before - expected).abs().max() > 0.1


def test_llama_adapter_of_gpt2_is_refused(tmp_path: Path) -> None:
    model = built(transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4))
    config = peft.AdaptionPromptConfig(adapter_len=P, adapter_layers=2, task_type="CAUSAL_LM")
    peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match="behind the output projection"):
        load(tmp_path, model=model)


def test_ptuning_v2s_network_is_folded_in(tmp_path: Path) -> None:
    """As its authors' code computes it: embedding, linear, tanh, linear; then [P, 2 L, H, D]."""
    generator = torch.Generator().manual_seed(0)
    names = {"trans.0.weight": (12, 32), "trans.0.bias": (12,), "trans.2.weight": (192, 12)}
    shapes = {"embedding.weight": (P, 32), **names, "trans.2.bias": (192,)}
    state = {f"prefix_encoder.{k}": torch.randn(v, generator=generator) for k, v in shapes.items()}
    state |= {"classifier.weight": torch.zeros(3, 32), "bert.pooler.bias": torch.zeros(32)}
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    torch.save(state, tmp_path / "pytorch_model.bin")
    prefix = load(tmp_path)
    x = state["prefix_encoder.embedding.weight"] @ state["prefix_encoder.trans.0.weight"].T
    x = torch.tanh(x + state["prefix_encoder.trans.0.bias"])
    x = x @ state["prefix_encoder.trans.2.weight"].T + state["prefix_encoder.trans.2.bias"]
    past = x.view(1, P, 6, 4, 8).permute(2, 0, 3, 1, 4).split(2)
    for (key, value), layer in zip(prefix(), past, strict=True):
        torch.testing.assert_close(key, layer[0][0])
        torch.testing.assert_close(value, layer[1][0])


def test_a_cartridge_of_an_early_version(tmp_path: Path) -> None:
    file = tmp_path / "cache.pt"
    save(plain(frozen=1), file, "cartridge")
    content = torch.load(file, weights_only=False)
    content["fixed_keys"] = content.pop("frozen_keys")
    content["fixed_values"] = content.pop("frozen_values")
    torch.save(content, file)
    back = load(file)
    assert isinstance(back, Prefix)
    assert back.num_frozen_tokens == 1


@torch.no_grad()
def test_adapterhubs_network_and_its_copies(tmp_path: Path) -> None:
    """The state of `adapters` 1.2: a network for each part, again below each layer's pool."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"wte.weight": (P, 32), "control_trans.0.weight": (12, 32)}
    shapes |= {"control_trans.0.bias": (12,), "control_trans.2.weight": (192, 12)}
    shapes["control_trans.2.bias"] = (192,)
    own = {k: torch.randn(v, generator=generator) for k, v in shapes.items()}
    head = "prefix_tuning.prefix_tunings.a.self_prefix."
    pool = "prefix_tuning.pool.prefix_tunings.a.self_prefix."
    state = {f"model.{head}{k}": v for k, v in own.items()}
    state |= {f"model.layers.0.self_attn.{pool}{k}": v * 9 for k, v in own.items()}
    torch.save(state, tmp_path / "pytorch_adapter.bin")
    config = {"architecture": "prefix_tuning", "prefix_length": P, "non_linearity": "tanh"}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"config": config}))
    prefix = load(tmp_path, model=llama(4))
    hidden = torch.tanh(
        own["wte.weight"] @ own["control_trans.0.weight"].T + own["control_trans.0.bias"]
    )
    flat = hidden @ own["control_trans.2.weight"].T + own["control_trans.2.bias"]
    expected = flat.view(P, 6, 4, 8)
    assert isinstance(prefix, Prefix)
    assert prefix.positions == "keep"
    torch.testing.assert_close(prefix()[1][0], expected[:, 2].transpose(0, 1))
    torch.testing.assert_close(prefix()[1][1], expected[:, 3].transpose(0, 1))


def kept() -> Prefix:
    prefix = plain()
    prefix.positions = "keep"
    return prefix


LOST: dict[str, tuple[Callable[[], Any], str, set[str]]] = {
    "gates": (
        lambda: GatedPrefix.gated(plain(), [4] * LAYERS),
        "gates",
        {"peft", "peft-cartridge", "cartridge", "ptuning-v2"},
    ),
    "positions": (kept, "positions", {"peft", "peft-cartridge", "cartridge", "ptuning-v2"}),
    "shifted positions": (plain, "positions", {"adapterhub"}),
    "frozen tokens": (lambda: plain(frozen=1), "frozen", {"peft", "ptuning-v2"}),
    "some layers": (
        lambda: Prefix(*zip(*plain()()[:2], strict=True), layers=[0, 2], num_layers=3),
        "layer",
        {"peft", "peft-cartridge", "cartridge", "ptuning-v2"},
    ),
    "a projection": (
        lambda: ProjectedPrefix.for_model(llama(4), P, hidden_dim=8),
        "network",
        {"peft", "peft-cartridge", "cartridge", "ptuning-v2", "adapterhub"},
    ),
    "dropout": (
        lambda: Prefix(*zip(*plain()(), strict=True), dropout=0.5),
        "dropout",
        {"peft", "peft-cartridge", "cartridge", "ptuning-v2", "adapterhub"},
    ),
    "three parts": (
        lambda: EncoderDecoderPrefix(encoder=plain(), decoder=plain()),
        "encoder",
        {"peft", "peft-cartridge", "cartridge", "ptuning-v2", "adapterhub"},
    ),
}


@pytest.mark.parametrize("what", LOST)
def test_what_would_be_lost_is_refused(tmp_path: Path, what: str) -> None:
    make, message, refusing = LOST[what]
    prefix = make()
    for name in refusing:
        with pytest.raises(ValueError, match=message):
            save(prefix, place(tmp_path, name), name)
    assert not list(tmp_path.iterdir())
    save(prefix, tmp_path / "ours")
    back = load(tmp_path / "ours")
    assert type(back) is type(prefix)
    if isinstance(prefix, Prefix):
        assert back.positions == prefix.positions


# Converting


def test_convert_on_the_command_line(tmp_path: Path) -> None:
    save(plain(), tmp_path / "a", "peft")
    run = CliRunner()
    arguments = ["convert", str(tmp_path / "a"), str(tmp_path / "b.pt"), "--to", "cartridge"]
    result = run.invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert recognise(tmp_path / "b.pt") == "cartridge"
    again = run.invoke(cli.app, arguments)
    assert again.exit_code == 1
    assert "exists already" in again.output
    assert run.invoke(cli.app, [*arguments, "--overwrite"]).exit_code == 0
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a", "b.pt"]


def test_what_is_there_stays_where_converting_fails(tmp_path: Path) -> None:
    save(plain(frozen=1), tmp_path / "a")
    save(plain(), tmp_path / "b", "peft")
    before = {x.name: x.read_bytes() for x in (tmp_path / "b").iterdir()}
    with pytest.raises(ValueError, match="frozen"):
        convert(tmp_path / "a", tmp_path / "b", "peft", overwrite=True)
    assert {x.name: x.read_bytes() for x in (tmp_path / "b").iterdir()} == before
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a", "b"]


def test_only_a_prefix_is_overwritten(tmp_path: Path) -> None:
    save(plain(), tmp_path / "a", "peft")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"more than a prefix: \['thesis.tex'\]"):
        convert(tmp_path / "a", tmp_path / "mine", "prefixattn", overwrite=True)
    with pytest.raises(FileExistsError, match="which is read"):
        convert(tmp_path / "a", tmp_path, "prefixattn", overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"
    convert(tmp_path / "a", tmp_path / "b", "prefixattn")
    convert(tmp_path / "a", tmp_path / "b", "ptuning-v2", overwrite=True)
    assert recognise(tmp_path / "b") == "ptuning-v2"


@pytest.mark.parametrize("name", ["peft", "peft-cartridge", "ptuning-v2", "adapterhub"])
def test_digits_are_not_lost(tmp_path: Path, name: str) -> None:
    prefix = kept() if name == "adapterhub" else plain()
    prefix.double()
    save(prefix, tmp_path / "whole", name)  # float32 holds these numbers
    with torch.no_grad():
        prefix.keys[0].add_(1e-12)
    with pytest.raises(ValueError, match="lose digits"):
        save(prefix, tmp_path / "lost", name)
    assert not (tmp_path / "lost").exists()


@torch.no_grad()
def test_positions_are_moved_on_the_way(tmp_path: Path) -> None:
    """From AdapterHub to PEFT: the same logits, up to the rounding of a rotation."""
    model, ids = llama(4), torch.randint(2, 90, (2, 7))
    save(kept(), tmp_path / "hub", "adapterhub")
    convert(tmp_path / "hub", tmp_path / "peft", "peft", model=model, positions="shift")
    one, other = copy.deepcopy(model), copy.deepcopy(model)
    attach(one, load(tmp_path / "hub", model=model))
    attach(other, load(tmp_path / "peft"))
    torch.testing.assert_close(
        one(input_ids=ids).logits, other(input_ids=ids).logits, rtol=1e-3, atol=1e-3
    )


# Bad files


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.file, "w")


def hostile(path: Path, content: object) -> None:
    """A file as torch.save writes it, with any content."""
    torch.save(content, path)


def compressed(path: Path) -> None:
    """The same records, compressed: a kilobyte may become gigabytes."""
    whole = io.BytesIO(path.read_bytes())
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))


def huge() -> torch.Tensor:
    return torch.zeros(1).expand(1, 4, 10**9, 8)


def cartridge(path: Path, **changes: Any) -> None:
    content: dict[str, Any] = {
        f"trainable_{half}": nn.ParameterList([nn.Parameter(torch.zeros(1, 4, P, 8))] * 2)
        for half in ("keys", "values")
    }
    hostile(path, content | {"frozen_keys": [], "frozen_values": []} | changes)


def endless() -> list[Any]:
    """A list that holds itself."""
    found: list[Any] = []
    found.append(found)
    return found


BAD_CARTRIDGES: dict[str, Callable[[Path], None]] = {
    "no pickle": lambda path: path.write_text("text") and None,
    "empty": lambda path: path.write_bytes(b"") and None,
    "truncated": lambda path: (cartridge(path), path.write_bytes(path.read_bytes()[:-40]))[0],
    "compressed": lambda path: (cartridge(path), compressed(path))[0],
    "code": lambda path: hostile(path, {"trainable_keys": Bomb(str(path) + ".ran")}),
    "a bare pickle with code": lambda path: (
        path.write_bytes(pickle.dumps(Bomb(str(path) + ".ran"))) and None
    ),
    "a list": lambda path: hostile(path, [torch.zeros(1)]),
    "no keys": lambda path: hostile(path, {}),
    "numbers": lambda path: cartridge(path, trainable_keys=[1, 2]),
    "NaN": lambda path: cartridge(path, trainable_keys=[torch.full((1, 4, P, 8), torch.nan)] * 2),
    "integers": lambda path: cartridge(path, trainable_keys=[torch.zeros(1, 4, P, 8).int()] * 2),
    "three dimensions": lambda path: cartridge(path, trainable_keys=[torch.zeros(4, P, 8)] * 2),
    "another length": lambda path: cartridge(path, trainable_keys=[torch.zeros(1, 4, 2, 8)] * 2),
    "fewer layers": lambda path: cartridge(path, trainable_values=[torch.zeros(1, 4, P, 8)]),
    "more than its numbers": lambda path: cartridge(path, trainable_keys=[huge(), huge()]),
    "a list of itself": lambda path: cartridge(path, trainable_keys=endless()),
    "no numbers": lambda path: cartridge(
        path, trainable_keys=[torch.empty(1, 4, P, 8, device="meta")] * 2
    ),
    "sparse": lambda path: cartridge(path, trainable_keys=[torch.zeros(1, 4, P, 8).to_sparse()]),
    "eight bits": lambda path: cartridge(
        path, trainable_keys=[torch.zeros(1, 4, P, 8).to(torch.float8_e4m3fn)] * 2
    ),
    "a million layers": lambda path: cartridge(path, trainable_keys=[torch.zeros(1)] * 1_000_000),
    "all frozen": lambda path: cartridge(path, trainable_keys=[], trainable_values=[]),
}


@pytest.mark.parametrize("what", BAD_CARTRIDGES)
def test_a_bad_cartridge_is_named(tmp_path: Path, what: str) -> None:
    file = tmp_path / "bad.pt"
    BAD_CARTRIDGES[what](file)
    with pytest.raises(ValueError, match=r"bad\.pt"):
        load(file)
    assert [x.name for x in tmp_path.iterdir()] == ["bad.pt"]  # and nothing ran


CONFIGS = {
    "prefixattn": "prefix_config.json",
    "peft": "adapter_config.json",
    "adapterhub": "adapter_config.json",
    "ptuning-v2": "config.json",
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        "[" * 100_000,
        '{"a": ' + "9" * 5000 + "}",
        '{"num_layers": 1e400}',
        "\\udcff",
    ],
    ids=["empty", "a list", "cut", "deep", "a long number", "infinity", "no text"],
)
def test_a_bad_configuration_is_named(tmp_path: Path, name: str, text: str) -> None:
    prefix = kept() if name == "adapterhub" else plain()
    save(prefix, tmp_path, name)
    (tmp_path / CONFIGS[name]).write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match=CONFIGS[name].replace(".", r"\.")):
        load(tmp_path, name, llama(4))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("number", [10**12, -1, 0, True, "3", None])
def test_absurd_sizes_are_refused(tmp_path: Path, name: str, number: object) -> None:
    prefix = kept() if name == "adapterhub" else plain()
    save(prefix, tmp_path, name)
    file = tmp_path / CONFIGS[name]
    content = json.loads(file.read_text())
    for names in ("num_layers", "num_hidden_layers", "num_virtual_tokens", "num_tokens"):
        if names in content:
            content[names] = number
    if name == "adapterhub":
        content["config"]["prefix_length"] = number
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=str(tmp_path)):
        load(tmp_path, name, llama(4))


@pytest.mark.parametrize("name", ["prefixattn", "peft", "ptuning-v2"])
@pytest.mark.parametrize("damage", ["cut", "a header of 2 ** 60 bytes", "missing", "a folder"])
def test_bad_safetensors_are_named(tmp_path: Path, name: str, damage: str) -> None:
    save(plain(), tmp_path, name)
    file = next(tmp_path.glob("*.safetensors"))
    content = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(content[:-7])
    elif damage == "a folder":
        file.mkdir()
    elif damage != "missing":
        file.write_bytes((2**60).to_bytes(8, "little") + content[8:])
    expected = ValueError if damage in ("cut", "a header of 2 ** 60 bytes") else FileNotFoundError
    with pytest.raises(expected, match=file.name.replace(".", r"\.")):
        load(tmp_path, name)


def test_other_tensors_in_a_file_are_named(tmp_path: Path) -> None:
    save(plain(), tmp_path, "peft")
    save_file({"lora": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="prompt_embeddings"):
        load(tmp_path)


def test_what_is_unknown_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="none of the formats prefixattn, peft"):
        load(tmp_path)
    with pytest.raises(ValueError, match="format must be one of prefixattn"):
        save(plain(), tmp_path, "gguf")
    with pytest.raises(ValueError, match="can be read, but not written"):
        save(plain(), tmp_path, "adaption-prompt")


def test_a_cartridge_that_nothing_would_recognise(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in \.pt or \.torch, got cartridge$"):
        save(plain(), tmp_path / "cartridge", "cartridge")
    assert not list(tmp_path.iterdir())


def test_ptuning_v2_for_a_model_of_fewer_key_heads(tmp_path: Path) -> None:
    grouped = llama(2)
    with pytest.raises(ValueError, match="4 heads and 32 numbers for Llama.*has 2 heads and 16"):
        save(Prefix.zeros(grouped, P), tmp_path / "grouped", "ptuning-v2", grouped)
    assert not list(tmp_path.iterdir())
    every = llama(4)
    save(Prefix.zeros(every, P), tmp_path / "every", "ptuning-v2", every)
    assert recognise(tmp_path / "every") == "ptuning-v2"


def test_another_formats_folder_says_who_reads_it(tmp_path: Path) -> None:
    save(plain(), tmp_path, "peft")
    with pytest.raises(FileNotFoundError, match=r"prefixattn\.checkpoints\.load reads other"):
        Prefix.from_pretrained(tmp_path)
