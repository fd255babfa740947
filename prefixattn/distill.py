"""Distilling a context into a prefix: what a model says that reads it, and the loss on that.

This is how Cartridges train (Eyuboglu et al., 2025, "Cartridges: Lightweight and general-purpose
long context representations via self-study"): the model with the document in context is the
teacher, the same model with a short prefix in its place is the student, and both see
conversations about the document. ``examples/cartridge.py`` is a whole run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from prefixattn.scalars import integer


class CausalModel(Protocol):
    """What the teacher and the student are: transformers' causal models are."""

    def __call__(self, *, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        """An object whose ``logits [rows, S, V]`` at ``i`` are of token ``i + 1``."""


class TopK(NamedTuple):
    """A next-token distribution at each position: its ``k`` likeliest tokens, and all others.

    ``tokens``: int64 ``[..., k]``. ``log_probs``: ``[..., k]``. ``rest``: ``[...]``, the
    log-probability of all other tokens together. The latter two are float32, or float64 where the
    logits were; a position then takes ``12 * k + 4`` bytes, or ``16 * k + 8``.
    """

    tokens: Tensor
    log_probs: Tensor
    rest: Tensor


@dataclass(frozen=True)
class Conversations:
    """Prompts and their answers, one to a row, padded on the right.

    Attributes:
        input_ids: int ``[rows, S]``.
        attention_mask: int ``[rows, S]``, 0 on padding.
        answers: bool ``[rows, S]``, the positions whose next token is the answer's: the loss
            falls on these.
    """

    input_ids: Tensor
    attention_mask: Tensor
    answers: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, rows: Any) -> "Conversations":
        return Conversations(self.input_ids[rows], self.attention_mask[rows], self.answers[rows])


def conversations(pairs: Sequence[tuple[Tensor, Tensor]], pad_token_id: int) -> Conversations:
    """Put ``(prompt, answer)`` pairs of token ids, int ``[n]`` each, into padded rows.

    Raises:
        ValueError: no pairs, or a prompt or an answer that is not a row of at least one token.
    """
    if not pairs:
        raise ValueError("pairs must hold at least one prompt and answer, got none")
    for i, pair in enumerate(pairs):
        for name, ids in zip(("prompt", "answer"), pair, strict=True):
            if ids.ndim != 1 or not len(ids):
                raise ValueError(
                    f"pairs[{i}]: the {name} must be token ids [n], n >= 1, got {tuple(ids.shape)}"
                )
    size = (len(pairs), max(len(prompt) + len(answer) for prompt, answer in pairs))
    device = pairs[0][0].device
    input_ids = torch.full(size, pad_token_id, dtype=torch.long, device=device)
    attention_mask = torch.zeros(size, dtype=torch.long, device=device)
    answers = torch.zeros(size, dtype=torch.bool, device=device)
    for row, (prompt, answer) in enumerate(pairs):
        start, end = len(prompt), len(prompt) + len(answer)
        input_ids[row, :end] = torch.cat([prompt, answer])
        attention_mask[row, :end] = 1
        answers[row, start - 1 : end - 1] = True
    return Conversations(input_ids, attention_mask, answers)


def top_k_targets(logits: Tensor, k: int) -> TopK:
    """The ``k`` likeliest next tokens at each position, and the mass of the rest.

    Args:
        logits: finite, floating point ``[..., V]``.
        k: at least 1 and below ``V``. ``V - 1`` keeps the whole distribution.

    Raises:
        TypeError: ``logits`` is not a floating-point tensor.
        ValueError: ``k`` is outside of that.
    """
    _check_logits(logits)
    vocabulary = logits.shape[-1]
    count = integer(k)
    if count is None or not 1 <= count < vocabulary:
        raise ValueError(f"k must be an integer in [1, {vocabulary}), got {k!r}")
    precise = _precise(logits.detach())
    tokens = precise.topk(count, dim=-1).indices
    log_probs, rest = _split(precise, tokens)
    return TopK(tokens, log_probs, rest)


