"""Whether the modules that `attach` looked at are still where they were, and what to do if not.

A layer that is replaced, added, taken out or put elsewhere is refused: a prefix is made for the
layers that there were. What embeds tokens or positions may be replaced: it is looked at anew. A
module that something was put around (a compiler, a checkpoint, an adapter) is where it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefixattn.integrations.places import Places, frequencies, position_modules, turning_table
from prefixattn.integrations.survey import input_embeddings

if TYPE_CHECKING:
    from prefixattn.integrations.boarding import Boarding

DETACH = "detach(), and attach a prefix that is made for the model as it is now"


def refuse_changes(model: PreTrainedModel, why: str | None) -> None:
    """Raise if there is a reason why a prefix cannot go on in ``model``.

    Where Dynamo meets an exception as it traces, the functions on its way run uncompiled from then
    on, in every model. After a graph break it is met where nothing is traced.
    """
    if why is None:
        return
    message = f"{type(model).__name__} was changed under its prefix: {why}. {DETACH}"
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break(msg=message)
    raise RuntimeError(message)


class Link(NamedTuple):
    """``child`` is what ``parent`` has under ``key``."""

    parent: nn.Module
    key: str
    child: nn.Module


class Sines(NamedTuple):
    """The table that ``owner`` turns keys by, and by which frequencies."""

    owner: nn.Module
    table: Tensor
    frequencies: dict[str, Tensor]

    def holds(self) -> bool:
        """Whether the table is the same. accelerate makes a meta tensor anew for each forward."""
        now = turning_table(self.owner)
        return now is self.table or (now is not None and now.is_meta and self.table.is_meta)


class Outline:
    """Where modules lie in another.

    Args:
        top: the module that they are in.
        fixed: those that must stay there, in their order.
        others: those that may be replaced.
    """

    def __init__(
        self, top: nn.Module, fixed: Sequence[nn.Module], others: Iterable[nn.Module] = ()
    ) -> None:
        self.top = top
        names = {module: name for name, module in top.named_modules()}
        self.fixed = {module: names[module] for module in fixed}
        self.kinds = {_kind(module) for module in fixed}
        self.counts = self._count()
        self.look(others)

    def look(self, others: Iterable[nn.Module] = ()) -> None:
        """Take what is there now for what shall be there."""
        names = {module: name for name, module in self.top.named_modules()}
        links: dict[tuple[nn.Module, str], nn.Module] = {}
        for module in (*self.fixed, *others):
            parent = self.top
            for key in filter(None, names[module].split(".")):
                child = parent.get_submodule(key)
                links[parent, key] = child
                parent = child
        self.links = [Link(parent, key, child) for (parent, key), child in links.items()]
        lists = {link.parent for link in self.links if isinstance(link.parent, nn.ModuleList)}
        self.lengths = [(each, len(each)) for each in lists]

    def holds(self) -> bool:
        """Whether nothing was replaced, added or taken out."""
        for parent, key, child in self.links:
            if parent._modules.get(key) is not child:
                return False
        return all(len(each) == length for each, length in self.lengths)

    def lost(self) -> str | None:
        """What of the fixed modules is no longer as it was, or None."""
        now = list(self.top.modules())
        present = set(now)
        gone = [name for module, name in self.fixed.items() if module not in present]
        if gone:
            more = f" (nor are {len(gone) - 1} others)" if len(gone) > 1 else ""
            return f"its {gone[0]} is not the module that it was{more}"
        if [module for module in now if module in self.fixed] != list(self.fixed):
            return "its layers stand in another order"
        counts = self._count()
        for kind, count in counts.items():
            if count > self.counts[kind]:
                return f"it has {count} modules of {kind[1]}, and had {self.counts[kind]}"
        return None

    def replaced(self) -> list[tuple[nn.Module, nn.Module | None]]:
        """The modules that something else stands in the place of, and what that is."""
        pairs = [(child, parent._modules.get(key)) for parent, key, child in self.links]
        return [(child, found) for child, found in pairs if found is not child]

    def _count(self) -> Counter[tuple[str, str]]:
        """How often modules of the fixed ones' classes stand in the model, one twice if shared."""
        every = self.top.named_modules(remove_duplicate=False)
        return Counter(kind for _, module in every if (kind := _kind(module)) in self.kinds)


def _kind(module: nn.Module) -> tuple[str, str]:
    """The class of a module, by its name: those that we or FSDP derive have another object."""
    return type(module).__module__, type(module).__name__


