"""A bank of prefixes: what each row reads, what is kept in memory, and what is refused."""

import contextlib
import copy
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import PATIENCE
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from prefixattn import prefix_attention
from prefixattn.bank import PrefixBank
from prefixattn.gated import GatedPrefix
from prefixattn.layers import LayerShape, PrefixBatch
from prefixattn.prefix import Prefix
from prefixattn.projected import ProjectedPrefix

SHAPES = [LayerShape(2, 8, 8), LayerShape(1, 4, 6)]
LENGTHS = (3, 5, 2)
TOKEN_BYTES = 4 * sum(shape.width for shape in SHAPES)


def member(num_tokens: int, **options: Any) -> Prefix:
    return Prefix(
        [torch.randn(s.num_heads, num_tokens, s.key_dim) for s in SHAPES],
        [torch.randn(s.num_heads, num_tokens, s.value_dim) for s in SHAPES],
        **options,
    )


@pytest.fixture
def members() -> list[Prefix]:
    torch.manual_seed(0)
    return [member(n) for n in LENGTHS]


@pytest.fixture
def folder(members: list[Prefix], tmp_path: Path) -> Path:
    for name, prefix in zip("abc", members, strict=True):
        prefix.save_pretrained(tmp_path / name)
    return tmp_path


def text(rows: int, layer: int) -> list[Tensor]:
    """Some query, key and value."""
    shape = SHAPES[layer]
    draw = torch.Generator().manual_seed(1)
    return [
        torch.randn(rows, heads, 2, dim, generator=draw)
        for heads, dim in (
            (2 * shape.num_heads, shape.key_dim),
            (shape.num_heads, shape.key_dim),
            (shape.num_heads, shape.value_dim),
        )
    ]


def attend(batch: PrefixBatch, rows: int, layer: int = 0) -> Tensor:
    """The attention of some rows in one layer."""
    return attention(batch, *text(rows, layer), layer=layer)


def attention(batch: PrefixBatch, *text: Tensor, layer: int = 0) -> Tensor:
    pair = batch.pairs[layer]
    assert pair is not None
    return prefix_attention(
        *text,
        *pair,
        prefix_index=batch.index,
        prefix_lengths=batch.lengths,
        is_causal=True,
        implementation="reference",
    )


def expected(rows: list[tuple[Prefix, ...]], layer: int = 0) -> Tensor:
    """Each row by itself, with its prefixes concatenated and nothing padded."""
    found = []
    shape = SHAPES[layer]
    for i, prefixes in enumerate(rows):
        pieces = [prefix()[layer] for prefix in prefixes]
        empty = (
            torch.zeros(shape.num_heads, 1, shape.key_dim),
            torch.zeros(shape.num_heads, 1, shape.value_dim),
        )
        key, value = (
            torch.cat([piece[half] for piece in pieces] or [empty[half]], dim=1)[None]
            for half in (0, 1)
        )
        index = torch.full((len(rows),), 0 if pieces else -1)
        found.append(attend(PrefixBatch([(key, value)] * 2, index), len(rows), layer)[i])
    return torch.stack(found)


# What each row reads


@pytest.mark.parametrize("trains", [True, False], ids=["gradients", "inference"])
@pytest.mark.parametrize("where", ["modules", "folders", "both"])
def test_each_row_reads_its_own(
    members: list[Prefix], folder: Path, trains: bool, where: str
) -> None:
    on_disk = {"modules": "", "folders": "abc", "both": "b"}[where]
    bank = PrefixBank(
        {
            name: folder / name if name in on_disk else prefix
            for name, prefix in zip("abc", members, strict=True)
        }
    )
    a, b, c = members
    with torch.set_grad_enabled(trains), bank.use([0, "c", -1, None, (0, "b", 2), 0]):
        batch = bank.batch()
        for layer in (0, 1):
            found = attend(batch, 6, layer)
            rows = [(a,), (c,), (), (), (a, b, c), (a,)]
            torch.testing.assert_close(found, expected(rows, layer))


