"""Precision, compilation, several prefixes at once, and the model as an object."""

import copy
import pickle
from contextlib import ExitStack
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

import prefixattn
from prefixattn import Prefix, PrefixBank

from .specimen import Specimen, first

SHORT = 3  # tokens of the bank's second prefix
READS, PICKS = [0, 1, -1], [0, 1, 0]  # the member that each of three rows reads, and its input


def _as_rough_as(s: Specimen, found: Tensor, rough: Tensor) -> str | None:
    """In low precision: as near to the truth as the stock model in that precision."""
    allowed = 2 * float((rough - s.logits).abs().median()) + 1e-3 * s.scale
    error = float((found - s.logits).abs().median())  # a mixture may route a token elsewhere
    return None if error <= allowed else f"error {error / allowed:.1f}x of what is allowed"


@torch.no_grad()
def half_precision(s: Specimen) -> str | None:
    rough = s.ask_behind(lambda m: s.behind(m.bfloat16()))
    after = s.attached(copy.deepcopy(s.stock).bfloat16())
    return _as_rough_as(s, s.forward(after), rough)


@torch.no_grad()
def autocast(s: Specimen) -> str | None:
    with torch.autocast("cpu", torch.bfloat16):
        rough = s.ask_behind(lambda m: s.behind(m.float()))
        model = s.attached(copy.deepcopy(s.stock).float())
        return _as_rough_as(s, s.forward(model), rough)


@torch.no_grad()
def compiled(s: Specimen) -> str | None:
    """Traced whole; what a compiler makes of the graph is not ours."""
    cache = {} if "decoder_input_ids" in s.inputs else {"use_cache": False}

    def run(model: Any) -> Tensor:
        torch._dynamo.reset()
        if model._can_set_experts_implementation():  # a loop over experts cannot be traced whole
            model.set_experts_implementation("batched_mm")
        return torch.compile(model, backend="eager", fullgraph=True)(**s.inputs, **cache).logits

    try:
        return s.compare(run(s.attached()))
    except Exception:
        s.ask(run)  # which cannot be traced either, or else it is ours
        raise


@torch.no_grad()
def rows(s: Specimen) -> str | None:
    """Two prefixes of different lengths and none, in three rows of a batch."""

    def short(prefix: Prefix) -> Prefix:
        pairs = [(key[:, :SHORT], value[:, :SHORT]) for key, value in prefix()]
        layers = {"layers": prefix.layers, "num_layers": prefix.num_layers}
        return Prefix(*zip(*pairs, strict=True), **layers)

    bank = s.changed(lambda prefix: PrefixBank([prefix, short(prefix)]))
    model = s.attached(prefix=bank)
    alone = s.forward(s.attached(prefix=s.changed(short)))
    truth = torch.stack([s.logits[0], alone[1], s.plain[0]])
    inputs = {name: x[PICKS] for name, x in s.inputs.items()}
    with ExitStack() as stack:
        for part in bank.modules():
            if isinstance(part, PrefixBank):
                stack.enter_context(part.use(READS))
        return s.compare(model(**inputs).logits, truth)


@torch.no_grad()
def copies(s: Specimen) -> str | None:
    model = s.attached()
    return first(
        s.compare(s.forward(copy.deepcopy(model))),
        s.compare(s.forward(pickle.loads(pickle.dumps(model)))),
        s.compare(s.forward(model)),
    )


@torch.no_grad()
def detached(s: Specimen) -> str | None:
    model = copy.deepcopy(s.stock)
    before, hooks = model.config._attn_implementation, _hooks(model)
    handle = prefixattn.attach(model, s.prefix())
    s.forward(model)
    handle.detach()
    if not torch.equal(s.forward(model), s.plain):
        return "other logits"
    if _hooks(model) != hooks:
        return "hooks are left"
    if model.config._attn_implementation != before:
        return f"its attention is {model.config._attn_implementation} now"
    return None


def _hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@torch.no_grad()
def raises(s: Specimen) -> str | None:
    """A module raises in the middle of a forward, and the model is whole again."""
    model = copy.deepcopy(s.stock)
    handle = prefixattn.attach(model, s.prefix())
    seen: list[nn.Module] = []
    with register_module_forward_pre_hook(lambda module, _: seen.append(module)):
        s.forward(model)
    for share in (0.3, 0.6, 0.9):
        if not _stopped(s, model, at=int(share * len(seen))):
            return "an error was swallowed"
        if wrong := s.compare(s.forward(model)):
            return wrong
    handle.detach()
    return None if torch.equal(s.forward(model), s.plain) else "other logits once it is detached"


def _stopped(s: Specimen, model: Any, at: int) -> bool:
    """Have the module that is called as number ``at`` raise: whether the caller hears of it."""
    calls = count()

    def stop(*_: Any) -> None:
        if next(calls) == at:
            raise KeyboardInterrupt

    with register_module_forward_pre_hook(stop):
        try:
            s.forward(model)
        except KeyboardInterrupt:
            return True
    return False


@torch.no_grad()
def switched_away(s: Specimen) -> str | None:
    """Another attention implementation, while a prefix is attached: refused, or as exact."""
    s.ask(lambda m: m.set_attn_implementation("eager"))
    model = copy.deepcopy(s.stock)
    before = model.config._attn_implementation
    handle = prefixattn.attach(model, s.prefix())
    model.set_attn_implementation("eager")
    try:
        wrong = s.compare(s.forward(model))
    except RuntimeError as error:
        wrong = None if "has a prefix" in str(error) else f"{type(error).__name__}: {error}"
    handle.detach()
    if wrong is None and model.config._attn_implementation not in (before, "eager"):
        return f"detached, its attention is {model.config._attn_implementation}"
    return wrong
