"""Several prefixes in one batch, gates, and keys that another network computes, in models."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prefixattn import ExternalPrefix, GatedPrefix, Prefix, PrefixBank
from prefixattn.integrations.carrier import KEYWORD

GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}


@pytest.fixture(params=["llama", "mistral", "gpt2", "bloom"])
def found(request: pytest.FixtureRequest, case: Callable[..., Any]) -> Any:
    return case(request.param)


@pytest.fixture
def llama(case: Callable[..., Any]) -> Any:
    return case("llama")


def texts() -> list[Tensor]:
    draw = torch.Generator().manual_seed(5)
    return [torch.randint(2, 90, (1, length), generator=draw) for length in (5, 3)]


def padded(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Row i behind i pads."""
    rows = [[0] * i + row.tolist() for i, row in enumerate(ids)]
    width = max(map(len, rows))
    mask = [[0] * i + [1] * (len(row) - i) for i, row in enumerate(rows)]
    filled = [row + [0] * (width - len(row)) for row in rows]
    return torch.tensor(filled), torch.tensor([m + [0] * (width - len(m)) for m in mask])


@torch.no_grad()
def test_each_row_continues_its_own_text(found: Any, attach: Any) -> None:
    """Two texts of different lengths, and none, in one batch, padded unlike, and with beams."""
    model, rows = found.model, torch.cat([found.input_ids, found.input_ids[:1]])
    before = [*texts(), torch.zeros(1, 0, dtype=torch.long)]
    joined = [torch.cat([t, row[None]], 1) for t, row in zip(before, rows, strict=True)]
    logits = [model(ids).logits[:, -rows.shape[1] :] for ids in joined]
    tokens = [model.generate(ids, **GREEDY)[:, -5:] for ids in joined]
    beams = [model.generate(ids, num_beams=3, **GREEDY)[:, -5:] for ids in joined]
    members = [Prefix.from_text(model, text) for text in texts()]
    bank = PrefixBank(members)
    attach(model, bank)
    with pytest.raises(RuntimeError, match="with bank.use"):
        model(rows)
    with bank.use([0, 1, -1]):
        found.assert_close(model(rows).logits, torch.cat(logits))
        assert torch.equal(model.generate(rows, **GREEDY)[:, -5:], torch.cat(tokens))
        got = model.generate(rows, num_beams=3, **GREEDY)[:, -5:]
        assert torch.equal(got, torch.cat(beams))
        static = model.generate(rows, cache_implementation="static", **GREEDY)[:, -5:]
        assert torch.equal(static, torch.cat(tokens))
        ids, mask = padded(rows)
        out = model(ids, attention_mask=mask).logits
        length = rows.shape[1]
        real = torch.stack([row[i : i + length] for i, row in enumerate(out)])
        found.assert_close(real, torch.cat(logits))
        with pytest.raises(ValueError, match="chosen for 3 rows, but the input has 2"):
            model(rows[:2])
    with bank.use([1]):
        found.assert_close(model(rows[1:2]).logits, logits[1])


def test_rows_that_share_a_member_sum_their_gradients(llama: Any, attach: Any) -> None:
    model, ids = llama.model.requires_grad_(False), llama.input_ids.repeat(2, 1)[:3]
    first, second, idle = (Prefix.random(model, n) for n in (4, 2, 3))
    alone = []
    for prefix, row in ((first, 0), (second, 1), (first, 2)):
        handle = attach(model, prefix)
        prefix.zero_grad()
        model(ids[row : row + 1], labels=ids[row : row + 1]).loss.backward()
        alone.append([p.grad.clone() for p in prefix.parameters()])
        handle.detach()
    first.zero_grad()
    second.zero_grad()
    bank = PrefixBank({"a": first, "b": second, "c": idle})
    attach(model.train(), bank)
    with bank.use(["a", "b", "a"]):
        loss = model(ids, labels=ids).loss * 3  # the mean over rows of equal length
    loss.backward()
    for i, parameter in enumerate(first.parameters()):
        torch.testing.assert_close(parameter.grad, alone[0][i] + alone[2][i])
    for i, parameter in enumerate(second.parameters()):
        torch.testing.assert_close(parameter.grad, alone[1][i])
    assert all(parameter.grad is None for parameter in idle.parameters())