@pytest.mark.parametrize("trains", [True, False], ids=["gradients", "inference"])
def test_no_row_reads_anything(members: list[Prefix], trains: bool) -> None:
    bank = PrefixBank(members)
    with torch.set_grad_enabled(trains), bank.use([-1, None]):
        torch.testing.assert_close(attend(bank.batch(), 2), expected([(), ()]))


def test_layers_without_a_prefix() -> None:
    bank = PrefixBank([member(n, layers=[0, 2], num_layers=4) for n in (3, 1)])
    assert bank.layer_shapes == [SHAPES[0], None, SHAPES[1], None]
    for trains in (True, False):
        with torch.set_grad_enabled(trains), bank.use([1, 0]):
            pairs = bank.batch().pairs
        assert [pair is None for pair in pairs] == [False, True, False, True]


# Training


def test_gradients_sum_over_rows_that_share_a_member(members: list[Prefix]) -> None:
    members[1].requires_grad_(False)
    bank = PrefixBank(members)
    with bank.use([0, 1, 0, -1]):
        attend(bank.batch(), 4).square().sum().backward()
    found = members[0].keys[0].grad
    members[0].zero_grad()
    expected([(members[0],), (members[1],), (members[0],), ()]).square().sum().backward()
    torch.testing.assert_close(found, members[0].keys[0].grad)
    assert all(p.grad is None for prefix in members[1:] for p in prefix.parameters())


def test_entries_are_stacked_once_and_not_per_row(members: list[Prefix]) -> None:
    bank = PrefixBank(members)
    with bank.use([0, 2] * 50):
        key, _ = bank.batch().pairs[0]  # type: ignore[misc]
        assert key.shape == (2, 2, 3, 8)


def test_two_selections_before_one_backward(members: list[Prefix]) -> None:
    """Frozen members beside something that trains: no table may change under autograd."""
    scale = torch.ones((), requires_grad=True)
    bank = PrefixBank([prefix.requires_grad_(False) for prefix in members], capacity=1)
    losses = []
    for row in (0, 1):
        with bank.use([row]):
            pair = bank.batch().pairs[0]
            assert pair is not None
            losses.append((pair[0] * scale).square().sum())
    sum(losses).backward()
    total = sum(prefix()[0][0].square().sum() for prefix in members[:2])
    torch.testing.assert_close(scale.grad, 2 * total)


def test_a_step_of_training_shows_in_inference(members: list[Prefix]) -> None:
    bank = PrefixBank(members)
    optimizer = torch.optim.SGD(bank.parameters(), lr=1.0)
    with bank.use([0]):
        with torch.no_grad():
            before = attend(bank.batch(), 1)
        attend(bank.batch(), 1).sum().backward()
        optimizer.step()
        with torch.no_grad():
            after = attend(bank.batch(), 1)
            members[0].keys[0].data.zero_()  # which nothing counts, as after some training steps
        attend(bank.batch(), 1)
        with torch.no_grad():
            last = attend(bank.batch(), 1)
    assert not torch.equal(before, after)
    assert not torch.equal(after, last)
    torch.testing.assert_close(last, expected([(members[0],)]))


@torch.no_grad()
def test_a_change_without_gradients_shows_too(members: list[Prefix]) -> None:
    bank = PrefixBank(members)
    with bank.use([0]):
        before = attend(bank.batch(), 1)
        members[0].keys[0].zero_()
        after = attend(bank.batch(), 1)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, expected([(members[0],)]))


def test_members_of_other_kinds() -> None:
    torch.manual_seed(0)
    projected, dropped = ProjectedPrefix(SHAPES, 3, 4, 5), member(4, dropout=0.5)
    bank = PrefixBank([projected, dropped])
    with bank.use([0, 1]):
        key = bank.batch().pairs[0][0]  # type: ignore[index]
        assert (key[1] == 0).float().mean() > 0.2
        with torch.no_grad():
            torch.testing.assert_close(
                attend(bank.batch(), 2), expected([(projected,), (dropped,)])
            )
        key.sum().backward()
    assert projected.embedding.weight.grad is not None


