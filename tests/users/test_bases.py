"""Bases and caches of few bits: the same quantised model, with a prefix or with its text."""

import logging
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import prefixattn
from prefixattn import Prefix


def needs(module: str, package: str) -> pytest.MarkDecorator:
    found = find_spec(module.split(".")[0]) is not None and find_spec(module) is not None
    return pytest.mark.skipif(not found, reason=f"needs the package {package}")


def bitsandbytes(**options: Any) -> Callable[[], Any]:
    return lambda: transformers.BitsAndBytesConfig(**options)


def quanto(weights: str) -> Callable[[], Any]:
    return lambda: transformers.QuantoConfig(weights=weights)


def torchao(name: str, **options: str) -> Callable[[], Any]:
    def make() -> Any:
        quantization = import_module("torchao.quantization")
        dtypes = {key: getattr(torch, value) for key, value in options.items()}
        return transformers.TorchAoConfig(getattr(quantization, name)(**dtypes))

    return make


BNB = needs("bitsandbytes", "bitsandbytes")
QUANTO = needs("optimum.quanto", "optimum-quanto")
AO = needs("torchao", "torchao")
PACKED = "one forward in evaluation mode packs bitsandbytes' weights: no gradient passes them then"
BASES = {
    # Activations of 8 bits round to the other side here and there.
    "bitsandbytes, 8 bits": (bitsandbytes(load_in_8bit=True), 0.03, BNB, ()),
    "bitsandbytes, 4 bits": (
        bitsandbytes(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
        0.01,
        BNB,
        (pytest.mark.xfail(reason=PACKED),),
    ),
    "quanto, 8 bits": (quanto("int8"), 1e-5, QUANTO, ()),
    "quanto, 4 bits": (quanto("int4"), 1e-5, QUANTO, ()),
    "torchao, 8 bits": (torchao("Int8WeightOnlyConfig"), 1e-5, AO, ()),
    "torchao, 4 bits": (torchao("IntxWeightOnlyConfig", weight_dtype="int4"), 1e-5, AO, ()),
}


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(2, 300, (2, 9))


@pytest.fixture
def model(make_model: Any) -> Any:
    return make_model(hidden_size=128)  # what the libraries quantise comes in blocks of 64


def behind(model: Any, text: Tensor, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(torch.cat([text.expand(len(ids), -1), ids], dim=1)).logits
    return logits[:, text.shape[1] :]


@pytest.mark.parametrize(
    ("config", "tolerance"),
    [
        pytest.param(config, tolerance, marks=[need, *marks], id=name)
        for name, (config, tolerance, need, marks) in BASES.items()
    ],
)
def test_a_base_of_few_bits(
    model: Any,
    text: Tensor,
    ids: Tensor,
    config: Callable[[], Any],
    tolerance: float,
    tmp_path: Path,
) -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    model.save_pretrained(tmp_path)
    few = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, device_map="cpu", quantization_config=config()
    )
    expected = behind(few, text, ids)
    prefix = Prefix.from_text(few, text)
    handle = prefixattn.attach(few, prefix)
    with torch.no_grad():
        found = few(ids).logits
    few.train()
    few(ids, labels=ids).loss.backward()
    few.eval()
    handle.detach()
    with torch.no_grad():
        plain = few(ids).logits
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    assert (found - plain).abs().max() > 0.1 * expected.abs().max()
    for parameter in prefix.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0


@needs("hqq", "hqq")
def test_a_base_of_hqq(model: Any, text: Tensor, ids: Tensor) -> None:
    """transformers 5 does not load these any more: people replace the layers themselves."""
    hqq = import_module("hqq.core.quantize")
    config = hqq.BaseQuantizeConfig(nbits=4, group_size=64)
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, torch.nn.Linear):
                    few = hqq.HQQLinear(child, config, compute_dtype=torch.float32, device="cpu")
                    setattr(parent, name, few)
    expected, prefix = behind(model, text, ids), Prefix.from_text(model, text)
    prefixattn.attach(model, prefix)
    model(ids, labels=ids).loss.backward()
    with torch.no_grad():
        assert (model(ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert prefix.keys[0].grad is not None


@torch.no_grad()
def decoded(model: Any, ids: Tensor, more: Tensor, cache: Any) -> Tensor:
    """Logits of ``more``, one token after the other."""
    model(ids, past_key_values=cache)
    steps = [model(token[:, None], past_key_values=cache).logits for token in more.T]
    return torch.cat(steps, dim=1)


@pytest.mark.parametrize(
    ("backend", "bits"),
    [
        pytest.param("quanto", 4, marks=needs("optimum.quanto", "optimum-quanto")),
        pytest.param("hqq", 4, marks=needs("hqq", "hqq")),
        pytest.param("hqq", 8, marks=needs("hqq", "hqq")),
    ],
)
def test_a_cache_of_few_bits(
    model: Any, text: Tensor, ids: Tensor, backend: str, bits: int
) -> None:
    """The text in a prefix loses nothing; the rest loses what it does without one."""
    more, joined = torch.randint(2, 300, (2, 12)), torch.cat([text.expand(2, -1), ids], dim=1)

    def cache() -> Any:
        axis = {"axis_key": 0, "axis_value": 0} if backend == "quanto" else {}
        return transformers.QuantizedCache(
            backend, model.config, nbits=bits, q_group_size=32, residual_length=4, **axis
        )

    whole = transformers.DynamicCache(config=model.config)
    expected = decoded(model, joined, more, whole)
    stock = (decoded(model, joined, more, cache()) - expected).abs().max()
    prefixattn.attach(model, Prefix.from_text(model, text))
    exact = decoded(model, ids, more, transformers.DynamicCache(config=model.config))
    ours = (decoded(model, ids, more, cache()) - expected).abs().max()
    assert (exact - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert 0 < ours <= 1.5 * stock < 0.3 * expected.abs().max()
