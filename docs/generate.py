"""Write what the pages show from files: `python docs/generate.py`, or `--check` to only compare.

The pages are those of this folder, and the README.

What stands between ``<!-- made: NAME -->`` and ``<!-- end -->`` is the text of ``MAKERS[NAME]``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

DOCS = Path(__file__).parent
ROOT = DOCS.parent
RESULTS = ROOT / "benchmarks/results"
CPU, METHODS = "cpu-zen4-2cores.jsonl", "methods-zen4-2cores.jsonl"
SERVING, DROPIN = "serving-zen4-2cores.json", "dropin-zen4-2cores.json"
DEMO, CARTRIDGE = "demo-cpu-zen4-2cores.json", "cartridge-zen4-2cores.json"
PART = re.compile(r"(<!-- made: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def formats() -> str:
    """The formats that `prefixattn convert` knows."""
    from prefixattn.checkpoints import FORMATS

    lines = ["| format | what | read | written | base model |", "|---|---|---|---|---|"]
    for name, found in FORMATS.items():
        written, needs = "yes" if found.save else "no", "to read" if found.needs_model else ""
        lines.append(f"| `{name}` | {found.words} | yes | {written} | {needs} |")
    return "\n".join(lines)


def dropin() -> str:
    """What the drop-in costs on the host, from each file of `benchmarks.dropin`."""
    from benchmarks.dropin import markdown

    parts = []
    for path in sorted(RESULTS.glob("dropin-*.json")):
        results = json.loads(path.read_text())
        parts.append(f"{_origin(path)}\n\n{markdown(results['rows'])}")
    return "\n\n".join(parts)


def dropin_cost() -> str:
    """What a decoded token costs more than from a cache that holds the text, in words."""
    from benchmarks.dropin import NARROW, WIDE

    results = json.loads((RESULTS / DROPIN).read_text())
    tokens = [row for row in results["rows"] if row["what"] == "decoded token"]

    def more(way: str, hidden: int) -> float:
        """The most milliseconds."""
        found = [row["ms"] for row in tokens if row["hidden"] == hidden]
        return max(ms[way][0] - ms["text in cache"][0] for ms in found)

    def longer(layers: int, hidden: int) -> float:
        """How much of the time, for one prefix and one row."""
        found = [
            row["ms"]
            for row in tokens
            if (row["layers"], row["hidden"], row["B"]) == (layers, hidden, 1)
        ]
        return max(ms["ours"][0] / ms["text in cache"][0] - 1 for ms in found)

    one, bank = (f"{more(way, NARROW):.1f} ms" for way in ("ours", "ours, bank"))
    four, many, wide = (f"{longer(*size):.0%}" for size in ((4, NARROW), (32, NARROW), (8, WIDE)))
    return (
        f"{_origin(RESULTS / DROPIN)} a decoded token takes up to {one} longer with one prefix, "
        f"and {bank} with a bank, than with the prefix's text in the cache, where layers are next "
        f"to empty. In one row with one prefix it takes {four} longer in four such layers, and "
        f"{many} in 32. In eight layers of {WIDE} numbers it takes at most {wide} longer, and less "
        "time than such a cache where batches are larger or prefixes longer."
    )


def bench() -> str:
    """The tables and sentences of each file of `prefixattn bench`."""
    from prefixattn.bench import growth, records
    from prefixattn.bench.figures import table
    from prefixattn.bench.shapes import SUITES

    parts = []
    for path in sorted(RESULTS.glob("cpu-*.jsonl")):
        found = records.read(path)
        rows = records.rows_of(found, "growth")
        suites = tuple(s for s in SUITES if s != "growth" and records.rows_of(found, s))
        parts.append(f"### {path.stem}\n\n{_origin(path)}\n\n{table(found, suites)}")
        for passes, axis, said in growth.sentences(rows):
            items = "\n".join(f"- {sentence}" for sentence in said)
            parts.append(f"#### {growth.PASSES[passes]} over {growth.AXES[axis]}\n\n{items}")
    return "\n\n".join(parts)


def readme() -> str:
    """The suites that say most, and what we set ourselves, from the CPU's results."""
    from prefixattn.bench import records
    from prefixattn.bench.figures import table

    found = records.read(RESULTS / CPU)
    return f"{_origin(RESULTS / CPU)}\n\n{table(found, ('training', 'shared-prefix'))}"


