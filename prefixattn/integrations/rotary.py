"""How each layer turns its keys by their place: found among few forms, and held to the model."""

import inspect
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefixattn.integrations.adapters import adapt
from prefixattn.integrations.handle import stack_of
from prefixattn.integrations.places import Places, turning_tables
from prefixattn.integrations.survey import Site, check_model, own_sites, survey

LEAST_SHIFT = 16  # places; over fewer, slowly turning forms look alike
# What a form that fits may leave of a layer's keys, as a share; steps are of the model's dtype.
# Rounding leaves 0.024 behind 32 layers in bfloat16, and other forms of the same model 0.5.
LEFT_OVER = 1e-2
LEFT_OVER_STEPS = 16


@dataclass(frozen=True, eq=False)
class Rotation:
    """Pairs of a key's numbers that turn with its place (RoPE; Su et al., 2021).

    Attributes:
        frequencies: ``[T]`` float64, radians per place of each pair. Empty: keys have no place.
        first: where the ``2 T`` numbers that turn begin among the ``D`` of a key.
        interleaved: pairs are neighbours; else number ``i`` and number ``T + i`` are one.
    """

    frequencies: Tensor
    first: int
    interleaved: bool

    def turned(self, key: Tensor, by: int) -> Tensor:
        """``key [..., D]`` as it would be ``by`` places further on, in float64 on the CPU."""
        key = key.detach().to("cpu", torch.float64)  # not every device has float64
        cos, sin = (by * self.frequencies).cos(), (by * self.frequencies).sin()
        width = 2 * len(cos)
        before, part, behind = key.split(
            [self.first, width, key.shape[-1] - self.first - width], dim=-1
        )
        split = part.unflatten(-1, (-1, 2) if self.interleaved else (2, -1))  # the pairs' halves
        dim = -1 if self.interleaved else -2
        x, y = split.unbind(dim)
        part = torch.stack([x * cos - y * sin, x * sin + y * cos], dim).flatten(-2)
        return torch.cat([before, part, behind], dim=-1)


STILL = Rotation(torch.zeros(0, dtype=torch.float64), 0, True)


def find_rotations(
    model: nn.Module, input_ids: Tensor, reach: int, part: str | None = None
) -> list[tuple[Site, Rotation]]:
    """How each layer of ``model`` that has keys of its own turns them.

    The model runs on ``input_ids`` at two places, ``reach`` apart. The forms tried are those of
    its own frequencies, over the first or the last numbers of a key; one must take all of a
    layer's keys from the one place to the other.

    Args:
        model: a transformers model, not attached to.
        input_ids: ``[1, N]``, some text.
        reach: the farthest that keys are to be moved, in places.
        part: of an encoder-decoder, as for `prefixattn.Prefix.from_text`.

    Raises:
        NotImplementedError: the layer that is named turns its keys in no such way, or its place
            cannot be moved.
    """
    model = check_model(model)
    sites = own_sites(survey(model, part=part or "decoder"), part)
    if not sites:
        raise ValueError(f"part must be one that {type(model).__name__} has, got {part!r}")
    stack = stack_of(model, sites)
    if sites[0].part == "cross":
        return [(site, STILL) for site in sites]
    with ExitStack() as undo:
        adapt(model, undo)  # some of our own forwards say that they know no places
        places = Places(stack, all(site.causal for site in sites))
        forms = _frequencies(model)
    if places.added is not None or places.tables:
        raise _refusal(model, sites[0], "places are learned or added, and part of the text itself")
    if not places.movable:
        raise _refusal(model, sites[0], f"{type(stack).__name__} takes no position_ids to try it")
    if not places.takes_ids:
        return [(site, STILL) for site in sites]  # the scores alone know of distances
    reach = max(reach, LEAST_SHIFT)
    # Near comes last: frequencies that grow with the text are then again what they are at first.
    far, near = (_run_at(model, stack, input_ids, place, part) for place in (reach, 0))
    return [
        (site, _fitting(model, site, other.key, forms, reach))
        for site, other in zip(near, far, strict=True)
    ]


def _run_at(
    model: PreTrainedModel, stack: nn.Module, input_ids: Tensor, first: int, part: str | None
) -> list[Site]:
    """What is attended to where the text of ``stack`` begins at place ``first``."""
    names = list(inspect.signature(type(stack).forward).parameters)[1:]

    def place(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = dict(zip(names, args, strict=False)) | kwargs
        inputs = kwargs.get("input_ids")
        inputs = kwargs["inputs_embeds"] if inputs is None else inputs
        places = torch.arange(first, first + inputs.shape[1], device=inputs.device)
        return (), kwargs | {"position_ids": places[None]}

    hook = stack.register_forward_pre_hook(place, with_kwargs=True)
    try:
        return own_sites(survey(model, input_ids, part or "decoder"), part)
    finally:
        hook.remove()


def _frequencies(model: nn.Module) -> list[Tensor]:
    """The distinct frequencies of the model's rotary modules, or of its tables' first step."""
    found = {
        tuple(buffer.tolist())
        for name, buffer in model.named_buffers()
        if name.endswith("inv_freq") and buffer.ndim == 1
    }
    for table in turning_tables(model):
        sines, cosines = table[1].double().chunk(2)
        found.add(tuple(torch.atan2(sines, cosines).tolist()))
    return [torch.tensor(numbers, dtype=torch.float64) for numbers in sorted(found)]


def _fitting(
    model: nn.Module, site: Site, far: Tensor, frequencies: list[Tensor], by: int
) -> Rotation:
    """The form that takes ``site``'s keys to the ``far`` ones ``[1, H_kv, N, D]``."""
    forms = [STILL] + [
        Rotation(way * f, first, interleaved)
        for f in frequencies
        for way in (1, -1)
        if 2 * len(f) <= far.shape[-1]
        for first in sorted({0, far.shape[-1] - 2 * len(f)})
        for interleaved in (False, True)
    ]
    target = far.to("cpu", torch.float64)

    def left_over(form: Rotation) -> float:
        return float((form.turned(site.key, by) - target).norm() / target.norm())

    best = min(forms, key=left_over)
    allowed = max(LEFT_OVER, LEFT_OVER_STEPS * torch.finfo(far.dtype).eps)
    if not left_over(best) <= allowed:
        raise _refusal(model, site, f"over {by} places they do not turn by its frequencies alone")
    return best


def _refusal(model: nn.Module, site: Site, reason: str) -> NotImplementedError:
    return NotImplementedError(
        f"the keys of {site.name} in {type(model).__name__} cannot be moved: {reason}"
    )
