"""Attaching and detaching, the two policies, packing, and what is refused."""

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers

import prefixattn
from prefixattn.prefix import Prefix

P = 5


@pytest.fixture
def llama(case: Callable[..., Any]) -> Any:
    return case("llama")


def test_the_prefix_is_the_models(llama: Any, attach: Any) -> None:
    prefix = llama.prefix()
    handle = attach(llama.model, prefix)
    assert handle.prefix is prefix
    assert handle.model is llama.model
    mine = {id(parameter) for parameter in prefix.parameters()}
    assert mine <= {id(parameter) for parameter in llama.model.parameters()}
    assert "prefixattn.keys.0" in llama.model.state_dict()
    llama.model.float()
    assert prefix.keys[0].dtype == torch.float32
    assert llama.model(llama.input_ids).logits.isfinite().all()


def test_training_flags_survive(llama: Any, attach: Any) -> None:
    llama.model.train()
    llama.model.model.layers[1].eval()
    flags = [module.training for module in llama.model.modules()]
    handle = attach(llama.model, llama.prefix())
    handle.detach()
    assert [module.training for module in llama.model.modules()] == flags


@torch.no_grad()
def test_the_handle_need_not_be_kept(llama: Any, attach: Any) -> None:
    attach(llama.model, llama.prefix())
    llama.assert_close(llama.model(llama.input_ids).logits)


def test_attach_twice_detach_twice(llama: Any, attach: Any) -> None:
    prefix = llama.prefix()
    handle = attach(llama.model, prefix)
    with pytest.raises(ValueError, match="detach"):
        attach(llama.model, prefix)
    handle.detach()
    handle.detach()
    assert torch.equal(llama.model(llama.input_ids).logits, llama.plain)
    attach(llama.model, prefix)
    llama.assert_close(llama.model(llama.input_ids).logits)


@torch.no_grad()
def test_a_copy_has_a_prefix_of_its_own(llama: Any, attach: Any) -> None:
    attach(llama.model, llama.prefix())
    twin = copy.deepcopy(llama.model)
    for parameter in llama.model.prefixattn.parameters():
        parameter.zero_()
    llama.assert_close(twin(llama.input_ids).logits)
    assert (llama.model(llama.input_ids).logits - llama.logits).abs().max() > 0.1


@torch.no_grad()
def test_a_failed_forward_leaves_the_model_usable(llama: Any, attach: Any) -> None:
    attach(llama.model, llama.prefix())
    hook = llama.model.model.layers[1].mlp.register_forward_hook(
        lambda *_: (_ for _ in ()).throw(KeyError("in the middle"))
    )
    with pytest.raises(KeyError, match="in the middle"):
        llama.model(llama.input_ids)
    hook.remove()
    llama.assert_close(llama.model(llama.input_ids).logits)


@torch.no_grad()
def test_half_precision_and_autocast(llama: Any, attach: Any) -> None:
    prefix = llama.prefix()
    assert prefix.keys[0].dtype == torch.float64
    attach(llama.model, prefix)
    llama.model.float()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = llama.model(llama.input_ids).logits
    half = llama.model.bfloat16()(llama.input_ids).logits
    for logits in (mixed, half):
        error = (logits.double() - llama.logits).abs().mean()
        assert error < 0.3 * (llama.logits - llama.plain).abs().mean()
    low = Prefix([torch.zeros(2, P, 8, dtype=torch.bfloat16)], [torch.zeros(2, P, 8).bfloat16()])
    assert low.keys[0].dtype == torch.float32


@torch.no_grad()
def test_positions_kept(llama: Any, attach: Any) -> None:
    places = torch.cat([torch.arange(P), torch.arange(llama.input_ids.shape[1])])[None]
    joined = llama.joined()
    mask = torch.ones_like(joined)  # keeps transformers from taking this for two documents
    expected = llama.model(joined, position_ids=places, attention_mask=mask).logits[:, P:]
    assert (expected - llama.logits).abs().max() > 0.1
    attach(llama.model, llama.prefix(), positions="keep")
    llama.assert_close(llama.model(llama.input_ids).logits, expected)


