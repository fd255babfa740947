"""What people do with an encoder, held to the same identity where the text sees only itself."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from . import forwards, objects, oracle, specimen, training
from .specimen import LENGTH, PAD, P, Situation, UnavailableError, padded, unlike


class Specimen(specimen.Specimen):
    """An encoder with a head that says something of each token.

    ``rebuilt`` makes the same encoder under the head of another class of transformers.
    """

    def __init__(self, model: Any, rebuilt: Callable[[Any], Any]) -> None:
        super().__init__(model)
        self.rebuilt = rebuilt

    def loss(self, model: Any) -> Tensor:
        return self.forward(model).square().sum()

    def behind(self, model: Any) -> Tensor:
        return self._behind(model, self.inputs)

    @torch.no_grad()
    def truth(self, **inputs: Tensor) -> Tensor:
        """The stock model's logits behind the text, which does not see what is behind it."""
        return self.ask(lambda model: self._behind(model, inputs))

    def _behind(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        inputs = inputs | {"input_ids": self.behind_text(inputs["input_ids"])}
        mask = inputs.get("attention_mask")
        if mask is not None:
            inputs["attention_mask"] = nn.functional.pad(mask, (P, 0), value=1)
        with oracle.eager(model, apart=P):
            logits = model(**inputs).logits
        with oracle.eager(model):
            alone = model(input_ids=self.text).logits
        if (logits[:1, :P] - alone).abs().max() > specimen.TEXT_ALONE * alone.abs().max():
            raise ValueError("its text sees what is behind it")
        return logits[:, P:]


@torch.no_grad()
def left_padding(s: Specimen) -> str | None:
    """An encoder counts its positions through the padding."""
    inputs = padded(s.ids, left=PAD)
    found = s.attached()(**inputs).logits[:, PAD:]
    return s.compare(found, s.truth(**inputs)[:, PAD:])


@torch.no_grad()
def right_padding(s: Specimen) -> str | None:
    inputs = padded(s.ids, right=PAD)
    inputs["input_ids"][:, LENGTH:] = getattr(s.stock.config, "pad_token_id", None) or 0
    found = s.attached()(**inputs).logits[:, :LENGTH]
    return s.compare(found, s.truth(**inputs)[:, :LENGTH])


@torch.no_grad()
def position_ids(s: Specimen) -> str | None:
    if not forwards.takes_positions(s.stock):
        raise UnavailableError("it takes no position_ids")
    start = forwards.first_place(s.stock)
    places = torch.arange(start, start + P + LENGTH).expand(2, -1)
    truth = s.truth(input_ids=s.ids, position_ids=places)
    return s.compare(s.attached()(input_ids=s.ids, position_ids=places[:, :LENGTH]).logits, truth)


@torch.no_grad()
def embeddings(s: Specimen) -> str | None:
    embed = s.stock.get_input_embeddings()
    if s.compare(s.ask(lambda m: m(inputs_embeds=embed(s.ids)).logits), s.plain):
        raise UnavailableError("embeddings mean something else to it")
    return s.compare(s.attached()(inputs_embeds=embed(s.ids)).logits)


@torch.no_grad()
def classification(s: Specimen) -> str | None:
    return _headed(s, transformers.AutoModelForSequenceClassification, "logits")


@torch.no_grad()
def answering(s: Specimen) -> str | None:
    return _headed(s, transformers.AutoModelForQuestionAnswering, "start_logits", "end_logits")


def _headed(s: Specimen, auto: Any, *names: str) -> str | None:
    """A head that looks at the input's tokens alone, behind layers that see the text too."""
    try:
        headed = Specimen(s.rebuilt(auto), s.rebuilt)
    except ValueError as error:
        raise UnavailableError(f"transformers has no {auto.__name__} of it") from error

    def behind(model: Any) -> list[Tensor]:
        _last_layer(model).register_forward_hook(_without_text)
        with oracle.eager(model, apart=P):
            out = model(input_ids=headed.joined)
        return [out[name] for name in names]

    truth, plain = headed.ask(behind), headed.ask(lambda m: m(input_ids=headed.ids))
    found = headed.attached()(input_ids=headed.ids)
    for name, expected in zip(names, truth, strict=True):
        scale = float(expected.abs().max())
        if unlike(plain[name], expected, scale) is None:
            return "vacuous: its head says the same without a prefix"
        if wrong := unlike(found[name], expected, scale):
            return wrong
    return None


def _last_layer(model: Any) -> nn.Module:
    depth = model.config.num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not lists:
        raise ValueError("its layers were not found")
    return lists[0][-1]


def _without_text(layer: nn.Module, args: Any, out: Any) -> Any:
    if isinstance(out, Tensor):
        return out[:, P:]
    return (out[0][:, P:], *out[1:])


SITUATIONS: dict[str, Situation] = {
    "no mask": forwards.no_mask,
    "left pad": left_padding,
    "right pad": right_padding,
    "position_ids": position_ids,
    "embeds": embeddings,
    "classify": classification,
    "answer": answering,
    "rows": objects.rows,
    "gradients": training.differences,
    "checkpoint": training.checkpointed,
    "reentrant": training.checkpointed_reentrant,
    "compile": objects.compiled,
    "bf16": objects.half_precision,
    "autocast": objects.autocast,
    "copies": objects.copies,
    "detach": objects.detached,
    "raises": objects.raises,
    "switched": objects.switched_away,
}
