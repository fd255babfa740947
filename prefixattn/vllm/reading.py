"""Adapters for an event loop: whatever touches the disk happens in threads of its own."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future, ThreadPoolExecutor

from prefixattn.vllm.claim import Claim
from prefixattn.vllm.folder import AdapterFolder

LOOKS, READS = 4, 2  # threads; each reading holds its whole adapter in memory


class Readings:
    """The claims of a folder's adapters, each content read once however many requests wait for it.

    A request gets a claim that was true after it came: it takes part in a reading that began
    later, and looks again after one that had begun before.
    """

    def __init__(self, folder: AdapterFolder) -> None:
        self.folder = folder
        self._looks = ThreadPoolExecutor(LOOKS, "prefixattn-look")
        self._reads = ThreadPoolExecutor(READS, "prefixattn-read")
        self._running: dict[str, Future[Claim]] = {}

    async def claim(self, name: str) -> Claim:
        """As `AdapterFolder.claim`, with its errors."""
        if (claim := await self._known(name)) is not None:
            return claim
        if (running := self._running.get(name)) is not None:
            await asyncio.wait([_waitable(running)])
            if (claim := await self._known(name)) is not None:
                return claim
        return await self._read(name)

    async def _known(self, name: str) -> Claim | None:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._looks, self.folder.known, name)

    async def _read(self, name: str) -> Claim:
        running = self._running.get(name)
        if running is None:
            running = self._running[name] = self._reads.submit(self.folder.claim, name)
            running.add_done_callback(lambda _: self._running.pop(name))
        # A client that leaves must not end a reading that others wait for.
        return await asyncio.shield(_waitable(running))


def _waitable(running: Future[Claim]) -> asyncio.Future[Claim]:
    """For one who waits; who leaves needs no error of it."""
    future = asyncio.wrap_future(running)
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return future