# Inference


@torch.no_grad()
def test_nothing_is_built_while_the_selection_stays(members: list[Prefix]) -> None:
    bank = PrefixBank(members)
    with bank.use([0, 1]):
        first = bank.batch()
        assert bank.batch() is first
        with bank.use([2, 2]):
            assert bank.batch().pairs[0][0] is first.pairs[0][0]  # type: ignore[index]
        assert bank.batch() is first


@torch.no_grad()
def test_swapping_members_does_not_recompile(members: list[Prefix], folder: Path) -> None:
    members += [member(n) for n in (1, 4)]
    bank = PrefixBank({str(i): prefix for i, prefix in enumerate(members)}, capacity=2)
    bank.add("disk", folder / "a")
    counts = CompileCounter(), CompileCounter()
    inputs = text(2, 0)
    given = torch.compile(lambda b: attention(b, *inputs), backend=counts[0], fullgraph=True)
    called = torch.compile(
        lambda: attention(bank.batch(), *inputs), backend=counts[1], fullgraph=True
    )
    for rows in ([0, 1], [2, 0], [3, 4], [-1, 1], [4, 4], [0, 5]):
        with bank.use(rows):
            chosen = [() if row < 0 else ([*members, members[0]][row],) for row in rows]
            torch.testing.assert_close(given(bank.batch()), expected(chosen))
            torch.testing.assert_close(called(), expected(chosen))
    assert [count.frame_count for count in counts] == [1, 1]


@torch.inference_mode()
def test_inference_mode_leaves_usable_tables(members: list[Prefix]) -> None:
    bank = PrefixBank(members)
    with bank.use([0]):
        bank.batch()
    with torch.inference_mode(False), torch.no_grad(), bank.use([1]):
        torch.testing.assert_close(attend(bank.batch(), 1), expected([(members[1],)]))


@torch.no_grad()
def test_tables_grow_for_longer_rows_and_more_of_them(members: list[Prefix]) -> None:
    bank = PrefixBank(members, capacity=1)
    with bank.use([0]):
        with bank.use([(0, 1), 2, 1]):
            assert bank.num_tokens == 8
            rows = [(members[0], members[1]), (members[2],), (members[1],)]
            torch.testing.assert_close(attend(bank.batch(), 3), expected(rows))
        torch.testing.assert_close(attend(bank.batch(), 1), expected([(members[0],)]))
    assert bank.num_tokens == 5


# `use`


def test_use_nests_and_comes_back_after_an_exception(members: list[Prefix]) -> None:
    bank = PrefixBank(members)
    with torch.no_grad(), bank.use([0]):
        outer = attend(bank.batch(), 1)
        with contextlib.suppress(KeyError), bank.use([1]):
            assert not torch.equal(attend(bank.batch(), 1), outer)
            raise KeyError
        assert torch.equal(attend(bank.batch(), 1), outer)
    with pytest.raises(RuntimeError, match="within `with bank.use"):
        bank.batch()


def test_another_thread_sees_what_is_in_use(members: list[Prefix]) -> None:
    """As where text is streamed out of a thread that generates."""
    bank, found = PrefixBank(members), []

    @torch.no_grad()
    def generate() -> None:
        found.append(attend(bank.batch(), 1))

    with bank.use([2]):
        thread = threading.Thread(target=generate)
        thread.start()
        thread.join(PATIENCE)
    torch.testing.assert_close(found[0], expected([(members[2],)]))


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([0, 3], IndexError, r"place must be in \[0, 3\).*got 3"),
        ([-2], IndexError, "got -2"),
        ([(0, -1)], IndexError, "or a whole row -1, got -1"),
        (["d"], KeyError, "no bank member is named 'd'"),
        ([], ValueError, "one member for each row of the batch, got none"),
        (0, TypeError, "one member for each row of the batch, got 0"),
        ("a", TypeError, "one member for each row of the batch, got 'a'"),
        ([True], TypeError, "place or name, got True"),
        ([0.5], TypeError, "place or name, got 0.5"),
    ],
)
def test_wrong_rows(members: list[Prefix], rows: Any, error: type[Exception], message: str) -> None:
    bank = PrefixBank(members)
    with pytest.raises(error, match=message):
        bank.use(rows)


