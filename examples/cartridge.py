"""A cartridge: a document distilled into a short prefix, held against the document itself.

    python examples/cartridge.py                    # minutes at first, then under one
    python examples/cartridge.py --document os.py --tokens 32 --seed 1

A small model that can look things up (`prefixattn.demo.reader`) reads a standard-library file that
no training saw. A prefix of 64 tokens starts as the document's first tokens and learns by
self-study to say what the model says that has the whole document in context (Eyuboglu et al., 2025,
"Cartridges"). Both are then asked what the study did not ask:

- questions: lines of the document that opened no conversation, to be continued. The document was
  studied, as a cartridge's always is; these ways into it were not;
- following text: what stands after the document in the same file, which nothing has seen.

It prints tables and leaves ``report.json``, ``cartridge.png`` and the cartridge itself, which
``prefixattn.Prefix.from_pretrained`` loads.
"""

import argparse
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here is downloaded

import torch
from findings import START, TRAINED, WHOLE, WITHOUT, Findings, Score, save, show
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from prefixattn import Prefix, attach
from prefixattn.demo.base import cached_tokenizer, load_base
from prefixattn.demo.cache import default_folder
from prefixattn.demo.reader import TINY, ReaderSizes, cached_reader
from prefixattn.demo.text import Module, library_root, read_library
from prefixattn.distill import Conversations, conversations, distill_step, lessons, teach


@dataclass(frozen=True)
class Settings:
    """The run's options and sizes. ``seed`` draws the questions and the study, not the reader.

    ``lr``, ``frozen_tokens`` and ``top_k`` are those of the Cartridges paper and its code.
    """

    document: str = "queue.py"
    tokens: int = 64
    seed: int = 0
    output: Path = Path("prefixattn-cartridge")
    cache: Path = field(default_factory=default_folder)
    text: Path | None = None  # Python source to learn from; None: the running Python's library
    document_tokens: int = 448  # with a conversation they fill the reader's context
    frozen_tokens: int = 1
    lr: float = 2e-2
    top_k: int = 20
    steps: int = 200
    rows: int = 16
    prompt_tokens: int = 6
    answer_tokens: int = 34
    samples: int = 4  # conversations sampled from each studied line, beside the one in the text
    held_out_turn: int = 3  # one line in three is a question
    measure_every: int = 25
    shown: int = 3  # questions whose greedy answers are printed
    shown_tokens: int = 16
    reader: ReaderSizes = field(default_factory=ReaderSizes)

    def __post_init__(self) -> None:
        fewest, most = self.frozen_tokens + 1, self.document_tokens - 1
        if not fewest <= self.tokens <= most:
            raise ValueError(f"tokens must be in [{fewest}, {most}], got {self.tokens}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in [0, 2**63), got {self.seed}")


QUICK = Settings(
    tokens=16,
    document_tokens=96,
    steps=8,
    samples=1,
    measure_every=4,
    reader=TINY,
)


@dataclass(frozen=True)
class Document:
    """A file's tokens: the document, what follows it, and where the document's lines start."""

    ids: Tensor
    following: Tensor
    studied: list[int]
    questions: list[int]


def read_document(
    module: Module, tokenizer: PreTrainedTokenizerFast, settings: Settings
) -> Document:
    """Cut the functions of ``module``, and set some of the document's lines aside as questions."""
    encoded = tokenizer(list(module.documented), add_special_tokens=False)["input_ids"]
    ids = [token for function in encoded for token in [*function, tokenizer.eos_token_id]]
    length, span = settings.document_tokens, settings.prompt_tokens + settings.answer_tokens
    if len(ids) < length + span:
        raise ValueError(
            f"document must have at least {length + span} tokens of documented functions, "
            f"{module.path} has {len(ids)}"
        )
    breaks = ["\n" in tokenizer.decode([token]) for token in ids[:length]]
    lines = [i + 1 for i in range(length - span) if breaks[i] and not breaks[i + 1]]
    random.Random(settings.seed).shuffle(lines)
    questions = lines[:: settings.held_out_turn]
    whole = torch.tensor(ids)
    studied = [line for line in lines if line not in questions]
    return Document(whole[:length], whole[length : length + 16 * span], studied, questions)


