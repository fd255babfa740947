"""The families that are promised, in every situation; and the page that tells of all of them."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import prefixattn

from . import table
from .cells import cell, examine, situations_of, specimen_of
from .families import Family
from .specimen import Specimen

ENCODERS = ("bert", "roberta", "distilbert", "modernbert", "neomme")
DOCS = Path(__file__).parents[2] / "docs"
CAUSAL = (
    "gpt2 opt gpt_neox gpt_bigcode llama mistral mixtral qwen2 qwen3 qwen3_moe gemma gemma2 "
    "gemma3_text phi3 gpt_oss cohere2 olmo2 glm4 llama4_text gemma4_text deepseek_v3 nemotron "
    "stablelm qwen3_next falcon bloom"
).split()
PROMISED = [
    *(Family(name, "causal") for name in CAUSAL),
    *(Family(name, "encoder") for name in ENCODERS),
    *(Family(name, "encoder-decoder") for name in ("bart", "t5")),
    Family("qwen2_5_vl", "multimodal"),
]
SLOW = {"compile"}
# A chunk of the text cannot be told from a caller's mask, once a prefix counts as text.
REFUSED = {("llama4_text", "4D mask")}


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()


def faults(family: Family, **changes: Any) -> dict[str, str]:
    """The cells that are neither exact nor beyond transformers itself."""
    found = {
        name: told
        for name, told in examine(family, without=SLOW, **changes)
        if not told.startswith(("exact", "n/a")) or name == table.WHOLE
    }
    for name, told in list(found.items()):
        if told.startswith("refused") and (family.name, name) in REFUSED:
            del found[name]
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", PROMISED, ids=lambda family: f"{family.name}-{family.kind}")
def test_a_promised_family_is_exact(family: Family) -> None:
    assert faults(family) == {}


@pytest.mark.filterwarnings("ignore")
def test_phi3_is_exact_with_a_window() -> None:
    assert faults(Family("phi3", "causal"), sliding_window=9) == {}


def dropped(model: Any, prefix: Any) -> None:
    prefixattn.attach(model, prefix).detach()


def louder(model: Any, prefix: Any) -> None:
    with torch.no_grad():
        for key in prefix.keys:
            key.mul_(1.1)
    prefixattn.attach(model, prefix)


def kept_places(model: Any, prefix: Any) -> None:
    prefixattn.attach(model, prefix, positions="keep")


# What each breaks, of the situations that hold one forward or a text against the truth.
BREAKS: dict[str, Callable[[Any, Any], None]] = {
    "the prefix is dropped": dropped,
    "its keys are a tenth too large": louder,
    "the text is not moved behind it": kept_places,
}
LOOKS = (
    "no mask, left pad, right pad, position_ids, packed, embeds, 4D mask, greedy, greedy pad"
).split(", ")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("broken", BREAKS)
def test_a_broken_prefix_is_seen(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def attached(s: Specimen, model: Any = None, prefix: Any = None) -> Any:
        model = copy.deepcopy(s.stock) if model is None else model
        BREAKS[broken](model.requires_grad_(False), s.prefix() if prefix is None else prefix)
        return model

    monkeypatch.setattr(Specimen, "attached", attached)
    family = Family("llama", "causal")
    s, situations = specimen_of(family), situations_of(family.kind)
    seen = {name: cell(situations[name], s) for name in situations if name in LOOKS}
    assert [name for name, told in seen.items() if not told.startswith("WRONG")] == []


def test_the_page_says_what_the_run_found() -> None:
    results = json.loads((DOCS / "families.json").read_text())
    assert table.as_json(results) == (DOCS / "families.json").read_text()
    assert table.as_markdown(results) == (DOCS / "families.md").read_text()
    assert table.faults(results["families"]) == []
