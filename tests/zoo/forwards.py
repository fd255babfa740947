"""One forward of a causal model, in the ways in which people write it."""

import inspect
from typing import Any

import torch

from .specimen import EFFECT, LENGTH, PAD, P, Specimen, UnavailableError, first, padded


@torch.no_grad()
def no_mask(s: Specimen) -> str | None:
    effect = float((s.logits - s.plain).abs().max()) / s.scale
    if effect < EFFECT:
        return f"vacuous: the prefix changes logits by {effect:.0e}"
    return s.compare(s.forward(s.attached()))


@torch.no_grad()
def left_padding(s: Specimen) -> str | None:
    s.check_padding()
    model = s.attached()
    even = model(**padded(s.ids, left=PAD)).logits[:, PAD:]
    inputs = padded(s.ids, left=PAD)
    inputs = {key: torch.stack([x[0], x[1].roll(-PAD)]) for key, x in inputs.items()}
    uneven = model(**inputs).logits
    return first(
        s.compare(even),
        s.compare(torch.stack([uneven[0, PAD:], uneven[1, :LENGTH]])),
    )


@torch.no_grad()
def right_padding(s: Specimen) -> str | None:
    return s.compare(s.attached()(**padded(s.ids, right=PAD)).logits[:, :LENGTH])


@torch.no_grad()
def position_ids(s: Specimen) -> str | None:
    start = first_place(s.stock)
    places = torch.arange(start, start + P + LENGTH).expand(2, -1)
    s.ask(lambda m: m(input_ids=s.joined, position_ids=places))
    model, inputs = s.attached(), padded(s.ids, left=PAD)
    wrong = s.compare(model(input_ids=s.ids, position_ids=places[:, :LENGTH]).logits)
    if wrong:
        return wrong
    s.check_padding()
    counted = (inputs["attention_mask"].cumsum(1) - 1 + start).clamp(min=0)
    return s.compare(model(**inputs, position_ids=counted).logits[:, PAD:])


@torch.no_grad()
def packed_rows(s: Specimen) -> str | None:
    lengths = [4, LENGTH - 4]
    rows = s.ids[:1].split(lengths, 1)
    places = torch.cat([torch.arange(n) for n in lengths])[None]
    inputs = {"input_ids": s.ids[:1], "position_ids": places, "use_cache": False}
    together = s.ask(lambda m: m(**inputs).logits)
    apart = torch.cat([s.ask(lambda m, row=row: m(input_ids=row).logits) for row in rows], 1)
    if s.compare(together, apart):
        raise UnavailableError("transformers does not keep packed documents apart")
    behind = [
        s.ask_behind(lambda m, row=row: m(input_ids=s.behind_text(row)).logits[:, P:])
        for row in rows
    ]
    return s.compare(s.attached()(**inputs).logits, torch.cat(behind, 1))


@torch.no_grad()
def embeddings(s: Specimen) -> str | None:
    embed = s.stock.get_input_embeddings()
    truth = s.ask_behind(lambda m: m(inputs_embeds=embed(s.joined)).logits[:, P:])
    return s.compare(s.attached()(inputs_embeds=embed(s.ids)).logits, truth)


@torch.no_grad()
def dense_mask(s: Specimen) -> str | None:
    """Few enough tokens that no window hides any: a caller's mask stands in for the windows'."""
    length = 4
    ids, joined = s.ids[:, :length], s.joined[:, : P + length]
    seen = torch.ones(P + length, P + length, dtype=torch.bool).tril()
    seen[P + 2, P + 1] = seen[P + 3, P] = False
    bias = torch.zeros(2, 1, *seen.shape, dtype=torch.double).masked_fill(~seen, -1e30)
    start = first_place(s.stock)
    places = torch.arange(start, start + P + length).expand(2, -1)
    known = {"position_ids": places} if s.ask(takes_positions) else {}
    truth = s.ask_behind(lambda m: m(input_ids=joined, attention_mask=bias, **known).logits)[:, P:]
    if s.compare(truth, s.logits[:, :length]) is None:
        raise UnavailableError("transformers passes over such a mask")
    known = {key: value[:, :length] for key, value in known.items()}
    inputs = {"input_ids": ids, "attention_mask": bias[:, :, P:, P:], **known}
    return s.compare(s.attached()(**inputs).logits, truth)


def first_place(model: Any) -> int:
    """The position of a text's first token: RoBERTa's family begins behind its padding row."""
    embeddings = [m for m in model.modules() if hasattr(m, "create_position_ids_from_input_ids")]
    return embeddings[0].padding_idx + 1 if embeddings else 0


def takes_positions(model: Any) -> bool:
    return "position_ids" in inspect.signature(type(model).forward).parameters
