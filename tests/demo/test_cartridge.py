"""Distillation by hand, to the prefix alone, and the example from end to end."""

import json
import math
import os
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path
from shutil import ignore_patterns
from types import SimpleNamespace

import pytest
import torch
from patience import PATIENCE
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from prefixattn import Prefix, attach
from prefixattn.demo.text import library_root
from prefixattn.distill import (
    conversations,
    distill_step,
    distillation_loss,
    lessons,
    teach,
    top_k_targets,
)

ROOT = Path(__file__).resolve().parents[2]
V = 13
PAD = 0


def random_logits(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(*shape, generator=generator, dtype=torch.float64)


def log_of(*probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()


# The loss


def test_the_loss_written_out():
    teacher, student = log_of(0.5, 0.1, 0.3, 0.1), log_of(0.2, 0.4, 0.3, 0.1)
    targets = top_k_targets(teacher[None] + 7, 2)  # a shift of the logits changes nothing
    assert targets.tokens.tolist() == [[0, 2]]
    torch.testing.assert_close(targets.log_probs, log_of(0.5, 0.3)[None])
    torch.testing.assert_close(targets.rest, log_of(0.2))
    wanted = 0.5 * math.log(0.5 / 0.2) + 0.3 * math.log(0.3 / 0.3) + 0.2 * math.log(0.2 / 0.5)
    assert distillation_loss(student[None] - 2, targets).item() == pytest.approx(wanted, abs=1e-12)


def test_all_but_one_token_is_the_whole_divergence():
    teacher, student = random_logits(2, 5, V, seed=0), random_logits(2, 5, V, seed=1)
    p, q = teacher.softmax(-1), student.softmax(-1)
    wanted = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(
        distillation_loss(student, top_k_targets(teacher, V - 1)), wanted.mean()
    )
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 3] = mask[1, 1] = True
    torch.testing.assert_close(
        distillation_loss(student, top_k_targets(teacher, V - 1), mask), wanted[mask].mean()
    )


def test_fewer_tokens_never_show_more_and_equals_show_nothing():
    teacher, student = random_logits(4, V, seed=2), random_logits(4, V, seed=3)
    losses = [distillation_loss(student, top_k_targets(teacher, k)).item() for k in range(1, V)]
    assert losses == sorted(losses)
    assert losses[0] > 0
    student = teacher.clone().requires_grad_()
    loss = distillation_loss(student, top_k_targets(teacher, 3))
    loss.backward()
    assert abs(loss.item()) < 1e-14
    assert student.grad.abs().max() < 1e-14


def test_the_gradient_is_the_losses_and_falls_on_masked_in_positions_only():
    targets = top_k_targets(random_logits(2, 3, V, seed=4), 4)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    student = random_logits(2, 3, V, seed=5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: distillation_loss(x, targets, mask), student)
    distillation_loss(student, targets, mask).backward()
    assert (student.grad != 0).any(-1).tolist() == mask.tolist()


def test_a_sure_teacher_keeps_the_mass_of_the_rest():
    # one minus the top's probability is exactly zero here, in float32
    targets = top_k_targets(torch.tensor([[60.0, 1.0, 0.0]]), 1)
    assert targets.rest.item() == pytest.approx(math.log(math.e + 1) - 60, rel=1e-6)
    student = torch.tensor([[0.0, 90.0, 0.0]], requires_grad=True)
    loss = distillation_loss(student, targets)
    loss.backward()
    assert loss.item() == pytest.approx(90)
    assert student.grad.isfinite().all()


def test_half_precision_is_summed_in_float32():
    logits = random_logits(1, V, seed=6).bfloat16()
    targets = top_k_targets(logits, 4)
    assert targets.log_probs.dtype == targets.rest.dtype == torch.float32
    torch.testing.assert_close(targets.rest, top_k_targets(logits.float(), 4).rest)


# Conversations


def ids(*tokens):
    return torch.tensor(tokens)


def test_rows_are_padded_and_the_loss_falls_on_what_predicts_the_answer():
    study = conversations([(ids(5, 6), ids(7)), (ids(8), ids(9, 10, 11))], PAD)
    assert study.input_ids.tolist() == [[5, 6, 7, 0], [8, 9, 10, 11]]
    assert study.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert study.answers.int().tolist() == [[0, 1, 0, 0], [1, 1, 1, 0]]


def test_lessons_see_each_conversation_once_a_pass():
    study = conversations([(ids(row + 1), ids(2)) for row in range(5)], PAD)
    targets = top_k_targets(random_logits(5, 2, V, seed=7), 3)

    def drawn(seed):
        batches = lessons(study, targets, 2, torch.Generator().manual_seed(seed))
        return list(islice(batches, 4))

    for batch, answers in drawn(0):
        for row, token in enumerate(batch.input_ids[:, 0].tolist()):
            assert torch.equal(answers.rest[row], targets.rest[token - 1])
    seen = [batch.input_ids[:, 0].tolist() for batch, _ in drawn(0)]
    assert len({*seen[0], *seen[1]}) == len({*seen[2], *seen[3]}) == 4  # the fifth fills no batch
    assert seen == [batch.input_ids[:, 0].tolist() for batch, _ in drawn(0)]
    assert seen != [batch.input_ids[:, 0].tolist() for batch, _ in drawn(1)]


WRONG = {
    "k of the whole vocabulary leaves no rest": (
        lambda: top_k_targets(torch.zeros(2, V), V),
        ValueError,
        r"k must be an integer in \[1, 13\), got 13",
    ),
    "k of none": (lambda: top_k_targets(torch.zeros(2, V), 0), ValueError, "k must be"),
    "token ids in the place of logits": (
        lambda: top_k_targets(torch.zeros(2, V, dtype=torch.long), 1),
        TypeError,
        "logits must be floating point, got torch.int64",
    ),
    "targets of other positions": (
        lambda: distillation_loss(torch.zeros(3, V), top_k_targets(torch.zeros(2, V), 1)),
        ValueError,
        r"targets must be of logits' positions \(3,\), got \(2,\)",
    ),
    "a mask of numbers": (
        lambda: distillation_loss(
            torch.zeros(2, V), top_k_targets(torch.zeros(2, V), 1), torch.ones(2)
        ),
        TypeError,
        "mask must be bool, got torch.float32",
    ),
    "a mask of other positions": (
        lambda: distillation_loss(
            torch.zeros(2, V), top_k_targets(torch.zeros(2, V), 1), torch.ones(1).bool()
        ),
        ValueError,
        r"mask must be of logits' positions \(2,\), got \(1,\)",
    ),
    "a mask of nothing, whose mean is NaN": (
        lambda: distillation_loss(
            torch.zeros(2, V), top_k_targets(torch.zeros(2, V), 1), torch.zeros(2).bool()
        ),
        ValueError,
        "mask must name at least one position",
    ),
    "no conversations": (lambda: conversations([], PAD), ValueError, "pairs must hold"),
    "an answer of no tokens": (
        lambda: conversations([(ids(1), torch.tensor([], dtype=torch.long))], PAD),
        ValueError,
        r"pairs\[0\]: the answer must be token ids \[n\], n >= 1, got \(0,\)",
    ),
    "more rows than conversations, which would never end": (
        lambda: next(
            lessons(
                conversations([(ids(1), ids(2))], PAD),
                top_k_targets(torch.zeros(1, 2, V), 1),
                2,
                torch.Generator(),
            )
        ),
        ValueError,
        r"rows must be an integer in \[1, 1\], got 2",
    ),
    "no rows": (
        lambda: teach(lambda **_: None, conversations([(ids(1), ids(2))], PAD), 1, rows=0),
        ValueError,
        "rows must be at least 1, got 0",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


# With a model


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter *= 8  # so that a context matters
    return model.requires_grad_(False)


DOCUMENT = ids(3, 1, 4, 1, 5, 9, 2, 6)


@pytest.fixture
def study():
    return conversations([(ids(5, 3), ids(5, 8, 9)), (ids(7), ids(9)), (ids(2), ids(6, 4))], PAD)


def test_the_teacher_says_what_the_model_says_behind_the_document(model, study):
    handle = attach(model, Prefix.from_text(model, DOCUMENT))
    try:
        targets = teach(model, study, V - 1, rows=2)
    finally:
        handle.detach()
    for row in range(len(study)):
        real = study.input_ids[row][study.attention_mask[row].bool()]
        logits = model(torch.cat([DOCUMENT, real])[None]).logits[0, len(DOCUMENT) :]
        wanted = top_k_targets(logits, V - 1)
        for part, expected in zip(targets, wanted, strict=True):
            torch.testing.assert_close(part[row, : len(real)], expected, atol=1e-9, rtol=1e-9)
    without = teach(model, study, V - 1)
    assert (without.rest - targets.rest).abs().max() > 0.1


def test_a_step_teaches_the_prefix_and_nothing_else(model, study):
    handle = attach(model, Prefix.from_text(model, DOCUMENT))
    targets = teach(model, study, 4)
    handle.detach()
    prefix = Prefix.from_text(model, DOCUMENT, num_tokens=3, num_frozen_tokens=1)
    start = [(key.clone(), value.clone()) for key, value in prefix()]
    base = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.Adam(prefix.parameters(), lr=2e-2)
    handle = attach(model, prefix)
    losses = [distill_step(model, optimizer, study, targets) for _ in range(30)]
    handle.detach()
    assert losses[-1] < losses[0] / 2
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, base[name])
    for before, after in zip(start, prefix(), strict=True):
        for old, new in zip(before, after, strict=True):
            assert torch.equal(old[:, 0], new[:, 0])  # the sink
            assert (old[:, 1:] != new[:, 1:]).all()


class Recorded(nn.Module):
    """A model that gives the logits it was made with, whose gradient can then be looked at."""

    def __init__(self, logits):
        super().__init__()
        self.weight = nn.Parameter(logits)

    def forward(self, input_ids, attention_mask, use_cache):
        return SimpleNamespace(logits=self.weight)


def test_a_step_counts_the_answers_and_forgets_the_last_gradient(study):
    model = Recorded(random_logits(3, 5, V, seed=8))
    targets = top_k_targets(random_logits(3, 5, V, seed=9), 4)
    model.weight.grad = torch.full_like(model.weight, 1e6)
    before = model.weight.detach().clone()
    loss = distill_step(model, torch.optim.SGD([model.weight], lr=1.0), study, targets)
    wanted = before.clone().requires_grad_()
    expected = distillation_loss(wanted, targets, study.answers)
    (gradient,) = torch.autograd.grad(expected, wanted)
    assert loss == pytest.approx(expected.item())
    torch.testing.assert_close(model.weight.detach(), before - gradient)


# The example


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    text = tmp_path_factory.mktemp("cartridge") / "text"
    for name in ("email", "logging"):
        shutil.copytree(library_root() / name, text / name, ignore=ignore_patterns("__pycache__"))
    shutil.copy(library_root() / "queue.py", text)
    return text


def example(library, *arguments):
    folder = library.parent
    command = [sys.executable, str(ROOT / "examples/cartridge.py"), "--quick", "--text", library]
    command += ["--output", folder / "out", "--cache", folder / "cache", *arguments]
    wide = {**os.environ, "COLUMNS": "140"}
    return subprocess.run(
        command, env=wide, capture_output=True, text=True, timeout=PATIENCE, check=False
    )


def test_the_example_runs_from_end_to_end(library):
    done = example(library)
    assert done.returncode == 0, done.stderr
    for heading in ("bytes per document token", "following text", "KL from the document"):
        assert heading in done.stdout
    out = library.parent / "out"
    report = json.loads((out / "report.json").read_text())
    for asked in ("questions", "following text"):
        scores = {way: report["scores"][way][asked] for way in report["scores"]}
        whole, start = scores["document"], scores["start"]
        assert whole["divergence"] == 0
        assert whole["agreement"] == 1
        assert scores["no context"]["divergence"] > 0
        # the start is the document cut to the cartridge's length
        assert start["divergence"] == pytest.approx(report["shorter"]["16"][asked]["divergence"])
        assert scores["cartridge"] != start
    cartridge = Prefix.from_pretrained(out / "cartridge")
    assert (cartridge.num_tokens, cartridge.num_frozen_tokens) == (16, 1)
    assert (out / "cartridge.png").stat().st_size > 10_000


def test_the_example_refuses_a_document_that_training_sees(library):
    done = example(library, "--document", "logging/__init__.py")
    assert done.returncode == 2
    assert done.stderr.startswith("cartridge: document must be a file that training leaves out")
    assert "queue.py" in done.stderr
