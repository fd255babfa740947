"""`make test-sanitize`: the C++ kernels under every sanitizer that can run them and under valgrind.

Arguments go to each run of pytest.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from prefixattn import compiler

TESTS = Path(__file__).parent
OPERATION = TESTS.parent / "operation" / "test_implementations.py"
HEADERS = TESTS / "test_headers.py"
KERNELS = (OPERATION, TESTS / "test_instructions.py", TESTS / "test_threads.py")
OF_CPU = "cpu-cpu or test_cpu or cpp or instruction or threads or extreme"
MEMORY = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O1", "-g")
RACES = ("-fsanitize=thread", "-O1", "-g")
THREADED = "kernels or parallel or forward or backward"
VALGRIND = ("valgrind", "--quiet", "--error-exitcode=9", "--leak-check=full")


def main() -> None:
    found = compiler.find_compiler()
    if not shutil.which(VALGRIND[0]):
        sys.exit("make test-sanitize needs valgrind; on Debian and Ubuntu: apt install valgrind")
    more = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="prefixattn-sanitize-") as folder:
        say(f"building the library with {' '.join(MEMORY)}, for {', '.join(found.flags())}")
        library = compiler.build(Path(folder), found, extra=MEMORY)
        say("AddressSanitizer, UndefinedBehaviorSanitizer: the kernels' tests")
        preloaded = " ".join(runtime(found, name) for name in ("libasan.so", "libstdc++.so"))
        test(
            [*map(str, KERNELS), "-k", OF_CPU, "--cpu-library", str(library), *more],
            LD_PRELOAD=preloaded,
            ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1",
        )
    say("AddressSanitizer, UndefinedBehaviorSanitizer, LeakSanitizer: the headers' programs")
    memory = [str(HEADERS), "-k", "program_of", f"--native-flags={' '.join(MEMORY)}", *more]
    test(memory, ASAN_OPTIONS="allocator_may_return_null=1")
    say(f"ThreadSanitizer: the programs {THREADED}, with std::thread, for it knows no libgomp")
    races = [str(HEADERS), "-k", THREADED, f"--native-flags={' '.join(RACES)}"]
    test([*races, "--native-runner=setarch -R", *more], TSAN_OPTIONS="allocator_may_return_null=1")
    say("valgrind memcheck: programs for plain and avx2, which is the best that it knows")
    test([*valgrind(), *more])
    say("all of it ran, and nothing was found")


def valgrind() -> list[str]:
    quick = "(plain or avx2) and program_of and not functions and not simd"
    return [str(HEADERS), "-rP", "-k", quick, f"--native-runner={' '.join(VALGRIND)}"]


def runtime(found: compiler.Compiler, name: str) -> str:
    """Where the compiler has a library of its own."""
    path = subprocess.check_output([*found.command, f"-print-file-name={name}"], text=True).strip()
    if not os.path.isabs(path):
        sys.exit(f"make test-sanitize: {found.version} has no {name}")
    return path


def test(arguments: Sequence[str], **environment: str) -> None:
    command = [sys.executable, "-P", "-m", "pytest", "-q", *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def say(text: str) -> None:
    print(f"== {text}", flush=True)


if __name__ == "__main__":
    main()
