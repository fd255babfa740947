"""The scheduler's half of reading an adapter: who waits, who is asked, and that nobody waits on."""

from prefixattn.vllm.claim import Claim
from prefixattn.vllm.waiting import Errand, Waiting

A, B, C = (Claim(name, name * 4, 5) for name in "abc")


def test_a_request_waits_until_all_workers_hold_its_adapter():
    waiting = Waiting(2)
    assert not waiting.is_ready("one", A)
    assert not waiting.is_ready("two", A)
    assert waiting.take_errand() == Errand([A])
    assert not waiting.is_ready("one", A)
    assert waiting.take_errand() == Errand()  # it is asked once
    waiting.reported({A.digest: 1})
    assert not waiting.is_ready("one", A)
    waiting.reported({A.digest: 1})
    assert waiting.is_ready("one", A)
    assert waiting.is_ready("three", A)


def test_an_adapter_that_the_workers_do_not_keep_is_asked_for_again():
    waiting = Waiting(1)
    for _ in range(3):
        assert not waiting.is_ready("one", A)
        assert not waiting.is_ready("two", A)
        assert waiting.take_errand() == Errand([A])
        waiting.reported({A.digest: 1})
        assert waiting.is_ready("one", A)
        waiting.written(A)
        waiting.reported({A.digest: -1})


def test_few_adapters_are_read_at_once_and_all_get_their_turn():
    waiting = Waiting(1)
    claims = {"one": A, "two": B, "three": C}
    assert not any(waiting.is_ready(*each) for each in claims.items())
    assert waiting.take_errand() == Errand([A, B])
    waiting.reported({A.digest: 1})
    assert [waiting.is_ready(*each) for each in claims.items()] == [True, False, False]
    waiting.written(A)
    assert not waiting.is_ready("three", C)
    assert waiting.take_errand() == Errand([C])


def test_nothing_is_kept_for_requests_that_left():
    waiting = Waiting(1)
    waiting.is_ready("one", A)
    waiting.is_ready("two", A)
    waiting.finished("one", A)
    waiting.finished("nobody", A)
    assert waiting.take_errand() == Errand([A])
    waiting.finished("two", A)
    waiting.finished("two", A)
    assert waiting.take_errand() == Errand([], [A.digest])
    waiting.is_ready("three", B)
    waiting.finished("three", B)  # before anyone was asked
    assert waiting.take_errand() == Errand()


def test_who_leaves_and_who_comes_in_one_step():
    """The workers forget first, and then read."""
    waiting = Waiting(1)
    waiting.is_ready("one", A)
    waiting.take_errand()
    waiting.finished("one", A)
    waiting.is_ready("two", A)
    assert waiting.take_errand() == Errand([A], [A.digest])