@torch.no_grad()
def test_prefix_always_visible_in_a_window(case: Callable[..., Any], attach: Any) -> None:
    """A text no longer than the window, behind a prefix that the window would cut."""
    mistral = case("mistral")
    length = mistral.model.config.sliding_window
    whole = case("mistral", sliding_window=None)
    expected = whole.logits[:, :length]
    ids = mistral.input_ids[:, :length]
    handle = attach(mistral.model, mistral.prefix())
    cut = mistral.model(ids).logits
    assert (cut - expected).abs().max() > 0.1
    handle.detach()
    attach(mistral.model, mistral.prefix(), prefix_in_window="visible")
    mistral.assert_close(mistral.model(ids).logits, expected)


def test_a_warning_of_tokens_out_of_reach(case: Callable[..., Any], attach: Any) -> None:
    mistral = case("mistral")
    prefix = Prefix.random(mistral.model, mistral.model.config.sliding_window + 1)
    with pytest.warns(UserWarning, match="2 of 10 in 2 of 2 layers") as caught:
        handle = attach(mistral.model, prefix)
    assert caught[0].filename == __file__
    handle.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(mistral.model, prefix, prefix_in_window="visible").detach()
        attach(mistral.model, Prefix.random(mistral.model, 8))


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_packed_documents(case: Callable[..., Any], attach: Any, name: str) -> None:
    given = case(name)
    one, two = given.input_ids[:1], given.input_ids[1:, :7]
    places = torch.cat([torch.arange(one.shape[1]), torch.arange(two.shape[1])])[None]
    both = torch.cat([one, two], 1)
    attach(given.model, given.prefix())
    for inputs in ({"use_cache": False}, {}):
        packed = given.model(both, position_ids=places, **inputs).logits
        given.assert_close(packed[:, : one.shape[1]], given.logits[:1])
        given.assert_close(packed[:, one.shape[1] :], given.logits[1:, :7])
    compiled = torch.compile(given.model, fullgraph=True, backend="eager")
    given.assert_close(
        compiled(both, position_ids=places).logits[:, one.shape[1] :], given.logits[1:, :7]
    )
    with pytest.raises(ValueError, match="use_cache=False"):
        given.model(both, position_ids=places, use_cache=True)
    bounds = torch.tensor([0, 11, 18])
    told = given.model(both, cu_seq_lens_q=bounds).logits
    given.assert_close(told[:, : one.shape[1]], given.logits[:1])
    given.assert_close(told[:, one.shape[1] :], given.logits[1:, :7])
    with pytest.raises(NotImplementedError, match="cu_seq_lens_q"):
        given.model(both, cu_seq_lens_q=bounds, attention_mask=torch.ones_like(both))
    with pytest.raises(ValueError, match=r"end with the row's 18 tokens, got \[0, 11, 17\]"):
        given.model(both, cu_seq_lens_q=torch.tensor([0, 11, 17]))


@torch.no_grad()
def test_a_mask_of_the_users_own(llama: Any, attach: Any) -> None:
    length = llama.input_ids.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    attach(llama.model, llama.prefix())
    llama.assert_close(llama.model(llama.input_ids, attention_mask=mask).logits)
    additive = torch.zeros(2, 1, length, length, dtype=torch.float64).masked_fill(~mask, -1e30)
    llama.assert_close(llama.model(llama.input_ids, attention_mask=additive).logits)


@torch.no_grad()
def test_cross_attention_has_no_prefix(model_of: Callable[..., Any], attach: Any) -> None:
    model = model_of("gpt2", add_cross_attention=True)
    text, ids = torch.randint(2, 90, (1, P)), torch.randint(2, 90, (2, 11))
    seen = torch.ones(2, 7, dtype=torch.long)
    seen[1, 4:] = 0
    encoded = {
        "encoder_hidden_states": torch.randn(2, 7, 32, dtype=torch.float64),
        "encoder_attention_mask": seen,
    }
    joined = torch.cat([text.expand(2, -1), ids], 1)
    # The text meets the encoder too, so its keys come from a run with it, row by row.
    cache = model(text, **{name: x[:1] for name, x in encoded.items()}, use_cache=True)
    layers = cache.past_key_values.self_attention_cache.layers
    prefix = Prefix([layer.keys[0] for layer in layers], [layer.values[0] for layer in layers])
    expected = model(joined, **encoded).logits[:1, P:]
    plain = model(ids, **encoded).logits[:1]
    assert (expected - plain).abs().max() > 0.1
    attach(model, prefix)
    got = model(ids, **encoded).logits[:1]
    torch.testing.assert_close(got, expected)
    out = model(ids[:, :6], **encoded, use_cache=True)
    rest = model(ids[:, 6:], **encoded, past_key_values=out.past_key_values).logits[:1]
    torch.testing.assert_close(rest, expected[:, 6:])