class Asker:
    """Makes conversations of a text: the end token and a few tokens, then what comes next."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, settings: Settings) -> None:
        self.settings = settings
        self.end = torch.tensor([tokenizer.eos_token_id])
        self.pad: int = tokenizer.pad_token_id

    def prompts(self, text: Tensor, starts: Sequence[int]) -> Tensor:
        """``[starts, 1 + prompt_tokens]``."""
        size = self.settings.prompt_tokens
        return torch.stack([torch.cat([self.end, text[at : at + size]]) for at in starts])

    def read(self, text: Tensor, starts: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Conversations whose answers are the text itself."""
        skip, size = self.settings.prompt_tokens, self.settings.answer_tokens
        answers = [text[at + skip : at + skip + size] for at in starts]
        return list(zip(self.prompts(text, starts), answers, strict=True))

    @torch.no_grad()
    def sampled(self, model: LlamaForCausalLM, prompts: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Conversations whose answers the model draws from what it would say."""
        size = self.settings.answer_tokens
        rows = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            top_k=0,
            min_new_tokens=size,
            max_new_tokens=size,
            pad_token_id=self.pad,
        )
        split = prompts.shape[1]
        return [(row[:split], row[split:]) for row in rows]

    @torch.no_grad()
    def greedy(self, model: LlamaForCausalLM, prompts: Tensor) -> Tensor:
        """The model's answers ``[prompts, shown_tokens]``."""
        rows = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            max_new_tokens=self.settings.shown_tokens,
            pad_token_id=self.pad,
        )
        answers: Tensor = rows[:, prompts.shape[1] :]
        return answers


@contextmanager
def attached(model: LlamaForCausalLM, prefix: Prefix) -> Iterator[None]:
    """With ``prefix`` before all that ``model`` reads."""
    handle = attach(model, prefix)
    try:
        yield
    finally:
        handle.detach()


class Exam:
    """What the study did not ask, and how near anyone's answers are to the whole document's.

    Made while ``model`` has the whole document in context.

    Attributes:
        asked: the conversations, by name.
        posed: the prompts ``[shown, 1 + prompt_tokens]`` of the first few questions.
        scores, answers: of those examined so far, by way.
    """

    def __init__(self, model: LlamaForCausalLM, document: Document, asker: Asker) -> None:
        span = asker.settings.prompt_tokens + asker.settings.answer_tokens
        follows = range(0, len(document.following) - span + 1, span)
        questions = asker.read(document.ids, document.questions)
        self.asked = {
            "questions": conversations(questions, asker.pad),
            "following text": conversations(asker.read(document.following, follows), asker.pad),
        }
        self.posed = torch.stack([prompt for prompt, _ in questions[: asker.settings.shown]])
        self.scores: dict[str, dict[str, Score]] = {}
        self.answers: dict[str, Tensor] = {}
        self._asker = asker
        self._model = model
        self._expected = {name: self._log_probs(part) for name, part in self.asked.items()}

    def examine(self, way: str) -> None:
        """Note the scores and the greedy answers of the model as it is now."""
        self.scores[way] = self.score()
        self.answers[way] = self._asker.greedy(self._model, self.posed)

    def score(self) -> dict[str, Score]:
        """Of the model as it is now, by name of what is asked."""
        scores = {}
        for name, part in self.asked.items():
            expected, given = self._expected[name], self._log_probs(part)
            real = part.input_ids.roll(-1, dims=1)[part.answers]
            agree = expected.argmax(dim=-1) == given.argmax(dim=-1)
            scores[name] = Score(
                divergence=(expected.exp() * (expected - given)).sum(dim=-1).mean().item(),
                agreement=agree.float().mean().item(),
                loss=-given.gather(-1, real[:, None]).mean().item(),
            )
        return scores

    @torch.no_grad()
    def _log_probs(self, part: Conversations) -> Tensor:
        """``[answer tokens, V]``."""
        output = self._model(input_ids=part.input_ids, attention_mask=part.attention_mask)
        logits: Tensor = output.logits[part.answers]
        return logits.log_softmax(dim=-1)


def prepare(
    settings: Settings, progress: Progress
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, Module]:
    """The reader, its tokenizer, and the file that holds the document, which no training saw."""

    def say(line: str) -> None:
        progress.console.print(line, highlight=False, markup=False)

    root = settings.text or library_root()
    train, held_out = read_library(root).split()
    files = {module.path: module for module in held_out}
    if settings.document not in files:
        raise ValueError(
            f"document must be a file that training leaves out, got {settings.document!r}; "
            f"those of {root} are {', '.join(sorted(files))}"
        )
    sizes = settings.reader
    tokenizer = cached_tokenizer(settings.cache, train, sizes.model, say)
    bar = progress.add_task("the reader", total=sizes.steps, note="")

    def report(loss: float) -> None:
        progress.update(bar, advance=1, note=f"{loss:.3f}")

    folder = cached_reader(settings.cache, train, tokenizer, sizes, report, say)
    progress.update(bar, completed=sizes.steps)
    return load_base(folder), tokenizer, files[settings.document]


