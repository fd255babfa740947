"""A configuration names our attention to the modules of the attached model, and to nobody else."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import prefixattn
from prefixattn import EncoderDecoderPrefix, Prefix
from prefixattn.integrations.transformers import NAME, attention_forward

SIZES = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
DECODER = SIZES | {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
BART = SIZES | {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
    "projection_dim": 32,
}
LLAMA = DECODER | {"intermediate_size": 48, "num_key_value_heads": 2}
MODELS: dict[str, tuple[Any, Callable[[], Any]]] = {
    "llama": (transformers.LlamaForCausalLM, lambda: transformers.LlamaConfig(**LLAMA)),
    "bloom": (transformers.BloomForCausalLM, lambda: transformers.BloomConfig(**DECODER)),
    "falcon": (transformers.FalconForCausalLM, lambda: transformers.FalconConfig(**DECODER)),
    "gpt_neo": (
        transformers.GPTNeoForCausalLM,
        lambda: transformers.GPTNeoConfig(
            **DECODER, attention_types=[[["local", "global"], 1]], window_size=5
        ),
    ),
    "bart": (transformers.BartForConditionalGeneration, lambda: transformers.BartConfig(**BART)),
    "llava": (  # its text has a configuration inside the one of the whole
        transformers.LlavaForConditionalGeneration,
        lambda: transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**VISION),
            text_config=transformers.LlamaConfig(**LLAMA),
            image_token_index=96,
        ),
    ),
}


def _through_a_file(config: Any, folder: Path) -> Any:
    config.save_pretrained(folder)
    return type(config).from_pretrained(folder)


TAKEN: dict[str, Callable[[Any, Path], Any]] = {
    "shared": lambda config, _: config,
    "copied": lambda config, _: copy.copy(config),
    "deeply copied": lambda config, _: copy.deepcopy(config),
    "pickled": lambda config, _: pickle.loads(pickle.dumps(config)),
    "as a dict": lambda config, _: type(config).from_dict(config.to_dict()),
    "made from its class": lambda config, _: type(config)(**config.to_dict()),
    "saved": _through_a_file,
}


def build(name: str, config: Any = None) -> Any:
    kind, make = MODELS[name]
    torch.manual_seed(0)
    model = kind(make() if config is None else config).double().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1 and "position" not in key:
                parameter.mul_(8)
    return model


@torch.no_grad()
def generated(model: Any) -> Tensor:
    """``[6, 2, V]``: the logits of a greedy text, from a static cache.

    Stock Bloom's are NaN in a padded row.
    """
    ids = torch.randint(3, 95, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    out = model.generate(
        ids.masked_fill(mask == 0, 0),
        attention_mask=mask,
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        cache_implementation="static",
        disable_compile=True,
    )
    return torch.stack(out.logits).nan_to_num()


def prefix_of(model: Any) -> Prefix:
    return Prefix.random(model, 4, generator=torch.Generator().manual_seed(1)).double()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The modules that asked our attention function."""
    from transformers import AttentionInterface

    asked: list[Any] = []

    def count(module: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(module)
        return attention_forward(module, *args, **kwargs)

    functions: Any = AttentionInterface._global_mapping
    prefixattn.integrations.transformers.register()
    monkeypatch.setitem(functions, NAME, count)
    monkeypatch.setattr(prefixattn.integrations.handle, "register", lambda: None)
    return asked


@pytest.mark.parametrize("way", TAKEN)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_built_from_an_attached_models_configuration(
    name: str, way: str, attach: Any, tmp_path: Path
) -> None:
    teacher, stock = build(name), build(name)
    prefix = prefix_of(teacher)
    expected = generated(stock)
    handle = attach(teacher, prefix)
    attached = generated(teacher)
    assert not torch.equal(attached, expected)
    config = TAKEN[way](teacher.config, tmp_path)
    student = build(name, config)
    names = {m.config._attn_implementation for m in student.modules() if hasattr(m, "config")}
    assert NAME not in names
    assert torch.equal(generated(student), expected)
    assert torch.equal(generated(teacher), attached)  # which has not lost its own
    handle.detach()
    assert torch.equal(generated(teacher), expected)
    assert torch.equal(generated(student), expected)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_shared_the_configuration_before(name: str, attach: Any) -> None:
    teacher = build(name)
    student = build(name, teacher.config)
    expected = generated(student)
    handle = attach(teacher, prefix_of(teacher))
    attached = generated(teacher)
    assert torch.equal(generated(student), expected)
    other = attach(student, prefix_of(student))
    assert torch.equal(generated(student), attached)
    handle.detach()
    assert torch.equal(generated(student), attached)
    assert torch.equal(generated(teacher), expected)
    other.detach()
    assert torch.equal(generated(student), expected)


def test_a_model_built_from_an_attached_models_configuration_is_attached_to(attach: Any) -> None:
    teacher = build("llava")
    expected = generated(teacher)
    handle = attach(teacher, prefix_of(teacher))
    attached = generated(teacher)
    student = build("llava", teacher.config)
    other = attach(student, prefix_of(student))
    third = build("llava", student.config)
    assert torch.equal(generated(student), attached)
    assert torch.equal(generated(third), expected)
    handle.detach()
    assert torch.equal(generated(student), attached)
    other.detach()
    for model in (teacher, student, third):
        assert torch.equal(generated(model), expected)


def test_a_stock_model_of_the_same_configuration_gives_weights(attach: Any) -> None:
    """What our attention refuses, a model that shares a configuration does not."""
    config = transformers.LlamaConfig(**LLAMA, attn_implementation="eager")
    teacher = build("llama", config)
    attach(teacher, prefix_of(teacher))
    student = build("llama", teacher.config)
    assert student(torch.ones(1, 3, dtype=torch.long), output_attentions=True).attentions


def test_no_other_model_asks_our_attention(attach: Any, counted: list[Any]) -> None:
    teacher = build("llama")
    attach(teacher, prefix_of(teacher))
    student = build("llama", teacher.config)
    generated(student)
    assert not counted
    generated(teacher)
    assert set(counted) <= set(teacher.modules())


def test_a_part_without_a_prefix_goes_on_as_before(attach: Any, counted: list[Any]) -> None:
    """BART's encoder and decoder have one configuration; only the one with a prefix asks us."""
    model = build("bart")
    attach(model, EncoderDecoderPrefix(encoder=Prefix.random(model, 4, part="encoder").double()))
    generated(model)
    assert counted
    assert set(counted) <= set(model.model.encoder.modules())


def test_the_configuration_is_seen_as_it_is_but_for_the_name(attach: Any) -> None:
    model = build("llama")
    config = model.config
    handle = attach(model, prefix_of(model))
    seen = model.config
    assert (seen._attn_implementation, config._attn_implementation) == (NAME, "sdpa")
    assert isinstance(seen, transformers.LlamaConfig)
    assert seen == config
    assert config == seen
    assert seen.to_diff_dict() == config.to_diff_dict()
    assert repr(seen) == repr(config)
    seen.use_cache = False  # either way a change is seen by both
    assert not config.use_cache
    config.use_cache = True
    assert seen.use_cache
    assert copy.copy(seen) is not config
    assert b"prefixattn" not in pickle.dumps(seen)  # it can be read where we are not installed
    handle.detach()
    assert model.config is config
    assert seen._attn_implementation == "sdpa"  # whoever kept it
    assert all("naming" not in key for m in model.modules() for key in vars(m))


@pytest.mark.parametrize("differ", [True, False], ids=["layers differ", "layers alike"])
def test_configurations_of_single_layers_name_it_too(differ: bool, attach: Any) -> None:
    """transformers makes them by copies, within the forward of a model: masks are made by them."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    if differ:
        model.config.per_layer_config = {1: {"rms_norm_eps": 1e-3}}
    handle = attach(model, Prefix.random(model, 3))
    seen = model.config.per_layer_config
    assert len(seen) == 2
    for config in (*seen, seen[-1], *seen[:]):
        assert isinstance(config, transformers.LlamaConfig)
        assert config._attn_implementation == NAME
    assert seen[0] is model.config or differ
    plain = copy.deepcopy(model.config)
    assert [config._attn_implementation for config in plain.per_layer_config] == ["sdpa"] * 2
    handle.detach()
    assert [config._attn_implementation for config in seen] == ["sdpa"] * 2


def test_auto_classes_know_it(attach: Any) -> None:
    class OwnConfig(transformers.LlamaConfig):
        model_type = "prefixattn-own-llama"

    class OwnModel(transformers.LlamaForCausalLM):
        config_class = OwnConfig

    transformers.AutoConfig.register(OwnConfig.model_type, OwnConfig, exist_ok=True)
    transformers.AutoModelForCausalLM.register(OwnConfig, OwnModel, exist_ok=True)
    model = OwnModel(OwnConfig(**LLAMA)).double()
    attach(model, prefix_of(model))
    made = transformers.AutoModelForCausalLM.from_config(model.config)
    assert type(made) is OwnModel
    assert made.config._attn_implementation == "sdpa"


def test_copies_and_pickles_of_the_model_have_their_own(attach: Any) -> None:
    model = build("llava")
    plain = generated(model)
    attach(model, prefix_of(model))
    expected = generated(model)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(generated(made), expected)
        inner = made.model.language_model
        assert inner.config is made.config.text_config
        assert inner.config is not model.model.language_model.config
        prefixattn.detach(made)
        assert torch.equal(generated(made), plain)
        assert torch.equal(generated(model), expected)


def test_a_configuration_put_in_its_place(attach: Any) -> None:
    model = build("llama")
    handle = attach(model, prefix_of(model))
    expected = generated(model)
    model.config = model.config
    model.config = config = copy.deepcopy(model.config)
    assert torch.equal(generated(model), expected)
    handle.detach()
    assert model.config is config


def test_a_layer_made_from_it_by_itself_is_refused(attach: Any) -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    model = build("llama")
    attach(model, prefix_of(model))
    hidden = torch.randn(1, 3, 32)
    rope = model.model.rotary_emb(hidden, torch.arange(3)[None])
    layer = LlamaDecoderLayer(model.config, 0)
    with pytest.raises(NotImplementedError, match=r"LlamaAttention.*copy\.deepcopy"):
        layer(hidden, position_embeddings=rope)
    LlamaDecoderLayer(copy.deepcopy(model.config), 0)(hidden, position_embeddings=rope)


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_a_module_made_from_the_class_of_an_attached_one(name: str, attach: Any) -> None:
    model = build(name)
    classes = [type(module) for module in model.modules()]
    handle = attach(model, prefix_of(model))
    attention = next(m for m in model.modules() if type(m).__name__.endswith("Attention"))
    made = type(attention)(copy.deepcopy(model.config), 0)
    assert type(made) in classes
    assert type(model)(copy.deepcopy(model.config)).config._attn_implementation != NAME
    handle.detach()
    assert [type(module) for module in model.modules()] == classes


def test_a_user_who_sets_the_shared_configuration(attach: Any) -> None:
    """It is theirs: the model keeps its prefix meanwhile, and has that name once it is detached."""
    model = build("llama")
    config = model.config
    handle = attach(model, prefix_of(model))
    expected = generated(model)
    config._attn_implementation = "eager"
    assert torch.equal(generated(model), expected)
    handle.detach()
    assert model.config._attn_implementation == "eager"
    handle = attach(model, prefix_of(model))
    model.set_attn_implementation("sdpa")  # of the attached model itself
    with pytest.raises(RuntimeError, match="'sdpa'"):
        generated(model)
    model.set_attn_implementation(NAME)
    assert torch.equal(generated(model), expected)
    handle.detach()
    assert model.config._attn_implementation == "sdpa"