@torch.no_grad()
def test_named_implementation(llama: Any, attach: Any) -> None:
    for implementation in ("reference", "sdpa"):
        handle = attach(llama.model, llama.prefix(), implementation=implementation)
        llama.assert_close(llama.model(llama.input_ids).logits)
        handle.detach()


@torch.no_grad()
def test_dropout_only_in_training(case: Callable[..., Any], attach: Any) -> None:
    given = case("llama", attention_dropout=0.5)
    attach(given.model, given.prefix())
    given.assert_close(given.model(given.input_ids).logits)
    given.model.train()
    first, second = (given.model(given.input_ids).logits for _ in range(2))
    assert (first - second).abs().max() > 0.1


# What is refused, and what is not lost silently


def test_another_attention_is_not_a_silent_loss(llama: Any, attach: Any) -> None:
    handle = attach(llama.model, llama.prefix())
    llama.model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match="'eager'"):
        llama.model(llama.input_ids)
    handle.detach()
    assert llama.model.config._attn_implementation == "eager"  # the user's own choice stays
    torch.testing.assert_close(llama.model(llama.input_ids).logits, llama.plain, rtol=0, atol=1e-5)


def test_a_part_of_the_model_called_alone(llama: Any, attach: Any) -> None:
    attach(llama.model, llama.prefix())
    inner = llama.model.model
    hidden = inner.embed_tokens(llama.input_ids)
    rope = inner.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    with pytest.raises(RuntimeError, match="did not bring"):
        inner.layers[0](hidden, position_embeddings=rope)


@pytest.mark.parametrize(
    "config",
    [
        transformers.RoFormerConfig(
            hidden_size=32,
            num_attention_heads=4,
            num_hidden_layers=2,
            intermediate_size=48,
            is_decoder=True,
        ),
        transformers.MptConfig(d_model=32, n_heads=4, n_layers=2),
    ],
    ids=lambda config: config.model_type,
)
def test_models_outside_the_interface_are_named(config: Any, attach: Any) -> None:
    config.vocab_size = 97
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert_refused(model, attach, "attention interface")


def test_other_refusals(attach: Any) -> None:
    albert = transformers.AlbertModel(
        transformers.AlbertConfig(
            vocab_size=97,
            hidden_size=32,
            num_attention_heads=4,
            num_hidden_layers=2,
            intermediate_size=48,
            embedding_size=16,
        )
    )
    assert_refused(albert, attach, "attends 2 times")
    doge = transformers.DogeForCausalLM(
        transformers.DogeConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    )
    assert_refused(doge, attach, "bias of its own")
    with pytest.raises(TypeError, match="PreTrainedModel"):
        attach(torch.nn.Linear(2, 2), Prefix([torch.zeros(1, 1, 1)], [torch.zeros(1, 1, 1)]))


def assert_refused(model: Any, attach: Any, reason: str) -> None:
    prefix = Prefix([torch.zeros(4, P, 8)] * 2, [torch.zeros(4, P, 8)] * 2)
    names = [set(vars(module)) for module in model.modules()]
    implementation = model.config._attn_implementation
    with pytest.raises(NotImplementedError, match=f"{type(model).__name__}.*{reason}"):
        attach(model, prefix)
    assert [set(vars(module)) for module in model.modules()] == names
    assert model.config._attn_implementation == implementation


