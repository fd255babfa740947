"""Threads: the same bits, no more threads than torch is told to take, and no way to hang."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import patience
import pytest
import torch
from patience import PATIENCE, until
from torch import Tensor

from prefixattn import build, prefix_attention
from prefixattn.testing import (
    Case,
    Inputs,
    assert_within_budget,
    evaluate,
    make_inputs,
    poisoned_memory,
    run_implementation,
)

# Enough work for threads, and prefixes that several rows, or several blocks of one row, share.
TRAINING = Case("training", B=5, H=2, H_kv=1, M=70, N=70, P=200, D=64)
ONE_ROW = Case("one-row", B=1, H=4, H_kv=1, M=300, N=300, P=200, D=64)
DECODE = Case("decode", B=2, H=4, H_kv=1, M=1, N=1500, P=1500, D=128)
SMALL = Case("small", M=40, N=40, P=16, D=64)
MANY_ROWS = Case("many-rows", B=96, H=6, H_kv=1, M=64, N=64, P=16, D=32)

SetThreads = Callable[[int], None]


@pytest.fixture
def set_threads() -> Iterator[SetThreads]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def results(inputs: Inputs, deterministic: bool = False) -> list[Tensor]:
    """Output, lse and every gradient."""

    def run(arguments: Inputs) -> tuple[Tensor, Tensor]:
        out, lse = prefix_attention(
            **arguments, implementation="cpu", return_lse=True, deterministic=deterministic
        )
        return out, lse

    found = evaluate(inputs, run)
    return [found.out, found.lse, *found.grads.values()]


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", [TRAINING, ONE_ROW, DECODE], ids=lambda case: case.name)
def test_deterministic_gives_the_same_bits_on_any_number_of_threads(
    case: Case, dtype: torch.dtype, set_threads: SetThreads
) -> None:
    inputs = make_inputs(case, dtype)
    found, free = [], []
    for threads in (1, 2, 3, 5):
        set_threads(threads)
        with poisoned_memory():
            found.append(results(inputs, deterministic=True))
        free.append(results(inputs))
    for others in found[1:]:
        assert same(found[0], others)
    # Else the problem would be none that is cut by the number of threads.
    assert not all(same(free[0], others) for others in free[1:])


@pytest.mark.parametrize("case", [TRAINING, ONE_ROW, DECODE], ids=lambda case: case.name)
def test_the_same_number_of_threads_gives_the_same_bits(
    case: Case, set_threads: SetThreads
) -> None:
    inputs = make_inputs(case, torch.float32)
    for threads in (2, 3):
        set_threads(threads)
        first = results(inputs)
        assert all(same(first, results(inputs)) for _ in range(4))


def test_one_thread_sums_a_large_batch_as_exactly_as_eager(set_threads: SetThreads) -> None:
    """Here one sum over all rows' queries would err more than the budget allows."""
    set_threads(1)
    inputs = make_inputs(MANY_ROWS, torch.float32)
    got = evaluate(inputs, run_implementation("cpu"), with_lse_gradient=False)
    assert_within_budget(got, inputs, with_lse_gradient=False)


REPEATS = """
import torch
from prefixattn import prefix_attention
from prefixattn.testing import Case, evaluate, make_inputs, run_implementation
torch.set_num_threads(2)
inputs = make_inputs(Case("", M=40, N=40, P=16, D=64), torch.float32)
found = [evaluate(inputs, run_implementation("cpu")) for _ in range(1000)]
numbers = [[each.out, each.lse, *each.grads.values()] for each in found]
assert all(torch.equal(*pair) for other in numbers[1:] for pair in zip(numbers[0], other))
"""


def test_a_thousand_runs_are_one(tmp_path: Path) -> None:
    """In a process of its own, whose threads do not wait busily: slow where cores are busy."""
    run_script(tmp_path, REPEATS, {**os.environ, "OMP_WAIT_POLICY": "passive"})


HAS_SCHEDSTAT = Path(f"/proc/self/task/{os.getpid()}/schedstat").exists()

