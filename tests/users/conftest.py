"""What users start from: a tokenizer, a small model that heeds its prefix, and rows of text."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from prefixattn.demo.base import train_tokenizer
from prefixattn.demo.text import parse

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def trained_tokenizer() -> Any:
    """Byte-level BPE of a library file, with a chat template."""
    trained = train_tokenizer([parse("inspect.py", inspect.getsource(inspect))], vocab_size=300)
    trained.chat_template = TEMPLATE
    trained.padding_side = "right"
    return trained


@pytest.fixture
def tokenizer(trained_tokenizer: Any) -> Any:
    """A test's own: pipelines, for one, turn its padding round."""
    return copy.deepcopy(trained_tokenizer)


@pytest.fixture
def make_model() -> Callable[..., Any]:
    """A Llama in float32 and evaluation mode, the same each time."""

    def make(**changes: Any) -> Any:
        sizes = {
            "vocab_size": 300,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 512,
            "eos_token_id": 0,
            "pad_token_id": 1,
        }
        torch.manual_seed(3)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(sizes | changes))).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(4)
        return model

    return make


@pytest.fixture
def text() -> torch.Tensor:
    """What the prefix says, ``[1, 6]``."""
    return torch.tensor([[20, 41, 7, 93, 250, 11]])


@pytest.fixture
def rows() -> list[dict[str, list[int]]]:
    """Rows of different lengths, as a tokenized data set has them."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 14, (24,), generator=generator).tolist()
    return [
        {"input_ids": torch.randint(2, 300, (n,), generator=generator).tolist()} for n in lengths
    ]
