"""Modules replaced, resized, added or taken out of a model that has a prefix: followed or refused.

What is followed says what a model that was changed first, and attached to then, says.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import prefixattn
from prefixattn import EncoderDecoderPrefix, Prefix

SINES, SINED = "embed_positions", ("gptj", "codegen")
SIZES = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 96}
HEADS = SIZES | {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GPT2 = SIZES | {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
SEQ2SEQ = SIZES | {
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
}
T5 = SIZES | {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 3}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**HEADS, intermediate_size=48, num_key_value_heads=2),
    "gpt2": lambda: transformers.GPT2Config(**GPT2),
    "gptj": lambda: transformers.GPTJConfig(**GPT2, rotary_dim=4),
    "codegen": lambda: transformers.CodeGenConfig(**GPT2, rotary_dim=4),
    "opt": lambda: transformers.OPTConfig(**HEADS, ffn_dim=48, word_embed_proj_dim=32),
    "stablelm": lambda: transformers.StableLmConfig(  # its layers relay the prefix
        **HEADS, intermediate_size=48, num_key_value_heads=2
    ),
    "bloom": lambda: transformers.BloomConfig(
        **SIZES, hidden_size=32, n_layer=3, n_head=4, tie_word_embeddings=False
    ),
    "roberta": lambda: transformers.RobertaConfig(**HEADS, intermediate_size=48),
    "bart": lambda: transformers.BartConfig(**SEQ2SEQ),
    "pegasus": lambda: transformers.PegasusConfig(**SEQ2SEQ),
    "t5": lambda: transformers.T5Config(**T5, decoder_start_token_id=0),
}
KINDS = {
    "roberta": transformers.AutoModelForMaskedLM,
    "bart": transformers.AutoModelForSeq2SeqLM,
    "pegasus": transformers.AutoModelForSeq2SeqLM,
    "t5": transformers.AutoModelForSeq2SeqLM,
}


def loud(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "position" not in name and "wpe" not in name:
                parameter.mul_(8)
    return model.double().eval()


def build(name: str) -> Any:
    torch.manual_seed(0)
    config = CONFIGS[name]()
    for key in [key for key in vars(config) if "drop" in key and "classifier" not in key]:
        setattr(config, key, 0.0)
    config.use_cache = False  # layers that are added or moved share its places
    kind: Any = KINDS.get(name, transformers.AutoModelForCausalLM)
    return loud(kind.from_config(config))


def inputs_of(model: Any, length: int = 9) -> dict[str, Tensor]:
    ids = torch.randint(3, 95, (2, length), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    return inputs


@torch.no_grad()
def says(model: Any, length: int = 9) -> Tensor:
    logits: Tensor = model(**inputs_of(model, length)).logits
    return logits


def prefix_of(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    if not model.config.is_encoder_decoder:
        return Prefix.random(model, 4, generator=generator).double()
    return EncoderDecoderPrefix(
        **{
            part: Prefix.random(model, 4, part=part, generator=generator).double()
            for part in ("encoder", "decoder", "cross")
        }
    )


def longer(table: Any, length: int) -> Any:
    """Another table of positions, that begins as this one does."""
    torch.manual_seed(3)
    offset = getattr(table, "offset", 0)
    args = (length, table.embedding_dim)
    made = type(table)(*args) if offset else nn.Embedding(*args, padding_idx=table.padding_idx)
    made = made.double()
    with torch.no_grad():
        made.weight.normal_()
        made.weight[: len(table.weight)] = table.weight
    return made


def _bart_tables(model: Any) -> None:
    for stack in (model.model.encoder, model.model.decoder):
        stack.embed_positions = longer(stack.embed_positions, 128)


def _bart_weights(model: Any) -> None:
    for stack in (model.model.encoder, model.model.decoder):
        stack.embed_positions.weight = longer(stack.embed_positions, 128).weight


def _gpt2_table(model: Any) -> None:
    model.transformer.wpe = longer(model.transformer.wpe, 128)


def _opt_table(model: Any) -> None:
    stack = model.model.decoder
    stack.embed_positions = longer(stack.embed_positions, 128)


def _roberta_table(model: Any) -> None:
    embeddings = model.roberta.embeddings
    embeddings.position_embeddings = longer(embeddings.position_embeddings, 128)
    embeddings.register_buffer("position_ids", torch.arange(128)[None])
    embeddings.register_buffer("token_type_ids", torch.zeros(1, 128, dtype=torch.long))


def _turning(model: Any) -> list[nn.Module]:
    """The modules with sines: the attentions, and from transformers 5.24 on a rotary embedding."""
    found = [m for m in model.modules() if isinstance(vars(m)["_buffers"].get(SINES), Tensor)]
    assert found
    return found


def _sines(model: Any, places: int = 128, slower: float = 1.0) -> Tensor:
    """``[places, 4]``, as GPT-J and CodeGen make them, or of other frequencies."""
    frequency = 1e4 ** -(torch.arange(0, 4, 2) / 4) / slower
    turned = torch.arange(places)[:, None] * frequency
    return torch.cat([turned.sin(), turned.cos()], 1).to(getattr(_turning(model)[0], SINES).dtype)


def _longer_sines(model: Any) -> None:
    for module in _turning(model):
        setattr(module, SINES, _sines(model))


def _slower_sines(model: Any) -> None:
    for module in _turning(model):
        setattr(module, SINES, _sines(model, slower=4.0))


def _tokens(model: Any) -> None:
    torch.manual_seed(3)
    model.resize_token_embeddings(128, mean_resizing=False)


def _same_rotary(model: Any) -> None:
    model.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)


class Around(nn.Module):
    """Something that is put around a module, as compilers and checkpoints are."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def _layers_of(model: Any) -> nn.ModuleList:
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 3)


