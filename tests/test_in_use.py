"""What contexts put in use: for one thread at a time, and read by all."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch

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
    thread.join(60)
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