# Who took part is told by the processor time of each thread: a thread of a team has some, however
# late it came, and one that sleeps has none. In a process of its own nobody else wakes up.
COUNTS = f"""
import ctypes, sys, time
sys.path.insert(0, {str(Path(patience.__file__).parent)!r})
import torch
from patience import THREADS, until_others_sleep
from prefixattn import prefix_attention
from prefixattn.testing import Case, make_inputs

def busy():
    return {{t.name: int((t / "schedstat").read_text().split()[0]) for t in THREADS.iterdir()}}

def workers(work):
    until_others_sleep()  # OpenMP's threads wait busily at first
    before, started = busy(), time.process_time_ns()
    work()
    after, spent = busy(), time.process_time_ns() - started
    assert after.keys() == before.keys()
    # The rest was done by threads that came and went.
    assert sum(after.values()) - sum(before.values()) > 0.9 * spent
    return sum(after[thread] > before[thread] for thread in after)

inputs = make_inputs(Case("long", B=8, H=8, M=200, N=200, P=200, D=64), torch.float32)
expected, threads = prefix_attention(**inputs, implementation="cpu"), int(sys.argv[1])
torch.set_num_threads(threads)
torch.randn(2**22).exp()  # torch's own have started now
"""
FROM_PYTHON = """
def work():
    for _ in range(6):
        prefix_attention(**inputs, implementation="cpu")

assert workers(work) == threads
"""
IN_A_REGION = """
found = []
region = ctypes.CDLL(None).GOMP_parallel  # the OpenMP runtime that torch brought
job = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(
    lambda _: found.extend(prefix_attention(**inputs, implementation="cpu") for _ in range(6))
)
assert workers(lambda: region(job, None, threads, 0)) == threads
assert len(found) == 6 * threads
assert all(torch.equal(expected, each) for each in found)
"""


@pytest.mark.skipif(not HAS_SCHEDSTAT, reason="this system has no schedstat")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_are_those_that_torch_has_and_as_many(threads: int, tmp_path: Path) -> None:
    run_script(tmp_path, COUNTS + FROM_PYTHON, dict(os.environ), str(threads))


@pytest.mark.skipif(not HAS_SCHEDSTAT, reason="this system has no schedstat")
def test_inside_a_parallel_region_it_takes_no_more_threads(tmp_path: Path) -> None:
    run_script(tmp_path, COUNTS + IN_A_REGION, dict(os.environ), "2")


def test_several_callers_at_once(set_threads: SetThreads) -> None:
    set_threads(2)
    problems = [make_inputs(case, torch.float32) for case in (TRAINING, DECODE, SMALL, ONE_ROW)]
    expected = [results(inputs) for inputs in problems]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            jobs = [pool.submit(results, inputs) for inputs in problems]
            for job, wanted in zip(jobs, expected, strict=True):
                assert same(job.result(PATIENCE), wanted)


def test_a_forked_child_computes_and_ends(set_threads: SetThreads) -> None:
    """It has a copy of the OpenMP runtime, but none of its threads."""
    set_threads(2)
    inputs = make_inputs(DECODE, torch.float32)
    expected, _ = prefix_attention(**inputs, implementation="cpu", return_lse=True)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            out = prefix_attention(**inputs, implementation="cpu")
            again = prefix_attention(**inputs, implementation="cpu")
            right = torch.equal(out, expected) and torch.equal(again, expected)
            status = 0 if right and torch.get_num_threads() == 2 else 2
        finally:
            os._exit(status)
    assert ended(child) == 0
    assert torch.equal(prefix_attention(**inputs, implementation="cpu"), expected)


def ended(child: int) -> int:
    """The exit status of a child process, which is killed if it hangs."""
    found = 0

    def happened() -> int:
        nonlocal found
        pid, found = os.waitpid(child, os.WNOHANG)
        return pid

    try:
        until(happened)
    except AssertionError:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    return os.waitstatus_to_exitcode(found)


WORKERS = f"""
import sys
import torch
from prefixattn import prefix_attention
from prefixattn.testing import Case, make_inputs
inputs = make_inputs(Case("", B=2, H_kv=1, M=60, N=60, P=60, D=64), torch.float32)
def compute(threads):
    torch.set_num_threads(threads)
    return prefix_attention(**inputs, implementation="cpu", deterministic=True)
class Results(torch.utils.data.Dataset):
    def __len__(self):
        return 6
    def __getitem__(self, index):
        return compute(1 + index % 2)
if __name__ == "__main__":
    expected = compute(2)
    loader = torch.utils.data.DataLoader(
        Results(), num_workers=2, multiprocessing_context=sys.argv[1], timeout={PATIENCE},
        batch_size=None
    )
    assert all(torch.equal(found, expected) for found in loader)
    assert torch.equal(compute(2), expected)
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader(method: str, tmp_path: Path) -> None:
    run_script(tmp_path, WORKERS, dict(os.environ), method)


def run_script(folder: Path, text: str, environment: dict[str, str], *arguments: str) -> None:
    """A process that runs `text` with the library under test, as do those that it spawns."""
    preamble = f"""
from pathlib import Path
from prefixattn import build
build.SHIPPED = Path({str(build.library())!r})
"""
    script = folder / "script.py"
    script.write_text(preamble + text)
    done = subprocess.run(
        [sys.executable, "-P", str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
