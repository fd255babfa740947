"""A process that the system refuses AMX to takes the next instruction set, and says so."""

import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from patience import PATIENCE

from prefixattn import cpu

LINUX = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="Linux on x86-64 is what wants to be asked for AMX",
)

# A filter of system calls (seccomp, in the BPF of 1993): arch_prctl with ARCH_REQ_XCOMP_PERM fails
# with EPERM, as it does in a sandbox that does not know it; all other calls go through.
FILTER = """
import ctypes, errno, struct
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, FAIL = 0x7FFF0000, 0x00050000 | errno.EPERM
program = b"".join(struct.pack("=HBBI", *line) for line in (
    (LOAD, 0, 0, 0),  # the call's number
    (EQUAL, 0, 3, 158),  # arch_prctl of x86-64; else allow
    (LOAD, 0, 0, 16),  # its first argument
    (EQUAL, 0, 1, 0x1023),
    (RETURN, 0, 0, FAIL),
    (RETURN, 0, 0, ALLOW),
))
buffer = ctypes.create_string_buffer(program)
header = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
if libc.prctl(22, 2, ctypes.create_string_buffer(header), 0, 0):  # PR_SET_SECCOMP, a filter
    raise SystemExit(77)
"""
NO_FILTERS = 77


def refused(program: str) -> str:
    """What a program prints where AMX is refused."""
    done = subprocess.run(
        [sys.executable, "-c", FILTER + program],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    if done.returncode == NO_FILTERS:
        pytest.skip("this system lets no process filter its calls")
    assert done.returncode == 0, done.stderr
    return done.stdout


@LINUX
def test_the_filter_refuses() -> None:
    ask = "print(libc.syscall(158, 0x1023, 18), errno.errorcode[ctypes.get_errno()])"
    assert refused(ask).split() == ["-1", "EPERM"]


@LINUX
def test_another_set_is_taken(use_instructions: Callable[[str], None]) -> None:
    use_instructions("amx")
    found = refused(
        "from prefixattn import cpu\nfrom prefixattn.cli import _instruction_set\n"
        "print(cpu.instructions())\nprint(_instruction_set())"
    )
    name, info = found.splitlines()
    assert name in ("avx512", "avx512bf16")
    assert info == f"{name}; the processor has AMX, which the system does not let this process use"


@LINUX
def test_nothing_is_said_where_nothing_is_refused(use_instructions: Callable[[str], None]) -> None:
    if "amx_bf16" in Path("/proc/cpuinfo").read_text():
        use_instructions("amx")  # or skips: then it is refused indeed
    assert not cpu.tiles_refused()