class Hooks:
    """The hooks on modules inside a stack, which follow where such a module is replaced.

    Args:
        boarding: whose hooks they are.
        model: what was attached to.
        stack: of layers, in it.
        attentions: the stack's attention modules.
    """

    def __init__(
        self,
        boarding: Boarding,
        model: PreTrainedModel,
        stack: PreTrainedModel,
        attentions: Sequence[nn.Module],
    ) -> None:
        self.boarding = boarding
        self.stack = stack
        self.num_layers = _num_layers(stack)
        self.above = Outline(model, [stack])
        members = set(attentions)
        self.within = Outline(stack, [m for m in stack.modules() if m in members])
        self.handles: list[Any] = []
        self._put()

    def _put(self) -> None:
        """Hook the modules that are there now."""
        self.remove()
        places = self.boarding.places
        for table in places.tables:
            if isinstance(table, nn.Embedding):
                hook = table.register_forward_hook(places.embedding_hook)
            else:
                hook = table.register_forward_pre_hook(places.table_hook, with_kwargs=True)
            self.handles.append(hook)
        others = position_modules(self.stack)
        embeddings = input_embeddings(self.stack)
        if embeddings is not None:
            self.handles.append(embeddings.register_forward_hook(self.boarding.embedding_hook))
            if any(module is embeddings for module in self.stack.modules()):
                others.append(embeddings)
        self.within.look(others)
        self.sizes = _sizes(self.stack, others)
        self.sines = [
            Sines(owner, sines, frequencies(owner))
            for owner in self.stack.modules()
            if (sines := turning_table(owner)) is not None
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        while self.handles:
            self.handles.pop().remove()

    @torch.compiler.assume_constant_result
    def keep_up(self) -> str | None:
        """Hook what was put in a hooked module's place, or say why that cannot be followed."""
        num_layers = _num_layers(self.stack)
        if num_layers != self.num_layers:
            return f"its configuration names {num_layers} layers, and named {self.num_layers}"
        tables_hold = all(_rows(owner, name) == size for owner, name, size in self.sizes)
        tables_hold = tables_hold and all(sines.holds() for sines in self.sines)
        if tables_hold and self.within.holds():
            return None
        lost = self.within.lost() or _turned_otherwise(self.within) or _other_sines(self.sines)
        if lost is not None:
            return lost
        places = Places(self.stack, self.boarding.places.causal)
        if self.boarding.places.movable and not places.movable:
            return "positions cannot be moved by what embeds them now"
        self.boarding.look(self.stack, places)
        self._put()
        return None

    @torch.compiler.assume_constant_result
    def keep_up_above(self) -> str | None:
        """The same for the way from the model to the stack."""
        if self.above.holds():
            return None
        lost = self.above.lost()
        if lost is None:
            self.above.look()
        return lost


def _num_layers(stack: PreTrainedModel) -> Any:
    return getattr(stack.config, "num_hidden_layers", None)


def _sizes(stack: nn.Module, others: Iterable[nn.Module]) -> list[tuple[Any, str, int]]:
    """The tables among these and of ``stack``: owner, attribute and how many rows there are.

    A longer one may be put into a module that stays.
    """
    found: list[Any] = [(m, "weight") for m in others if isinstance(m, nn.Embedding)]
    for module in stack.modules():
        if isinstance(getattr(module, "pos_encoding", None), Tensor):  # XLM-like sines
            found.append((module, "pos_encoding"))
    return [(owner, name, _rows(owner, name)) for owner, name in found]


def _rows(owner: nn.Module, name: str) -> int:
    table = getattr(owner, name, None)
    return len(table) if isinstance(table, Tensor) else 0


def _turned_otherwise(outline: Outline) -> str | None:
    """Whether a module that turns queries and keys gave way to one of other frequencies."""
    for old, new in outline.replaced():
        before = frequencies(old)
        if not before:
            continue
        same = new is not None and _same(before, frequencies(new))
        if not same or getattr(old, "attention_scaling", 1) != getattr(new, "attention_scaling", 1):
            return (
                f"its {type(old).__name__} was replaced by one of other frequencies than the "
                "prefix's keys were turned by"
            )
    return None


def _other_sines(tables: Sequence[Sines]) -> str | None:
    """Whether a table that keys are turned by gave way to one of other frequencies."""
    for sines in tables:
        now = frequencies(sines.owner)
        if not sines.holds() and sines.frequencies and now and not _same(sines.frequencies, now):
            return (
                f"the sines of its {type(sines.owner).__name__} were replaced by those of other "
                "frequencies than the prefix's keys were turned by"
            )
    return None


def _same(before: dict[str, Tensor], now: dict[str, Tensor]) -> bool:
    """Whether these are the same frequencies; they may have been in half precision in between."""
    return before.keys() == now.keys() and all(
        one.shape == now[name].shape and torch.allclose(one, now[name], rtol=2**-7, atol=1e-7)
        for name, one in before.items()
    )
