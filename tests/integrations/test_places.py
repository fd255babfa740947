"""Places that a caller or a model around the stack chose are kept, behind the prefix."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from prefixattn import Prefix, PrefixBank

P, LENGTH = 5, 11
COUNT = torch.arange(LENGTH)

# One row is for all rows of the batch. None of them comes back to its least place.
PLACES: dict[str, Tensor] = {
    "jump": COUNT[None] + 16 * (COUNT >= 4),  # PoSE
    "jumps": 2 * COUNT[None],  # every other place is skipped
    "late": COUNT[None] + 4,  # the middle of a text
    "back": (COUNT + 6 * (COUNT >= 4) - 9 * (COUNT >= 7))[None],
    "stay": (COUNT - (COUNT >= 3).long() - (COUNT >= 6).long())[None],  # two tokens to a place
    "rows": torch.stack([COUNT + 16 * (COUNT >= 4), COUNT + 3]),
}
# No window, a window, learned places, chunks, both kinds of window.
FAMILIES = ("llama", "mistral", "gpt2", "llama4_text", "gemma3")


def behind(places: Tensor) -> Tensor:
    """Places of the text that became the prefix, and of the input behind it."""
    return torch.cat([torch.arange(P).expand(len(places), -1), places + P], 1)


def whole(model: Any, joined: Tensor, places: Tensor) -> Tensor:
    """What the model makes of one text at these places; a mask says that it is one."""
    mask = torch.ones_like(joined)
    return model(joined, position_ids=behind(places), attention_mask=mask).logits[:, P:]


def in_steps(model: Any, ids: Tensor, places: Tensor, cache: Any) -> Tensor:
    found = [
        model(ids[:, a:b], position_ids=places[:, a:b], past_key_values=cache).logits
        for a, b in ((0, 4), (4, 5), (5, LENGTH))
    ]
    return torch.cat(found, 1)


def padded(model: Any, ids: Tensor, places: Tensor) -> Tensor:
    """With padding on both sides, whose places are those that transformers gives it."""
    sides = (3, 2)
    ids, mask = (nn.functional.pad(x, sides) for x in (ids, torch.ones_like(ids)))
    places = nn.functional.pad(places, sides, value=1)
    return model(ids, attention_mask=mask, position_ids=places).logits[:, 3:-2]


@torch.no_grad()
@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_is_one_at_any_places(
    case: Callable[..., Any], attach: Any, family: str, places: Tensor
) -> None:
    given = case(family)
    model, ids = given.model, given.input_ids
    expected = whole(model, given.joined(), places)
    attach(model, given.prefix())
    ways: list[dict[str, Any]] = [
        {},
        {"use_cache": False},
        {"use_cache": True},
        {"attention_mask": torch.ones_like(ids)},
    ]
    for way in ways:
        out = model(ids, position_ids=places, **way)
        given.assert_close(out.logits, expected)
        assert (out.past_key_values is None) == (way.get("use_cache") is False)
    config = model.config
    for cache in (
        transformers.DynamicCache(config=config),
        transformers.StaticCache(config=config, max_cache_len=32),
    ):
        given.assert_close(in_steps(model, ids, places, cache), expected)
    given.assert_close(padded(model, ids, places), expected)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", "jump"), ("mistral", "late"), ("mistral", "rows"), ("llama4_text", "jump")],
)
def test_compiled(case: Callable[..., Any], attach: Any, family: str, name: str) -> None:
    """A compiler may not look at places."""
    given = case(family)
    expected = whole(given.model, given.joined(), PLACES[name])
    attach(given.model, given.prefix())
    compiled = torch.compile(given.model, fullgraph=True, backend="eager")
    given.assert_close(compiled(given.input_ids, position_ids=PLACES[name]).logits, expected)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_checkpointing_does_not_cut_a_text(
    case: Callable[..., Any], attach: Any, family: str
) -> None:
    """It turns the cache off, without which transformers takes jumps for packed documents."""
    given = case(family)
    expected = whole(given.model, given.joined(), PLACES["jump"]).detach()
    prefix = given.prefix()
    attach(given.model, prefix)
    gradients = []
    for checkpoint in (False, True):
        if checkpoint:
            given.model.train().gradient_checkpointing_enable({"use_reentrant": False})
        prefix.zero_grad()
        logits = given.model(given.input_ids, position_ids=PLACES["jump"]).logits
        given.assert_close(logits.detach(), expected)
        logits.pow(2).sum().backward()
        gradients.append([p.grad.clone() for p in prefix.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["jump", "rows", "late"])
def test_generation(case: Callable[..., Any], attach: Any, family: str, name: str) -> None:
    given = case(family)
    ids, places = given.input_ids, PLACES[name].expand(2, -1)

    def say(text: Tensor, at: Tensor, **ways: Any) -> Tensor:
        mask = torch.ones_like(text)
        return given.model.generate(
            text,
            attention_mask=mask,
            position_ids=at.clone(),
            max_new_tokens=4,
            do_sample=False,
            eos_token_id=None,
            **ways,
        )[:, text.shape[1] :]

    plain, beams = (say(given.joined(), behind(places), num_beams=n) for n in (1, 3))
    attach(given.model, given.prefix())
    for ways in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(say(ids, places, **ways), plain)
    assert torch.equal(say(ids, places, num_beams=3), beams)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_prefixes_of_different_lengths(case: Callable[..., Any], attach: Any, family: str) -> None:
    given = case(family)
    model, ids, text = given.model, given.input_ids, given.text
    for places in (PLACES["jump"].expand(2, -1), PLACES["rows"]):
        expected = []
        for row, length in enumerate((P, 3)):
            joined = torch.cat([text[:, :length], ids[row, None]], 1)
            at = torch.cat([torch.arange(length)[None], places[row, None] + length], 1)
            mask = torch.ones_like(joined)
            out = model(joined, position_ids=at, attention_mask=mask).logits
            expected.append(out[:, length:])
        bank = PrefixBank([Prefix.from_text(model, text[:, :n]) for n in (P, 3)])
        handle = attach(model, bank)
        with bank.use([0, 1]):
            given.assert_close(model(ids, position_ids=places).logits, torch.cat(expected))
        handle.detach()


# Packed rows: lengths of documents, and the places of their tokens.
PACKED: dict[str, tuple[list[int], list[int]]] = {
    "from 0": ([4, 7], [*range(4), *range(7)]),
    "from 1": ([4, 7], [*range(1, 5), *range(1, 8)]),  # as PaliGemma counts
    "jumps inside": ([4, 7], [0, 1, 12, 13, 0, 1, 2, 20, 21, 22, 23]),
    "the end of a text first": ([3, 8], [8, 9, 10, *range(8)]),
    "single tokens": ([1, 1, 9], [0, 0, *range(9)]),
}


@torch.no_grad()
@pytest.mark.parametrize(("lengths", "row"), PACKED.values(), ids=PACKED)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents(
    case: Callable[..., Any], attach: Any, family: str, lengths: list[int], row: list[int]
) -> None:
    given = case(family)
    model, ids, places = given.model, given.input_ids[:1], torch.tensor([row])
    pieces = zip(ids.split(lengths, 1), places.split(lengths, 1), strict=True)
    expected = torch.cat([whole(model, torch.cat([given.text, x], 1), at) for x, at in pieces], 1)
    attach(model, given.prefix())
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    for way in ({}, {"use_cache": False}, {"cu_seq_lens_q": bounds}):
        found = model(ids, position_ids=places, **way).logits
        given.assert_close(found, expected)
    with pytest.raises(ValueError, match="an attention_mask of ones says that a row is one text"):
        model(ids, position_ids=places, use_cache=True)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral", "llama4_text"])
def test_packed_documents_compiled(case: Callable[..., Any], attach: Any, family: str) -> None:
    given = case(family)
    places = torch.tensor([PACKED["jumps inside"][1]])
    attach(given.model, given.prefix())
    expected = given.model(given.input_ids, position_ids=places).logits
    compiled = torch.compile(given.model, fullgraph=True, backend="eager")
    found = compiled(given.input_ids, position_ids=places).logits
    assert (found - expected).abs().max() <= given.tolerance


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_lengths_alone_tell_documents(case: Callable[..., Any], attach: Any, family: str) -> None:
    """Each begins behind the prefix, as it does where it is a row of its own."""
    given = case(family)
    row = given.input_ids[:1]
    attach(given.model, given.prefix())
    expected = torch.cat([given.model(x).logits for x in row.split([4, 7], 1)], 1)
    found = given.model(row, cu_seq_lens_q=torch.tensor([0, 4, 11])).logits
    given.assert_close(found, expected)


@torch.no_grad()
def test_places_that_are_not_of_this_text_are_refused(
    case: Callable[..., Any], attach: Any
) -> None:
    given = case("gpt2")
    model, ids = given.model, given.input_ids
    attach(model, given.prefix())
    given.assert_close(model(ids, position_ids=COUNT).logits)  # one row, as GPT-2 takes it
    wrong: list[tuple[Any, type[Exception], str]] = [
        (COUNT[None, :-1], ValueError, r"must be \[2, 11\] or \[1, 11\], .* got \(1, 10\)"),
        (COUNT.expand(3, -1), ValueError, r"got \(3, 11\)"),
        (COUNT.tolist(), TypeError, "must be a tensor, got a list"),
        # Few tokens may reach far: the table has 64 places.
        (COUNT[None] * 6, ValueError, "positions up to 63, but behind a prefix of 5 .* reaches 65"),
    ]
    for places, error, message in wrong:
        with pytest.raises(error, match=message):
            model(ids, position_ids=places)


# A model of the user's own around a backbone: how it makes places from `past`, rows and a mask.
MADE: dict[str, Callable[[int, Tensor, Tensor], Tensor]] = {
    "counted": lambda past, ids, mask: torch.arange(past, past + ids.shape[1])[None],
    "counted from 7": lambda past, ids, mask: torch.arange(past + 7, past + 7 + ids.shape[1])[None],
    "of the mask": lambda past, ids, mask: (mask.cumsum(1) - 1)[:, past:].clamp(min=0),
    "of the mask from 7": lambda past, ids, mask: (mask.cumsum(1) - 1)[:, past:].clamp(min=0) + 7,
    "rows apart": lambda past, ids, mask: (
        (mask.cumsum(1) - 1)[:, past:].clamp(min=0) + torch.arange(len(ids))[:, None]
    ),
    "jump": lambda past, ids, mask: (
        (mask.cumsum(1) - 1)[:, past:].clamp(min=0) + 10 * (mask.cumsum(1)[:, past:] > 4)
    ),
}


class Around(transformers.LlamaPreTrainedModel):
    def __init__(self, config: Any, places: Callable[..., Tensor]) -> None:
        super().__init__(config)
        self.model = transformers.LlamaModel(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.places = places
        self.post_init()

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        out = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=self.places(past, input_ids, attention_mask),
            past_key_values=past_key_values,
            **kwargs,
        )
        return CausalLMOutputWithPast(logits=self.head(out.last_hidden_state))


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2], ids=["one row", "two rows"])
@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
def test_a_model_around_a_backbone(
    case: Callable[..., Any], attach: Any, made: Callable[..., Tensor], rows: int
) -> None:
    """Whether its places count padding or not, the text begins where it does without padding."""
    given = case("llama")
    ids, ones = given.input_ids[:rows], torch.ones_like(given.input_ids[:rows])
    model = Around(given.model.config, made).double().eval()
    model.model, model.head = given.model.model, given.model.lm_head
    prefix = given.prefix()
    places = made(0, ids, ones)
    expected = whole(given.model, given.joined()[:rows], places)
    attach(model, prefix)
    given.assert_close(model(ids, attention_mask=ones).logits, expected)
    for left in (1, 3):
        text, mask = (nn.functional.pad(x, (left, 0)) for x in (ids, ones))
        given.assert_close(model(text, attention_mask=mask).logits[:, left:], expected)
        for cache in (
            transformers.DynamicCache(config=model.config),
            transformers.StaticCache(config=model.config, max_cache_len=32),
        ):
            steps = [
                model(text[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits
                for a, b in ((0, left + 4), (left + 4, left + 5), (left + 5, left + LENGTH))
            ]
            given.assert_close(torch.cat(steps, 1)[:, left:], expected)


class Twice(Around):
    """Two texts in one forward, as models that compare texts do it."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        if input_ids.shape[1] < 2 * LENGTH:  # as attach calls it
            return super().forward(input_ids, attention_mask, **kwargs)
        halves = zip(input_ids.chunk(2, 1), attention_mask.chunk(2, 1), strict=True)
        logits = [super(Twice, self).forward(x, mask, **kwargs).logits for x, mask in halves]
        return CausalLMOutputWithPast(logits=torch.cat(logits, 1))


@torch.no_grad()
def test_a_model_that_runs_its_backbone_twice(case: Callable[..., Any], attach: Any) -> None:
    given = case("llama")
    model = Twice(given.model.config, MADE["counted"]).double().eval()
    model.model, model.head = given.model.model, given.model.lm_head
    attach(model, given.prefix())
    text, mask = (
        nn.functional.pad(x, (3, 0)).repeat(1, 2)
        for x in (given.input_ids, torch.ones_like(given.input_ids))
    )
    for half in model(text, attention_mask=mask).logits.chunk(2, 1):
        given.assert_close(half[:, 3:])
