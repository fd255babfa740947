"""What torch.compile has to be told: models that run as they were written, code of their own."""

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn


class _Stance:
    """How many are within `uncompiled` now, and what sets the compiler back."""

    lock = threading.Lock()
    users = 0
    setting: Any = None


@contextmanager
def uncompiled() -> Iterator[None]:
    """Within, whatever torch.compile was given runs as it was written.

    A compiler does not see hooks that record what a model does, and breaks off at them. The
    compiler's stance belongs to the process: other threads run uncompiled meanwhile, too.
    """
    if "torch._dynamo" not in sys.modules:  # then nothing is compiled, and to load it takes seconds
        yield
        return
    with _Stance.lock:
        if not _Stance.users:
            _Stance.setting = torch.compiler.set_stance("force_eager")
        _Stance.users += 1
    try:
        yield
    finally:
        with _Stance.lock:
            _Stance.users -= 1
            if not _Stance.users:
                _Stance.setting.__exit__(None, None, None)


def unwrapped(model: Any) -> Any:
    """What ``torch.compile(model)`` is around; any other object is returned as it is."""
    compiler = sys.modules.get("torch._dynamo")
    while compiler is not None and isinstance(model, compiler.OptimizedModule):
        model = model._orig_mod
    return model


def compiled_alone(model: nn.Module, layer: nn.Module | None, modules: Sequence[nn.Module]) -> bool:
    """Whether ``torch.compile(layer)`` was called, or one of ``modules`` is compiled in any way."""
    wrapped = {
        id(unwrapped(module)) for module in model.modules() if unwrapped(module) is not module
    }
    in_place = any(module._compiled_call_impl is not None for module in modules)
    return in_place or any(id(module) in wrapped for module in (layer, *modules))


def with_code_of_its_own(held: Any) -> Any:
    """A function or a bound method with a copy of its code; anything else is returned as it is.

    ``torch.compile`` keeps what it made by the code object of the function that it entered by, and
    counts there how often it had to compile anew. Hooks and the methods of derived classes are
    such functions, and every model would share them: the ninth kind of model that a process
    compiles would be over Dynamo's limit.
    """
    if isinstance(held, MethodType):
        return MethodType(with_code_of_its_own(held.__func__), held.__self__)
    if not isinstance(held, FunctionType):
        return held
    code, names = held.__code__.replace(), held.__globals__
    made = FunctionType(code, names, held.__name__, held.__defaults__, held.__closure__)
    made.__kwdefaults__, made.__qualname__ = held.__kwdefaults__, held.__qualname__
    made.__dict__.update(held.__dict__)
    return made