def distillation_loss(logits: Tensor, targets: TopK, mask: Tensor | None = None) -> Tensor:
    """The forward KL divergence from the teacher to the student: nats per position, a scalar.

    ``sum_t p_t (log p_t - log q_t)`` over the teacher's top ``k`` tokens ``t``, plus the same term
    for one bucket with all other tokens, for teacher ``p`` and student ``q``. It is zero where the
    two agree on the ``k`` and the bucket, and grows to the whole divergence with ``k``. Cartridges'
    own code sums ``-p_t log q_t`` over the top ``k`` alone; without the bucket the student is best
    off giving the other tokens nothing.

    Args:
        logits: the student's, floating point ``[..., V]``.
        targets: of the same positions.
        mask: bool ``[...]``, the positions that count, at least one. None: all.

    Raises:
        TypeError: ``logits`` or ``mask`` has the wrong dtype.
        ValueError: the positions of the three are not the same, or none counts.
    """
    _check_logits(logits)
    positions = logits.shape[:-1]
    if targets.rest.shape != positions:
        raise ValueError(
            f"targets must be of logits' positions {tuple(positions)}, got "
            f"{tuple(targets.rest.shape)}"
        )
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, got {mask.dtype}")
        if mask.shape != positions:
            raise ValueError(
                f"mask must be of logits' positions {tuple(positions)}, got {tuple(mask.shape)}"
            )
        logits, targets = logits[mask], TopK(*(part[mask] for part in targets))
    if not targets.rest.numel():
        raise ValueError("mask must name at least one position, got none")
    log_probs, rest = _split(_precise(logits), targets.tokens)
    inside = targets.log_probs.exp() * (targets.log_probs - log_probs)
    outside = targets.rest.exp() * (targets.rest - rest)
    return (inside.sum(dim=-1) + outside).mean()


@torch.no_grad()
def teach(model: CausalModel, study: Conversations, k: int, rows: int = 16) -> TopK:
    """What the teacher says at each position of each conversation.

    The document is in the model's context by whatever means. As a prefix,
    ``attach(model, Prefix.from_text(model, document))``, it is read once and stored once.

    Args:
        model: the teacher.
        study: the conversations.
        k: as for `top_k_targets`.
        rows: conversations in one forward, at least 1.
    """
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    parts = [
        top_k_targets(_logits(model, study[first : first + rows]), k)
        for first in range(0, len(study), rows)
    ]
    return TopK(*(torch.cat(part) for part in zip(*parts, strict=True)))


def lessons(
    study: Conversations, targets: TopK, rows: int, generator: torch.Generator
) -> Iterator[tuple[Conversations, TopK]]:
    """Batches of ``rows`` conversations with their targets, without end.

    Each conversation is seen once before any is seen again; a pass's last rows that fill no batch
    are left out of that pass.

    Args:
        study: the conversations.
        targets: of the same conversations.
        rows: at least 1, at most ``len(study)``.
        generator: a CPU generator.
    """
    count = integer(rows)
    if count is None or not 1 <= count <= len(study):
        raise ValueError(f"rows must be an integer in [1, {len(study)}], got {rows!r}")
    while True:
        order = torch.randperm(len(study), generator=generator).to(study.input_ids.device)
        for chosen in order[: len(order) // count * count].split(count):
            yield study[chosen], TopK(*(part[chosen] for part in targets))


def distill_step(
    model: CausalModel, optimizer: torch.optim.Optimizer, batch: Conversations, targets: TopK
) -> float:
    """One step of the student towards ``targets``; the loss before it, in nats per position.

    Args:
        model: the student: a frozen model with the prefix attached.
        optimizer: over the prefix's parameters.
        batch: the conversations of this step.
        targets: of the same conversations.
    """
    loss = distillation_loss(_logits(model, batch), targets, batch.answers)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def _logits(model: CausalModel, batch: Conversations) -> Tensor:
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    logits: Tensor = output.logits
    return logits


def _split(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of ``tokens [..., k]``, and of all others together ``[...]``.

    The others are summed as they are: one minus the top's sum would lose them to rounding.
    """
    whole = logits.logsumexp(dim=-1, keepdim=True)
    others = logits.scatter(-1, tokens, float("-inf")).logsumexp(dim=-1)
    return logits.gather(-1, tokens) - whole, others - whole[..., 0]


def _precise(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype.itemsize < 4 else logits


def _check_logits(logits: Tensor) -> None:
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        kind = logits.dtype if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise TypeError(f"logits must be floating point, got {kind}")