@torch.no_grad()
def test_rows_out_of_a_tensor(members: list[Prefix]) -> None:
    bank = PrefixBank(members)
    with bank.use(torch.tensor([1, -1])):  # type: ignore[arg-type]
        assert bank.batch().index.tolist() == [0, -1]  # type: ignore[union-attr]


def test_a_closed_bank(members: list[Prefix]) -> None:
    bank = PrefixBank(members)
    with bank.use([0]), pytest.raises(RuntimeError, match="cannot be closed within"):
        bank.close()
    bank.close()
    with pytest.raises(RuntimeError, match="was closed"):
        bank.use([0])


# Files


@torch.no_grad()
def test_members_are_loaded_when_used_and_evicted_within_the_budget(folder: Path) -> None:
    bank = PrefixBank.from_folder(folder, budget_bytes=2 * 5 * TOKEN_BYTES)
    assert bank.names == ["a", "b", "c"]
    assert bank.loaded == []
    with bank.use(["a"]):
        assert bank.loaded == ["a"]
        with bank.use(["b"]):
            assert bank.loaded == ["a", "b"]
            with pytest.raises(ValueError, match="3 entries in use.*budget_bytes"):
                bank.use(["c"]).__enter__()
    with bank.use(["a"]):
        pass
    with bank.use(["c"]):
        assert bank.loaded == ["a", "c"]  # b was used longest ago
    (folder / "a" / "prefix.safetensors").unlink()
    with bank.use(["b", "a"]):
        assert bank.loaded == ["a", "b"]  # a makes no room for b, though used longer ago than c
    with bank.use([("b", "c")]):
        assert bank.loaded == ["b", "c"]
    with bank.use(["b", "c"]):  # two short slots in place of a long one
        assert bank.loaded == ["b", "c"]


@torch.no_grad()
def test_a_member_in_memory_needs_no_file(members: list[Prefix], folder: Path) -> None:
    bank = PrefixBank.from_folder(folder)
    with bank.use(["a"]):
        pass
    (folder / "a" / "prefix.safetensors").unlink()
    with bank.use(["a"]):
        torch.testing.assert_close(attend(bank.batch(), 1), expected([(members[0],)]))


def changed(folder: Path) -> None:
    member(3).save_pretrained(folder)


def truncated(folder: Path) -> None:
    file = folder / "prefix.safetensors"
    file.write_bytes(file.read_bytes()[:-20])


def removed(folder: Path) -> None:
    (folder / "prefix.safetensors").unlink()


@pytest.mark.parametrize(
    ("harm", "error", "message"),
    [
        (changed, ValueError, "member 'a'.*has changed since it was opened"),
        (truncated, ValueError, "member 'a'.*has changed since it was opened"),
        (removed, FileNotFoundError, "member 'a'.*no prefix.safetensors"),
    ],
)
def test_a_file_that_is_harmed_meanwhile(
    members: list[Prefix], folder: Path, harm: Any, error: type[Exception], message: str
) -> None:
    bank = PrefixBank.from_folder(folder)
    harm(folder / "a")
    with pytest.raises(error, match=message), bank.use(["a"]):
        raise AssertionError("this must not run")
    with torch.no_grad(), bank.use(["b"]):
        torch.testing.assert_close(attend(bank.batch(), 1), expected([(members[1],)]))


def test_a_file_that_is_damaged_from_the_start(folder: Path) -> None:
    truncated(folder / "a")
    with pytest.warns(UserWarning, match="member 'a'.*truncated") as warned:
        bank = PrefixBank({"a": folder / "a", "b": folder / "b"})
    assert warned[0].filename == __file__
    with pytest.raises(ValueError, match="member 'a'.*truncated"):
        bank.use(["a"])
    with bank.use(["b"]):
        assert bank.loaded == ["b"]
    with pytest.raises(ValueError, match="member 'a'.*truncated"):
        bank.save_pretrained(folder / "new")
    assert not (folder / "new").exists()