def targets() -> str:
    """What we set ourselves for the C++ kernels, and whether it is met."""
    from prefixattn.bench import records
    from prefixattn.bench.targets import verdicts

    lines = ["| target | wanted | measured | |", "|---|--:|--:|---|"]
    for target in verdicts(records.read(RESULTS / CPU)):
        sign = "at most" if target.at_most else "at least"
        measured = "wrong" if target.measured is None else f"{target.measured:.2f}"
        met = "met" if target.met else "**missed**"
        lines.append(f"| {target.words} | {sign} {target.wanted} | {measured} | {met} |")
    return "\n".join(lines)


def methods() -> str:
    """The tables of `benchmarks.methods`."""
    from benchmarks.methods.report import table
    from prefixattn.bench import records

    return f"{_origin(RESULTS / METHODS)}\n\n{table(records.read(RESULTS / METHODS))}"


def serving() -> str:
    """What a server with adapters does under load."""
    from benchmarks.serving import markdown

    path = RESULTS / SERVING
    found = json.loads(path.read_text())
    head = (
        f"{found['processor']}, {found['threads']} threads, vLLM {found['vllm']}, {found['date']}"
    )
    seconds = {row["way"]: row["seconds"] for row in found["rows"]}
    longer = seconds["adapters"] / seconds["no adapters"] - 1
    said = f"A later round with adapters takes {longer:.0%} longer than one with none."
    return f"{_origin(path)}\n\n{head}\n\n{markdown(found['rows'])}\n\n{said}"


def demo() -> str:
    """What `make demo` prints of its three ways of tuning."""
    found = json.loads((RESULTS / DEMO).read_text())
    ways, counts, machine = found["ways"], found["counts"], found["machine"]
    last = len(ways["PEFT"]["losses"])

    def row(label: str, before: str, of: Callable[[dict[str, Any]], str]) -> str:
        return f"| {label} | {before} | {' | '.join(of(way) for way in ways.values())} |"

    farthest = max(found["loss_difference"].values())
    return "\n".join(
        [
            f"{_origin(RESULTS / DEMO)} {machine['processor']}, {machine['threads']} threads, "
            f"torch {machine['torch']}, commit {machine['commit']}; "
            f"{sum(found['seconds'].values()):.0f} s once its packages were installed. A base of "
            f"{counts['base_parameters']:,} parameters, {counts['prefix_tokens']} prefix tokens, "
            f"{last} steps, seed {found['settings']['seed']}; memory and time vary with the "
            "machine's mood.",
            "",
            f"| | before | {' | '.join(name.replace('PEFT', 'stock PEFT') for name in ways)} |",
            "|---|--:|" + "--:|" * len(ways),
            row(f"training loss, step {last}", "", lambda way: f"{way['losses'][-1]:.6f}"),
            row(
                "held-out loss",
                f"{found['base_loss']:.3f}",
                lambda way: f"{way['held_out'][str(last)]:.3f}",
            ),
            row(
                "held-out ROUGE-L F1",
                f"{found['base_overlap']:.1%}",
                lambda way: f"{way['overlap']:.1%}",
            ),
            row("median time of a step", "", lambda way: f"{1e3 * way['seconds']:.0f} ms"),
            row("peak memory from training", "", lambda way: f"{way['memory_growth']:.0f} MiB"),
            "",
            f"The three losses stay within {farthest:.1e} of each other at every step.",
        ]
    )


