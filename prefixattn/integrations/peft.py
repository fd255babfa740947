"""A live PeftModel with a prefix-tuning adapter, taken over in place."""

import functools
import inspect
import warnings
from contextlib import ExitStack
from typing import Any

from peft import PeftModel, PeftType
from torch import Tensor, nn

from prefixattn.integrations.carrier import Options
from prefixattn.integrations.handle import Handle, check_shapes, install, warn_of_dead_tokens
from prefixattn.integrations.survey import check_model, own_sites, survey
from prefixattn.layers import LayerShape, split_layers

TYPES = (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE)


def is_prompt_learning(model: nn.Module) -> bool:
    """Whether this PeftModel's active adapter is one that adds virtual tokens."""
    return isinstance(model, PeftModel) and bool(model.active_peft_config.is_prompt_learning)


def attach_peft(model: PeftModel, options: Options) -> Handle:
    """Take over ``model``: the same object, API and files, with our attention.

    Its class is replaced by a subclass of its own class; ``detach()`` gives the old one back.

    Raises:
        NotImplementedError: the active adapter is of another type, or the base model cannot carry
            a prefix.
    """
    config = model.active_peft_config
    if config.peft_type not in TYPES:
        raise NotImplementedError(
            f"{type(model).__name__} with a {config.peft_type.value} adapter has no prefix; "
            f"supported are {', '.join(t.value for t in TYPES)}"
        )
    base = check_model(model)
    sites = survey(base)
    source = PeftSource(model, len(own_sites(sites)))
    check_shapes(source.layer_shapes(config), sites)
    with ExitStack() as undo:
        install(base, sites, source, options, undo)
        warn_of_dead_tokens(config.num_virtual_tokens, sites, options, stacklevel=5)
        undo.callback(setattr, model, "__class__", type(model))
        model.__class__ = _subclass(type(model))
        return Handle(model, model.prompt_encoder, undo.pop_all())


class PeftSource:
    """Gives the active adapter's prefix, computed once per forward, for no copies of the batch.

    Args:
        model: the PeftModel.
        num_slots: layers of the base model with keys of their own. PEFT also allots numbers to
            layers that borrow keys, which come last, and does not use them.
    """

    def __init__(self, model: PeftModel, num_slots: int) -> None:
        self.model = model
        self.num_slots = num_slots

    def __call__(self) -> list[tuple[Tensor, Tensor]] | None:
        model = self.model
        config = model.active_peft_config
        if model._adapters_disabled or config.peft_type not in TYPES:
            return None
        encoder = model.prompt_encoder[model.active_adapter]
        flat = self._flat(encoder, config, model.prompt_tokens[model.active_adapter])
        return split_layers(flat, self.layer_shapes(config, all_layers=True))[: self.num_slots]

    def layer_shapes(self, config: Any, all_layers: bool = False) -> list[LayerShape]:
        """What the adapter holds, per slot or for every layer that it counts."""
        heads = config.num_attention_heads
        dim = config.token_dim // heads
        count = config.num_layers if all_layers else min(config.num_layers, self.num_slots)
        return [LayerShape(heads, dim, dim)] * count

    @staticmethod
    def _flat(encoder: Any, config: Any, tokens: Tensor) -> Tensor:
        """``[P, 2 * L * H_kv * D]``."""
        weight = encoder.embedding.weight
        projects = getattr(encoder, "prefix_projection", False) and not config.inference_mode
        if not projects and not hasattr(weight, "device_mesh"):
            return weight
        tokens = tokens[: config.num_virtual_tokens].to(weight.device)
        if config.inference_mode and config.peft_type == PeftType.PREFIX_TUNING:
            return encoder.embedding(tokens)
        return encoder(tokens[None])[0]


def _subclass(old: type[PeftModel]) -> type[PeftModel]:
    """``old`` with a forward and a generation that leave the prefix to the attention."""
    signature = inspect.signature(old.forward)

    @functools.wraps(old.forward)
    def forward(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        if self.active_peft_config.peft_type not in TYPES:
            return old.forward(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs).arguments
        given = {name: value for name, value in bound.items() if name not in ("self", "kwargs")}
        given |= bound.get("kwargs", {})
        for name in (*self.special_peft_forward_args, "task_ids"):
            if given.pop(name, None) is not None:
                raise NotImplementedError(f"{name} is not supported by an attached {old.__name__}")
        if hasattr(self, "base_model_prepare_inputs_for_generation"):
            _drop_token_types(given)
        return self.base_model(**{name: v for name, v in given.items() if v is not None})

    def prepare_inputs_for_generation(self: PeftModel, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if self.active_peft_config.peft_type not in TYPES:
            return old.prepare_inputs_for_generation(self, *args, **kwargs)
        kwargs.pop("task_ids", None)
        inputs = self.base_model_prepare_inputs_for_generation(*args, **kwargs)
        _drop_token_types(inputs)
        return inputs

    members: dict[str, Any] = {"forward": forward, "__module__": old.__module__}
    if hasattr(old, "prepare_inputs_for_generation"):
        members["prepare_inputs_for_generation"] = prepare_inputs_for_generation
    return type(old.__name__, (old,), members)


def _drop_token_types(inputs: dict[str, Any]) -> None:
    """Causal prefix tuning in PEFT ignores token types, and says so."""
    if inputs.pop("token_type_ids", None) is not None:
        warnings.warn(
            "Token type ids are not supported for parameter efficient tuning. "
            "Ignoring token type ids",
            stacklevel=3,
        )
