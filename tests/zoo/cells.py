"""One row of the table: what each situation comes to for one family."""

import copy
import re
import traceback
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import prefixattn

from . import causal, encoder, encoder_decoder
from .families import Family, build
from .overrides import UNTRIED
from .specimen import RefusedError, Situation, Specimen, UnavailableError
from .table import WHOLE

OURS = str(Path(prefixattn.__file__).parent)
SITUATIONS = {
    "causal": causal.SITUATIONS,
    "multimodal": causal.SITUATIONS,
    "encoder": encoder.SITUATIONS,
    "encoder-decoder": encoder_decoder.SITUATIONS,
}


def situations_of(kind: str) -> dict[str, Situation]:
    """Those that this machine can try."""
    return {name: x for name, x in SITUATIONS[kind].items() if name not in causal.MISSING}


def specimen_of(family: Family, **changes: Any) -> Specimen:
    """A family's tiny model, with changes to its configuration."""
    model = build(family, **changes)
    if family.kind == "encoder-decoder":
        return encoder_decoder.Specimen(model)
    if family.kind == "encoder":
        return encoder.Specimen(model, lambda auto: build(family, auto, **changes))
    return Specimen(model)


def examine(
    family: Family, without: Collection[str] = (), **changes: Any
) -> Iterator[tuple[str, str]]:
    """Each cell of a family's row as soon as it is known, ``without`` some situations."""
    if family.name in UNTRIED:
        yield WHOLE, f"n/a: {UNTRIED[family.name]}"
        return
    try:
        s = specimen_of(family, **changes)
    except ImportError as error:
        missing = re.search(r"the (\S+) library|No module named '(\S+)'", str(error))
        name = next(filter(None, missing.groups()), "a library") if missing else "a library"
        yield WHOLE, f"n/a: needs {name}, which was not installed"
        return
    except Exception as error:
        yield WHOLE, f"n/a: not built: {type(error).__name__}: {error}"[:200]
        return
    for question in (_attach, _truth):
        found = cell(question, s)
        if found != "exact":
            yield WHOLE, found
            return
    for name, situation in situations_of(family.kind).items():
        if name not in without:
            yield name, cell(situation, s)


def _attach(s: Specimen) -> None:
    """Refusals come before anything is known of the model's keys."""
    try:
        s.attached()
    except UnavailableError:
        one = [torch.zeros(1, 1, 1)]
        with suppress(ValueError):  # this prefix fits no model
            prefixattn.attach(copy.deepcopy(s.stock), prefixattn.Prefix(one, one))
    except Exception as error:
        if not isinstance(error, NotImplementedError):
            _truth(s)  # it may be transformers that cannot
        raise


def _truth(s: Specimen) -> None:
    assert s.plain.shape == s.logits.shape


def cell(situation: Situation, s: Any) -> str:
    """``exact``, or what it is instead and why."""
    try:
        wrong = situation(s)
    except UnavailableError as error:
        return f"n/a: {error}"[:200]
    except RefusedError as error:
        return f"refused: {error}"
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        mine = frames[-1].filename.startswith(OURS)
        if isinstance(error, NotImplementedError) and mine:
            return f"refused: {error}"
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
        return f"crash: {type(error).__name__}: {error}"[:300] + f" ({where})"
    return "exact" if wrong is None else f"WRONG: {wrong}"
