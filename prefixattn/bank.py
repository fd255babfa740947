"""Many prefixes beside one model, of which each row of a forward reads its own."""

import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prefixattn import ranks
from prefixattn.gated import GatedPrefix
from prefixattn.in_use import InUse
from prefixattn.kept import stores
from prefixattn.layers import (
    LayerShape,
    Positions,
    PrefixBatch,
    PrefixSource,
    check_count,
    spread,
)
from prefixattn.prefix import Prefix
from prefixattn.scalars import integer
from prefixattn.stored import CONFIG_FILE, StoredPrefix
from prefixattn.tables import Entry, Pairs, Tables, side_by_side

Member = Prefix | str | Path
Row = int | str | None | Sequence[int | str]


@dataclass(eq=False)
class _Use:
    """One ``with bank.use(rows)``: what each row reads, and the tables that this was found in.

    What a compiler is to see of it holds no places: each selection would have a graph of its own.
    """

    rows: list[Entry]  # empty: no prefix
    index: Tensor  # [rows], the place of each one's entry among `entries`, -1 for none
    lengths: Tensor  # [R], tokens of each entry
    modules: list[list[Prefix]] | None  # of each entry; None: some are in files
    tables: Pairs | None = None
    ready: PrefixBatch | None = None  # out of the tables

    @property
    def entries(self) -> list[Entry]:
        return _distinct(self.rows)


