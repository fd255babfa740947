"""What the drop-in costs on the host: `python -m benchmarks.dropin`.

Models so narrow that Python and the framework take most of their time, and a wider one, run without
a prefix, with a text of the prefix's length in its KV cache, by stock PEFT, and by ours (one prefix
for all rows, and a bank with one for each). Each way has a model of its own, and decodes a few
tokens in a row as generation does. All start from the same text, so that their logits are compared
before anything is timed. Rounds are interleaved, in milliseconds for one forward or one token.
"""

from __future__ import annotations

import copy
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import peft
import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from prefixattn import Prefix, PrefixBank, attach
from prefixattn.bench import machine
from prefixattn.bench.measure import Plan, interleaved
from prefixattn.checkpoints import save_peft

PROMPT = 16
TOKENS = 8  # that are decoded in a row
NARROW, WIDE = 64, 512
BATCHES = (1, 8)
# Layers, hidden size and prefix tokens.
SIZES = (
    (4, NARROW, 64),
    (16, NARROW, 64),
    (32, NARROW, 64),
    (32, NARROW, 1024),
    (8, WIDE, 64),
    (8, WIDE, 512),
    (8, WIDE, 2048),
)
TOLERANCE = 1e-4
COLUMNS = ("layers", "hidden", "P", "B")
NAMES = ("no prefix", "text in cache", "PEFT", "ours", "ours, bank")


class Wrong(Exception):
    """A way of running the model that gives other logits than the rest."""


def build(layers: int, hidden: int) -> Any:
    """A Llama of `hidden` numbers a token; with 64 there is next to no arithmetic."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4 if hidden == NARROW else 8,
        num_key_value_heads=2 if hidden == NARROW else 4,
        max_position_embeddings=4096,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


def ways(layers: int, hidden: int, prefix_length: int, folder: Path) -> dict[str, Any]:
    """The models by name, and the text that all but the first have before them."""
    stock = build(layers, hidden)
    text = torch.randint(2, 97, (1, prefix_length), generator=torch.Generator().manual_seed(1))
    prefix = Prefix.from_text(stock, text)
    save_peft(prefix, folder, stock)
    ours, banked = copy.deepcopy(stock), copy.deepcopy(stock)
    attach(ours, prefix)
    attach(banked, PrefixBank([prefix, copy.deepcopy(prefix)]))
    by_peft = peft.PeftModel.from_pretrained(copy.deepcopy(stock), str(folder)).eval()
    models = {"no prefix": stock, "text in cache": copy.deepcopy(stock)}
    return models | {"PEFT": by_peft, "ours": ours, "ours, bank": banked, "text": text}


def decoding(models: dict[str, Any], rows: int) -> dict[str, Callable[[], Tensor]]:
    """A few more tokens a call, each way with its own cache."""
    text, prompt = models["text"].expand(rows, -1), torch.arange(2, 2 + PROMPT).expand(rows, -1)
    token = torch.full((rows, 1), 7)

    def steps(model: Any, start: Tensor) -> Callable[[], Tensor]:
        cache = model(input_ids=start, use_cache=True).past_key_values

        def step() -> Tensor:
            for _ in range(TOKENS):
                out = model(input_ids=token, past_key_values=cache, use_cache=True)
            return out.logits

        return step

    def peft_steps() -> Callable[[], Tensor]:
        model = models["PEFT"]
        cache = model(input_ids=prompt, use_cache=True).past_key_values
        # A PeftModel forgets a cache that is passed to it; its base goes on, as in generate.
        mask = torch.ones(rows, text.shape[1] + PROMPT + 1, dtype=torch.long)
        base = model.get_base_model()

        def step() -> Tensor:
            nonlocal mask
            given = {"past_key_values": cache, "use_cache": True}
            for _ in range(TOKENS):
                out = base(input_ids=token, attention_mask=mask, **given)
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            return out.logits

        return step

    behind = torch.cat([text, prompt], dim=1)
    found = {name: steps(models[name], prompt) for name in NAMES if name != "PEFT"}
    return found | {"PEFT": peft_steps(), "text in cache": steps(models["text in cache"], behind)}


def forwards(models: dict[str, Any], rows: int) -> dict[str, Callable[[], Tensor]]:
    """A forward of the prompt, without a cache of text."""
    prompt = torch.arange(2, 2 + PROMPT).expand(rows, -1)

    def forward(model: Any) -> Callable[[], Tensor]:
        return lambda: model(input_ids=prompt).logits

    return {name: forward(models[name]) for name in NAMES if name != "text in cache"}


def check(runs: dict[str, Callable[[], Tensor]]) -> None:
    """All but the one without a prefix must say the same."""
    said = {name: run() for name, run in runs.items() if name != "no prefix"}
    expected = said["PEFT"]
    for name, logits in said.items():
        error = float((logits - expected).abs().max() / expected.abs().max())
        if not error <= TOLERANCE:
            raise Wrong(f"{name} is off by {error:.1e} of the largest logit")


@torch.no_grad()
def measure(
    rounds: int, folder: Path, sizes: tuple[tuple[int, int, int], ...]
) -> Iterator[dict[str, Any]]:
    """One row for each size, of a forward and of a decoded token."""
    for (layers, hidden, length), batch in product(sizes, BATCHES):
        models = ways(layers, hidden, length, folder)
        size = {"layers": layers, "hidden": hidden, "P": length, "B": batch}
        with models["ours, bank"].prefixattn.use([row % 2 for row in range(batch)]):
            for what, make, count in (
                ("decoded token", decoding, TOKENS),
                ("forward", forwards, 1),
            ):
                runs = make(models, batch)
                check(runs)
                times = interleaved(runs, "cpu", Plan(rounds, seconds=4.0, warm=True))
                each = {name: t.of_each(count) for name, t in times.items()}
                yield {"what": what, **size, "ms": each}


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table that the docs show: medians, and ours over each of what it replaces."""
    heads = ["", *COLUMNS, *NAMES, "ours / text in cache", "ours / PEFT"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" + "--:|" * (len(heads) - 1)]
    for row in rows:
        ms = {name: times[0] for name, times in row["ms"].items()}
        cells = [row["what"], *(str(row[name]) for name in COLUMNS)]
        cells += [f"{ms[name]:.3g}" if name in ms else "" for name in NAMES]
        for peer in ("text in cache", "PEFT"):
            cells.append(f"{ms['ours'] / ms[peer]:.2f}" if peer in ms else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(
    rounds: Annotated[int, typer.Option(help="Interleaved rounds of a row.", min=9)] = 60,
    quick: Annotated[bool, typer.Option("--quick", help="The smallest model only.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the rows here, as JSON.")] = None,
) -> None:
    """Time forwards and decoded tokens of a small model with and without a prefix."""
    torch.set_num_threads(1)  # what is measured is Python, which has one
    transformers.logging.set_verbosity_error()
    table = Table("", *COLUMNS, *NAMES, title="milliseconds", title_justify="left")
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for row in measure(rounds, Path(folder), SIZES[:1] if quick else SIZES):
            found.append(row)
            cells = [f"{row['ms'][n].median:.2f}" if n in row["ms"] else "" for n in NAMES]
            table.add_row(row["what"], *(str(row[name]) for name in COLUMNS), *cells)
    Console().print(table)
    if out is not None:
        command = shlex.join(["python", "-m", "benchmarks.dropin", *sys.argv[1:]])
        content = {"machine": machine.facts("cpu", command), "rows": found}
        out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
