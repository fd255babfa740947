"""One tiny model with a text that becomes its prefix, and what the model itself says of both."""

import copy
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

import prefixattn
from prefixattn import Prefix

from . import oracle

P = 5
LENGTH = 11
PAD = 3
TOLERANCE = 2e-5  # of the largest logit: some models round to float32 on the way
TEXT_ALONE = 0.1  # of the same, and that loosely: bfloat16 comes by here
EFFECT = 1e-2  # of the same: a prefix that changes less shows nothing


class UnavailableError(Exception):
    """transformers itself cannot do this with this model."""


class RefusedError(Exception):
    """prefixattn does not do this, and says why."""


class Specimen:
    """A causal model; ``logits [2, LENGTH, V]`` are the stock model's behind the text."""

    def __init__(self, model: Any) -> None:
        self.stock = model
        generator = torch.Generator().manual_seed(0)
        self.text = torch.randint(2, 90, (1, P), generator=generator)
        self.ids = torch.randint(2, 90, (2, LENGTH), generator=generator)
        self.joined = self.behind_text(self.ids)
        self.generate_is_odd: str | None = None  # why, once it is known
        self._prefix: Any = None

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a model is asked of: two rows."""
        return {"input_ids": self.ids}

    @cached_property
    def logits(self) -> Tensor:
        """``[2, LENGTH, V]``: the truth."""
        with torch.no_grad():
            return self.ask_behind(self.behind)

    @cached_property
    def plain(self) -> Tensor:
        """``[2, LENGTH, V]``: what the stock model says where there is no text before."""
        with torch.no_grad():
            return self.ask(self.forward)

    @property
    def scale(self) -> float:
        return float(self.logits.abs().max())

    def forward(self, model: Any) -> Tensor:
        """``[2, LENGTH, V]``: what a model says of the input, its prefix seen if it has one."""
        return model(**self.inputs).logits

    def loss(self, model: Any) -> Tensor:
        """What a model is trained by."""
        return model(input_ids=self.ids, labels=self.ids, use_cache=False).loss

    def behind(self, model: Any) -> Tensor:
        """The same as `forward` of a stock model, for which the text stands before the input."""
        logits = model(input_ids=self.joined).logits
        alone = model(input_ids=self.text).logits
        if (logits[:1, :P] - alone).abs().max() > TEXT_ALONE * alone.abs().max():
            raise ValueError("its text sees what is behind it")
        return logits[:, P:]

    def inputs_behind(self, model: Any) -> dict[str, Any]:
        """What a stock model is asked for the same answer."""
        return {"input_ids": self.joined}

    def behind_text(self, ids: Tensor) -> Tensor:
        return torch.cat([self.text.expand(len(ids), -1), ids], dim=1)

    def ask(self, question: Callable[[Any], Any]) -> Any:
        """What the stock model answers; it may be unable to."""
        try:
            return question(copy.deepcopy(self.stock))
        except Exception as error:
            raise UnavailableError(f"{type(error).__name__}: {error}") from error

    def ask_behind(self, question: Callable[[Any], Any]) -> Any:
        """The same, where the input stands behind the text."""

        def split(model: Any) -> Any:
            oracle.split_mixers(model, P)
            return question(model)

        return self.ask(split)

    @torch.no_grad()
    def check_padding(self) -> None:
        """Raise where layers that are no attention take padding for text."""
        if oracle.mixers(self.stock):
            stock = self.ask(lambda m: m(**padded(self.ids, left=PAD)).logits[:, PAD:])
            if self.compare(stock, self.plain):
                raise UnavailableError("without a prefix, too, its state takes padding for text")

    def prefix(self) -> Any:
        """The text as a prefix."""
        if self._prefix is None:
            self._prefix = self.make_prefix()
        return copy.deepcopy(self._prefix)

    def make_prefix(self) -> Any:
        return Prefix.from_text(copy.deepcopy(self.stock), self.text)

    def changed(self, change: Callable[[Prefix], Any]) -> Any:
        """The prefix with each of its parts changed."""
        return change(self.prefix())

    def attached(self, model: Any = None, prefix: nn.Module | None = None) -> Any:
        """A copy of the model with the text as its prefix, or another one."""
        model = copy.deepcopy(self.stock) if model is None else model
        prefixattn.attach(model.requires_grad_(False), self.prefix() if prefix is None else prefix)
        return model

    def compare(self, found: Tensor, expected: Tensor | None = None) -> str | None:
        """What is wrong with ``found`` logits, or None."""
        return unlike(found, self.logits if expected is None else expected, self.scale)


def unlike(found: Tensor, expected: Tensor, scale: float) -> str | None:
    """What is wrong with ``found``, whose largest values are as large as ``scale``."""
    if found.shape != expected.shape:
        return f"shape {tuple(found.shape)}, not {tuple(expected.shape)}"
    error = float((found - expected).abs().max()) / scale
    return None if error <= TOLERANCE else f"off by {error:.0e} of the largest"


Situation = Callable[[Any], str | None]


def first(*findings: str | None) -> str | None:
    """The first thing that is wrong."""
    return next((finding for finding in findings if finding is not None), None)


def padded(ids: Tensor, *, left: int = 0, right: int = 0) -> dict[str, Tensor]:
    """Inputs with padding at the sides of every row."""
    pad = torch.nn.functional.pad
    mask = torch.ones_like(ids)
    return {
        "input_ids": pad(ids, (left, right)),
        "attention_mask": pad(mask, (left, right)),
    }