def run(settings: Settings, console: Console) -> Findings:
    """All of it; what is found is saved and shown."""
    columns = (BarColumn(bar_width=12), MofNCompleteColumn(), TimeElapsedColumn())
    note = TextColumn("{task.fields[note]}")
    with Progress(TextColumn("{task.description}"), *columns, note, console=console) as progress:
        model, tokenizer, module = prepare(settings, progress)
        started = time.perf_counter()
        torch.manual_seed(settings.seed)
        document = read_document(module, tokenizer, settings)
        asker = Asker(tokenizer, settings)
        bar = progress.add_task("distilling", total=settings.steps, note="")

        def report(loss: float) -> None:
            progress.update(bar, advance=1, note=f"{loss:.4f}")

        findings, cartridge = distil(model, tokenizer, document, asker, report)
        findings.seconds = time.perf_counter() - started
        cartridge.save_pretrained(settings.output / "cartridge")
        save(findings, settings.output)
    show(findings, console)
    console.print(f"Cartridge, picture and report: {settings.output}/")
    return findings


def distil(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    document: Document,
    asker: Asker,
    report: Callable[[float], None],
) -> tuple[Findings, Prefix]:
    """Teach a cartridge, and ask it and its rivals what it was not taught."""
    settings = asker.settings
    whole = Prefix.from_text(model, document.ids)
    with attached(model, whole):
        study = self_study(model, document, asker)
        targets = teach(model, study, settings.top_k)
        exam = Exam(model, document, asker)
        exam.examine(WHOLE)
    exam.examine(WITHOUT)
    shorter = {}
    for tokens in range(settings.tokens, settings.document_tokens, settings.tokens):
        with attached(model, Prefix.from_text(model, document.ids, num_tokens=tokens)):
            shorter[tokens] = exam.score()

    cartridge = Prefix.from_text(
        model, document.ids, num_tokens=settings.tokens, num_frozen_tokens=settings.frozen_tokens
    )
    optimizer = torch.optim.Adam(cartridge.parameters(), lr=settings.lr)
    generator = torch.Generator().manual_seed(settings.seed)
    batches = lessons(study, targets, min(settings.rows, len(study)), generator)
    with attached(model, cartridge):
        exam.examine(START)
        curve = {0: exam.scores[START]}
        for step, (batch, answers) in enumerate(islice(batches, settings.steps), start=1):
            report(distill_step(model, optimizer, batch, answers))
            if step % settings.measure_every == 0:
                curve[step] = exam.score()
        exam.examine(TRAINED)
    shapes = [shape for shape in whole.layer_shapes if shape is not None]
    findings = Findings(
        settings=asdict(settings),
        conversations=len(study),
        layer_bytes=[shape.width * whole.keys[0].element_size() for shape in shapes],
        asked_tokens={name: int(part.answers.sum()) for name, part in exam.asked.items()},
        scores=exam.scores,
        shorter=shorter,
        curve=curve,
        questions=tokenizer.batch_decode(exam.posed[:, 1:]),
        answers={
            way: tokenizer.batch_decode(ids, skip_special_tokens=True)
            for way, ids in exam.answers.items()
        },
    )
    return findings, cartridge


def self_study(model: LlamaForCausalLM, document: Document, asker: Asker) -> Conversations:
    """Conversations that studied lines open: the text's own, and some the model has with itself.

    The model has the whole document in context.
    """
    prompts = asker.prompts(document.ids, document.studied)
    pairs = asker.read(document.ids, document.studied)
    pairs += asker.sampled(model, prompts.repeat(asker.settings.samples, 1))
    return conversations(pairs, asker.pad)


def parse(arguments: Sequence[str]) -> Settings:
    """The command line's settings."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--document", help="a held-out file of the library")
    parser.add_argument("--tokens", type=int, help="of the cartridge")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--output", type=Path, help="folder for what is left")
    parser.add_argument("--cache", type=Path, help="folder for the tokenizer and the reader")
    parser.add_argument("--text", type=Path, help="folder of Python source to learn from")
    parser.add_argument("--quick", action="store_true", help="minute sizes: shows that it runs")
    given = {k: v for k, v in vars(parser.parse_args(arguments)).items() if v is not None}
    base = QUICK if given.pop("quick") else Settings()
    return Settings(**{**vars(base), **given})


def main(arguments: Sequence[str]) -> int:
    """Run it; the exit status."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        run(parse(arguments), Console())
    except ValueError as error:
        print(f"cartridge: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was finished is whole", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
