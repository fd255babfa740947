"""A model with a prefix under data, sharded and tensor parallelism, against one process."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from launch import launch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from prefixattn import GatedPrefix, Prefix, PrefixBank, ProjectedPrefix, attach
from prefixattn.checkpoints import load, save

ROWS, TOKENS, LENGTH = 4, 7, 5
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def make_model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config).requires_grad_(False)


def make_prefix(model: Any) -> Prefix:
    return Prefix.random(model, LENGTH, 0.5, torch.Generator().manual_seed(1))


def all_rows() -> Tensor:
    return torch.randint(64, (ROWS, TOKENS), generator=torch.Generator().manual_seed(2))


def own_rows() -> Tensor:
    return all_rows().chunk(dist.get_world_size())[dist.get_rank()]


def step(model: Any, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach()


def on_one_process(make: Callable[[Any], Prefix] = make_prefix) -> tuple[Tensor, list[Tensor]]:
    """The loss over all rows, and the prefix's gradients."""
    model = make_model()
    prefix = make(model)
    attach(model, prefix)
    loss = step(model, all_rows())
    return loss, [parameter.grad for parameter in prefix.parameters()]


def whole(x: Any) -> Tensor:
    """A DTensor's own, all of it."""
    found: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return found


def error_of(prefix: Prefix, expected: list[Tensor]) -> float:
    grads = [whole(p.grad) for p in prefix.parameters()]
    pairs = zip(grads, expected, strict=True)
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in pairs)


def under_ddp() -> float:
    model = make_model()
    prefix = make_prefix(model)
    attach(model, prefix)
    step(DistributedDataParallel(model), own_rows())
    return error_of(prefix, on_one_process()[1])


def test_ddp() -> None:
    assert max(launch(under_ddp, 2)) < 1e-5


def shard(model: Any, per_layer: bool = True, **options: Any) -> None:
    if per_layer:
        for layer in model.model.layers:
            fully_shard(layer, **options)
    fully_shard(model, **options)


HALF = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)}


def under_fsdp() -> dict[str, float]:
    expected = on_one_process()[1]
    found = {}
    for per_layer, checkpointed, half in product((False, True), repeat=3):
        model = make_model()
        prefix = make_prefix(model)
        attach(model, prefix)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        shard(model, per_layer, **(HALF if half else {}))
        for _ in range(2):  # the second forward runs on weights that were freed in between
            prefix.zero_grad()
            step(model, own_rows())
        name = f"layers={per_layer}, checkpointed={checkpointed}, half={half}"
        found[name] = error_of(prefix, expected)
    return found


def test_fsdp2() -> None:
    for found in launch(under_fsdp, 2):
        assert isinstance(found, dict), found
        for name, error in found.items():
            assert error < (0.05 if "half=True" in name else 1e-5), name


NAMES, USED = "abc", ["a", "a", "b", None]


def make_bank(model: Any) -> PrefixBank:
    draws = [torch.Generator().manual_seed(seed) for seed in range(len(NAMES))]
    return PrefixBank(
        {
            name: Prefix.random(model, LENGTH, 0.5, draw)
            for name, draw in zip(NAMES, draws, strict=True)
        }
    )


def bank_error(wrap: Callable[[Any], Any]) -> float:
    """How far a bank's gradients are from one process's, where ranks read different members."""
    model = make_model()
    bank = make_bank(model)
    attach(model, bank)
    with bank.use(USED):
        step(model, all_rows())
    expected = [p.grad if p.grad is not None else torch.zeros_like(p) for p in bank.parameters()]
    model = make_model()
    bank = make_bank(model)
    attach(model, bank)
    wrapped = wrap(model)
    own = len(USED) // dist.get_world_size()
    for _ in range(2):
        bank.zero_grad()
        with bank.use(USED[dist.get_rank() * own :][:own]):
            step(wrapped, own_rows())
    grads = [whole(p.grad) for p in bank.parameters()]
    scale = max(y.abs().max() for y in expected)
    return max(float((x - y).abs().max() / scale) for x, y in zip(grads, expected, strict=True))


