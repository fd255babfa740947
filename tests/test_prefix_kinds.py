"""Prefixes with gates, prefixes that are activations, and the three of an encoder-decoder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from prefixattn import prefix_attention
from prefixattn.bank import PrefixBank
from prefixattn.encoder_decoder import EncoderDecoderPrefix
from prefixattn.external import ExternalPrefix
from prefixattn.gated import GatedPrefix
from prefixattn.layers import LayerShape
from prefixattn.prefix import Prefix
from prefixattn.projected import ProjectedPrefix

P = 3
SHAPES = [LayerShape(2, 8, 8), LayerShape(1, 4, 6)]
HEADS = [4, 3]


def tensors(*rows: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return (
        [torch.randn(*rows, s.num_heads, P, s.key_dim) for s in SHAPES],
        [torch.randn(*rows, s.num_heads, P, s.value_dim) for s in SHAPES],
    )


@pytest.fixture
def llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config).eval()


# Gates


def test_gates_start_at_zero_and_train_first() -> None:
    prefix = GatedPrefix.gated(Prefix(*tensors()), HEADS)
    batch = prefix.batch()
    assert batch.gates is not None
    pair, gate = batch.pairs[0], batch.gates[0]
    assert pair is not None
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    out = prefix_attention(query, key, key, *pair, prefix_gate=gate, is_causal=True)
    alone = torch.nn.functional.scaled_dot_product_attention(
        query, key, key, is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(out, alone)
    out.square().sum().backward()
    assert prefix.gates[0].grad is not None
    assert prefix.gates[0].grad.all()
    assert not prefix.keys[0].grad.any()


def test_gates_of_some_layers(llama: Any) -> None:
    prefix = GatedPrefix.random(llama, P, layers=[0, 2], num_frozen_tokens=1)
    assert isinstance(prefix, GatedPrefix)
    assert prefix.num_heads == [4, None, 4]
    assert prefix.num_frozen_tokens == 1
    assert [gate is None for gate in prefix.batch().gates or ()] == [False, True, False]
    plain = Prefix.from_text(llama, torch.arange(P), layers=[1], dropout=0.5)
    gated = GatedPrefix.gated(plain, [4])
    assert torch.equal(gated()[0][0], plain()[0][0])
    assert (gated.layers, gated.dropout) == ([1], 0.5)
    projected = ProjectedPrefix(SHAPES, P, 4, 4)
    assert torch.equal(GatedPrefix.gated(projected, HEADS)()[1][1], projected()[1][1])


@pytest.mark.parametrize(
    ("gates", "error", "message"),
    [
        ([torch.zeros(4)], ValueError, "gates must be as many as keys, 2, got 1"),
        ([torch.zeros(3), torch.zeros(3)], ValueError, r"gates\[0\].*multiple.*2 heads, got \(3,"),
        ([torch.zeros(4), torch.zeros(())], ValueError, r"gates\[1\] must be \[H\]"),
        ([torch.zeros(4), torch.zeros(0)], ValueError, r"gates\[1\] must be \[H\]"),
        ([torch.zeros(4).long(), torch.zeros(3)], TypeError, "floating point, got torch.int64"),
    ],
)
def test_wrong_gates(gates: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GatedPrefix(*tensors(), gates)
    with pytest.raises(ValueError, match=r"num_heads must hold.*2 layers.*\[4\]"):
        GatedPrefix.gated(Prefix(*tensors()), [4])


# Activations


@pytest.mark.parametrize("rows", [(), (2,)], ids=["shared", "one for each row"])
def test_gradients_reach_what_made_them(rows: tuple[int, ...]) -> None:
    network = torch.nn.Linear(4, 2 * P * 8)
    made = network(torch.randn(*rows, 4)).view(*rows, 2, P, 8)
    prefix = ExternalPrefix([SHAPES[0]], P)
    assert not list(prefix.parameters())
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    with prefix.use([made], [2 * made]):
        pair = prefix.batch().pairs[0]
        assert pair is not None
        out = prefix_attention(query, key, key, *pair)
    for i in range(2):
        own = made[i] if rows else made
        alone = prefix_attention(query[[i]], key[[i]], key[[i]], own[None], 2 * own[None])
        torch.testing.assert_close(out[[i]], alone)
    out.sum().backward()
    assert network.weight.grad is not None
    assert network.weight.grad.any()


def test_use_nests_and_comes_back_after_an_exception() -> None:
    prefix = ExternalPrefix(SHAPES, P, layers=[0, 2], num_layers=3)
    assert prefix.layer_shapes == [SHAPES[0], None, SHAPES[1]]
    outer, inner = tensors(), tensors(4)
    with prefix.use(*outer):
        try:
            with prefix.use(*inner):
                assert prefix.batch().pairs[2][0] is inner[0][1]  # type: ignore[index]
                raise KeyError
        except KeyError:
            assert torch.equal(prefix.batch().pairs[2][0][0], outer[0][1])  # type: ignore[index]
        assert prefix.batch().pairs[1] is None
    with pytest.raises(RuntimeError, match="within `with prefix.use"):
        prefix.batch()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda k, v: k.pop(), ValueError, "keys must hold 2 tensors.*got 1"),
        (lambda k, v: v.append(v[0]), ValueError, "values must hold 2 tensors.*got 3"),
        (lambda k, v: k.__setitem__(0, k[0][:, :2]), ValueError, r"keys\[0\] must be \(2, 3, 8\)"),
        (
            lambda k, v: v.__setitem__(1, v[1][None]),
            ValueError,
            r"values\[1\].*same for all layers",
        ),
        (
            lambda k, v: v.__setitem__(0, v[0].double()),
            ValueError,
            r"values\[0\] must be torch.float",
        ),
        (
            lambda k, v: k.__setitem__(0, k[0][None, None]),
            ValueError,
            r"got \(1, 1, 2, 3, 8\)",
        ),
        (lambda k, v: k.__setitem__(0, k[0][None][:0]), ValueError, r"got \(0, 2, 3, 8\)"),
        (
            lambda k, v: k.__setitem__(0, k[0].long()),
            TypeError,
            r"keys\[0\] must be floating point",
        ),
    ],
)
def test_wrong_activations(change: Any, error: type[Exception], message: str) -> None:
    keys, values = tensors()
    change(keys, values)
    with pytest.raises(error, match=message):
        ExternalPrefix(SHAPES, P).use(keys, values)


def test_a_place_for_activations_in_a_model(llama: Any) -> None:
    prefix = ExternalPrefix.for_model(llama, P, layers=[1])
    assert prefix.layer_shapes == [None, LayerShape(2, 8, 8), None]
    assert prefix.num_tokens == P


# Encoder-decoders


@pytest.fixture(scope="module")
def bart() -> Any:
    config = transformers.BartConfig(
        vocab_size=97,
        d_model=32,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
    )
    return transformers.BartForConditionalGeneration(config).eval()


def test_parts_are_kept_together(tmp_path: Path) -> None:
    whole = EncoderDecoderPrefix(
        encoder=GatedPrefix.gated(Prefix(*tensors()), HEADS), cross=ProjectedPrefix(SHAPES, P, 4, 4)
    )
    assert list(whole.parts) == ["encoder", "cross"]
    whole.save_pretrained(tmp_path)
    EncoderDecoderPrefix(decoder=Prefix(*tensors())).save_pretrained(tmp_path / "other")
    back = EncoderDecoderPrefix.from_pretrained(tmp_path)
    mine, theirs = whole.state_dict(), back.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_part_may_be_a_bank(tmp_path: Path) -> None:
    members = [Prefix(*tensors()), Prefix(*tensors())]
    cross = Prefix(*tensors())
    EncoderDecoderPrefix(decoder=PrefixBank(members), cross=cross).save_pretrained(tmp_path)
    bank = EncoderDecoderPrefix.from_pretrained(tmp_path).parts["decoder"]
    assert isinstance(bank, PrefixBank)
    with torch.no_grad(), bank.use([1]):
        found = bank.batch().pairs[0][0][0]  # type: ignore[index]
    assert torch.equal(found, members[1]()[0][0])
    with pytest.raises(TypeError, match="cross is a ExternalPrefix, which cannot be saved"):
        EncoderDecoderPrefix(cross=ExternalPrefix(SHAPES, P)).save_pretrained(tmp_path)


def test_parts_of_an_earlier_file_do_not_come_back(tmp_path: Path) -> None:
    for part in ("encoder", "decoder"):
        EncoderDecoderPrefix(**{part: Prefix(*tensors())}).save_pretrained(tmp_path)
    assert list(EncoderDecoderPrefix.from_pretrained(tmp_path).parts) == ["decoder"]


def test_each_part_of_a_model(bart: Any) -> None:
    for part, layers in (("encoder", 2), ("decoder", 3), ("cross", 3)):
        assert Prefix.zeros(bart, P, part=part).num_layers == layers
    assert Prefix.zeros(bart, P).num_layers == 3
    ids = torch.tensor([[5, 6, 7]])
    whole = EncoderDecoderPrefix.from_text(bart, source=ids)
    assert list(whole.parts) == ["encoder", "cross"]
    seen = bart.model.encoder(ids).last_hidden_state
    attention = bart.model.decoder.layers[1].encoder_attn
    key = attention.k_proj(seen).view(3, 4, 8).transpose(0, 1)
    torch.testing.assert_close(whole.parts["cross"]()[1][0], key)


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ({}, ValueError, "encoder, decoder, cross"),
        ({"cross": torch.nn.Linear(1, 1)}, TypeError, "cross must be a Prefix, got a Linear"),
    ],
)
def test_wrong_parts(parts: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        EncoderDecoderPrefix(**parts)


@pytest.mark.parametrize("parts", [None, [], ["middle"], [["encoder"]], "encoder", ["../x"]])
def test_a_damaged_list_of_parts(parts: Any, tmp_path: Path) -> None:
    EncoderDecoderPrefix(encoder=Prefix(*tensors())).save_pretrained(tmp_path)
    file = tmp_path / "encoder_decoder_prefix.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"parts": parts}))
    with pytest.raises(ValueError, match="parts must be some of"):
        EncoderDecoderPrefix.from_pretrained(tmp_path)
