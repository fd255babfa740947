"""The demo's base model: a byte-level tokenizer and a small Llama, trained on library source."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefixattn.demo import text
from prefixattn.demo.cache import cached, recipe
from prefixattn.demo.settings import BaseSizes
from prefixattn.demo.text import Module

END, PAD = "<|end|>", "<|pad|>"
GRADIENT_NORM = 1.0
SOURCES = (Path(text.__file__), Path(__file__))  # a change of these makes cached models stale


def cached_tokenizer(
    root: Path, modules: Sequence[Module], sizes: BaseSizes, say: Callable[[str], None]
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `modules`, from the cache where it is there."""

    def build(folder: Path) -> None:
        train_tokenizer(modules, sizes.vocab_size).save_pretrained(folder)

    key = recipe(SOURCES, text=text_digest(modules), vocab_size=sizes.vocab_size)
    folder = cached(root, "tokenizer", key, build, say)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def train_tokenizer(modules: Sequence[Module], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with two special tokens, `END` and `PAD`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((module.text for module in modules), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def cached_base(
    root: Path,
    modules: Sequence[Module],
    tokenizer: PreTrainedTokenizerFast,
    sizes: BaseSizes,
    seed: int,
    report: Callable[[float], None],
    say: Callable[[str], None],
) -> Path:
    """The folder of a base model trained on `modules`, from the cache where it is there.

    `report` gets each training step's loss. Load the model with `load_base`.
    """

    def build(folder: Path) -> None:
        model = train_base(modules, tokenizer, sizes, seed, report)
        model.save_pretrained(folder)

    key = recipe(SOURCES, text=text_digest(modules), sizes=asdict(sizes), seed=seed)
    return cached(root, "base", key, build, say)


def load_base(folder: Path) -> LlamaForCausalLM:
    """The base model in evaluation mode, frozen, in float32, with PyTorch's own attention."""
    model = LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    )
    return model.eval().requires_grad_(False)


def train_base(
    modules: Sequence[Module],
    tokenizer: PreTrainedTokenizerFast,
    sizes: BaseSizes,
    seed: int,
    report: Callable[[float], None],
) -> LlamaForCausalLM:
    """Train a Llama from scratch on the documented functions of `modules`."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(_config(tokenizer, sizes))
    optimizers = _optimizers(model, sizes)
    schedules = [
        LambdaLR(optimizer, lambda step: warm_then_fall(step, sizes.steps))
        for optimizer in optimizers
    ]
    for rows in _batches(_token_stream(modules, tokenizer), sizes, seed):
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        report(loss.item())
    return model


def warm_then_fall(step: int, steps: int) -> float:
    """The learning rate's factor: linear up over a twentieth of the steps, then down to a tenth."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 1 - 0.9 * (step - warm) / max(1, steps - warm)


def text_digest(modules: Sequence[Module]) -> str:
    """SHA-256 of the modules' paths and texts."""
    digest = hashlib.sha256()
    for module in modules:
        digest.update(f"{module.path}\0{module.text}\0".encode())
    return digest.hexdigest()


def _config(tokenizer: PreTrainedTokenizerFast, sizes: BaseSizes) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.hidden_size * 8 // 3 // 32 * 32,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_key_value_heads,
        max_position_embeddings=4 * sizes.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _optimizers(model: LlamaForCausalLM, sizes: BaseSizes) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for the rest: a third of AdamW's steps to one loss."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        hidden = parameter.ndim == 2 and "embed_tokens" not in name
        (matrices if hidden else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=sizes.matrix_lr, weight_decay=0.0),
        torch.optim.AdamW(others, lr=sizes.other_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _token_stream(modules: Sequence[Module], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """All documented functions' tokens in one row, each closed by the end token: `[tokens]`.

    A model this small learns most from the text that its task is about. The functions stand here
    as they are in the library: docstring first, then the body, and no marker.
    """
    functions = [text for module in modules for text in module.documented]
    encoded = tokenizer(functions, add_special_tokens=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in [*ids, tokenizer.eos_token_id]])


def _batches(tokens: Tensor, sizes: BaseSizes, seed: int) -> Iterator[Tensor]:
    """`sizes.steps` batches `[batch, context]`: windows in random order, used up before repeats."""
    count = len(tokens) // sizes.context
    if count < sizes.batch:
        wanted = sizes.batch * sizes.context
        raise ValueError(
            f"modules: got {len(tokens)} tokens of documented functions, need {wanted}"
        )
    windows = tokens[: count * sizes.context].view(count, sizes.context)
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(sizes.steps):
        if len(order) < sizes.batch:
            order = torch.randperm(count, generator=generator)
        yield windows[order[: sizes.batch]]
        order = order[sizes.batch :]
