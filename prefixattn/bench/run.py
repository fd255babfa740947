"""A run: each case verified, then timed, row by row into a results file."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prefixattn.bench import machine
from prefixattn.bench.inputs import Tensors, make_tensors
from prefixattn.bench.measure import (
    Plan,
    Rates,
    Run,
    Times,
    interleaved,
    measure_rates,
    peak_memory,
)
from prefixattn.bench.providers import FLOOR, OURS, PROVIDERS, SLOW_TO_START, copies_ready
from prefixattn.bench.records import Record, Writer, key_of, runs_of
from prefixattn.bench.shapes import Case, cases
from prefixattn.bench.support import Attention, Provider, Unsupported
from prefixattn.bench.verify import Oracle
from prefixattn.bench.work import flops, least_bytes

QUICK = Plan(rounds=9, seconds=0.15)


@dataclass(frozen=True)
class Selection:
    """What a run measures; empty `shapes` and `providers` mean all, `plan` None the suite's."""

    suites: tuple[str, ...]
    shapes: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    device: str = "cpu"
    plan: Plan | None = None
    warm: bool = False
    known: dict[str, Provider] = field(default_factory=lambda: dict(PROVIDERS))

    def cases(self) -> list[Case]:
        """The cases, in the order of the suites.

        Raises:
            ValueError: a suite, shape or provider is not known; the known are named.
        """
        if unknown := set(self.providers) - set(self.known):
            raise ValueError(_unknown("provider", unknown, self.known))
        every = [case for suite in self.suites for case in cases(suite, self.device)]
        names = dict.fromkeys(name for case in every for name in _names(case))
        if unknown := set(self.shapes) - names.keys():
            raise ValueError(_unknown("shape", unknown, names))
        chosen = set(self.shapes)
        return [c for c in every if not chosen or set(_names(c)) & chosen]

    def of(self, case: Case) -> dict[str, Provider]:
        """The providers of a case; the floor is always among them."""
        names = self.providers or self.known
        return {name: self.known[name] for name in dict.fromkeys([*names, FLOOR])}

    def left_out(self, case: Case, provider: str) -> str:
        """Why a provider is not tried, in words; empty if it is."""
        if case.suite == "quick" and provider in SLOW_TO_START and provider not in self.providers:
            return "left out of the quick suite, for it compiles: name it by --provider"
        return ""


def _names(case: Case) -> tuple[str, str, str]:
    """What a case may be chosen by."""
    return case.name, case.shape.name, case.shape.model


def _unknown(argument: str, got: set[str], known: dict[str, Any]) -> str:
    return f"{argument}: expected some of {', '.join(known)}; got {', '.join(sorted(got))}"


def measure(
    selection: Selection, writer: Writer, command: str
) -> Iterator[tuple[Case, list[Record]]]:
    """Measure what `writer` does not have yet; yields each case with its new rows.

    Raises:
        ValueError: a name is unknown, or the file was measured on another machine.
    """
    todo = selection.cases()
    header = machine.facts(selection.device, command)
    _same_machine(writer, header)
    number, known = len(runs_of(writer.records)), writer.known()
    rates: dict[str, Rates] = {}
    started = False
    for case in todo:
        wanted = {
            name: provider
            for name, provider in selection.of(case).items()
            if (case.suite, case.name, name, selection.warm) not in known
        }
        rows: list[Record] = []
        if wanted:
            if not started:
                writer.add([{"kind": "run", "run": number} | header])
                started = True
            dtype = case.shape.dtype
            if dtype not in rates:
                rates[dtype] = measure_rates(selection.device, case.shape.torch_dtype)
            rows = measure_case(
                case, wanted | {FLOOR: selection.known[FLOOR]}, selection, rates[dtype]
            )
            rows = [row | {"run": number} for row in rows if key_of(row) not in known]
            writer.add(rows)
        yield case, rows


def _same_machine(writer: Writer, header: Record) -> None:
    """Figures of two machines, or of two states of the code, have no place in one file."""
    for before in runs_of(writer.records)[-1:]:
        for fact in machine.WITHIN:
            if before.get(fact) != header[fact]:
                raise ValueError(
                    f"--out: {writer.path} was measured with {fact} {before.get(fact)}, here it is "
                    f"{header[fact]}; --fresh starts anew"
                )