def test_a_bank_is_not_saved_over_a_larger_one(tmp_path: Path, members: list[Prefix]) -> None:
    PrefixBank(members).save_pretrained(tmp_path)
    PrefixBank(members).save_pretrained(tmp_path)
    with pytest.raises(FileExistsError, match=r"members that this bank does not have, \['2'\]"):
        PrefixBank(members[:2]).save_pretrained(tmp_path)


def test_a_saved_bank_keeps_order_and_names(tmp_path: Path, folder: Path) -> None:
    many: list[Any] = [member(1 + i % 3) for i in range(11)]
    bank = PrefixBank([*many, folder / "a"])
    bank.save_pretrained(tmp_path / "bank")
    back = PrefixBank.from_folder(tmp_path / "bank")
    assert back.names == [str(i) for i in range(12)]
    for rows in ([10, 2], [11]):
        with torch.no_grad(), bank.use(rows), back.use(rows):
            count = len(rows)
            assert torch.equal(attend(bank.batch(), count), attend(back.batch(), count))
    back.save_pretrained(tmp_path / "bank")  # onto itself
    with back.use([5]):  # whose file has not changed
        assert back.num_tokens == 3


# What a bank accepts, and what becomes of it


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (list, ValueError, "at least one prefix"),
        (lambda: member(2), TypeError, "members must be several, got one Prefix"),
        (lambda: [3], TypeError, "member '0' must be a Prefix or a folder, got a int"),
        (lambda: ["/no/where"], FileNotFoundError, "member '0': no folder /no/where"),
        (lambda: {"a/b": member(2)}, ValueError, "that of a folder, got 'a/b'"),
        (
            lambda: [member(2), Prefix([torch.ones(2, 2, 8)], [torch.ones(2, 2, 8)])],
            ValueError,
            "member '1' must have layers like the others",
        ),
        (
            lambda: [GatedPrefix.gated(member(2), [4, 2])],
            ValueError,
            "member '0' has gates",
        ),
    ],
)
def test_wrong_members(wrong: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PrefixBank(wrong())


def test_members_added_later(members: list[Prefix]) -> None:
    bank = PrefixBank(members[:1])
    with pytest.raises(ValueError, match="'0' is there already"):
        bank.add("0", members[1])
    with torch.no_grad():
        with bank.use([0]):
            bank.batch()
        bank.add("long", members[1])
        with bank.use(["long", 0]):
            rows = [(members[1],), (members[0],)]
            torch.testing.assert_close(attend(bank.batch(), 2), expected(rows))


@torch.no_grad()
def test_tables_follow_the_module(folder: Path) -> None:
    bank = PrefixBank.from_folder(folder).to(torch.bfloat16)
    with bank.use(["a"]):
        assert bank.batch().pairs[0][0].dtype == torch.bfloat16  # type: ignore[index]
        with bank.use(["b"]):
            bank.double()
            assert bank.batch().pairs[0][0].dtype == torch.float64  # type: ignore[index]
        assert bank.batch().pairs[0][0].dtype == torch.float64  # type: ignore[index]


@torch.no_grad()
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda bank: pickle.loads(pickle.dumps(bank))],
    ids=["copy", "pickle"],
)
def test_copies_are_their_own(members: list[Prefix], duplicate: Any) -> None:
    bank = PrefixBank(members)
    with bank.use([0]):
        before = attend(bank.batch(), 1)
        other = duplicate(bank)
        with pytest.raises(RuntimeError, match="within `with bank.use"):
            other.batch()
        other.members["0"].values[0].zero_()
        with other.use([0]):
            assert not torch.equal(attend(other.batch(), 1), before)
        assert torch.equal(attend(bank.batch(), 1), before)
    assert next(iter(bank.state_dict())) == "members.0.keys.0"
