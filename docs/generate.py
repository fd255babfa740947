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
from typing import Any

DOCS = Path(__file__).parent
ROOT = DOCS.parent
RESULTS = ROOT / "benchmarks/results"
CPU, METHODS = "cpu-zen4-2cores.jsonl", "methods-zen4-2cores.jsonl"
SERVING = "serving-zen4-2cores.json"
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
    return f"{_origin(path)}\n\n{head}\n\n{markdown(found['rows'])}"


def scaling() -> str:
    """What many GPUs would cost, on paper."""
    from benchmarks.scaling import markdown

    return markdown()


def _origin(path: Path) -> str:
    return f"From `{path.relative_to(ROOT)}`:"


MAKERS: dict[str, Callable[[], str]] = {
    "formats": formats,
    "dropin": dropin,
    "bench": bench,
    "readme": readme,
    "targets": targets,
    "methods": methods,
    "scaling": scaling,
    "serving": serving,
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
