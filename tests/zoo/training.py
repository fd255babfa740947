"""Gradients of a prefix, with and without gradient checkpointing."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from .specimen import Specimen, UnavailableError, first


def trained(s: Specimen, model: Any) -> list[Tensor]:
    """The gradients of a training loss with respect to the model's prefix."""
    model.zero_grad()
    s.loss(model).backward()
    return [p.grad.clone() for p in model.prefixattn.parameters()]


def true_gradients(s: Specimen) -> list[Tensor]:
    """The same of the stock model, whose cache holds the prefix, as PEFT has it."""
    prefix = s.prefix()

    def question(model: Any) -> list[Tensor]:
        model.requires_grad_(False).train()
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        layers = [i for i, layer in enumerate(cache.layers) if hasattr(layer, "keys")]
        for i, (key, value) in zip(layers, prefix(), strict=True):
            cache.update(key.expand(2, -1, -1, -1), value.expand(2, -1, -1, -1), i)
        out = model(input_ids=s.ids, labels=s.ids, past_key_values=cache, use_cache=True)
        if s.compare(out.logits):
            raise ValueError("a cache that holds the prefix is not the identity here")
        out.loss.backward()
        return [p.grad for p in prefix.parameters()]

    return s.ask(question)


def unequal(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-4) -> str | None:
    scale = max(float(x.abs().max()) for x in expected)
    pairs = zip(found, expected, strict=True)
    error = max(float((one - other).abs().max()) for one, other in pairs) / scale
    return None if error <= tolerance else f"gradients off by {error:.0e} of the largest"


def gradients(s: Specimen) -> str | None:
    try:
        expected = true_gradients(s)
    except UnavailableError:
        return differences(s)
    return unequal(trained(s, s.attached().train()), expected)


def differences(s: Specimen) -> str | None:
    """Gradients against differences of the forward, which is exact: a direction per tensor.

    Long steps cross corners of a ReLU, short ones are lost where a model rounds on the way.
    """
    wrong = [_differ(s, step) for step in (1e-3, 1e-4)]
    return wrong[0] if all(wrong) else None


def _differ(s: Specimen, step: float) -> str | None:
    model = s.attached()
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(s.logits.shape, generator=generator).to(s.logits) / s.scale

    def loss() -> Tensor:
        return (s.forward(model) * weights).sum()

    loss().backward()
    found, expected = [], []
    for parameter in model.prefixattn.parameters():
        direction = torch.randn(parameter.shape, generator=generator).to(parameter) * step
        found.append((parameter.grad * direction).sum())
        with torch.no_grad():
            values = []
            for change in (direction, -2 * direction):
                parameter.add_(change)
                values.append(loss())
            parameter.add_(direction)
        expected.append((values[0] - values[1]) / 2)
    return unequal(found, expected, 1e-2)


def _checkpointed(s: Specimen, reentrant: bool) -> str | None:
    """Enabled after and before the prefix is attached, and with another forward in between."""
    if not s.stock.supports_gradient_checkpointing:
        raise UnavailableError("transformers has no checkpointing for it")
    kind = {"use_reentrant": reentrant}

    def stock(model: Any) -> None:
        model.train().gradient_checkpointing_enable(kind)
        s.loss(model).backward()

    s.ask(stock)
    model = s.attached().train()
    expected = trained(s, model)
    model.gradient_checkpointing_enable(kind)
    after = trained(s, model)
    enabled = copy.deepcopy(s.stock)
    enabled.gradient_checkpointing_enable(kind)
    before = trained(s, s.attached(enabled).train())
    model.zero_grad()
    loss = s.loss(model)
    with torch.no_grad():
        model(**{name: x.flip(1)[:, :5] for name, x in s.inputs.items()})
    loss.backward()
    between = [p.grad for p in model.prefixattn.parameters()]
    return first(*(unequal(found, expected) for found in (after, before, between)))


def checkpointed(s: Specimen) -> str | None:
    return _checkpointed(s, reentrant=False)


def checkpointed_reentrant(s: Specimen) -> str | None:
    return _checkpointed(s, reentrant=True)