class PrefixBank(PrefixSource):
    """Prefixes of different lengths, of which each row reads one, several, or none.

    ``with bank.use([0, 2, -1]): model.generate(...)``. Rows of beams and of several returned
    sequences follow the row they are made from: without gradients, ``k`` times as many rows are
    ``k`` neighbours made from each.

    Where gradients are computed, the entries in use are put side by side in each forward, once and
    not per row, and members that train get gradients summed over their rows. Without gradients
    they lie in tables that are filled when an entry first comes into use, and kept while there is
    room; forwards then build nothing, and shapes stay when other members come into use. Dropout is
    for gradients only.

    Args:
        members: prefixes, which become submodules, or folders that `Prefix.save_pretrained` wrote,
            which do not train and are read when they first come into use. In a mapping they have
            names, in a sequence "0", "1", ….
        capacity: entries that the tables have room for. More in use at once have them grow.
        budget_bytes: what the tables may take; entries in use longest ago make room. A slot takes
            as many bytes as the longest entry, in the bank's dtype (``bank.to(torch.bfloat16)``).

    A bank serves one thread, or asyncio task, at a time, which may be another than that which
    entered ``use``: a second one's ``use`` meanwhile is refused.

    Raises:
        ValueError: no members, members whose layers differ, or gates, which all rows share.
        TypeError: a member that is no prefix.
        FileNotFoundError: no prefix in a folder.

    Warns:
        UserWarning: a damaged file. ``use`` refuses this member, with the reason.
    """

    _like: Tensor
    positions: Positions = Prefix.positions

    def __init__(
        self,
        members: Sequence[Member] | Mapping[str, Member],
        *,
        capacity: int = 8,
        budget_bytes: int | None = None,
    ) -> None:
        super().__init__()
        capacity = check_count("capacity", capacity)
        if budget_bytes is not None:
            budget_bytes = check_count("budget_bytes", budget_bytes)
        self.names: list[str] = []
        self.members = nn.ModuleDict()  # those that are modules, by their place in names
        self._stored: dict[int, StoredPrefix] = {}  # those in folders
        self._broken: dict[int, str] = {}  # those that cannot be read, and why
        self._lengths: dict[int, int] = {}  # tokens of each that can be read
        self._layer_shapes: list[LayerShape | None] = []
        self._uses: InUse[_Use] = InUse(type(self).__name__)
        self._tables = Tables(capacity, budget_bytes)
        self._closed = False
        named = members if isinstance(members, Mapping) else _numbered(members)
        for name, member in named.items():
            self._add(name, member)
        if not self._layer_shapes:
            raise ValueError("members must hold at least one prefix that can be read, got none")
        dtypes = [p.dtype for p in self.parameters()] + [s.dtype for s in self._stored.values()]
        device = next((p.device for p in self.parameters()), torch.device("cpu"))
        dtype = functools.reduce(torch.promote_types, dtypes)
        # Its dtype and device are those of the tables; they change as a module's do.
        self.register_buffer("_like", torch.empty(0, dtype=dtype, device=device), persistent=False)

    @classmethod
    def from_folder(
        cls, path: str | Path, *, capacity: int = 8, budget_bytes: int | None = None
    ) -> "PrefixBank":
        """Every folder in ``path`` that holds a prefix, by its name; read when it comes into use.

        Names that are numbers come first, in their order.
        """
        folders = _folders(path)
        if not folders:
            raise FileNotFoundError(f"no folder with a {CONFIG_FILE} in {path}")
        ordered = {name: folders[name] for name in sorted(folders, key=_order)}
        return cls(ordered, capacity=capacity, budget_bytes=budget_bytes)

    def add(self, name: str, member: Member) -> None:
        """Add one more member; the class says what it may be and what is refused."""
        self._add(name, member)

    @property
    def num_tokens(self) -> int:
        """``P``, the tokens of the longest member, or of the longest row in use."""
        rows = [self._length(entry) for use in self._uses.items for entry in use.entries]
        return max([*self._lengths.values(), *rows])

    @property
    def layer_shapes(self) -> list[LayerShape | None]:
        """Per layer of the model, None where it has no prefix."""
        return list(self._layer_shapes)

    @property
    def loaded(self) -> list[str]:
        """The names of the members in memory: those that are modules, and those in the tables."""
        tables = {place for entry in self._tables.slots for place in entry}
        return [
            name
            for place, name in enumerate(self.names)
            if str(place) in self.members or place in tables
        ]

    def use(self, rows: Sequence[Row]) -> AbstractContextManager[None]:
        """Have the forwards within this context read these prefixes.

        Contexts nest. What is wrong is raised before any work, by this call or on entering.

        Args:
            rows: per row of the batch a member's place or name; -1 or None for no prefix; a tuple
                for several, whose tokens follow one another.

        Raises:
            IndexError, KeyError: no such member.
            TypeError: something that is no member.
            ValueError: no rows, a damaged or changed file, or more than ``budget_bytes``.
            RuntimeError: the bank was closed, or is in use by another thread or task.
        """
        if self._closed:
            raise RuntimeError("the bank was closed")
        if isinstance(rows, str) or not hasattr(rows, "__iter__"):
            raise TypeError(f"rows must hold one member for each row of the batch, got {rows!r}")
        found = [self._entry(row) for row in rows]
        if not found:
            raise ValueError("rows must hold one member for each row of the batch, got none")
        return self._using(self._use(found))

    def batch(self) -> PrefixBatch:
        """What a forward of the model attends to: the entries of the rows in use.

        Raises:
            RuntimeError: outside of ``use``.
        """
        compiling, trains = torch.compiler.is_compiling(), torch.is_grad_enabled()
        use = self._uses.read()
        if use is None:
            raise RuntimeError(
                "no members are in use: run the model within `with bank.use([0, ...]):`, one "
                "member for each row of the batch, -1 for none"
            )
        if compiling and not trains and use.ready is not None:
            return use.ready
        if compiling or trains:
            return self._stacked(use)
        if use.ready is None or not self._current(use):
            use.ready = self._prepared(use)
        return use.ready

    def save_pretrained(self, path: str | Path) -> None:
        """Write each member into a folder of its name below ``path``, as `from_folder` reads it.

        Raises:
            ValueError: a member cannot be read.
            FileExistsError: ``path`` holds members that this bank does not have, and which
                `from_folder` would read with it.
        """
        for message in self._broken.values():
            raise ValueError(message)
        others = sorted(set(_folders(path)) - set(self.names))
        if others:
            raise FileExistsError(
                f"{path} holds members that this bank does not have, {others}: remove them, or "
                "save to another folder"
            )
        for place, name in enumerate(self.names):
            folder, module = Path(path) / name, self._module(place)
            if module is not None:
                module.save_pretrained(folder)
            elif folder.resolve() != self._stored[place].folder.resolve():
                Prefix.from_pretrained(self._stored[place].folder).save_pretrained(folder)

    def close(self) -> None:
        """Let go of what was loaded; nothing can be used any more."""
        if self._uses.items:
            raise RuntimeError("the bank cannot be closed within `with bank.use(...)`")
        self._closed = True
        self._tables.clear()

    def extra_repr(self) -> str:
        return f"num_members={len(self.names)}, num_tokens={self.num_tokens}"

    def __getstate__(self) -> dict[str, Any]:
        """A copy is not in use."""
        return vars(self) | {"_uses": InUse(type(self).__name__)}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._tables.clear()
        for use in self._uses.items:
            use.ready = None
        return super()._apply(fn, recurse)

    # Members

    def _add(self, name: str, member: Member) -> None:
        if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\"):
            raise ValueError(f"the name of a bank member must be that of a folder, got {name!r}")
        if name in self.names:
            raise ValueError(f"bank member {name!r} is there already")
        place = len(self.names)
        if isinstance(member, str | Path):
            if not Path(member).is_dir():
                raise FileNotFoundError(f"bank member {name!r}: no folder {member}")
            try:
                stored = StoredPrefix.open(Path(member))
            except (ValueError, FileNotFoundError) as error:
                self._broken[place] = f"bank member {name!r}: {error}"
                self.names.append(name)
                warnings.warn(self._broken[place], stacklevel=3)
                return
            policy = stored.positions(Prefix.positions)
            self._check(name, stored.config.get("kind"), stored.layer_shapes, policy)
            self._stored[place], self._lengths[place] = stored, stored.num_tokens
        elif isinstance(member, Prefix):
            self._check(name, member.kind, member.layer_shapes, member.positions)
            self.members[str(place)], self._lengths[place] = member, member.num_tokens
        else:
            raise TypeError(
                f"bank member {name!r} must be a Prefix or a folder, got a {type(member).__name__}"
            )
        self.names.append(name)

    def _check(
        self, name: str, kind: object, shapes: Sequence[LayerShape | None], policy: Positions
    ) -> None:
        if kind == GatedPrefix.kind:
            raise ValueError(f"bank member {name!r} has gates, which all rows of a forward share")
        if self._layer_shapes and list(shapes) != self._layer_shapes:
            raise ValueError(
                f"bank member {name!r} must have layers like the others, {self._layer_shapes}, "
                f"got {list(shapes)}"
            )
        if self.names and policy != self.positions:
            raise ValueError(
                f"bank member {name!r} is for positions={policy!r}, the others for "
                f"{self.positions!r}: move_prefix turns one into the other"
            )
        self._layer_shapes, self.positions = list(shapes), policy

    def _entry(self, row: Row) -> Entry:
        if isinstance(row, Sequence) and not isinstance(row, str):
            return tuple(self._place(member) for member in row)
        none = row is None or (not isinstance(row, str) and _index(row) == -1)
        return () if none else (self._place(row),)

    def _place(self, member: Any) -> int:
        """The place of a member that is given by its place or name."""
        if isinstance(member, str):
            if member not in self.names:
                raise KeyError(f"no bank member is named {member!r}; there are {self.names[:8]}")
            place = self.names.index(member)
        else:
            found = _index(member)
            if found is None:
                raise TypeError(f"a bank member must be given by place or name, got {member!r}")
            place = found
            if not 0 <= place < len(self.names):
                raise IndexError(
                    f"a bank member's place must be in [0, {len(self.names)}), or a whole row -1, "
                    f"got {place}"
                )
        if place in self._broken:
            raise ValueError(self._broken[place])
        return place

    def _length(self, entry: Entry) -> int:
        return sum(self._lengths[place] for place in entry)

    # What is in use

    def _use(self, rows: list[Entry]) -> _Use:
        entries = _distinct(rows) or [()]
        places = {entry: place for place, entry in enumerate(entries)}
        modules = [[self._module(place) for place in entry] for entry in entries]
        live = [[m for m in members if m is not None] for members in modules]
        device = self._like.device
        with torch.inference_mode(False):  # training may begin within
            index = torch.tensor([places[row] if row else -1 for row in rows], device=device)
            lengths = torch.tensor([self._length(entry) for entry in entries], device=device)
        return _Use(rows, index, lengths, live if live == modules else None)

    @contextmanager
    def _using(self, use: _Use) -> Iterator[None]:
        with self._uses.hold(use):
            if self._trains(use):
                self._tables.doubt({place for entry in use.entries for place in entry})
            else:
                use.ready = self._prepared(use)
            yield

    def _trains(self, use: _Use) -> bool:
        """Whether all that is in use will be taken from modules, with gradients."""
        modules = [self._module(place) for entry in use.entries for place in entry]
        if not torch.is_grad_enabled() or None in modules:
            return False
        return any(p.requires_grad for m in modules if m is not None for p in m.parameters())

    def _module(self, place: int) -> Prefix | None:
        found: Any = self.members._modules.get(str(place))
        return found

    def _tensors(self, entry: Entry) -> list[Tensor]:
        """What the numbers of an entry depend on; those out of files do not change."""
        roots = [m for m in map(self._module, entry) if m is not None]
        return [x for r in roots for store in stores(r) for x in store.values() if x is not None]

    def _current(self, use: _Use) -> bool:
        """Whether the tables still hold what is in use."""
        if use.tables is not self._tables.pairs:
            return False
        return all(self._tables.holds(entry, self._tensors(entry)) for entry in use.entries)

    def _prepared(self, use: _Use) -> PrefixBatch:
        """The tables, with all that is in use in them."""
        entries = list(dict.fromkeys(entry for use in self._uses.items for entry in use.entries))
        shapes = [shape for shape in self._layer_shapes if shape is not None]
        self._tables.reserve(shapes, max(1, len(entries)), self.num_tokens, self._like)
        for entry in entries:
            tensors = self._tensors(entry)
            if not self._tables.holds(entry, tensors):
                self._tables.put(entry, entries, tensors, self._read)
            self._tables.touch(entry)
        use.tables = self._tables.pairs
        index = [self._tables.slots[row] if row else -1 for row in use.rows]
        return PrefixBatch(
            self._spread(self._tables.pairs),
            torch.tensor(index, device=self._like.device),
            self._tables.lengths,
        )

    def _read(self, place: int) -> Pairs:
        """The tensors of one member, without gradients."""
        module = self._module(place)
        if module is not None:
            return module()
        try:
            return self._stored[place].pairs()
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"bank member {self.names[place]!r}: {error}") from error

    def _stacked(self, use: _Use) -> PrefixBatch:
        """The entries in use side by side in new tensors, which gradients flow through."""
        if torch.compiler.is_compiling() and use.modules is not None:
            return self._joined(use, [[_pairs(m) for m in entry] for entry in use.modules])
        live: dict[int, Pairs] = {}
        for place in dict.fromkeys(place for entry in use.entries for place in entry):
            module = self._module(place)
            if module is not None:
                live[place] = _pairs(module)
        if any(place not in live for entry in use.entries for place in entry):
            self._prepared(use)
        self._tables.doubt(live)
        return self._joined(use, [list(self._pieces(e, live)) for e in use.entries or [()]])

    def _joined(self, use: _Use, pieces: list[list[Pairs]]) -> PrefixBatch:
        shapes = [shape for shape in self._layer_shapes if shape is not None]
        pairs = side_by_side(pieces, shapes, self._like)
        if ranks.on_several() and (idle := self._idle(use)):
            key, value = pairs[0]
            pairs = [(ranks.WithZeros.apply(key, *idle), value), *pairs[1:]]
        return PrefixBatch(self._spread(pairs), use.index, use.lengths)

    def _idle(self, use: _Use) -> list[nn.Parameter]:
        """What trains, and no row reads here; the rows of other ranks may.

        Ranks reduce gradients by place: each has to have one, zeros too.
        """
        busy = {str(place) for entry in use.entries for place in entry}
        members = [m for place, m in self.members.items() if place not in busy]
        return [p for m in members for p in m.parameters() if p.requires_grad]

    def _pieces(self, entry: Entry, live: Mapping[int, Pairs]) -> Iterator[Pairs]:
        """The tensors of each member of an entry; those of files out of the tables."""
        start = 0
        for place in entry:
            end = start + self._length((place,))
            if place in live:
                yield live[place]
            else:
                slot = self._tables.slots[entry]
                yield [
                    (k[slot, :, start:end], v[slot, :, start:end]) for k, v in self._tables.pairs
                ]
            start = end

    def _spread(self, pairs: Pairs) -> list[tuple[Tensor, Tensor] | None]:
        layers = [i for i, shape in enumerate(self._layer_shapes) if shape is not None]
        return spread(pairs, layers, len(self._layer_shapes))


def _index(member: Any) -> int | None:
    """The integer of a number, or of a tensor or an array of one; None: it is none."""
    if getattr(member, "ndim", None) == 0 and hasattr(member, "item"):
        member = member.item()
    return integer(member)


def _folders(path: str | Path) -> dict[str, Path]:
    """The folders in ``path`` that hold a prefix, by name."""
    return {file.parent.name: file.parent for file in Path(path).glob(f"*/{CONFIG_FILE}")}


def _distinct(rows: Sequence[Entry]) -> list[Entry]:
    """The entries that some row reads, each once."""
    return list(dict.fromkeys(row for row in rows if row))


def _pairs(member: Prefix) -> Pairs:
    """What a module gives, per layer that has a prefix."""
    return [(k[0], v[0]) for k, v in filter(None, member.batch().pairs)]


def _numbered(members: Sequence[Member]) -> dict[str, Member]:
    if isinstance(members, str | Path | nn.Module):
        raise TypeError(f"members must be several, got one {type(members).__name__}")
    return {str(place): member for place, member in enumerate(members)}


def _order(name: str) -> tuple[bool, int, str]:
    return (not name.isdecimal(), int(name) if name.isdecimal() else 0, name)
