"""What every test gets: fixed seeds, and a skip with its reason where a device is missing."""

import importlib
import os
import random
import signal
import sys
import zlib
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

from prefixattn import build, cpu, quick

# What other versions of transformers get wrong themselves, by a part of a test's name.
PEFT_LOSES = "PEFT 0.21 loses its prefix: its `past_key_values` are `cache` in transformers 5.24"
CHUNKS = "its chunked mask for a static cache is called with an argument that it does not take"
UPSTREAM: dict[str, dict[str, str]] = {
    "5.17": {
        "test_generation[llama4_text": CHUNKS,
        "test_a_model_that_names_us_and_has_no_prefix[llama4-whole-static]": CHUNKS,
        "test_a_model_that_names_us_and_has_no_prefix[llama4-padded-static]": CHUNKS,
    },
    "5.24": {
        "integrations/test_encoders.py::test_equals_peft": PEFT_LOSES,
        "integrations/test_encoder_decoder.py::test_equals_peft": PEFT_LOSES,
        "integrations/test_peft.py::test_generation[": PEFT_LOSES,
        "integrations/test_peft.py::test_a_base_that_generate_compiles": PEFT_LOSES,
        "checkpoints/test_peft.py::test_a_head_travels_with_the_adapter": PEFT_LOSES,
        "users/test_chat.py::test_pipeline_of_a_peft_model": PEFT_LOSES,
        "test_lora_added_later_is_saved_alone_and_says_so[added]": "add_adapter wants PEFT 0.22",
    },
}

# What all tests share. Not the folder `tests`, whose folders have names of packages, like `vllm`.
sys.path.insert(0, str(Path(__file__).parent / "support"))

HAS_GPU = torch.cuda.is_available()
HAS_TRITON = find_spec("triton") is not None

# Without a device Triton interprets the kernels. It reads this once, when it is imported.
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

# torch keeps compiled backward graphs from run to run, by what calls an operator and not by the
# operator's own arguments: those of an older schema would be found again.
os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"

# Two busy cores make any single example late now and then; that says nothing about the code.
hypothesis.settings.register_profile(
    "prefixattn",
    deadline=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("prefixattn")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu-library", type=Path, help="the library of C++ kernels to test")
    parser.addoption("--native-flags", default="", help="more flags for tests/native/headers")
    parser.addoption(
        "--random-problems",
        type=int,
        default=0,
        help="how many random problems tests/operation/test_random.py gives each implementation",
    )
    parser.addoption("--native-runner", default="", help="the command that runs these programs")


def pytest_configure(config: pytest.Config) -> None:
    # A shell has what it runs in the background ignore Ctrl-C, and so would all that tests start.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if library := config.getoption("cpu_library"):
        build.SHIPPED = library.absolute()


def pytest_report_header() -> str:
    if not HAS_TRITON:
        return f"torch {torch.__version__}, no triton"
    import triton

    how = "interpreted" if triton.knobs.runtime.interpret else "compiled"
    return f"torch {torch.__version__}, triton {triton.__version__} ({how})"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    absent = {}
    if not HAS_GPU:
        absent["gpu"] = "needs a CUDA or ROCm device, and torch finds none here"
    if not HAS_TRITON:
        absent["triton"] = "needs the package triton, which is not installed here"
    found = version("transformers") if find_spec("transformers") is not None else ""
    upstream = UPSTREAM.get(".".join(found.split(".")[:2]), {})
    for item in items:
        for marker, reason in absent.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
        for part, reason in upstream.items():
            if part in item.nodeid:
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))


@pytest.fixture
def use_instructions(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """A function that takes an instruction set for this test, or skips the test by its name.

    A set for tests has a library of its own, which is built when it is first asked for.
    """
    import emulated  # of tests/support

    before = cpu.instructions()
    refusals = {1: "this processor lacks it", 2: "the library was built without it"}

    def use(name: str) -> None:
        status = cpu.library().prefixattn_use_instructions(name.encode())
        if status == 2 and name in emulated.SETS and build.obstacle() is None:
            quick.forget()  # runs that were made for the other library
            monkeypatch.setattr(cpu, "library", emulated.library)
            status = cpu.library().prefixattn_use_instructions(name.encode())
        if status:
            pytest.skip(f"{name}: {refusals[status]}")

    yield use
    monkeypatch.undo()
    quick.forget()
    cpu.library().prefixattn_use_instructions(before.encode())


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """No test meets the graphs of those before it: they count towards Dynamo's limit."""
    yield
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> Iterator[None]:
    """Half of the interpreter's time: at each call of a helper it patches Triton's language anew.

    Once for a launch is enough, for each of the modules by which helpers know the language.
    """
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None and HAS_TRITON and not HAS_GPU:
        interpreter = importlib.import_module("triton.runtime.interpreter")
    if interpreter is None:
        yield
        return
    launch, patch, patched = interpreter.GridExecutor.__call__, interpreter._patch_lang, set()  # type: ignore[var-annotated]

    def launch_once(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            launch(self, *args, **kwargs)
        finally:
            patched.clear()

    def patch_once(fn: Any) -> Any:
        seen = tuple(id(fn.__globals__.get(name)) for name in ("tl", "core"))
        if seen in patched:
            return None
        patched.add(seen)
        return patch(fn)

    with pytest.MonkeyPatch.context() as context:
        context.setattr(interpreter.GridExecutor, "__call__", launch_once)
        context.setattr(interpreter, "_patch_lang", patch_once)
        yield


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """Each test starts from a seed of its own, whatever ran before it and on which worker."""
    seed = zlib.crc32(request.node.name.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
