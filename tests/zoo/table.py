"""The results as docs/families.json, and that file as docs/families.md."""

import json
from collections import defaultdict
from typing import Any

from .known import KNOWN

Rows = dict[str, dict[str, str]]  # family -> situation -> cell
WHOLE = "*"  # the cell of a row whose situations all come to the same
TITLES = {
    "causal": "Causal language models",
    "multimodal": "The text side of models for images and sound",
    "encoder": "Encoders",
    "encoder-decoder": "Encoder-decoders",
}
INTRODUCTION = """\
Every text family of transformers, built tiny from its configuration and run in every situation by
`{command}` ({date}; {versions}).
✓ is exact: the model with a prefix says what the stock model says behind the prefix's text, in
logits, gradients or tokens. *r* refuses, with a reason that is below the table, before anything is
computed; – is what transformers itself cannot do with this family or does not answer the same way
twice; ✗ is known to be wrong, for the reason below.
"""


def faults(rows: dict[str, Rows]) -> list[str]:
    """What is wrong and not known to be, and what is known to be wrong and is not."""
    wrong = {
        (family, name): cell
        for kind in rows.values()
        for family, cells in kind.items()
        for name, cell in cells.items()
        if cell.startswith(("WRONG", "crash"))
    }
    unknown = [f"{' / '.join(key)}: {cell}" for key, cell in wrong.items() if key not in KNOWN]
    return unknown + [f"{' / '.join(key)}: wrong no longer" for key in KNOWN if key not in wrong]


def as_json(results: dict[str, Any]) -> str:
    """One line per family; cells that are exact are left out."""
    head = {name: value for name, value in results.items() if name != "families"}
    lines = [json.dumps(head, indent=1, ensure_ascii=False)[:-2], ' "families": {']
    kinds = []
    for kind, rows in results["families"].items():
        body = ",\n".join(f"   {json.dumps(name)}: {_cells(rows[name])}" for name in sorted(rows))
        kinds.append(f'  "{kind}": {{\n{body}\n  }}')
    return ",\n".join(lines[:1]) + ",\n" + lines[1] + "\n" + ",\n".join(kinds) + "\n }\n}\n"


def _cells(cells: dict[str, str]) -> str:
    told = {name: cell for name, cell in cells.items() if cell != "exact"}
    return json.dumps(told, ensure_ascii=False)


def as_markdown(results: dict[str, Any]) -> str:
    """The page for people; ``results`` as `as_json` keeps them."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    introduction = INTRODUCTION.format(
        command=results["command"], date=results["date"], versions=versions
    )
    parts = ["# Families and situations", introduction]
    for name, reason in results["missing"].items():
        parts.append(f"The situation “{name}” was not run: it {reason}.\n")
    for kind, rows in results["families"].items():
        parts.append(f"## {TITLES[kind]}\n")
        parts.append(_table(rows, results["situations"][kind]))
        parts += _wholes(rows)
    return "\n".join(parts)


def _table(rows: Rows, situations: list[str]) -> str:
    """The families of one kind that take a prefix, and the reasons for what they refuse."""
    notes: dict[str, str] = {}
    lines = ["| | " + " | ".join(situations) + " |", "|---" * (len(situations) + 1) + "|"]
    for family, cells in sorted(rows.items()):
        if WHOLE not in cells:
            marks = [_mark(family, name, cells.get(name, "exact"), notes) for name in situations]
            lines.append(f"| {family} | " + " | ".join(marks) + " |")
    told = [f"- {mark}: {reason}" for reason, mark in notes.items()]
    return "\n".join([*lines, "", *told, ""])


def _mark(family: str, situation: str, cell: str, notes: dict[str, str]) -> str:
    state, _, reason = cell.partition(": ")
    if state == "exact":
        return "✓"
    if state == "n/a":
        return "–"
    sign = "r" if state == "refused" else "✗"
    reason = KNOWN.get((family, situation), reason)
    return notes.setdefault(reason, f"{sign}{len(notes) + 1}")


def _wholes(rows: Rows) -> list[str]:
    """The families that no situation was run with."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for family, cells in sorted(rows.items()):
        if WHOLE in cells:
            state, _, reason = cells[WHOLE].partition(": ")
            reason = reason.partition(" cannot carry a prefix: ")[2] or reason
            found[state][_line(reason)].append(family)
    titles = {"refused": "Refused before the first forward:", "n/a": "Not tried:"}
    parts = []
    for state, reasons in sorted(found.items(), reverse=True):
        names = sorted(reasons.items(), key=lambda item: (-len(item[1]), item[0]))
        lines = [f"- {reason}: {', '.join(families)}" for reason, families in names]
        parts.append("\n".join([titles.get(state, state), "", *lines, ""]))
    return parts


def _line(reason: str) -> str:
    return " ".join(reason.split())
