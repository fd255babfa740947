"""Results files: JSON lines, a header for each run and a row for each case and provider.

A row has `kind` "row", the number of its run, the case (`suite`, `case`, `passes`, `axis`, the
shape's letters, `model`, `dtype`), the `provider`, `state` ("timed", "unsupported", "wrong" or
"failed") with its `reason`, and `command`, which repeats it. A timed one has `ms` [median, 20 %,
80 %], `rounds`, `verified` ("whole"; in older files a part, too), `peak` (bytes beyond the inputs,
with copies of the prefix that were made before), `flops`, `bytes`, `rates` (FLOP/s of a matrix
product and bytes/s of a copy in the same run), `of_matmul`, `of_copy` (parts of these) and
`of_floor` (how many times as long it takes as the same without a prefix).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from prefixattn.files import replace_file

Record = dict[str, Any]
Key = tuple[str, str, str, bool]
STATES = ("timed", "unsupported", "wrong", "failed")
HEADER = ("date", "processor", "instructions", "threads", "gpu", "torch", "prefixattn", "commit")
TIMED = ("ms", "rounds", "peak", "rates", "command")  # of a row that has a time, besides
FIELDS = ("suite", "case", "passes", "axis", "provider", "warm", "state", "reason")


def key_of(row: Record) -> Key:
    """What a row is about: rows of the same key may be compared."""
    return row["suite"], row["case"], row["provider"], row["warm"]


def read(path: Path, fields: Sequence[str] = ()) -> list[Record]:
    """Every record of a file; a last line that an interruption cut short is left out.

    Args:
        path: the file.
        fields: what each row must have, `FIELDS` for those of `prefixattn bench`.

    Raises:
        OSError: it cannot be read.
        ValueError: the file is no results file; its line is named.
    """
    try:
        lines = path.read_text().splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: expected a results file, got no text") from None
    found: list[Record] = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines) and found:
                break
            raise ValueError(f"{path}:{number}: expected a JSON line of a results file") from None
        if not isinstance(record, dict) or record.get("kind") not in ("run", "row"):
            raise ValueError(f"{path}:{number}: expected kind 'run' or 'row', got {line[:60]!r}")
        wanted = () if not fields else HEADER if record["kind"] == "run" else fields
        if missing := [name for name in wanted if name not in record]:
            raise ValueError(
                f"{path}:{number}: expected a results file of another benchmark, whose "
                f"{record['kind']}s have {', '.join(missing)}"
            )
        if fields == FIELDS and (bad := _bad_number(record)):
            raise ValueError(f"{path}:{number}: {bad}")
        found.append(record)
    if not found or found[0]["kind"] != "run":
        raise ValueError(f"{path}: expected a results file that starts with a run's header")
    return found


def _bad_number(record: Record) -> str:
    """Words for what a timed row has that nobody could have measured; empty when all is well."""
    if record["kind"] != "row" or record["state"] != "timed":
        return ""
    if missing := [name for name in TIMED if name not in record]:
        return f"a timed row must have {', '.join(missing)}"
    ms, rates = record["ms"], record["rates"]
    if not isinstance(ms, list) or len(ms) != 3 or not _positive(ms):
        return f"ms must be three positive numbers, got {ms!r}"
    if (
        not isinstance(rates, dict)
        or {*rates} < {"matmul", "copy"}
        or not _positive(rates.values())
    ):
        return f"rates must be the positive numbers matmul and copy, got {rates!r}"
    return ""


def _positive(numbers: Iterable[Any]) -> bool:
    return all(isinstance(x, int | float) and x > 0 for x in numbers)


def runs_of(records: Iterable[Record]) -> list[Record]:
    """The headers."""
    return [record for record in records if record["kind"] == "run"]


def rows_of(records: Iterable[Record], suite: str = "") -> list[Record]:
    """The rows, of one suite if it is named."""
    rows = [record for record in records if record["kind"] == "row"]
    return [row for row in rows if not suite or row["suite"] == suite]


def timed(rows: Iterable[Record]) -> list[Record]:
    """The rows that have a time."""
    return [row for row in rows if row["state"] == "timed"]


class Writer:
    """Appends whole lines to a results file, and remembers them; `path` None keeps no file.

    Args:
        path: the file, which no other process may write meanwhile.
        fresh: begin it anew. Else go on with what is there.
        fields: what its rows must have, as for `read`.

    Raises:
        OSError: it cannot be written.
        ValueError: it is none of ours, or another process writes it.
    """

    def __init__(
        self, path: Path | None, fresh: bool = False, fields: Sequence[str] = FIELDS
    ) -> None:
        self.path = path
        self.records: list[Record] = []
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() or not path.exists():  # and no pipe or device
            self._lock()
        if path.exists() and path.stat().st_size and not fresh:
            self.records = read(path, fields)
        self.write_all()  # what an interruption cut short goes

    def _lock(self) -> None:
        """Keep other processes out; this one may go on with a file of its own."""
        assert self.path is not None
        place = self.path.resolve()
        self._held = FileLock(place.with_name(f".{place.name}.lock"), is_singleton=True)
        try:
            self._held.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"{self.path}: another process is writing it") from None

    def write_all(self) -> None:
        """Write every record anew."""
        if self.path is None:
            return
        text = "".join(json.dumps(record) + "\n" for record in self.records)
        if self.path.is_file():
            replace_file(self.path.resolve(), lambda place: place.write_text(text))
        else:
            self.path.write_text(text)

    def add(self, records: list[Record]) -> None:
        """Write records, whole and at once: what was measured outlives an interruption."""
        self.records += records
        if self.path is not None:
            with self.path.open("a") as file:
                file.write("".join(json.dumps(record) + "\n" for record in records))

    def known(self) -> set[Key]:
        """The keys of every row there is."""
        return {key_of(row) for row in rows_of(self.records)}