def _wrapped_layers(model: Any) -> None:
    layers = _layers_of(model)
    for place, layer in enumerate(layers):
        layers[place] = Around(layer)


def _wrapped_stack(model: Any) -> None:
    model.model = Around(model.model)


FOLLOWED: dict[str, tuple[str, Callable[[Any], None], int]] = {
    # What was changed, and the length of a text that needs it.
    "bart, a table by assignment": ("bart", _bart_tables, 80),
    "bart, a table's weight by assignment": ("bart", _bart_weights, 80),
    "pegasus, resize_position_embeddings": (
        "pegasus",
        lambda m: m.resize_position_embeddings(128),
        80,
    ),
    "gpt2, a table by assignment": ("gpt2", _gpt2_table, 80),
    "opt, a table by assignment": ("opt", _opt_table, 80),
    "roberta, a table by assignment": ("roberta", _roberta_table, 80),
    "gptj, longer sines": ("gptj", _longer_sines, 80),
    "codegen, longer sines": ("codegen", _longer_sines, 80),
    "llama, resize_token_embeddings": ("llama", _tokens, 9),
    "bart, resize_token_embeddings": ("bart", _tokens, 9),
    "t5, resize_token_embeddings": ("t5", _tokens, 9),
    "llama, the same rotary embedding": ("llama", _same_rotary, 9),
    "llama, something around its layers": ("llama", _wrapped_layers, 9),
    "stablelm, something around its layers": ("stablelm", _wrapped_layers, 9),
    "llama, something around the stack": ("llama", _wrapped_stack, 9),
}


@pytest.mark.parametrize("case", FOLLOWED)
def test_followed(case: str, attach: Any) -> None:
    name, change, length = FOLLOWED[case]
    model, other = build(name), build(name)
    prefix = prefix_of(model)
    handle = attach(model, prefix)
    before = says(model)
    change(model)
    found = says(model), says(model, length)
    handle.detach()
    plain = says(model, length)
    change(other)
    torch.testing.assert_close(plain, says(other, length), rtol=0, atol=0)
    if "around the stack" not in case:  # attach needs a transformers model there
        attach(other, prefix)
        torch.testing.assert_close(found[0], says(other), rtol=0, atol=0)
        torch.testing.assert_close(found[1], says(other, length), rtol=0, atol=0)
    vocabulary = before.shape[-1]
    torch.testing.assert_close(found[0][..., :vocabulary], before)
    assert (found[1] - plain).abs().max() > 1e-3  # the prefix is there


@pytest.mark.parametrize("name", ["bart", "pegasus"])
def test_a_shorter_table_is_followed_too(name: str, attach: Any) -> None:
    model = build(name)
    attach(model, prefix_of(model))
    says(model, 20)
    for stack in (model.model.encoder, model.model.decoder):
        short = copy.deepcopy(stack.embed_positions)
        short.weight = nn.Parameter(short.weight[:20].detach())
        stack.embed_positions = short
    says(model, 9)
    with pytest.raises(ValueError, match="knows positions up to"):
        says(model, 17)


