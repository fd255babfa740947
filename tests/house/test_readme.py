"""The README's code runs as it stands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def model_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model where the README says `path/to/model`."""
    monkeypatch.chdir(tmp_path)
    words = Tokenizer(models.BPE(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator([README.read_text()], trainer)
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(
        "path/to/model"
    )
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained("path/to/model")


def test_there_is_a_block_for_each_use() -> None:
    assert len(BLOCKS) == 3


@pytest.mark.usefixtures("model_folder")
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block_runs(number: int) -> None:
    names: dict[str, object] = {}
    exec(compile(BLOCKS[number], f"README block {number}", "exec"), names)
    if number == 0:
        prefix = names["prefix"]
        assert isinstance(prefix, torch.nn.Module)
        assert any(x.abs().sum() > 0 for x in prefix.parameters())
    if number == 1:
        assert names["prefix_key"].grad.shape == (3, 4, 32, 64)  # type: ignore[attr-defined]


def test_the_number_of_families_is_that_of_the_table() -> None:
    page, results = ROOT / "docs/families.md", ROOT / "docs/families.json"
    rows = re.findall(r"^\| .*✓.*$", page.read_text(), re.MULTILINE)
    every = sum(map(len, json.loads(results.read_text())["families"].values()))
    assert f"{len(rows)} of transformers' {every} text families" in README.read_text()
