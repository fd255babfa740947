"""A live model's ``forward`` that brings the prefix too, for callers that pass its hooks by.

A hook runs where a model is called. sentence-transformers calls ``model.forward``. The object is
given a subclass of its class, which copies, pickles and compilers know; the class itself, which
other models have, is left alone.
"""

import functools
from typing import Any, Protocol

from torch import nn

from prefixattn.integrations.carrier import KEYWORD
from prefixattn.integrations.derived import derive, is_hidden
from prefixattn.integrations.undo import Undoing

BOARDING = "prefixattn_boarding"
NOTING = "prefixattn_noting"


class Boards(Protocol):
    """What stands before and behind a forward of the layers' own model."""

    closed: bool
    takes_keywords: bool

    def __call__(
        self, stack: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]: ...

    def leave(self, stack: Any, args: tuple[Any, ...], output: Any) -> None: ...

    def note_caller(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None: ...

    def forget_caller(self, model: Any, args: tuple[Any, ...], output: Any) -> None: ...


def board_directly(stack: nn.Module, boarding: Boards, undo: Undoing) -> None:
    """Have ``stack.forward`` bring what the hooks of ``stack`` bring, where they did not run.

    Where something lies on the object in the place of its forward, that is left alone: the hooks
    still bring the prefix to calls.
    """
    if is_hidden(stack, _boards) or not boarding.takes_keywords:
        return  # the keyword tells whether the hooks ran
    setattr(stack, BOARDING, boarding)
    undo.callback(delattr, stack, BOARDING)
    undo.callback(derive(stack, _boards))


def note_directly(model: nn.Module, boarding: Boards, undo: Undoing) -> None:
    """Have ``model.forward`` tell ``boarding``, of a stack inside it, what its caller said."""
    others: list[Boards] | None = getattr(model, NOTING, None)
    if others is not None:
        others.append(boarding)
    elif not is_hidden(model, _notes):
        setattr(model, NOTING, [boarding])
        undo.callback(delattr, model, NOTING)
        undo.callback(derive(model, _notes))


def _boards(old: type) -> dict[str, Any]:
    base: Any = old

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        boarding: Boards | None = getattr(self, BOARDING, None)
        # A copy that shares its original's modules is not told that they were detached.
        if boarding is None or boarding.closed or KEYWORD in kwargs:
            return base.forward(self, *args, **kwargs)
        output = None
        try:
            args, kwargs = boarding(self, args, kwargs)
            output = base.forward(self, *args, **kwargs)
        finally:
            boarding.leave(self, args, output)
        return output

    return {"forward": forward}


def _notes(old: type) -> dict[str, Any]:
    base: Any = old

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        noting = [boarding for boarding in getattr(self, NOTING, []) if not boarding.closed]
        for boarding in noting:
            boarding.note_caller(self, args, kwargs)
        try:
            return base.forward(self, *args, **kwargs)
        finally:
            for boarding in noting:
                boarding.forget_caller(self, (), None)

    return {"forward": forward}