@pytest.mark.parametrize("name", SINED)
def test_sines_that_were_in_half_precision_are_no_others(name: str, attach: Any) -> None:
    model = build(name)
    attach(model, prefix_of(model))
    before = says(model)
    for module in _turning(model):
        table = getattr(module, SINES)
        setattr(module, SINES, table.bfloat16().to(table.dtype))
    assert 0 < (says(model) - before).abs().max() < 0.01 * before.abs().max()


@pytest.mark.parametrize("name", SINED)
def test_another_module_with_the_sines(name: str, attach: Any) -> None:
    model = build(name)
    owner, *more = _turning(model)
    if more:
        pytest.skip("before transformers 5.24 the sines are in the attentions, which must stay")
    attach(model, prefix_of(model))
    before = says(model)
    parent, _, key = _path(model, owner).rpartition(".")

    def put(sines: Tensor) -> None:
        made = copy.deepcopy(owner)
        setattr(made, SINES, sines)
        setattr(model.get_submodule(parent), key, made)

    put(_sines(model))
    torch.testing.assert_close(says(model), before)
    says(model, 80)
    put(_sines(model, slower=4.0))
    with pytest.raises(RuntimeError, match="was replaced by one of other frequencies"):
        says(model)


def test_another_table_of_relative_biases(attach: Any) -> None:
    model, other = build("t5"), build("t5")
    prefix = prefix_of(model)
    attach(model, prefix)
    before = says(model)
    for changed in (model, other):
        torch.manual_seed(3)
        for stack in (changed.encoder, changed.decoder):
            attention = stack.block[0].layer[0].SelfAttention
            attention.relative_attention_bias = nn.Embedding(32, 4).double()
    found = says(model)
    attach(other, prefix)
    assert torch.equal(found, says(other))
    assert (found - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
    ids=["LoRA on the embeddings", "the embeddings saved"],
)
def test_what_peft_puts_around_the_embeddings(settings: dict[str, Any], attach: Any) -> None:
    import peft

    model = build("llama")
    attach(model, prefix_of(model))
    before = says(model)
    peft.get_peft_model(model, peft.LoraConfig(**settings)).double()
    torch.testing.assert_close(says(model), before)
    assert model.get_input_embeddings()._forward_hooks  # for reentrant checkpointing


def test_reentrant_checkpointing_finds_the_new_embeddings(attach: Any) -> None:
    model = build("llama")
    model.requires_grad_(False)
    prefix = prefix_of(model)
    attach(model, prefix)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.train()
    _tokens(model)
    model.requires_grad_(False)
    prefix.requires_grad_(True)
    model(**inputs_of(model), use_cache=False).logits.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in prefix.parameters())


def _new_layer(model: Any) -> nn.Module:
    layer = _layers_of(model)[0]
    return copy.deepcopy(build(model.config.model_type)).get_submodule(_path(model, layer))


def _path(model: Any, module: nn.Module) -> str:
    return next(name for name, found in model.named_modules() if found is module)


def _replace_layer(model: Any) -> None:
    _layers_of(model)[1] = _new_layer(model)


def _replace_attention(model: Any) -> None:
    new = _new_layer(model)
    for name in dict(_layers_of(model)[1].named_children()):
        if "attn" in name or "attention" in name:
            setattr(_layers_of(model)[1], name, getattr(new, name))
            return
    raise AssertionError("no attention")


def _add_layer(model: Any) -> None:
    _layers_of(model).append(_new_layer(model))


def _repeat_layer(model: Any) -> None:
    layers = _layers_of(model)
    layers.append(layers[0])


def _cut_layers(model: Any) -> None:
    layers = _layers_of(model)
    parent, _, key = _path(model, layers).rpartition(".")
    setattr(model.get_submodule(parent), key, layers[:2])


def _drop_layer(model: Any) -> None:
    del _layers_of(model)[1]


def _swap_layers(model: Any) -> None:
    layers = _layers_of(model)
    layers[0], layers[2] = layers[2], layers[0]


def _name_fewer(model: Any) -> None:
    model.config.num_hidden_layers = 2


def _other_stack(model: Any) -> None:
    setattr(model, model.base_model_prefix, build(model.config.model_type).base_model)


def _other_rotary(model: Any) -> None:
    config = copy.deepcopy(model.config)
    config.rope_parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    model.model.rotary_emb = type(model.model.rotary_emb)(config)


def _no_positions(model: Any) -> None:
    model.model.decoder.embed_positions = nn.Identity()


