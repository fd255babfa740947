"""A small model that uses what stands in its context, for examples and benchmarks.

The demo's base gains 0.02 nats per token from a document in context, too little to distil. This one
has its tokenizer and its architecture, and is trained to look things up, in two parts:

- drills: short random token rows that repeat, so that looking back is the only thing to learn
  (induction heads: Olsson et al., 2022);
- readings: functions of one library file, then excerpts of them in random order.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from prefixattn.demo import base
from prefixattn.demo.base import warm_then_fall
from prefixattn.demo.cache import cached, recipe
from prefixattn.demo.settings import BaseSizes
from prefixattn.demo.text import Module


@dataclass(frozen=True)
class ReaderSizes:
    """The reader and its training; ``model.steps`` and ``model.context`` are the readings'."""

    model: BaseSizes = field(
        default_factory=lambda: BaseSizes(
            hidden_size=128, num_layers=3, num_heads=4, steps=700, batch=4, context=512
        )
    )
    drill_steps: int = 500
    drill_rows: int = 16
    drill_tokens: int = 128
    document_tokens: int = 320
    excerpts: int = 8  # of each document
    excerpt_lines: int = 4
    seed: int = 0

    @property
    def steps(self) -> int:
        """Steps of both parts."""
        return self.drill_steps + self.model.steps


# It runs, and has learned nothing.
TINY = ReaderSizes(
    model=BaseSizes(
        vocab_size=512, hidden_size=32, num_layers=2, num_heads=2, steps=6, batch=2, context=128
    ),
    drill_steps=6,
    drill_rows=4,
    drill_tokens=32,
    document_tokens=64,
)


def cached_reader(
    root: Path,
    modules: Sequence[Module],
    tokenizer: PreTrainedTokenizerFast,
    sizes: ReaderSizes,
    report: Callable[[float], None],
    say: Callable[[str], None],
) -> Path:
    """The folder of a reader trained on ``modules``, from the cache where it is there.

    ``report`` gets each training step's loss. Load it with `prefixattn.demo.base.load_base`.
    """

    def build(folder: Path) -> None:
        train_reader(modules, tokenizer, sizes, report).save_pretrained(folder)

    sources = (*base.SOURCES, Path(__file__))
    key = recipe(sources, text=base.text_digest(modules), sizes=asdict(sizes))
    return cached(root, "reader", key, build, say)


def train_reader(
    modules: Sequence[Module],
    tokenizer: PreTrainedTokenizerFast,
    sizes: ReaderSizes,
    report: Callable[[float], None],
) -> LlamaForCausalLM:
    """Train a Llama from scratch on drills, then on readings of ``modules``."""
    torch.manual_seed(sizes.seed)
    generator = torch.Generator().manual_seed(sizes.seed)
    model = LlamaForCausalLM(base._config(tokenizer, sizes.model))
    optimizers = base._optimizers(model, sizes.model)
    schedules = [
        LambdaLR(optimizer, lambda step: warm_then_fall(step, sizes.steps))
        for optimizer in optimizers
    ]
    tokens = reading_tokens(modules, tokenizer, sizes)
    for rows in chain(drills(tokens, sizes, generator), readings(tokens, sizes, generator)):
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), base.GRADIENT_NORM)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        report(loss.item())
    return model


def drills(tokens: Tensor, sizes: ReaderSizes, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows that repeat with a period of their own; every other one is of random tokens.

    The others are of the text's, so that the model learns its words beside looking back.
    """
    length = sizes.drill_tokens
    for _ in range(sizes.drill_steps):
        rows = []
        for row in range(sizes.drill_rows):
            period = _draw(length // 8, length // 2, generator)
            if row % 2:
                start = _draw(0, len(tokens) - period, generator)
                part = tokens[start : start + period]
            else:
                part = torch.randint(sizes.model.vocab_size, (period,), generator=generator)
            rows.append(part.repeat(length // period + 1)[:length])
        yield torch.stack(rows)


def readings(tokens: Tensor, sizes: ReaderSizes, generator: torch.Generator) -> Iterator[Tensor]:
    """Windows of the readings in random order, used up before any is repeated."""
    rows, context = sizes.model.batch, sizes.model.context
    count = len(tokens) // context
    if count < rows:
        raise ValueError(f"modules: got {len(tokens)} tokens of readings, need {rows * context}")
    windows = tokens[: count * context].view(count, context)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(sizes.model.steps):
        if len(order) < rows:
            order = torch.randperm(count, generator=generator)
        yield windows[order[:rows]]
        order = order[rows:]


def reading_tokens(
    modules: Sequence[Module], tokenizer: PreTrainedTokenizerFast, sizes: ReaderSizes
) -> Tensor:
    """All readings in one row: a document, its excerpts, each closed by the end token.

    Each document comes twice, with other excerpts, in random order.
    """
    rng = random.Random(sizes.seed)
    whole = [text for module in modules for text in documents(module, tokenizer, sizes)] * 2
    rng.shuffle(whole)
    texts = [text for document in whole for text in (document, *excerpts(document, sizes, rng))]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in [*ids, tokenizer.eos_token_id]])


def documents(module: Module, tokenizer: PreTrainedTokenizerFast, sizes: ReaderSizes) -> list[str]:
    """The module's documented functions, as many together as ``document_tokens`` hold."""
    if not module.documented:
        return []
    encoded = tokenizer(list(module.documented), add_special_tokens=False)["input_ids"]
    groups: list[list[str]] = [[]]
    filled = 0
    for text, ids in zip(module.documented, encoded, strict=True):
        if len(ids) > sizes.document_tokens:
            continue
        if filled + len(ids) > sizes.document_tokens:
            groups.append([])
            filled = 0
        groups[-1].append(text)
        filled += len(ids)
    return ["\n\n".join(group) for group in groups if group]


def excerpts(document: str, sizes: ReaderSizes, rng: random.Random) -> list[str]:
    """A few consecutive lines each, from places drawn without repeats."""
    lines = [line for line in document.split("\n") if line.strip()]
    places = range(max(1, len(lines) - sizes.excerpt_lines + 1))
    starts = rng.sample(places, min(sizes.excerpts, len(places)))
    return ["\n".join(lines[start : start + sizes.excerpt_lines]).lstrip() for start in starts]


def _draw(low: int, high: int, generator: torch.Generator) -> int:
    """An integer in ``[low, high)``."""
    return int(torch.randint(low, high, (1,), generator=generator))
