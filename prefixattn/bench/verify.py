"""Whether what is about to be timed computes the right numbers.

The rule is that of the tests: against the float64 reference, twice as much error as eager attention
in the same precision has (gradients: three times). In bfloat16 that leaves room for what rounding
hides in each number, but not in the sum over all: a wrong scale, one key of thousands that is not
seen, a softcap that is not applied. So the error's root mean square is held against eager's too,
and how much of each such fault is in the error is estimated by least squares.

A large case is checked part by part, some rows and key heads at a time: the upstream gradient is
zero outside of a part, so that every gradient of it, the sum over rows in a shared prefix too, is
exactly that of the smaller problem. The scale is named here, for the operation's own default is
among what is checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from prefixattn import reference
from prefixattn.api import make_problem
from prefixattn.bench.inputs import Tensors
from prefixattn.bench.shapes import Case
from prefixattn.bench.support import Attention
from prefixattn.testing import GRADIENT, OUTPUT, Results, evaluate, over_budget

LARGEST = 2**25  # float64 scores that one check may hold
SEED = 1
FAINT = 2**-8  # of a gain or the scale; half a unit in the last place of bfloat16
STEP = 1e-3  # by which the scale is varied
NOISE = 4.0  # root mean squares of eager's error that are no fault
GONE = 0.5  # of one token's gradient


class Oracle:
    """The truth of a case, made once for all providers.

    Args:
        case: what is timed; gradients are checked where they are.
        tensors: its tensors.
        with_prefix: false for the floor, which has no prefix to see.
    """

    def __init__(self, case: Case, tensors: Tensors, with_prefix: bool = True) -> None:
        self.parts = [Part(case, tensors, with_prefix, *part) for part in _parts(case)]

    def fault(self, run: Attention) -> str:
        """Words for what `run` has wrong, in the first part that is; empty when all is well."""
        faults = (part.fault(run) for part in self.parts)
        return next((fault for fault in faults if fault), "")


class Part:
    """The truth of some rows and key heads of a case."""

    def __init__(
        self, case: Case, tensors: Tensors, with_prefix: bool, rows: list[int], heads: list[int]
    ) -> None:
        self.tensors = tensors
        self.backward = case.passes != "fwd"
        self.rows, self.heads = rows, heads
        self.queries = [h * tensors.group + g for h in self.heads for g in range(tensors.group)]
        inputs = self._inputs(case, with_prefix)
        wide = {
            name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
            for name, x in inputs.items()
        }
        self.exact = self._evaluate(wide, None)
        self.plain = self._evaluate(inputs, inputs["query"].dtype)
        self.by_scale = self._by_scale(wide, case.shape.D**-0.5)
        self.by_fault = dict(self._by_fault(wide))

    def fault(self, run: Attention) -> str:
        """Words for what `run` has wrong; empty when all is well."""
        t = self.tensors
        with torch.set_grad_enabled(self.backward):
            out = run()
        if out.shape != t.query.shape:
            return f"out: shape {list(out.shape)}, expected {list(t.query.shape)}"
        got = {"out": self._of_queries(out.detach())}
        if self.backward:
            grads = torch.autograd.grad(
                out, list(t.leaves.values()), self._upstream(out), allow_unused=True
            )
            for (name, leaf), grad in zip(t.leaves.items(), grads, strict=True):
                got[f"d{name}"] = self._pick(name, torch.zeros_like(leaf) if grad is None else grad)
        return self._compare(got)

    def _compare(self, got: dict[str, Tensor]) -> str:
        dtype = self.tensors.query.dtype
        exact, plain = self._named(self.exact), self._named(self.plain)
        faults = []
        for name, x in got.items():
            allowed = OUTPUT if name == "out" else GRADIENT
            if exact[name].numel():  # the floor's prefix has no tokens
                faults.append(over_budget(name, x, exact[name], plain[name], dtype, allowed))
                if not faults[-1]:
                    faults.append(_spread_out(name, x, exact[name], plain[name], dtype))
                if not faults[-1] and abs(gain := _part_of(x - exact[name], exact[name])) > FAINT:
                    faults.append(f"{name}: {abs(gain):.2%} too {'large' if gain > 0 else 'small'}")
        error = got["out"] - self.exact.out
        if abs(off := _part_of(error, self.by_scale)) > FAINT:
            faults.append(f"out: as if the scale were {abs(off):.2%} off")
        usual = self.plain.out - self.exact.out
        for words, direction in self.by_fault.items():
            most = max((1 + abs(_part_of(usual, direction))) / 2, _chance(usual, direction))
            if abs(_part_of(error, direction)) > most:
                faults.append(f"out: as if {words}")
        return "; ".join(fault for fault in faults if fault)

    @staticmethod
    def _named(results: Results) -> dict[str, Tensor]:
        return {"out": results.out, **{f"d{name}": x for name, x in results.grads.items()}}

    def _of_queries(self, x: Tensor) -> Tensor:
        return x[self.rows][:, self.queries]

    def _pick(self, name: str, x: Tensor) -> Tensor:
        """The checked part of an argument, or of its gradient."""
        if name == "query":
            return self._of_queries(x)
        return x[:, self.heads] if name.startswith("prefix_") else x[self.rows][:, self.heads]

    def _inputs(self, case: Case, with_prefix: bool) -> dict[str, Any]:
        t = self.tensors
        inputs: dict[str, Any] = {
            name: self._pick(name, leaf.detach()) for name, leaf in t.leaves.items()
        }
        if not with_prefix:
            for name in ("prefix_key", "prefix_value"):
                inputs[name] = inputs[name][:, :, :0]
        inputs["prefix_index"] = t.index[self.rows]
        scale = case.shape.D**-0.5
        return inputs | {"is_causal": True, "softcap": case.shape.softcap, "scale": scale}

    def _evaluate(self, inputs: dict[str, Any], dtype: torch.dtype | None) -> Results:
        def run(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
            return reference.forward(make_problem(**arguments), dtype)[:2]

        if self.backward:
            return evaluate(inputs, run, with_lse_gradient=False, seed=SEED)
        with torch.no_grad():
            return Results(*run(inputs), {})

    def _by_scale(self, wide: dict[str, Any], scale: float) -> Tensor:
        """The output's derivative by the logarithm of the scale."""
        with torch.no_grad():
            more, less = (
                reference.forward(make_problem(**wide | {"scale": factor * scale}), None)[0]
                for factor in (1 + STEP, 1 - STEP)
            )
        return (more - less) / (2 * STEP)

    def _by_fault(self, wide: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """What the output changes by where something at an edge is left out."""
        index, own = wide["prefix_index"], slice(-wide["query"].shape[2], None)
        prefix = [wide[name][index] for name in ("prefix_key", "prefix_value")]
        text = [wide[name] for name in ("key", "value")]
        edges = [("the prefix's first token", prefix, slice(1)), ("the first key", text, slice(1))]
        edges += [("the prefix's last token", prefix, slice(-1, None)), ("its own key", text, own)]
        for name, (keys, values), which in edges:
            if keys.shape[2]:
                changed = self._without(wide, keys[:, :, which], values[:, :, which])
                yield f"no query saw {name}", changed
        if wide["softcap"] is not None:
            with torch.no_grad():
                out, *_ = reference.forward(make_problem(**wide | {"softcap": None}), None)
            yield "there were no softcap", out - self.exact.out

    def _without(self, wide: dict[str, Any], key: Tensor, value: Tensor) -> Tensor:
        """What the output changes by where no query sees one key: the same, or one for each."""
        key, value = (x.repeat_interleave(self.tensors.group, dim=1) for x in (key, value))
        scores = (wide["query"] * key).sum(-1) * wide["scale"]
        if (softcap := wide["softcap"]) is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weight = torch.exp(scores - self.exact.lse)
        others = 1 - weight  # none, where it is the only one
        ratio = torch.where(others > STEP, weight / others, 0.0)
        return (self.exact.out - value) * ratio[..., None]

    def _upstream(self, out: Tensor) -> Tensor:
        """The gradient that `evaluate` draws for the checked part, and zero elsewhere."""
        part = self._of_queries(out)
        generator = torch.Generator().manual_seed(SEED)
        drawn = torch.randn(part.shape, generator=generator, dtype=torch.float64).to(out)
        upstream = torch.zeros_like(out)
        rows = torch.tensor(self.rows, device=out.device)[:, None]
        upstream[rows, torch.tensor(self.queries, device=out.device)] = drawn
        return upstream


def _part_of(error: Tensor, direction: Tensor) -> float:
    """How much of `direction` is in an error, by least squares; 0 where there is no direction."""
    size = direction.square().sum().item()
    return (error.double() * direction).sum().item() / size if size else 0.0


def _spread_out(name: str, got: Tensor, exact: Tensor, plain: Tensor, dtype: torch.dtype) -> str:
    """Words for an error that is in no number by itself; empty when all is well."""
    error, usual, unit = got - exact, plain - exact, torch.finfo(dtype).eps
    most = NOISE * (_rms(usual) + unit * _rms(exact))
    if (found := _rms(error)) > most:
        return f"{name}: root mean square of the error {found:.2e}, at most {most:.2e}"
    # Of each token over all rows and heads: the last one's gradient may be faint beside others'.
    sizes, missing, noise = ((x.double() * exact).sum(dim=(0, 1, 3)) for x in (exact, error, usual))
    told = (sizes > unit**2 * sizes.mean()) & (noise.abs() < GONE / 4 * sizes)
    if bool((gone := told & (missing.abs() > GONE * sizes)).any()):
        return f"{name}: as if token {int(gone.int().argmax())} had none of it"
    return ""


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def _chance(usual: Tensor, direction: Tensor) -> float:
    """How much of `direction` may be in an error as large as the usual one, by chance.

    The numbers of one query err together, those of different queries and heads do not.
    """
    together = usual.double().square().sum(-1) * direction.square().sum(-1)
    size = direction.square().sum().item()
    return 2 * together.sum().sqrt().item() / size if size else 0.0


def _parts(case: Case) -> list[tuple[list[int], list[int]]]:
    """All rows and key heads, cut so that the float64 scores of each part are at most `LARGEST`."""
    s = case.shape
    one = s.H // s.H_kv * s.M * (s.P + s.N)  # scores of a row and key head
    pairs = max(1, LARGEST // one)
    heads = _chunks(s.H_kv, min(pairs, s.H_kv))
    return [(r, h) for r in _chunks(s.B, max(1, pairs // s.H_kv)) for h in heads]


def _chunks(size: int, most: int) -> list[list[int]]:
    """`range(size)` in pieces of at most `most`."""
    return [list(range(first, min(first + most, size))) for first in range(0, size, most)]