def cartridge() -> str:
    """What the runs of `examples/cartridge.py` came to, over questions that were not studied."""
    found = json.loads((RESULTS / CARTRIDGE).read_text())
    runs = found["runs"]
    columns = {
        "no context": "no context",
        "untrained start": "start",
        "cartridge": "cartridge",
        "whole document": "document",
    }

    def row(label: str, field: str, shown: Callable[[float], str]) -> str:
        cells = []
        for column in columns.values():
            scores = [run["scores"][column]["questions"][field] for run in runs]
            if column == "document":
                cells.append(shown(scores[0]))
            else:
                middle, low, high = mean(scores), min(scores), max(scores)
                cells.append(f"{shown(middle)} ({shown(low)} to {shown(high)})")
        return f"| {label} | {' | '.join(cells)} |"

    documents = len({run["document"] for run in runs})
    token = sum(runs[0]["layer_bytes"])  # bytes of keys and values
    kept = token * found["settings"]["tokens"] / found["settings"]["document_tokens"]
    return "\n".join(
        [
            f"{_origin(RESULTS / CARTRIDGE)} {documents} documents, {len(runs)} runs, the mean and "
            "the least and largest.",
            "",
            f"| | {' | '.join(columns)} |",
            "|---|" + "--:|" * len(columns),
            row("KL divergence from the document's", "divergence", lambda x: f"{x:.3f}"),
            row("the same likeliest token", "agreement", lambda x: f"{x:.0%}"),
            f"| keys and values, bytes a document token | 0 | {kept:.0f} | {kept:.0f} | "
            f"{token:,} |",
        ]
    )


def scaling() -> str:
    """What many GPUs would cost, on paper."""
    from benchmarks.scaling import markdown

    return markdown()


def _origin(path: Path) -> str:
    return f"From `{path.relative_to(ROOT)}`:"


MAKERS: dict[str, Callable[[], str]] = {
    "formats": formats,
    "dropin": dropin,
    "dropin-cost": dropin_cost,
    "bench": bench,
    "readme": readme,
    "targets": targets,
    "methods": methods,
    "scaling": scaling,
    "serving": serving,
    "demo": demo,
    "cartridge": cartridge,
}


def bench_pictures(path: Path) -> dict[str, Any]:
    """The curves and the roofline of a file of `prefixattn bench`, by name."""
    from prefixattn.bench import records
    from prefixattn.bench.page import pictures

    return {name: figure for name, _, figure in pictures(records.read(path))}


def methods_pictures(path: Path) -> dict[str, Any]:
    """The pictures of a file of `benchmarks.methods`, by name."""
    from benchmarks.methods import plots
    from benchmarks.methods.report import scored
    from prefixattn.bench import records

    rows = scored(records.read(path))
    return {name: draw(rows) for name, draw in plots.PICTURES.items()}


# The pictures that stand on the pages: the file each is drawn from, and what draws it.
PICTURES = {
    CPU: (bench_pictures, ("growth-training", "growth-decoding", "roofline")),
    METHODS: (methods_pictures, ("methods-scores", "methods-size")),
}


def redraw(check: bool) -> list[Path]:
    """The pictures that were drawn from something else than their file holds now."""
    found = []
    for name, (draw, shown) in PICTURES.items():
        digest = hashlib.sha256((RESULTS / name).read_bytes()).hexdigest()
        paths = {picture: DOCS / "pictures" / f"{picture}.svg" for picture in shown}
        old = [p for p in paths.values() if not p.exists() or digest not in p.read_text()]
        found += old
        if old and not check:
            drawn = draw(RESULTS / name)
            for picture, path in paths.items():
                drawn[picture].savefig(path, metadata={"Date": None, "Source": digest})
    return found


def filled(page: str) -> str:
    """``page`` with every made part as its maker has it now.

    Raises:
        KeyError: a part that nobody makes.
    """
    return PART.sub(lambda m: f"{m[1]}\n{MAKERS[m[2]]()}\n\n{m[4]}", page)


def stale() -> dict[Path, str]:
    """The pages that do not say what their files say, and what they should be."""
    paths = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
    pages = {path: filled(path.read_text()) for path in paths}
    return {path: text for path, text in pages.items() if text != path.read_text()}


def main() -> int:
    """Status 1 where `--check` finds a page that disagrees with its files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    sys.path.insert(0, str(ROOT))  # benchmarks/ is not installed
    pages, pictures = stale(), redraw(check)
    for path in (*pages, *pictures):
        print(f"{path.relative_to(ROOT)}: {'disagrees with its files' if check else 'written'}")
        if not check and path in pages:
            path.write_text(pages[path])
    return int(check and bool(pages or pictures))


if __name__ == "__main__":
    sys.exit(main())
