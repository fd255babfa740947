"""What contexts put in use: for one thread at a time, and read by all."""

import asyncio
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest
import torch
from patience import PATIENCE

from prefixattn import kept
from prefixattn.bank import PrefixBank
from prefixattn.external import ExternalPrefix
from prefixattn.layers import LayerShape
from prefixattn.prefix import Prefix

Use = Callable[[float], AbstractContextManager[None]]
Read = Callable[[], float]


def bank() -> tuple[Use, Read]:
    whole = PrefixBank(
        [Prefix([torch.full((2, 3, 8), float(i))], [torch.zeros(2, 3, 8)]) for i in (1, 2)]
    )

    def read() -> float:
        batch = whole.batch()
        assert batch.pairs[0] is not None
        assert batch.index is not None
        return float(batch.pairs[0][0][batch.index[0], 0, 0, 0])

    return lambda number: whole.use([int(number) - 1]), read


def external() -> tuple[Use, Read]:
    place = ExternalPrefix([LayerShape(2, 8, 8)], 3)

    def read() -> float:
        pair = place.batch().pairs[0]
        assert pair is not None
        return float(pair[0][0, 0, 0, 0])

    return lambda number: place.use([torch.full((2, 3, 8), number)], [torch.zeros(2, 3, 8)]), read


def in_thread(work: Callable[[], object]) -> object:
    """What ``work`` gives, or raises, in another thread."""
    found: list[object] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(PATIENCE)
    return found[0]


@pytest.mark.parametrize("make", [bank, external])
def test_a_second_thread_is_refused_while_the_first_has_something_in_use(
    make: Callable[[], tuple[Use, Read]],
) -> None:
    use, read = make()

    def second() -> float:
        with use(2.0):
            return read()

    with torch.no_grad():
        with use(1.0):
            refused = in_thread(second)
            assert isinstance(refused, RuntimeError)
            assert "in use by another thread" in str(refused)
            assert read() == in_thread(read) == 1
        assert in_thread(second) == 2
        with pytest.raises(RuntimeError, match=r"are in use: run the model within `with"):
            read()


@pytest.mark.parametrize("make", [bank, external])
def test_a_second_task_is_refused_in_the_same_thread(
    make: Callable[[], tuple[Use, Read]],
) -> None:
    """Two requests of one event loop, each of which waits for its text in a pool's thread."""
    use, read = make()

    async def answer(number: float) -> object:
        await asyncio.sleep(0)
        try:
            with use(number):
                return await asyncio.to_thread(read)
        except RuntimeError as error:
            return str(error)

    async def both() -> tuple[object, object]:
        return await asyncio.gather(answer(1.0), answer(2.0))

    with torch.no_grad():
        first, second = asyncio.run(both())
    assert first == 1
    assert "in use by another thread or task" in str(second)


@pytest.mark.parametrize("make", [bank, external])
def test_streams_that_take_turns_end_with_an_error(
    make: Callable[[], tuple[Use, Read]],
) -> None:
    """The first one reads what the second one has in use, which nothing can tell in between."""
    use, read = make()

    def stream(number: float) -> Iterator[float]:
        with use(number):
            for _ in range(2):
                yield read()

    with torch.no_grad():
        one, two = stream(1.0), stream(2.0)
        found = [next(one), next(two), next(one)]
        with pytest.raises(RuntimeError, match="entered later is open still"):
            next(one)
        two.close()
        assert found == [1, 2, 2]
        assert list(stream(1.0)) == [1, 1]


@pytest.mark.parametrize("make", [bank, external])
def test_a_thread_that_decodes_is_not_given_what_an_inner_context_has(
    make: Callable[[], tuple[Use, Read]],
) -> None:
    use, read = make()
    steps: queue.Queue[bool] = queue.Queue()
    said: queue.Queue[object] = queue.Queue()

    @torch.no_grad()
    def decode() -> None:
        kept.begin_text()
        while steps.get():
            try:
                said.put(read())
            except RuntimeError as error:
                said.put(str(error))

    def step() -> object:
        steps.put(True)
        return said.get(timeout=PATIENCE)

    thread = threading.Thread(target=decode)
    thread.start()
    with torch.no_grad(), use(1.0):
        assert step() == 1
        with use(2.0):
            assert read() == 2  # of this thread, whose text began here
            assert "began under another `use`" in str(step())
        assert step() == 1
    steps.put(False)
    thread.join(PATIENCE)
