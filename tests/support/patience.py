"""How tests wait: for an event, however long it takes on this machine today."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE = 1800
"""Seconds after which a test counts as hung.

No verdict may depend on how fast the machine is or on what else runs there. A limit is only there
to end a test that hangs.
"""
THREADS = Path("/proc/self/task")


def until(happened: Callable[[], object]) -> None:
    """Wait until `happened()` is true."""
    end = time.monotonic() + PATIENCE
    while not happened():
        if time.monotonic() > end:
            raise AssertionError(f"it did not happen for {PATIENCE} s")
        time.sleep(0.02)


def until_others_sleep() -> None:
    """Wait until every other thread of this process waits for something, for several looks on end.

    A thread that has work, and gets no processor for it, does not sleep. One that waits for the
    interpreter does, and has it between two looks.
    """
    looks = 0

    def quiet() -> bool:
        nonlocal looks
        looks = looks + 1 if _others_sleep() else 0
        return looks >= 5

    until(quiet)


def _others_sleep() -> bool:
    """Whether the system says so; one that says nothing of threads is believed to."""
    if not sys.platform.startswith("linux"):
        return True
    states = []
    for thread in THREADS.iterdir():
        try:
            state = (thread / "stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:  # it ended meanwhile
            continue
        states.append(state)
    return states.count("S") == len(states) - 1  # but for the one that looks
