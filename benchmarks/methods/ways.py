"""The methods: each makes a base model ready to be trained, and knows how to be saved.

All prefixes and soft prompts have the same number of tokens; everything else is each method's
customary form (PEFT's defaults where PEFT has it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import Tensor, nn

from prefixattn import GatedPrefix, Prefix, ProjectedPrefix, attach
from prefixattn.demo.base import load_base
from prefixattn.demo.task import IGNORED, Batch
from prefixattn.distill import distillation_loss, top_k_targets

HIDDEN = 256  # width of the small networks that compute a prefix or a prompt
LORA = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
LORA_SHARE = 0.03  # of the rate, where a prefix trains beside: its numbers are much larger
TOP_K = 20  # logits that a cartridge's teacher passes on, as in the paper
Loss = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Start:
    """What a method may begin from.

    Attributes:
        base: the base model's folder.
        text: solved examples, ``num_tokens`` tokens.
        shots: as many solved examples as the base can have in context.
        num_tokens: of a prefix or a soft prompt.
        seed: of what is drawn.
    """

    base: Path
    text: list[int]
    shots: list[int]
    num_tokens: int
    seed: int

    def model(self) -> Any:
        """The frozen base."""
        return load_base(self.base)

    def prefix(self) -> Prefix:
        """The keys and values of the text."""
        return Prefix.from_text(self.model(), torch.tensor(self.text))


@dataclass
class Ready:
    """A model that is ready to be trained.

    Attributes:
        model: what is called, and generates.
        save: writes what the task adds to the base into a folder.
        groups: trained parameters, each with its part of the learning rate.
        loss: of a batch; None: the model's own.
    """

    model: Any
    save: Callable[[Path], object]
    groups: list[tuple[list[nn.Parameter], float]] = field(default_factory=list)
    loss: Loss | None = None

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [parameter for group, _ in self.groups for parameter in group]


@dataclass(frozen=True)
class Method:
    """A way to adapt the base; `rates` are the learning rates to try first, none: untrained."""

    prepare: Callable[[Start], Ready]
    rates: tuple[float, ...] = ()


def _trained(model: Any, save: Callable[[Path], object], share: float = 1.0) -> Ready:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return Ready(model, save, [(parameters, share)])


def untrained(start: Start) -> Ready:
    """The base as it is."""
    return Ready(start.model(), lambda folder: None)


def in_context(start: Start) -> Ready:
    """Solved examples before every prompt, read once: their keys and values are a prefix."""
    prefix = Prefix.from_text(start.model(), torch.tensor(start.shots))
    model = start.model()
    attach(model, prefix.requires_grad_(False))
    return Ready(model, prefix.save_pretrained)


def full(start: Start) -> Ready:
    """Every weight."""
    model = start.model().requires_grad_(True)
    return _trained(model, model.save_pretrained)


def with_peft(config: Callable[[int], PeftConfig]) -> Callable[[Start], Ready]:
    """A method of PEFT's; ``config`` gets the number of virtual tokens."""

    def prepare(start: Start) -> Ready:
        model = get_peft_model(start.model(), config(start.num_tokens))
        return _trained(model, model.save_pretrained)

    return prepare