LAYERED = ("llama", "gpt2", "gptj", "stablelm", "bloom", "roberta", "bart")
CHANGES: dict[str, tuple[Callable[[Any], None], str, tuple[str, ...]]] = {
    "a layer replaced": (_replace_layer, r"is not the module that it was", LAYERED),
    "an attention replaced": (
        _replace_attention,
        r"(attn|attention|self_attn)\S* is not the module that it was",
        ("llama", "gpt2", "stablelm", "roberta", "bart"),
    ),
    "a layer added": (_add_layer, r"it has \d modules of \w+, and had \d", LAYERED),
    "a layer twice": (_repeat_layer, r"it has \d modules of \w+, and had \d", LAYERED),
    "layers cut": (_cut_layers, r"is not the module that it was", LAYERED),
    "a layer taken out": (_drop_layer, r"is not the module that it was", LAYERED),
    "layers swapped": (_swap_layers, r"another order", LAYERED),
    "fewer layers named": (_name_fewer, r"names 2 layers, and named 3", ("llama", "gpt2")),
    "another stack": (_other_stack, r"is not the module that it was", ("llama", "gpt2", "bart")),
    "another rotary embedding": (_other_rotary, r"other frequencies", ("llama",)),
    "other sines": (_slower_sines, r"sines of its \w+ were replaced .* other freq", SINED),
    "no table of positions": (_no_positions, r"positions cannot be moved", ("bart",)),
}
REFUSED = [(case, name) for case, (_, _, names) in CHANGES.items() for name in names]


@pytest.mark.parametrize(("case", "name"), REFUSED)
def test_refused(case: str, name: str, attach: Any) -> None:
    change, message, _ = CHANGES[case]
    model = build(name)
    handle = attach(model, prefix_of(model))
    says(model)
    change(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message) as error:
            says(model)
    assert "detach()" in str(error.value)
    handle.detach()
    other = build(name)
    change(other)
    if case != "no table of positions":
        torch.testing.assert_close(says(model), says(other), rtol=0, atol=0)


def test_what_is_put_back_is_as_it_was(attach: Any) -> None:
    model = build("llama")
    attach(model, prefix_of(model))
    before, layers = says(model), list(model.model.layers)
    _swap_layers(model)
    with pytest.raises(RuntimeError, match="another order"):
        says(model)
    model.model.layers = nn.ModuleList(layers)
    assert torch.equal(says(model), before)


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_what_no_hook_is_on_is_nobodys_business(name: str, attach: Any) -> None:
    model = build(name)
    attach(model, prefix_of(model))
    before = says(model)
    layer = _layers_of(model)[0]
    for key, child in list(layer.named_children()):
        if "mlp" in key or "fc" in key or "norm" in key:
            setattr(layer, key, copy.deepcopy(child))
    assert torch.equal(says(model), before)


def test_copies_look_at_their_own_modules(attach: Any) -> None:
    model = build("bart")
    attach(model, prefix_of(model))
    made = copy.deepcopy(model)
    before = says(model)
    _bart_tables(made)
    torch.testing.assert_close(says(made), before)
    _drop_layer(made)
    with pytest.raises(RuntimeError, match="is not the module"):
        says(made)
    assert torch.equal(says(model), before)
    prefixattn.detach(made)
    says(made)


def test_compiled_and_followed(attach: Any) -> None:
    model = build("bart")
    attach(model, prefix_of(model))
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    before = says(model)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs_of(model)).logits, before)
        _bart_tables(model)
        torch.testing.assert_close(compiled(**inputs_of(model)).logits, before)


@pytest.mark.parametrize("change", [_replace_attention, _swap_layers])
@torch.no_grad()
def test_compiled_and_refused(change: Callable[[Any], None], attach: Any) -> None:
    """A graph is made anew for a model that was changed, and the change is looked at then.

    What is done as the refusal says is one graph again. An exception that Dynamo traces would leave
    the functions on its way uncompiled, in this model and in others of its class.
    """
    model, other = build("llama"), build("llama")
    handle = attach(model, prefix_of(model))
    compiled: Any = torch.compile(model, backend="eager")
    before = says(model)
    torch.testing.assert_close(compiled(**inputs_of(model)).logits, before)
    change(model)
    with pytest.raises(RuntimeError, match="changed under its prefix"):
        compiled(**inputs_of(model))
    whole: Any = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="changed under its prefix"):
        whole(**inputs_of(model))
    handle.detach()
    for attached in (model, other):
        attach(attached, prefix_of(attached))
        counter = CompileCounter()
        whole = torch.compile(attached, backend=counter, fullgraph=True)
        torch.testing.assert_close(whole(**inputs_of(attached)).logits, says(attached))
        assert counter.frame_count == 1
