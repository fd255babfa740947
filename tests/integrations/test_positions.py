"""Prefixes moved to other places: turned as the model turns its own keys, or refused."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from prefixattn import GatedPrefix, Prefix, PrefixBank, ProjectedPrefix
from prefixattn.integrations.places import Places
from prefixattn.positions import move_prefix

P, LENGTH = 5, 11
BASE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 96,
    "tie_word_embeddings": False,
}
GQA = BASE | {"num_key_value_heads": 2, "head_dim": 8}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.5, 2.0, 3.0],
    "long_factor": [2.0, 4.0, 8.0, 16.0],
    "factor": 2.0,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
ENCODER = BASE | {"num_hidden_layers": 1, "local_attention": 12}  # its keys see nothing behind them

# The forms that places take in the families of transformers, and a family that has each.
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**GQA),
    "qwen3": lambda: transformers.Qwen3Config(**GQA),  # keys are normed before they turn
    "gemma3": lambda: transformers.Gemma3TextConfig(  # two frequencies, by the layer's type
        **GQA, sliding_window=9, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**BASE),  # the first quarter turns
    "cohere": lambda: transformers.CohereConfig(**GQA, logit_scale=1.0),  # neighbours are pairs
    "cohere2": lambda: transformers.Cohere2Config(  # full layers have no places
        **GQA,
        logit_scale=1.0,
        sliding_window=9,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "glm4": lambda: transformers.Glm4Config(**GQA),  # neighbours, and the first half
    "nanochat": lambda: transformers.NanoChatConfig(**GQA),  # backwards
    "llama4_text": lambda: transformers.Llama4TextConfig(  # chunks, and layers without places
        **(GQA | {"intermediate_size": 16}),
        intermediate_size_mlp=48,
        attention_chunk_size=32,
        layer_types=["chunked_attention", "full_attention"],
        no_rope_layers=[1, 0],
        num_local_experts=2,
        moe_layers=[],
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(  # yarn, which also scales its keys
        **GQA, sliding_window=9, num_local_experts=4, num_experts_per_tok=2
    ),
    "phi3_longrope": lambda: transformers.Phi3Config(
        **BASE,
        num_key_value_heads=2,
        original_max_position_embeddings=32,
        rope_parameters=LONGROPE,
    ),
    "llama_dynamic": lambda: transformers.LlamaConfig(**GQA, rope_parameters=DYNAMIC),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(  # the last numbers of a key turn
        **BASE,
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=12,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
    ),
    "gptj": lambda: transformers.GPTJConfig(  # sines and cosines in a table; some numbers turn
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4
    ),
    "modernbert_local": lambda: transformers.ModernBertConfig(
        **ENCODER, layer_types=["sliding_attention"]
    ),
    "modernbert_global": lambda: transformers.ModernBertConfig(
        **ENCODER, layer_types=["full_attention"]
    ),
}
STILL: dict[str, Callable[[], Any]] = {
    "bloom": lambda: transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4),
    "falcon_alibi": lambda: transformers.FalconConfig(
        **{k: v for k, v in BASE.items() if k != "intermediate_size"}, alibi=True
    ),
    "t5": lambda: transformers.T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4
    ),
}
LEARNED: dict[str, tuple[Callable[[], Any], str]] = {
    "gpt2": (
        lambda: transformers.GPT2Config(
            vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=8
        ),
        r"transformer\.h\.0\.attn in GPT2LMHeadModel .* learned or added",
    ),
    "opt": (
        lambda: transformers.OPTConfig(**BASE, ffn_dim=48, word_embed_proj_dim=32),
        r"layers\.0\.self_attn in OPTForCausalLM .* learned or added",
    ),
    "bert": (
        lambda: transformers.BertConfig(**BASE, is_decoder=True),
        r"layer\.0\.attention\.self in BertLMHeadModel .* learned or added",
    ),
    "ctrl": (  # sinusoids
        lambda: transformers.CTRLConfig(
            vocab_size=97, n_embd=32, dff=48, n_layer=2, n_head=4, n_positions=64
        ),
        r"h\.0\.multi_head_attention in CTRLLMHeadModel .* learned or added",
    ),
}


def build(config: Any) -> Any:
    """A model in evaluation mode with weights that let every token matter."""
    torch.manual_seed(0)
    kind = {"modernbert": transformers.AutoModelForMaskedLM, "t5": transformers.T5Model}
    auto = kind.get(config.model_type, transformers.AutoModelForCausalLM)
    make = auto if auto is transformers.T5Model else auto.from_config
    model = make(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model


def some_ids(rows: int, length: int) -> Tensor:
    return torch.randint(2, 90, (rows, length), generator=torch.Generator().manual_seed(rows))


TEXT, IDS = some_ids(1, P), some_ids(2, LENGTH)


def far_apart(a: Tensor, b: Tensor) -> float:
    """In units of the largest number of ``b``."""
    return float((a - b).detach().abs().max() / b.detach().abs().max())


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_moved_before_the_text_it_is_exact_where_positions_are_kept(
    family: str, attach: Any
) -> None:
    """The token-prefix identity: the model itself says what it makes of text behind text."""
    model = build(FAMILIES[family]())
    behind = model(torch.cat([TEXT.expand(2, -1), IDS], dim=1)).logits[:, P:]
    prefix = Prefix.from_text(model, TEXT)
    moved = move_prefix(prefix, model, -P)
    for used, exact in ((prefix, False), (moved, True)):
        handle = attach(model, used, positions="keep")
        error = far_apart(model(IDS).logits, behind)
        handle.detach()
        assert error <= 1e-4 if exact else error > 1e-2
    for back, before in zip(move_prefix(moved, model, P)(), prefix(), strict=True):
        assert far_apart(back[0], before[0]) <= 1e-6
        assert torch.equal(back[1], before[1])


@torch.no_grad()
def test_moved_behind_another_the_two_are_one() -> None:
    """With one layer, keys know of no other token: only of their place."""
    model = build(transformers.LlamaConfig(**(GQA | {"num_hidden_layers": 1}))).double()
    first, second = some_ids(1, 7), TEXT
    (whole,) = Prefix.from_text(model, torch.cat([first, second], dim=1)).keys
    (key,) = move_prefix(Prefix.from_text(model, second), model, 7).keys
    assert far_apart(key, whole[:, 7:]) <= 1e-6


@torch.no_grad()
def test_in_half_precision_the_right_form_is_found() -> None:
    """Rounding makes keys at two places differ; the frequencies are exact all the same."""
    config = transformers.Gemma3TextConfig(
        **(GQA | {"num_hidden_layers": 6}),
        sliding_window=9,
        layer_types=["sliding_attention", "full_attention"] * 3,
    )
    model = build(config)
    prefix = Prefix.from_text(model, TEXT)
    expected = move_prefix(prefix, model, 9)
    found = move_prefix(prefix, copy.deepcopy(model).bfloat16(), 9)
    for a, b in zip(found.keys, expected.keys, strict=True):
        assert far_apart(a, b) <= 0.02  # bfloat16 holds the frequencies, too


@torch.no_grad()
@pytest.mark.parametrize("family", STILL)
def test_keys_without_a_place_stay_as_they_are(family: str) -> None:
    model = build(STILL[family]())
    prefix = Prefix.random(model, P)
    for a, b in zip(move_prefix(prefix, model, 3)(), prefix(), strict=True):
        assert torch.equal(a[0], b[0])


@pytest.mark.parametrize("family", LEARNED)
def test_places_that_are_part_of_the_text_are_refused(family: str) -> None:
    config, message = LEARNED[family]
    model = build(config())
    with pytest.raises(NotImplementedError, match=message):
        move_prefix(Prefix.random(model, P), model, -P)


def test_a_form_that_is_not_known_is_refused() -> None:
    """HunYuan scales each number of a key after it has turned, so it is no turn any more."""
    model = build(transformers.HunYuanDenseV1Config(**GQA))
    prefix = Prefix.from_text(model, TEXT)
    move_prefix(prefix, model, -P)
    with torch.no_grad():
        model.model.layers[1].self_attn.key_layernorm.weight.copy_(torch.linspace(0.5, 2, 8))
    with pytest.raises(NotImplementedError, match=r"layers\.1\.self_attn .* do not turn"):
        move_prefix(prefix, model, -P)


@pytest.mark.parametrize(
    ("family", "limit"),
    [("llama_dynamic", 64), ("phi3_longrope", 32)],
)
def test_frequencies_that_change_with_the_length_are_followed_up_to_there(
    family: str, limit: int
) -> None:
    model = build(FAMILIES[family]())
    before = model.model.rotary_emb.inv_freq.clone()
    prefix = Prefix.from_text(model, TEXT)
    move_prefix(prefix, model, limit - 8)
    with pytest.raises(NotImplementedError, match=f"over {limit} places they do not turn"):
        move_prefix(prefix, model, -limit)
    assert torch.equal(model.model.rotary_emb.inv_freq, before)


def test_all_but_the_keys_stays() -> None:
    """Frozen tokens turn like the others; what trains, which layers, gates and dropout stay."""
    model = build(FAMILIES["gemma3"]())
    options: dict[str, Any] = {"num_frozen_tokens": 2, "dropout": 0.25, "layers": [1]}
    prefix = GatedPrefix.from_text(model, TEXT, **options)
    with torch.no_grad():
        prefix.gates[0].fill_(0.5)
    prefix.values.requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in prefix.state_dict().items()}
    moved = move_prefix(prefix, model, -P)
    assert isinstance(moved, GatedPrefix)
    assert str(moved) == str(prefix)
    assert [p.requires_grad for p in moved.parameters()] == [True, False, True]
    plain = move_prefix(Prefix.from_text(model, TEXT), model, -P)
    (pair,) = moved()
    assert torch.equal(pair[0], plain()[1][0])
    for name, tensor in moved.state_dict().items():
        assert torch.equal(tensor, state[name]) == ("key" not in name), name
        assert torch.equal(prefix.state_dict()[name], state[name])


def test_the_model_is_left_as_it_was() -> None:
    model = build(FAMILIES["llama"]()).train()
    prefix = Prefix.from_text(model, TEXT)
    with torch.inference_mode():
        moved = move_prefix(prefix, model, 3)
    assert not any(parameter.is_inference() for parameter in moved.parameters())
    assert all(module.training for module in model.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert model.config._attn_implementation == "sdpa"


def test_what_it_does_not_move() -> None:
    model = build(FAMILIES["llama"]())
    prefix = Prefix.from_text(model, TEXT)
    projected = ProjectedPrefix.for_model(model, P)
    other = build(transformers.LlamaConfig(**(GQA | {"num_hidden_layers": 1})))
    refused: list[tuple[Any, Any, Any, type[Exception], str]] = [
        (projected, model, 1, TypeError, r"ProjectedPrefix: move prefix\.folded\(\)"),
        (
            PrefixBank([prefix]),
            model,
            1,
            TypeError,
            "must be a prefixattn.Prefix, got a PrefixBank",
        ),
        (prefix, model, 1.0, TypeError, "by must be an integer, got 1.0"),
        (prefix, torch.nn.Linear(2, 2), 1, TypeError, "transformers PreTrainedModel, got Linear"),
        (prefix, other, 1, ValueError, "must have 1 layers like the model, got 2"),
    ]
    for given, whose, by, error, message in refused:
        with pytest.raises(error, match=message):
            move_prefix(given, whose, by)
    with pytest.raises(ValueError, match="part must be one that LlamaForCausalLM has, got 'cross'"):
        move_prefix(prefix, model, 1, part="cross")
    assert isinstance(move_prefix(projected.folded(), model, 1), Prefix)


@torch.no_grad()
@pytest.mark.parametrize("name", ["phi3", "llama_dynamic"])
def test_a_length_at_which_frequencies_change_is_refused(name: str, attach: Any) -> None:
    """Text that crosses it would meet prefix keys of the frequencies before."""
    if name == "phi3":
        config: Any = transformers.Phi3Config(
            **BASE, rope_parameters=LONGROPE, original_max_position_embeddings=32
        )
        border = 32
    else:
        config, border = transformers.LlamaConfig(**GQA, rope_parameters=DYNAMIC), 64
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    attach(model, Prefix.random(model, P))
    model(torch.ones(1, border - P, dtype=torch.long))
    with pytest.raises(ValueError, match=f"other frequencies from {border} tokens on"):
        model(torch.ones(1, border - P + 1, dtype=torch.long))


@torch.no_grad()
def test_more_tokens_than_a_model_was_made_for_are_said_once(attach: Any) -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**GQA)).eval()
    attach(model, Prefix.random(model, P))
    with pytest.warns(UserWarning, match="has 65, more than the 64"):
        model(torch.ones(1, 60, dtype=torch.long))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.ones(1, 60, dtype=torch.long))


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "opt", "gemma3", "phi3"])
def test_padding_changes_nothing_where_the_text_stays(
    case: Callable[..., Any], attach: Any, name: str
) -> None:
    given = case(name)
    attach(given.model, given.prefix(), positions="keep")
    ids, pad = given.input_ids, torch.zeros(2, 3, dtype=torch.long)
    mask = torch.cat([pad, torch.ones_like(ids)], dim=1)
    padded = torch.cat([pad, ids], dim=1)
    with torch.no_grad():
        expected = given.model(ids).logits
        found = given.model(padded, attention_mask=mask).logits[:, 3:]
        assert (found - expected).abs().max() <= given.tolerance
        made = [
            given.model.generate(
                row, attention_mask=seen, max_new_tokens=5, do_sample=False, eos_token_id=None
            )[:, -5:]
            for row, seen in ((ids, torch.ones_like(ids)), (padded, mask))
        ]
    assert torch.equal(*made)
    assert (expected - given.plain).abs().max() > 0.05


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_a_static_cache_runs_over_the_table(
    case: Callable[..., Any], attach: Any, name: str
) -> None:
    given = case(name, **{"n_positions" if name == "gpt2" else "max_position_embeddings": 20})
    attach(given.model, given.prefix())
    with pytest.raises(ValueError, match="knows positions up to 19"):
        given.model.generate(given.input_ids, max_new_tokens=9, cache_implementation="static")


@pytest.mark.parametrize(
    ("name", "num_tokens", "said"),
    [
        ("llama4_text", 19, r"\d+ of 19 in .* layers .*, whose chunks are of"),
        ("mistral", 19, r"\d+ of 19 in .* layers .*, whose window is"),
    ],
)
def test_tokens_that_no_query_reaches_are_said(
    case: Callable[..., Any], attach: Any, name: str, num_tokens: int, said: str
) -> None:
    model = case(name).model.requires_grad_(False)
    prefix = Prefix.random(model, num_tokens).to(model.dtype)
    with pytest.warns(UserWarning, match=said) as caught:
        attach(model, prefix)
    (message,) = [str(each.message) for each in caught if "reach" in str(each.message)]
    model(torch.randint(2, 90, (1, 4))).logits.pow(2).sum().backward()
    dead = [int((value.grad.abs().sum((0, 2)) == 0).sum()) for value in prefix.values]
    for count in {count for count in dead if count}:
        assert f"{count} of {num_tokens} in {dead.count(count)} of {len(dead)} layers" in message
    assert any(dead)


@pytest.mark.parametrize("options", [{}, {"layers": [0]}], ids=["all layers", "one layer"])
def test_padding_changes_nothing_beside_gates(
    case: Callable[..., Any], attach: Any, options: dict[str, Any]
) -> None:
    """Their text stays without being asked to; a static cache pads behind it, too."""
    given = case("llama")
    prefix = GatedPrefix.from_text(given.model, given.text, **options)
    with torch.no_grad():
        for gate in prefix.gates:
            gate.fill_(0.7)
    attach(given.model, prefix)
    ids, pad = given.input_ids, torch.zeros(2, 3, dtype=torch.long)
    padded, mask = torch.cat([pad, ids], 1), torch.cat([pad, torch.ones_like(ids)], 1)
    said: dict[str, Any] = {
        "max_new_tokens": 4,
        "do_sample": False,
        "eos_token_id": None,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with torch.no_grad():
        forward = given.model(padded, attention_mask=mask).logits[:, 3:]
        assert (forward - given.model(ids).logits).abs().max() <= given.tolerance
    plain = torch.stack(given.model.generate(ids, **said).logits)
    assert (plain[0] - forward[:, -1]).abs().max() <= given.tolerance
    for cache in ({}, {"cache_implementation": "static"}):
        found = given.model.generate(padded, attention_mask=mask, **said, **cache).logits
        assert (torch.stack(found) - plain).abs().max() <= given.tolerance


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (FAMILIES["gemma3"], [9, None]),
        (
            lambda: transformers.ModernBertConfig(  # its windows have two sides
                **(ENCODER | {"num_hidden_layers": 2, "local_attention": 10}),
                layer_types=["full_attention", "sliding_attention"],
            ),
            [None, 5],
        ),
    ],
    ids=["gemma3", "modernbert"],
)
def test_every_window_and_its_tokens_are_said(
    attach: Any, config: Callable[[], Any], windows: list[int | None]
) -> None:
    """Held to gradients: those of tokens that no query reaches are zero."""
    model = build(config()).requires_grad_(False)
    prefix = Prefix.random(model, 14)
    with pytest.warns(UserWarning, match="out of every query's reach") as caught:
        attach(model, prefix)
    (message,) = [str(each.message) for each in caught]
    model(some_ids(1, 4)).logits.pow(2).sum().backward()
    dead = [int((value.grad.abs().sum((0, 2)) == 0).sum()) for value in prefix.values]
    assert [bool(count) for count in dead] == [window is not None for window in windows]
    for count, window in zip(dead, windows, strict=True):
        assert window is None or f"{count} of 14 in 1 of 2 layers" in message
        assert window is None or f"whose window is {window};" in message


def longer_adapter(windowed: Any) -> tuple[Any, Callable[[], Any]]:
    peft = pytest.importorskip("peft")
    short, long = (
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=n) for n in (3, 20)
    )
    model = peft.get_peft_model(windowed, short)

    def run() -> None:
        if "long" not in model.peft_config:
            model.add_adapter("long", long)
            model.set_adapter("long")
        model(input_ids=IDS)

    return (model, None), run


def longer_member(windowed: Any) -> tuple[Any, Callable[[], Any]]:
    bank = PrefixBank([Prefix.random(windowed, 3)])
    long = Prefix.random(windowed, 20)

    def run() -> None:
        if len(bank.names) == 1:
            bank.add("long", long)
        with bank.use(["long", 0]):
            windowed(IDS)

    return (windowed, bank), run


def several_in_a_row(windowed: Any) -> tuple[Any, Callable[[], Any]]:
    bank = PrefixBank([Prefix.random(windowed, 5), Prefix.random(windowed, 6)])

    def run() -> None:
        with bank.use([(0, 1), 0]):
            windowed(IDS)

    return (windowed, bank), run


@pytest.mark.parametrize(
    ("make", "said"),
    [(longer_adapter, "13 of 20"), (longer_member, "13 of 20"), (several_in_a_row, "4 of 11")],
)
def test_a_longer_prefix_that_comes_later_is_said_once(
    attach: Any, make: Callable[[Any], tuple[Any, Callable[[], Any]]], said: str
) -> None:
    given, run = make(build(transformers.MistralConfig(**GQA, sliding_window=8)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(*given)
    with pytest.warns(UserWarning, match=f"{said} in 2 of 2 layers .* whose window is 8"):
        run()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run()


def test_what_attach_has_said_is_not_said_again(attach: Any) -> None:
    model = build(transformers.MistralConfig(**GQA, sliding_window=8))
    with pytest.warns(UserWarning, match="13 of 20"):
        attach(model, Prefix.random(model, 20))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(IDS)


def test_a_static_cache_is_asked_for_its_length_once_a_text(
    attach: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an accelerator each question waits for the device; at the end of the room it is asked."""
    model = build(transformers.LlamaConfig(**(GQA | {"max_position_embeddings": 24})))
    attach(model, Prefix.random(model, P))
    asked: list[int] = []
    count = Places._count

    class Counter(Tensor):
        def __int__(self) -> int:
            asked.append(int(self.as_subclass(Tensor)))
            return asked[-1]

    counters: dict[int, Any] = {}

    def spied(places: Places, counter: Tensor, length: int, room: int) -> int:
        same = counters.setdefault(id(counter), counter.as_subclass(Counter))
        return count(places, same, length, room)

    monkeypatch.setattr(Places, "_count", spied)
    static: dict[str, Any] = {"cache_implementation": "static", "do_sample": False}
    static["eos_token_id"] = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(IDS, max_new_tokens=24 - P - LENGTH + 1, **static)
    assert len(asked) == 1
    with pytest.warns(UserWarning, match="has 25, more than the 24"):
        model.generate(IDS, max_new_tokens=24 - P - LENGTH + 2, **static)
    assert asked[-1] == 24 - P