def prompt_from_text(start: Start) -> Ready:
    """PEFT's prompt tuning, from the text's embeddings."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=start.num_tokens)
    model = get_peft_model(start.model(), config)
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(torch.tensor(start.text))
        model.prompt_encoder["default"].embedding.weight.copy_(embeddings)
    return _trained(model, model.save_pretrained)


def with_prefix(make: Callable[[Start], Prefix]) -> Callable[[Start], Ready]:
    """A prefix of ours; what is saved is a plain prefix, folded where a network computes it."""

    def prepare(start: Start) -> Ready:
        model, prefix = start.model(), make(start)
        attach(model, prefix)

        def save(folder: Path) -> None:
            whole = prefix.folded() if isinstance(prefix, ProjectedPrefix) else prefix
            whole.save_pretrained(folder)

        return _trained(model, save)

    return prepare


def gated(start: Start) -> Prefix:
    """LLaMA-Adapter's form: the text's keys and values behind gates that start at zero."""
    prefix = start.prefix()
    heads = start.model().config.num_attention_heads
    return GatedPrefix.gated(prefix, [heads] * len(prefix.layer_shapes))


def projected(start: Start) -> Prefix:
    """The reparameterisation of Li & Liang, 2021."""
    torch.manual_seed(start.seed)
    return ProjectedPrefix.for_model(start.model(), start.num_tokens, hidden_dim=HIDDEN)


def at_random(start: Start) -> Prefix:
    """As PEFT draws it."""
    generator = torch.Generator().manual_seed(start.seed)
    return Prefix.random(start.model(), start.num_tokens, generator=generator)


def lora_and_prefix(start: Start) -> Ready:
    """Both at once, saved in one folder."""
    model, prefix = get_peft_model(start.model(), LORA), start.prefix()
    lora = [p for p in model.parameters() if p.requires_grad]
    attach(model, prefix)
    return Ready(model, model.save_pretrained, [(lora, LORA_SHARE), (list(prefix.parameters()), 1)])


def cartridge(start: Start) -> Ready:
    """A prefix that learns what the base says of the examples' answers with the shots in context.

    It begins as the shots' first tokens, and never sees an answer as a label.
    """
    teacher = in_context(start).model.eval()
    shots = torch.tensor(start.shots)
    tokens = min(start.num_tokens, len(shots))
    prefix = Prefix.from_text(start.model(), shots, num_tokens=tokens, num_frozen_tokens=1)
    student = start.model()
    attach(student, prefix)

    def loss(batch: Batch) -> Tensor:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        answered = batch["labels"].roll(-1, dims=1) != IGNORED  # a prompt is at least a token
        with torch.no_grad():
            targets = top_k_targets(teacher(**inputs, use_cache=False).logits, TOP_K)
        logits = student(**inputs, use_cache=False).logits
        return distillation_loss(logits, targets, answered)

    return Ready(student, prefix.save_pretrained, [(list(prefix.parameters()), 1)], loss)


def _prefix_tuning(projection: bool) -> Callable[[int], PeftConfig]:
    width = HIDDEN if projection else None
    return lambda tokens: PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=tokens,
        prefix_projection=projection,
        encoder_hidden_size=width,
    )


def _p_tuning(tokens: int) -> PeftConfig:
    return PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=tokens, encoder_hidden_size=HIDDEN
    )


# Every learning rate that a search may come to; it starts from three neighbours.
LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)
WEIGHTS = (3e-4, 1e-3, 3e-3)  # for a model's own weights
NETWORKS = (1e-3, 3e-3, 1e-2)  # for networks beside it, and LoRA
EMBEDDINGS = (1e-2, 3e-2, 1e-1)  # for the embeddings of a prompt
NUMBERS = (3e-2, 1e-1, 3e-1)  # for keys and values themselves
METHODS: dict[str, Method] = {
    "untrained base": Method(untrained),
    "in context": Method(in_context),
    "full fine-tuning": Method(full, WEIGHTS),
    "LoRA": Method(with_peft(lambda tokens: LORA), NETWORKS),
    "prompt tuning": Method(prompt_from_text, EMBEDDINGS),
    "P-tuning": Method(with_peft(_p_tuning), NETWORKS),
    "prefix, from text": Method(with_prefix(Start.prefix), NUMBERS),
    "prefix, from zeros": Method(
        with_prefix(lambda start: Prefix.zeros(start.model(), start.num_tokens)), NUMBERS
    ),
    "prefix, random": Method(with_prefix(at_random), NUMBERS),
    "prefix, MLP": Method(with_prefix(projected), NETWORKS),
    "prefix, PEFT": Method(with_peft(_prefix_tuning(False)), NUMBERS),
    "prefix, MLP, PEFT": Method(with_peft(_prefix_tuning(True)), NETWORKS),
    "LoRA + prefix": Method(lora_and_prefix, NUMBERS),
    "LLaMA-Adapter gate": Method(with_prefix(gated), NUMBERS),
    "cartridge": Method(cartridge, NUMBERS),
}


def trained(names: Sequence[str]) -> list[str]:
    """Of these methods the ones that have a learning rate."""
    return [name for name in names if METHODS[name].rates]
