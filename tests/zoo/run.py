"""`make families`: every family in every situation, into docs/families.json and docs/families.md.

What is done is kept in build/zoo, by the versions and the code that it was done with: a run that
was stopped goes on where it was. `--only NAME` shows the cells of some families, and keeps nothing.
"""

import argparse
import datetime
import hashlib
import json
import multiprocessing
import platform
import sys
import time
import warnings
from collections.abc import Iterator
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from patience import PATIENCE

from zoo import table
from zoo.causal import MISSING
from zoo.cells import examine, situations_of
from zoo.families import KINDS, Family, families

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
VERSIONS = {
    "transformers": transformers.__version__,
    "torch": torch.__version__,
    "Python": platform.python_version(),
}
TELLERS = ("run.py", "table.py", "known.py", "test_zoo.py")  # no cell depends on these
Cells = dict[str, str]


class Running(NamedTuple):
    """A family in a process of its own, and what it has told."""

    family: Family
    process: Any
    pipe: Connection
    start: float
    cells: Cells

    def hear(self, limit: float) -> bool:
        """Take down what it says: whether it is done, or came to an end."""
        try:
            while self.pipe.poll(0):
                told = self.pipe.recv()
                if told is None:
                    return True
                self.cells[told[0]] = told[1]
        except EOFError:
            self._stopped("it died")
            return True
        if time.monotonic() - self.start > limit:
            self._stopped(f"not done in {limit:.0f} s")
            return True
        return False

    def _stopped(self, how: str) -> None:
        names = [name for name in situations_of(self.family.kind) if name not in self.cells]
        self.cells[names[0] if self.cells else table.WHOLE] = f"crash: {how}"
        for name in names[1:] if self.cells else []:
            self.cells.setdefault(name, "n/a: not reached")


def _child(family: Family, pipe: Connection) -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    for cell in examine(family):
        pipe.send(cell)
    pipe.send(None)


def examined(chosen: list[Family], workers: int, limit: float) -> Iterator[tuple[Family, Cells]]:
    """The rows of these families, as they are done."""
    context = multiprocessing.get_context("fork")
    waiting, running = list(reversed(chosen)), []
    while waiting or running:
        while waiting and len(running) < workers:
            family = waiting.pop()
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(family, theirs), daemon=True)
            process.start()
            theirs.close()
            running.append(Running(family, process, ours, time.monotonic(), {}))
        for one in list(running):
            if one.hear(limit):
                one.process.kill()
                one.process.join()
                running.remove(one)
                yield one.family, one.cells
        time.sleep(0.02)


def kept_rows() -> Path:
    """The file of rows that this code has found with these versions: one line of JSON for each."""
    code = hashlib.sha256(json.dumps(VERSIONS).encode())
    for folder in (ROOT / "prefixattn", Path(__file__).parent):
        for file in sorted(folder.rglob("*.py")):
            if file.name not in TELLERS:
                code.update(file.read_bytes())
    return ROOT / "build" / "zoo" / f"{code.hexdigest()[:16]}.jsonl"


def all_rows(workers: int, limit: float) -> dict[str, table.Rows]:
    """Kind -> family -> situation -> cell."""
    import_module("prefixattn.integrations")  # once, and not by each family as it is by then
    file = kept_rows()
    file.parent.mkdir(parents=True, exist_ok=True)
    rows: dict[str, table.Rows] = {kind: {} for kind in KINDS}
    if file.exists():
        for line in file.read_text().splitlines():
            name, kind, cells = json.loads(line)
            rows[kind][name] = cells
    left = [family for family in families() if family.name not in rows[family.kind]]
    with file.open("a") as lines:
        for done, (family, cells) in enumerate(examined(left, workers, limit), start=1):
            rows[family.kind][family.name] = cells
            print(json.dumps([*family, cells]), file=lines, flush=True)
            _say(f"{done}/{len(left)}", family, cells)
    if kept_rows() != file:
        file.unlink()
        sys.exit("prefixattn or the zoo was changed while this ran: run it again")
    return rows


def _say(where: str, family: Family, cells: Cells) -> None:
    bad = {name: cell for name, cell in cells.items() if cell.startswith(("WRONG", "crash"))}
    print(f"{where} {family.name} ({family.kind})", *(f"\n    {n}: {c}" for n, c in bad.items()))
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="show these families alone")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--limit", type=float, default=PATIENCE, help="seconds until a family counts as hung"
    )
    options = parser.parse_args()
    if options.only:
        chosen = [family for family in families() if family.name in options.only]
        for family, cells in examined(chosen, options.workers, options.limit):
            print(f"{family.name} ({family.kind})", json.dumps(cells, indent=1))
        return
    rows = all_rows(options.workers, options.limit)
    results = {
        "command": "make families",
        "date": datetime.date.today().isoformat(),
        "versions": VERSIONS,
        "missing": MISSING,
        "situations": {kind: list(situations_of(kind)) for kind in KINDS},
        "families": rows,
    }
    DOCS.mkdir(exist_ok=True)
    (DOCS / "families.json").write_text(table.as_json(results))
    page = table.as_markdown(json.loads((DOCS / "families.json").read_text()))
    (DOCS / "families.md").write_text(page)
    sys.exit("\n".join(table.faults(rows)) or 0)


if __name__ == "__main__":
    main()