def test_training_names_one_prefix_for_each_row(llama: Any, attach: Any) -> None:
    """Chosen answers above rejected ones are no beams of as many rows."""
    bank = PrefixBank([Prefix.random(llama.model, n) for n in (3, 2)])
    attach(llama.model, bank)
    twice = torch.cat([llama.input_ids, llama.input_ids])
    with bank.use([0, 1]), pytest.raises(ValueError, match="2 rows, .* 4: with gradients name one"):
        llama.model(twice)
    with bank.use([0, 1, 0, 1]):
        logits = llama.model(twice).logits
    torch.testing.assert_close(logits[:2], logits[2:])


@torch.no_grad()
def test_two_texts_that_are_decoded_in_turns(llama: Any, attach: Any) -> None:
    """Each within a `use` of its own, in one thread: refused; one after the other goes on."""
    bank = PrefixBank([Prefix.from_text(llama.model, text) for text in texts()])
    attach(llama.model, bank)
    row = llama.input_ids[:1]
    whole = torch.cat([row, row[:, :1]], 1)
    expected = []
    for member in (0, 1):
        with bank.use([member]):
            expected.append(llama.model(whole).logits[:, -1:])
    caches = []
    with bank.use([0]):
        caches.append(llama.model(row, use_cache=True).past_key_values)
        with bank.use([1]):
            caches.append(llama.model(row, use_cache=True).past_key_values)
            with pytest.raises(RuntimeError, match="began under another `use`"):
                llama.model(row[:, :1], past_key_values=caches[0])
            logits = llama.model(row[:, :1], past_key_values=caches[1]).logits
            llama.assert_close(logits, expected[1])
    with bank.use([0]):  # a chat's next turn
        llama.assert_close(llama.model(row[:, :1], past_key_values=caches[0]).logits, expected[0])


@torch.no_grad()
def test_decoding_builds_no_tables(llama: Any, attach: Any) -> None:
    bank = PrefixBank([Prefix.from_text(llama.model, text) for text in texts()])
    attach(llama.model, bank)
    with bank.use([0, 1]):
        cache = llama.model(llama.input_ids, use_cache=True).past_key_values
        tables = [pair for pair in bank.batch().pairs if pair]
        llama.model(llama.input_ids[:, :1], past_key_values=cache)
        again = [pair for pair in bank.batch().pairs if pair]
    assert all(a[0] is b[0] and a[1] is b[1] for a, b in zip(tables, again, strict=True))


def test_gates(llama: Any, attach: Any) -> None:
    """At zero the model is as it was; open, the prefix is added by head."""
    model = llama.model.requires_grad_(False)
    prefix = GatedPrefix.random(model, 4)
    attach(model, prefix)
    out = model(llama.input_ids, labels=llama.input_ids)
    torch.testing.assert_close(out.logits, llama.plain)  # and positions are kept
    out.loss.backward()
    assert all(gate.grad.abs().max() > 0 for gate in prefix.gates)
    with torch.no_grad():
        prefix.gates[0][1] = 0.5
    assert (model(llama.input_ids).logits - llama.plain).abs().max() > 1e-3
    model.prefixattn = GatedPrefix.gated(prefix, [4, 4])
    torch.testing.assert_close(model(llama.input_ids).logits, llama.plain)


def test_gates_of_another_number_of_heads(llama: Any, attach: Any) -> None:
    plain = Prefix.random(llama.model, 3)
    with pytest.raises(ValueError, match="gate for each of the 4 query heads .* got 2"):
        attach(llama.model, GatedPrefix.gated(plain, [2, 2]))


