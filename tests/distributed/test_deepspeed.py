"""A model with a prefix under DeepSpeed's ZeRO-2 and ZeRO-3, against one process."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from launch import launch
from torch import Tensor, nn

from prefixattn import Prefix, ProjectedPrefix, attach

pytest.importorskip("deepspeed", reason="needs DeepSpeed: make test-more brings it")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
STEPS, ROWS, RATE = 4, 4, 0.05


def tuned(kind: str) -> tuple[Any, nn.Module]:
    """A frozen model with something to train, and that."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).requires_grad_(False)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight *= 4
    if kind == "peft":
        tuning = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6)
        wrapped: Any = peft.get_peft_model(model, tuning)
        attach(wrapped)
        return wrapped, wrapped.prompt_encoder
    prefix = Prefix.from_text(model, torch.arange(5, 11)[None])
    if kind == "projected":
        prefix = ProjectedPrefix.for_model(model, 6, hidden_dim=16)
    attach(model, prefix)
    return model, prefix


def trained(part: nn.Module) -> list[Any]:
    return [parameter for parameter in part.parameters() if parameter.requires_grad]


def batches() -> Tensor:
    return torch.randint(2, 90, (STEPS, ROWS, 9), generator=torch.Generator().manual_seed(3))


def alone(kind: str) -> tuple[list[float], list[Tensor]]:
    """The losses of one process, and what it has trained."""
    model, part = tuned(kind)
    optimizer = torch.optim.AdamW(trained(part), lr=RATE)
    losses = []
    for ids in batches():
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, [parameter.detach() for parameter in trained(part)]


def differences(stage: int, kind: str) -> tuple[float, float, float, float]:
    """How far losses and parameters are from one process's, how far training came, and a file."""
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    expected, wanted = alone(kind)
    model, part = tuned(kind)
    start = [parameter.detach().clone() for parameter in trained(part)]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(trained(part), lr=RATE),
        model_parameters=trained(part),
        config={
            "train_micro_batch_size_per_gpu": ROWS // dist.get_world_size(),
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    losses = []
    for ids in batches():
        own = ids.chunk(dist.get_world_size())[dist.get_rank()]
        loss = engine(input_ids=own, labels=own).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
    with deepspeed.zero.GatheredParameters(trained(part)):
        found = [parameter.detach().clone() for parameter in trained(part)]
    saved = found
    if isinstance(part, Prefix):
        folder = Path(tempfile.gettempdir(), f"prefixattn-test-{stage}-{kind}")
        part.save_pretrained(folder)
        saved = [x.detach() for x in trained(Prefix.from_pretrained(folder))]

    def apart(some: list[Tensor], others: list[Tensor]) -> float:
        return max(float((a - b).abs().max()) for a, b in zip(some, others, strict=True))

    off = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    return off, apart(found, wanted), apart(found, start), apart(saved, found)


def two_prefix() -> Any:
    return differences(2, "prefix")


def two_peft() -> Any:
    return differences(2, "peft")


def three_prefix() -> Any:
    return differences(3, "prefix")


def three_projected() -> Any:
    return differences(3, "projected")


def three_peft() -> Any:
    return differences(3, "peft")


@pytest.mark.parametrize("work", [two_prefix, two_peft, three_prefix, three_projected, three_peft])
def test_it_trains_as_one_process_does(
    work: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # for the processes
    for result in launch(work, 2):
        assert not isinstance(result, str), result
        losses, parameters, way, saved = result
        assert saved == 0
        assert losses < 1e-5
        assert parameters < 1e-3 < 0.05 < way