def sharded(model: Any) -> Any:
    shard(model)
    return model


def banks() -> dict[str, float]:
    return {"DDP": bank_error(DistributedDataParallel), "FSDP2": bank_error(sharded)}


def test_ranks_may_read_different_members_of_a_bank() -> None:
    for found in launch(banks, 2):
        assert isinstance(found, dict), found
        assert {name: error for name, error in found.items() if not error < 1e-5} == {}


def unreduced() -> list[str]:
    """What is said where nothing would reduce a prefix's gradients."""
    said = []

    def saying(do: Callable[[Any], Any]) -> None:
        try:
            do(make_model())
        except (RuntimeError, NotImplementedError) as error:
            said.append(str(error))
        else:
            said.append("nothing")

    def wrapped_too_early(model: Any) -> None:
        wrapped = DistributedDataParallel(model.requires_grad_(True))
        attach(model, make_prefix(model))
        step(wrapped, own_rows())

    def layers_alone(model: Any) -> None:
        attach(model, make_prefix(model))
        for layer in model.model.layers:
            fully_shard(layer)
        step(model, own_rows())

    def sharded_too_early(model: Any) -> None:
        prefix = make_prefix(model)
        shard(model)
        attach(model, prefix)

    for do in (wrapped_too_early, layers_alone, sharded_too_early):
        saying(do)
    return said


def test_what_nothing_would_reduce_is_refused() -> None:
    for found in launch(unreduced, 2):
        early, layers, late = found
        assert "attach first, then wrap" in early
        assert "fully_shard(model) too" in layers
        assert "before fully_shard" in late


def exported() -> list[float]:
    """How far what was saved of sharded prefixes is from what is in their shards."""
    folder = Path(tempfile.gettempdir(), "prefixattn-test-export")
    found = []
    for name, make in (("prefix", make_prefix), ("network", with_network), ("bank", make_bank)):
        model = make_model()
        prefix: Any = make(model)
        attach(model, prefix)
        shard(model)
        with prefix.use(USED[:2]) if name == "bank" else nullcontext():
            step(model, own_rows())
        prefix.save_pretrained(folder / name)
        members = [prefix] if name != "bank" else list(prefix.members.values())
        for member, label in zip(members, NAMES, strict=False):
            read = Prefix.from_pretrained(
                folder / name / label if name == "bank" else folder / name
            )
            pairs = zip(read.parameters(), map(whole, member.parameters()), strict=True)
            found.append(max(float((x - y).abs().max().detach()) for x, y in pairs))
        if name == "prefix":
            save(prefix, folder / "peft", "peft")
            again: Any = load(folder / "peft")
            found.append(float((again.keys[0] - read.keys[0]).abs().max().detach()))
    return found


def told_of_a_failure() -> str:
    """What each rank is told where rank 0 finds a file in the place of the folder."""
    folder = Path(tempfile.gettempdir(), "prefixattn-test-file")
    if dist.get_rank() == 0:
        folder.touch()
    dist.barrier()
    model = make_model()
    prefix = make_prefix(model)
    attach(model, prefix)
    shard(model)
    try:
        prefix.save_pretrained(folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_a_save_that_fails_ends_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    first, second = launch(told_of_a_failure, 2)
    assert "prefixattn-test-file" in first
    assert second == "RuntimeError: another rank could not save: its own error says why"


def with_network(model: Any) -> Prefix:
    torch.manual_seed(3)
    return ProjectedPrefix.for_model(model, LENGTH, hidden_dim=8)


def test_sharded_prefixes_are_saved_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for found in launch(exported, 2):
        assert isinstance(found, list), found
        assert len(found) == 6
        assert max(found) == 0


def trained_and_saved() -> list[Any]:
    """Two steps, a sharded and a full checkpoint, and a third step; the prefix after that."""
    folder = Path(tempfile.gettempdir(), "prefixattn-test-checkpoint")
    model = make_model()
    prefix = make_prefix(model)
    attach(model, prefix)
    shard(model)
    optimizer = torch.optim.SGD(prefix.parameters(), lr=0.5)
    for number in range(3):
        if number == 2:
            dcp.save(get_model_state_dict(model), checkpoint_id=folder / "sharded")
            whole = StateDictOptions(full_state_dict=True)
            state = get_model_state_dict(model, options=whole)
            if dist.get_rank() == 0:
                torch.save(state, folder / "full.pt")
        step(model, own_rows())
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.full_tensor().tolist() for parameter in prefix.parameters()]