def test_wrong_arguments_leave_the_model_alone(llama: Any, attach: Any) -> None:
    right = llama.prefix()
    shapes = [(2, P, 8)] * 2
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (None, {}, "prefix must be a prefixattn.Prefix"),
        (right, {"positions": "moved"}, "positions must be one of"),
        (right, {"prefix_in_window": "maybe"}, "prefix_in_window must be one of"),
        (right, {"implementation": "magic"}, "implementation: expected .auto. or one of"),
        (Prefix(*[[torch.zeros(2, P, 8)]] * 2), {}, "2 layers like the model, got 1"),
        (Prefix(*[[torch.zeros(4, P, 8)] * 2] * 2), {}, "prefix layer 0 must be"),
    ]
    assert [tuple(key.shape) for key in right.keys] == shapes
    for prefix, options, message in wrong:
        with pytest.raises((TypeError, ValueError), match=message):
            attach(llama.model, prefix, **options)
        assert torch.equal(llama.model(llama.input_ids).logits, llama.plain)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_positions_beyond_the_table(case: Callable[..., Any], attach: Any, name: str) -> None:
    given = case(name)
    attach(given.model, given.prefix())
    ids = torch.randint(2, 90, (1, 64))
    with pytest.raises(ValueError, match="positions up to 63.*prefix of 5.*reaches 68"):
        given.model(ids)
    assert given.model(ids[:, : 64 - P]).logits.isfinite().all()
    mask = torch.ones_like(ids)
    mask[:, :P] = 0  # padding takes no places
    assert given.model(ids, attention_mask=mask).logits.isfinite().all()


def test_a_short_mask_beside_a_cache(llama: Any, attach: Any) -> None:
    attach(llama.model, llama.prefix())
    cache = llama.model(llama.input_ids, use_cache=True).past_key_values
    ids = llama.input_ids[:, :2]
    with pytest.raises(ValueError, match="attention_mask must cover the 11 cached and 2 new"):
        llama.model(ids, attention_mask=torch.ones_like(ids), past_key_values=cache)


def test_a_deleted_model_leaves_nothing_behind(case: Callable[..., Any]) -> None:
    given = case("llama")
    prefixattn.attach(given.model, given.prefix())
    config = weakref.ref(given.model.config)
    del given
    gc.collect()
    assert config() is None


WRONG: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "a model in another's hands": (
        lambda m: prefixattn.attach(torch.nn.DataParallel(m), Prefix.random(m, 3)),
        TypeError,
        "got DataParallel around a LlamaForCausalLM: give it that",
    ),
    "prompt tuning of PEFT's, and a prefix": (
        lambda m: prefixattn.attach(tuned(m, peft.PromptTuningConfig), Prefix.random(m, 3)),
        ValueError,
        r"prefix must be None .* \(PROMPT_TUNING\)",
    ),
    "no prefix": (lambda m: prefixattn.attach(m), TypeError, "prefix must be .* got none"),
    "tokens that it does not know": (
        lambda m: Prefix.from_text(m, torch.tensor([3, 97])),
        ValueError,
        r"input_ids must be in \[0, 97\), .* got 97",
    ),
    "negative tokens": (
        lambda m: Prefix.from_text(m, torch.tensor([3, -1])),
        ValueError,
        r"input_ids must be in \[0, 97\), .* got -1",
    ),
    "more tokens than positions": (
        lambda m: Prefix.from_text(gpt2(), torch.zeros(65, dtype=torch.long)),
        ValueError,
        "input_ids must hold at most 64 tokens, .* got 65",
    ),
}


def tuned(model: Any, kind: Any) -> Any:
    return peft.get_peft_model(model, kind(task_type="CAUSAL_LM", num_virtual_tokens=4))


def gpt2() -> Any:
    sizes = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()


@pytest.mark.parametrize(("do", "kind", "said"), WRONG.values(), ids=WRONG.keys())
def test_wrong_input(llama: Any, do: Any, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        do(llama.model)


@pytest.mark.parametrize("kind", ["siglip_vision_model", "idefics3_vision"])
def test_places_for_patches_are_none_for_text(kind: str) -> None:
    """A tower's table ends early (here at 4 patches), whatever it says that it takes."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    tower = sizes | {"intermediate_size": 48, "image_size": 32, "patch_size": 16}
    side = sizes | {"intermediate_size": 48, "vocab_size": 97, "model_type": "llama"}
    config = transformers.LlavaConfig(
        vision_config=tower | {"model_type": kind},
        text_config=side | {"pad_token_id": None},
        image_token_index=96,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    assert Prefix.from_text(model, torch.zeros(9, dtype=torch.long)).num_tokens == 9


def test_all_positions_can_be_a_prefix() -> None:
    assert Prefix.from_text(gpt2(), torch.zeros(64, dtype=torch.long)).num_tokens == 64