@torch.no_grad()
def test_some_layers_only(llama: Any, attach: Any) -> None:
    """A layer without a prefix is a layer whose prefix has no tokens; the text still moves."""
    prefix = Prefix.from_text(llama.model, llama.text, layers=[1])
    whole = llama.prefix()
    attach(llama.model, prefix)
    found = llama.model(llama.input_ids).logits
    assert (found - llama.logits).abs().max() > 1e-3
    assert (found - llama.plain).abs().max() > 1e-3
    llama.model.prefixattn = whole
    llama.assert_close(llama.model(llama.input_ids).logits)


def test_keys_of_another_network(llama: Any, attach: Any) -> None:
    """One prefix for each row, computed from a context, with gradients to the network."""
    model = llama.model.requires_grad_(False)
    prefix = ExternalPrefix.for_model(model, 3)
    network = nn.Linear(6, 2 * 2 * 2 * 3 * 8).double()
    context = torch.randn(2, 6, dtype=torch.float64)
    attach(model, prefix)

    def computed(rows: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        keys, values = network(rows).view(-1, 2, 2, 2, 3, 8).unbind(2)  # [B, L, H_kv, P, D]
        return list(keys.unbind(1)), list(values.unbind(1))

    with prefix.use(*computed(context)):
        logits = model(llama.input_ids).logits
        logits.square().mean().backward()
    assert network.weight.grad.abs().max() > 0
    for row in range(2):
        with prefix.use(*computed(context[row : row + 1])):
            alone = model(llama.input_ids[row : row + 1]).logits
        torch.testing.assert_close(alone, logits[row : row + 1])


def a_prefix(model: Any) -> tuple[Any, Any, Tensor]:
    prefix = Prefix.random(model, 3).float()
    return prefix, contextlib.nullcontext(), prefix.keys[0]


def a_gated_one(model: Any) -> tuple[Any, Any, Tensor]:
    prefix = GatedPrefix.random(model, 3).float()
    nn.init.ones_(prefix.gates[0])
    return prefix, contextlib.nullcontext(), prefix.keys[0]


def a_bank(model: Any) -> tuple[Any, Any, Tensor]:
    bank = PrefixBank([Prefix.random(model, n) for n in (3, 2)]).float()
    return bank, bank.use([0, 1]), bank.members["0"].keys[0]


def computed(model: Any) -> tuple[Any, Any, Tensor]:
    prefix = ExternalPrefix.for_model(model, 3)
    keys, values = ([torch.randn(2, 3, 8) for _ in range(2)] for _ in "kv")
    return prefix, prefix.use(keys, values), keys[0]


@pytest.mark.parametrize("make", [a_prefix, a_gated_one, a_bank, computed])
@torch.no_grad()
def test_the_next_token_finds_all_made_until_a_number_changes(
    llama: Any, attach: Any, make: Callable[[Any], tuple[Any, Any, Tensor]]
) -> None:
    """In another dtype than the model's, so that there is something to be made."""
    seen: list[list[Any]] = []
    source, using, numbers = make(llama.model)
    attach(llama.model, source)
    first: Any = llama.model.model.layers[0].self_attn
    first.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs[KEYWORD].entries), with_kwargs=True
    )
    with using:
        cache = llama.model(llama.input_ids, use_cache=True).past_key_values

        def decoded() -> Tensor:
            logits = llama.model(llama.input_ids[:, :1], past_key_values=cache).logits
            cache.crop(-1)
            return logits

        before, same = decoded(), decoded()
        assert all(a is b for a, b in zip(*seen[-2:], strict=True))
        assert seen[-1][0].key.dtype == torch.float64
        numbers.mul_(3)
        after = decoded()
        llama.model(llama.input_ids)  # another text: all is made anew
    assert torch.equal(same, before)
    assert (after - before).abs().max() > 1e-3
    assert torch.equal(seen[-1][0].key, seen[-2][0].key)
    assert not torch.equal(seen[-2][0].key, seen[-3][0].key)
