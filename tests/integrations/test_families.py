"""The token-prefix identity: behind the keys and values of a text, a model continues the text."""

from typing import Any

import pytest
import torch
from torch import Tensor

PADDING = 3
NEW = 8


def padded(input_ids: Tensor, side: str) -> tuple[Tensor, Tensor]:
    """``input_ids`` and their mask with three padding tokens on one side of every row."""
    pad = torch.zeros(input_ids.shape[0], PADDING, dtype=torch.long)
    parts = [(pad, pad), (input_ids, torch.ones_like(input_ids))]
    parts = parts if side == "left" else parts[::-1]
    return torch.cat([ids for ids, _ in parts], 1), torch.cat([mask for _, mask in parts], 1)


@torch.no_grad()
def test_forward(causal: Any, attach: Any) -> None:
    attach(causal.model, causal.prefix())
    causal.assert_close(causal.model(causal.input_ids).logits)
    causal.assert_close(causal.model(causal.input_ids, use_cache=False).logits)
    embeds = causal.model.get_input_embeddings()(causal.input_ids)
    causal.assert_close(causal.model(inputs_embeds=embeds).logits)


@torch.no_grad()
def test_padding_changes_nothing(causal: Any, attach: Any) -> None:
    attach(causal.model, causal.prefix())
    length = causal.input_ids.shape[1]
    for side, real in (("left", slice(PADDING, None)), ("right", slice(0, length))):
        ids, mask = padded(causal.input_ids, side)
        causal.assert_close(causal.model(ids, attention_mask=mask).logits[:, real])


@torch.no_grad()
def test_rows_padded_unlike(promised: Any, attach: Any) -> None:
    attach(promised.model, promised.prefix())
    ids, mask = padded(promised.input_ids, "left")
    ids[1] = ids[1].roll(-PADDING)
    mask[1] = mask[1].roll(-PADDING)
    logits = promised.model(ids, attention_mask=mask).logits
    length = promised.input_ids.shape[1]
    real = torch.stack([logits[0, PADDING:], logits[1, :length]])
    promised.assert_close(real)


@torch.no_grad()
def test_a_gap_in_the_mask(promised: Any, attach: Any) -> None:
    """Masked tokens inside the text keep the places that the model gives them."""
    mask = torch.ones_like(promised.input_ids)
    mask[:, 4:6] = 0
    front = torch.ones(2, promised.text.shape[1], dtype=torch.long)
    joined = torch.cat([front, mask], dim=1)
    expected = promised.model(promised.joined(), attention_mask=joined).logits[:, -5:]
    assert (expected - promised.logits[:, -5:]).abs().max() > 0.1
    attach(promised.model, promised.prefix())
    got = promised.model(promised.input_ids, attention_mask=mask).logits[:, -5:]
    promised.assert_close(got, expected)


@torch.no_grad()
def test_a_cache_filled_in_pieces(causal: Any, attach: Any) -> None:
    attach(causal.model, causal.prefix())
    cache, pieces = None, []
    for piece in causal.input_ids.split([4, 5, 1, 1], dim=1):
        out = causal.model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        pieces.append(out.logits)
    causal.assert_close(torch.cat(pieces, dim=1))
    assert cache.get_seq_length() == causal.input_ids.shape[1]  # the prefix is not in it


def answered_otherwise(causal: Any, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """An input that the model answers otherwise behind the text, and the answer there.

    Weights that are drawn by chance may lead to one answer for both; which do depends on the order
    in which a version of transformers draws them.
    """
    for _ in range(20):
        ids = torch.randint(2, 90, causal.input_ids.shape)
        joined = torch.cat([causal.text.expand(len(ids), -1), ids], dim=1)
        expected, without = (
            causal.model.generate(x, **arguments)[:, x.shape[1] :] for x in (joined, ids)
        )
        if not torch.equal(expected, without):
            return ids, expected
    raise AssertionError("the model says the same behind the text to every input")


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_generation(causal: Any, attach: Any, beams: int) -> None:
    arguments = {
        "max_new_tokens": NEW,
        "do_sample": False,
        "num_beams": beams,
        "eos_token_id": None,
    }
    ids, expected = answered_otherwise(causal, arguments)

    attach(causal.model, causal.prefix())
    padded_ids, mask = padded(ids, "left")
    ways: dict[str, dict[str, Any]] = {
        "dynamic": {"input_ids": ids},
        "static": {"input_ids": ids, "cache_implementation": "static"},
        "no cache": {"input_ids": ids, "use_cache": False},
        "left": {"input_ids": padded_ids, "attention_mask": mask},
        "left, static": {
            "input_ids": padded_ids,
            "attention_mask": mask,
            "cache_implementation": "static",
        },
    }
    for way, inputs in ways.items():
        got = causal.model.generate(**inputs, **arguments)[:, inputs["input_ids"].shape[1] :]
        assert torch.equal(got, expected), way


@torch.no_grad()
def test_generation_that_guesses_ahead(promised: Any, attach: Any) -> None:
    ids = promised.input_ids[:1]
    arguments = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    joined = promised.joined()[:1]
    expected = promised.model.generate(joined, **arguments)[:, joined.shape[1] :]
    attach(promised.model, promised.prefix())
    got = promised.model.generate(ids, prompt_lookup_num_tokens=3, **arguments)
    assert torch.equal(got[:, ids.shape[1] :], expected)


@torch.no_grad()
def test_detach_leaves_the_model_as_it_was(causal: Any, attach: Any) -> None:
    model = causal.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    names = [set(vars(module)) for module in model.modules()]
    handle = attach(model, causal.prefix())
    assert model.config._attn_implementation == "prefixattn"
    model(causal.input_ids)
    handle.detach()
    assert torch.equal(model(causal.input_ids).logits, causal.plain)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [module.training for module in model.modules()] == flags
    assert [set(vars(module)) for module in model.modules()] == names
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert model.config._attn_implementation != "prefixattn"