def resumed_from_shards() -> list[Any]:
    return resumed(full=False)


def resumed_from_the_whole() -> list[Any]:
    return resumed(full=True)


def resumed(full: bool) -> list[Any]:
    folder = Path(tempfile.gettempdir(), "prefixattn-test-checkpoint")
    model = make_model()
    prefix = Prefix.zeros(model, LENGTH)
    attach(model, prefix)
    shard(model)
    if full:
        state = torch.load(folder / "full.pt", weights_only=True)
        set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))
    else:
        state = get_model_state_dict(model)
        dcp.load(state, checkpoint_id=folder / "sharded")
        set_model_state_dict(model, state)
    optimizer = torch.optim.SGD(prefix.parameters(), lr=0.5)
    step(model, own_rows())
    optimizer.step()
    return [parameter.full_tensor().tolist() for parameter in prefix.parameters()]


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # for the processes
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "prefixattn-test-checkpoint").mkdir()


@pytest.mark.usefixtures("checkpoint")
def test_a_checkpoint_is_resumed_on_another_number_of_ranks() -> None:
    saved = launch(trained_and_saved, 2)[0]
    assert isinstance(saved, list), saved
    for work in (resumed_from_shards, resumed_from_the_whole):
        for found in launch(work, 4):
            assert isinstance(found, list), found
            for x, y in zip(found, saved, strict=True):
                torch.testing.assert_close(torch.tensor(x), torch.tensor(y), rtol=1e-5, atol=1e-6)


def with_gates(model: Any) -> Prefix:
    gated = GatedPrefix.gated(make_prefix(model), [4, 4])
    with torch.no_grad():
        for gate in gated.gates:
            gate.copy_(torch.tensor([0.5, -0.25, 1.0, 0.75]))
    return gated


def under_tensor_parallelism() -> dict[str, Any]:
    folder = Path(tempfile.gettempdir(), "prefixattn-test-model")
    if dist.get_rank() == 0:
        make_model().save_pretrained(folder)
    dist.barrier()
    ids = all_rows()
    found: dict[str, Any] = {}
    for name, make in (("plain", make_prefix), ("gated", with_gates)):
        loss, grads = on_one_process(make)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
        model.requires_grad_(False)
        prefix = make(model)
        attach(model, prefix)
        found[f"{name}, loss"] = float((step(model, ids) - loss).abs())
        found[f"{name}, gradients"] = error_of(prefix, grads)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    alone = make_model()
    pairs = [Prefix.from_text(m, ids[0])()[0] for m in (model, alone)]
    found["from text"] = float((pairs[0][0] - pairs[1][0]).detach().abs().max())
    said = []
    for each in (model, alone):
        bank = PrefixBank({"one": make_prefix(each), "two": Prefix.from_text(alone, ids[0])})
        attach(each, bank)
        with bank.use(["two", None, "one", "two"]):
            said.append(each.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0))
    found["generated alike"] = torch.equal(*said)
    return found


def test_tensor_parallelism(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for found in launch(under_tensor_parallelism, 2):
        assert isinstance(found, dict), found
        assert found.pop("generated alike") is True
        assert {name: error for name, error in found.items() if not error < 1e-5} == {}
