"""Adapters are read in threads: an event loop serves others meanwhile, and nobody gets the old."""

import asyncio
import threading

import pytest

from prefixattn.vllm.claim import Claim
from prefixattn.vllm.reading import Readings


class Folder:
    """Stands for a folder whose readings last until the test lets them end."""

    def __init__(self, settles=True):
        self.settles, self.content = settles, "old"
        self.reads, self.threads = 0, set()
        self.seen = {}
        self.begun, self.go_on = threading.Event(), threading.Event()

    def known(self, name):
        self.threads.add(threading.current_thread())
        if name == "gone":
            raise KeyError("no adapter 'gone'")
        found = self.seen.get(name)
        return found if self.settles and found and found.digest == self.content else None

    def claim(self, name):
        if (found := self.known(name)) is not None:
            return found
        self.reads += 1
        content = self.content
        self.begun.set()
        assert self.go_on.wait(60)
        if name == "broken":
            raise ValueError("it is damaged")
        self.seen[name] = claim = Claim(name, content, 5)
        return claim


async def begun(folder):
    await asyncio.get_running_loop().run_in_executor(None, folder.begun.wait, 60)


def test_the_event_loop_goes_on_while_an_adapter_is_read():
    folder = Folder()

    async def run():
        readings = Readings(folder)
        reading = asyncio.create_task(readings.claim("large"))
        await begun(folder)
        folder.seen["small"] = Claim("small", "old", 3)
        assert (await readings.claim("small")).num_tokens == 3  # and so would be whatever else
        assert not reading.done()
        folder.go_on.set()
        assert (await reading).num_tokens == 5

    asyncio.run(run())
    assert threading.main_thread() not in folder.threads


def test_a_content_is_read_once_for_all_who_wait():
    folder = Folder()

    async def run():
        readings = Readings(folder)
        waiting = [asyncio.create_task(readings.claim("large")) for _ in range(20)]
        await begun(folder)
        late = asyncio.create_task(readings.claim("large"))
        leaving = asyncio.create_task(readings.claim("large"))
        await asyncio.sleep(0)
        leaving.cancel()
        waiting.pop(0).cancel()  # who asked first leaves, and the reading goes on
        folder.go_on.set()
        assert len(set(await asyncio.gather(*waiting, late))) == 1

    asyncio.run(run())
    assert folder.reads == 1


@pytest.mark.parametrize("settles", [True, False], ids=["settled", "just written"])
def test_who_comes_behind_a_replacement_gets_the_new(settles):
    """The reading that is under way may have begun with the old content."""
    folder = Folder(settles)

    async def run():
        readings = Readings(folder)
        before = asyncio.create_task(readings.claim("large"))
        await begun(folder)
        folder.content = "new"
        behind = asyncio.create_task(readings.claim("large"))
        await asyncio.sleep(0)
        folder.go_on.set()
        assert (await before).digest == "old"
        assert (await behind).digest == "new"

    asyncio.run(run())
    assert folder.reads == 2


@pytest.mark.parametrize(("name", "error"), [("gone", KeyError), ("broken", ValueError)])
def test_errors_reach_all_who_wait(name, error):
    folder = Folder()
    folder.go_on.set()

    async def run():
        readings = Readings(folder)
        waiting = [readings.claim(name) for _ in range(3)]
        found = await asyncio.gather(*waiting, return_exceptions=True)
        assert {type(each) for each in found} == {error}
        assert not readings._running

    asyncio.run(run())


def test_one_event_loop_behind_another():
    folder = Folder(settles=False)
    folder.go_on.set()
    readings = Readings(folder)
    for _ in range(2):
        assert asyncio.run(readings.claim("large")).digest == "old"
