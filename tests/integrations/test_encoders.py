"""Encoders see everything at once; PEFT, which is right there, is the truth."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers

from prefixattn.prefix import Prefix

P = 5
AUTO = {
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
}


def inputs_for(model: Any, task: str, side: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 90, (2, 11))
    mask = torch.ones_like(ids)
    if side != "none":
        hidden = slice(0, 3) if side == "left" else slice(8, None)
        mask[1, hidden] = 0
        ids[1, hidden] = model.config.pad_token_id
    labels = torch.tensor([0, 2]) if task == "SEQ_CLS" else torch.randint(0, 3, ids.shape)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_equals_peft(
    model_of: Callable[..., Any], attach: Any, name: str, task: str, side: str
) -> None:
    base = model_of(name, AUTO[task])
    inputs = inputs_for(base, task, side)
    plain = base(**inputs).logits
    config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=P)
    ours = peft.get_peft_model(base, config).double().eval()
    stock = copy.deepcopy(ours)
    attach(ours)
    outs = []
    for model in (stock, ours):
        out = model(**inputs)
        out.loss.backward()
        outs.append(out)
    seen = inputs["attention_mask"].bool() if task == "TOKEN_CLS" else slice(None)
    torch.testing.assert_close(outs[1].logits[seen], outs[0].logits[seen], rtol=1e-9, atol=1e-9)
    assert (outs[0].logits - plain).abs().max() > 1e-3
    for one, other in zip(ours.parameters(), stock.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-8, atol=1e-10)


@torch.no_grad()
def test_a_text_becomes_a_prefix(model_of: Callable[..., Any], attach: Any) -> None:
    """BERT has no cache: the keys of a text alone are those that its own layers compute."""
    model = model_of("bert", transformers.AutoModelForMaskedLM)
    text = torch.randint(2, 90, (P,))
    first = model.bert.encoder.layer[0].attention.self
    seen: list[torch.Tensor] = []
    hook = first.key.register_forward_hook(lambda module, args, output: seen.append(output))
    model(text[None])
    hook.remove()
    prefix = Prefix.from_text(model, text)
    key = seen[0].view(P, 4, 8).transpose(0, 1)  # [H, P, D]
    torch.testing.assert_close(prefix.keys[0].detach(), key)
    ids = torch.randint(2, 90, (2, 7))
    plain = model(ids).logits
    attach(model, prefix)
    assert (model(ids).logits - plain).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_one_layer_continues_a_text(model_of: Callable[..., Any], attach: Any, name: str) -> None:
    """With one layer the keys of a text do not depend on what follows, so the identity holds."""
    model = model_of(name, transformers.AutoModelForMaskedLM, num_hidden_layers=1)
    text, ids = torch.randint(2, 90, (1, P)), torch.randint(2, 90, (2, 11))
    expected = model(torch.cat([text.expand(2, -1), ids], 1)).logits[:, P:]
    plain = model(ids).logits
    attach(model, Prefix.from_text(model, text))
    torch.testing.assert_close(model(ids).logits, expected)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    got = model(ids, attention_mask=mask).logits
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(got[1, :8], model(ids[1:, :8]).logits[0])


@torch.no_grad()
@pytest.mark.parametrize(("name", "reach"), [("bert", 64), ("roberta", 63)])
def test_positions_beyond_the_table(
    model_of: Callable[..., Any], attach: Any, name: str, reach: int
) -> None:
    model = model_of(name, transformers.AutoModel)
    attach(model, Prefix.random(model, P))
    ids = torch.randint(2, 90, (1, 64))
    assert model(ids[:, : reach - P]).last_hidden_state.isfinite().all()
    with pytest.raises(ValueError, match="knows positions up to 63.*prefix of 5"):
        model(ids[:, : reach - P + 1])
