"""In the scheduler: requests wait until the workers have read their adapter, and no other waits.

A worker that reads from disk in front of a step holds every request of the engine. So it reads in
a thread, and says what it has; until then the scheduler passes over the requests of the adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from prefixattn.vllm.claim import Claim

AT_ONCE = 2  # adapters that are read or lie ready for a request, beside a worker's budget


@dataclass
class Errand:
    """What the workers are asked beside writing: adapters to read, and digests to forget."""

    read: list[Claim] = field(default_factory=list)
    forget: list[str] = field(default_factory=list)


class Waiting:
    """Which adapters the workers hold, and which requests wait for one.

    Args:
        num_workers: that write their part of each prefix.
    """

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self._held: dict[str, int] = {}  # by how many workers
        self._requests: dict[str, set[str]] = {}
        self._read: dict[str, Claim] = {}
        self._forget: list[str] = []

    def is_ready(self, request_id: str, claim: Claim) -> bool:
        """Whether its prefix can be written at once; if not, the workers are asked to read it."""
        if self._held.get(claim.digest, 0) >= self.num_workers:
            return True
        waiting = self._requests.get(claim.digest)
        if waiting is None:
            if len(self._requests) >= AT_ONCE:
                return False
            waiting = self._requests[claim.digest] = set()
            self._read[claim.digest] = claim
        waiting.add(request_id)
        return False

    def written(self, claim: Claim) -> None:
        """A worker forgets what it read for a request once that is written."""
        self._requests.pop(claim.digest, None)

    def finished(self, request_id: str, claim: Claim) -> None:
        """A request ended; where it waited, and as the last, nothing is to be read for it."""
        waiting = self._requests.get(claim.digest)
        if waiting is None or request_id not in waiting:
            return
        waiting.remove(request_id)
        if not waiting:
            del self._requests[claim.digest]
            if self._read.pop(claim.digest, None) is None:
                self._forget.append(claim.digest)

    def reported(self, changes: Mapping[str, int]) -> None:
        """By how many more workers, or fewer, each digest is held."""
        for digest, change in changes.items():
            self._held[digest] = self._held.get(digest, 0) + change
            if not self._held[digest]:
                del self._held[digest]

    def take_errand(self) -> Errand:
        """What the workers are asked with the next step; they forget first."""
        errand = Errand(list(self._read.values()), self._forget)
        self._read, self._forget = {}, []
        return errand