def measure_case(
    case: Case, providers: dict[str, Provider], selection: Selection, rates: Rates
) -> list[Record]:
    """A row for each provider of one case; a wrong one has no time."""
    tensors = make_tensors(case, selection.device)
    found: dict[str, Record] = {}
    runs: dict[str, Run] = {}
    oracles: dict[bool, Oracle] = {}
    for name, provider in providers.items():
        found[name] = _start_of_row(case, name, selection)
        try:
            if reason := selection.left_out(case, name):
                raise Unsupported(reason)
            call = provider(case.shape, tensors, case.passes)
            sees = name != FLOOR
            if sees not in oracles:
                oracles[sees] = Oracle(case, tensors, with_prefix=sees)
            fault = oracles[sees].fault(call)
        except (Unsupported, NotImplementedError) as error:
            found[name] |= {"state": "unsupported", "reason": _first_line(error)}
        except Exception as error:  # another's crash is that row's result, not the run's end
            found[name] |= {
                "state": "failed",
                "reason": f"{type(error).__name__}: {_first_line(error)}",
            }
        else:
            found[name]["verified"] = "whole"
            if fault:
                found[name] |= {"state": "wrong", "reason": fault}
            else:
                runs[name] = _timed_call(case, tensors, call)
    oracles.clear()  # their memory is not the calls'
    plan = selection.plan or (QUICK if case.suite == "quick" else Plan())
    times = interleaved(runs, selection.device, Plan(plan.rounds, plan.seconds, selection.warm))
    for name, run in runs.items():
        peak = peak_memory(run, selection.device)
        if peak is not None:
            peak += copies_ready(name, case.shape)
        found[name] |= _figures(case, name, times, rates) | {"peak": peak}
    return list(found.values())


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _timed_call(case: Case, tensors: Tensors, call: Attention) -> Run:
    if case.passes == "fwd":

        def forward() -> Tensor:
            with torch.no_grad():
                return call()

        return forward
    leaves, upstream = list(tensors.leaves.values()), torch.ones_like(tensors.query)

    def both() -> object:
        out = call()
        return out, torch.autograd.grad(out, leaves, upstream, allow_unused=True)

    return both


def _start_of_row(case: Case, provider: str, selection: Selection) -> Record:
    s = case.shape
    letters = {name: getattr(s, name) for name in ("B", "M", "C", "P", "R", "H", "H_kv", "D")}
    names = {"suite": case.suite, "case": case.name, "passes": case.passes, "axis": case.axis}
    about = {"kind": "row", **names, "model": s.model, "dtype": s.dtype, **letters}
    command = ["prefixattn", "bench", "--suite", case.suite, "--shape", case.name]
    command += ["--provider", provider, "--device", selection.device]
    if selection.device == "cpu":
        command += ["--threads", str(torch.get_num_threads())]
    if (plan := selection.plan) is not None:
        command += ["--rounds", str(plan.rounds), "--seconds", f"{plan.seconds:g}"]
    command += ["--warm"] if selection.warm else []
    about |= {"softcap": s.softcap, "warm": selection.warm, "provider": provider}
    return about | {"state": "timed", "reason": "", "command": shlex.join(command)}


def _figures(case: Case, name: str, times: dict[str, Times], rates: Rates) -> Record:
    """What is computed from a provider's time."""
    mine, sees = times[name], name != FLOOR
    seconds = mine.median / 1e3
    found: Record = {
        "ms": [mine.median, mine.low, mine.high],
        "rounds": mine.rounds,
        "flops": flops(case, sees),
        "bytes": least_bytes(case, sees),
        "rates": rates._asdict(),
    }
    found["of_matmul"] = found["flops"] / seconds / rates.matmul
    found["of_copy"] = found["bytes"] / seconds / rates.copy
    found["of_floor"] = mine.median / times[FLOOR].median if FLOOR in times else None
    return found


def broken(rows: Sequence[Record]) -> list[Record]:
    """Rows of ours, and floors, that are wrong or failed: what a run's exit status speaks of.

    A floor that is wrong puts the truth itself in doubt.
    """
    watched = (*OURS, FLOOR)
    return [
        row for row in rows if row["provider"] in watched and row["state"] in ("wrong", "failed")
    ]
