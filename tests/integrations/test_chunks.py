"""Layers that attend in chunks, where a row holds several documents or a mask of the caller's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from prefixattn import Prefix, PrefixBank

POLICIES = [
    {"prefix_in_window": window, "positions": places}
    for window in ("positions", "visible")
    for places in ("shift", "keep")
]
LENGTHS = {
    "where a chunk ends": [7, 13],
    "within a chunk": [4, 12],
    "three, one of them short": [1, 10, 9],
}


@pytest.fixture
def chunked(case: Callable[..., Any]) -> Any:
    return case("llama4_text")


@pytest.fixture(params=POLICIES, ids=lambda policy: "-".join(policy.values()))
def policy(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = request.param
    return found


def packed(lengths: list[int]) -> dict[str, Any]:
    """A row of documents, and what transformers tells them by."""
    ids = torch.randint(2, 90, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    places = torch.cat([torch.arange(n) for n in lengths])[None]
    return {"input_ids": ids, "position_ids": places, "use_cache": False}


def documents(row: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
    return row.split(lengths, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_packed_is_what_its_documents_are(
    chunked: Any, attach: Any, policy: dict[str, Any], lengths: list[int]
) -> None:
    row = packed(lengths)
    attach(chunked.model, chunked.prefix(), **policy)
    found = documents(chunked.model(**row).logits, lengths)
    for one, ids in zip(found, documents(row["input_ids"], lengths), strict=True):
        assert (one - chunked.model(ids).logits).abs().max() <= chunked.tolerance


@torch.no_grad()
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_packed_is_text_behind_text(chunked: Any, attach: Any, lengths: list[int]) -> None:
    """The token-prefix identity, of each document."""
    row = packed(lengths)
    texts = [torch.cat([chunked.text, x], 1) for x in documents(row["input_ids"], lengths)]
    expected = [chunked.model(x).logits[:, chunked.text.shape[1] :] for x in texts]
    attach(chunked.model, chunked.prefix())
    found = chunked.model(**row).logits
    assert (found - torch.cat(expected, 1)).abs().max() <= chunked.tolerance


@torch.no_grad()
def test_rows_of_their_own_and_layers_without(
    chunked: Any, attach: Any, policy: dict[str, Any]
) -> None:
    lengths = [9, 11]
    row = packed(lengths)
    other = Prefix.from_text(chunked.model, chunked.input_ids[:1, :3])
    row["input_ids"] = row["input_ids"].expand(2, -1).clone()
    row["input_ids"][1] = row["input_ids"][1].flip(0)
    row["position_ids"] = row["position_ids"].expand(2, -1)
    bank = PrefixBank([chunked.prefix(), other])
    few = Prefix.from_text(chunked.model, chunked.text, layers=[0, 1])
    for prefix in (bank, few):
        handle = attach(chunked.model, prefix, **policy)
        with bank.use([1, 0]):
            found = chunked.model(**row).logits.split(lengths, dim=1)
            for one, ids in zip(found, documents(row["input_ids"], lengths), strict=True):
                assert (one - chunked.model(ids).logits).abs().max() <= chunked.tolerance
        handle.detach()


@torch.no_grad()
def test_packed_while_compiling(chunked: Any, attach: Any) -> None:
    row = packed([9, 11])
    attach(chunked.model, chunked.prefix())
    expected = chunked.model(**row).logits
    found = torch.compile(chunked.model, backend="aot_eager")(**row).logits
    assert (found - expected).abs().max() <= chunked.tolerance


@torch.no_grad()
def test_a_mask_of_the_callers_rules_the_text(chunked: Any, attach: Any) -> None:
    """Text and prefix that are few enough lie in one chunk, where both policies say the same."""
    P, N = chunked.text.shape[1], 2
    joined = chunked.joined()[:, : P + N]
    seen = torch.ones(P + N, P + N, dtype=torch.bool).tril()
    seen[P + 1, P] = False
    bias = torch.zeros(2, 1, P + N, P + N, dtype=torch.double).masked_fill(~seen, -1e30)
    places = torch.arange(P + N).expand(2, -1)
    expected = chunked.model(joined, attention_mask=bias, position_ids=places).logits[:, P:]
    given = {"attention_mask": bias[:, :, P:, P:], "position_ids": places[:, :N]}
    handle = attach(chunked.model, chunked.prefix(), prefix_in_window="visible")
    found = chunked.model(joined[:, P:], **given).logits
    handle.detach()
    chunked.assert_close(found, expected)
    attach(chunked.model, chunked.prefix())
    with pytest.raises(NotImplementedError, match="a caller's 4D mask behind a prefix that counts"):
        chunked.model(joined[:, P:], **given)
