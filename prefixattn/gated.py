"""A prefix with a gate per head: the form of LLaMA-Adapter."""

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from prefixattn.files import check_floating
from prefixattn.initialise import Start, master_copy
from prefixattn.layers import Options, Positions, Training, check_count, describe, spread
from prefixattn.prefix import Prefix
from prefixattn.stored import TENSORS_FILE, StoredPrefix


class GatedPrefix(Prefix, kind="gated"):
    """A prefix whose attention is added to the sequence's, each head by a gate that trains.

    ``out = sequence + gate * prefix``, two softmaxes (LLaMA-Adapter, Zhang et al., 2023). Gates
    that start at zero leave the model as it is at the start of training, whatever the keys and
    values; the initialisers of `Prefix` start them so.

    Args:
        keys: as for `Prefix`.
        values: as for `Prefix`.
        gates: per layer that has a prefix ``[H]``, one for each query head; ``H`` is a multiple of
            the key's ``H_kv``. They are copied, and become parameters.
        options: the keywords of `Prefix`.

    Raises:
        ValueError: shapes or numbers that do not fit together.
        TypeError: something that is not a floating-point tensor.
    """

    gates: nn.ParameterList
    positions: Positions = "keep"

    def __init__(
        self,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        gates: Sequence[Tensor],
        **options: Unpack[Options],
    ) -> None:
        super().__init__(keys, values, **options)
        _check_gates(gates, keys)
        with torch.inference_mode(False):
            self.gates = nn.ParameterList([nn.Parameter(master_copy(gate)) for gate in gates])

    @classmethod
    def gated(cls, prefix: Prefix, num_heads: Sequence[int]) -> "GatedPrefix":
        """The keys and values of ``prefix``, copied, behind gates of zero.

        Args:
            prefix: of any kind; how it trains and its layers are taken over.
            num_heads: query heads of each layer that has a prefix.
        """
        with torch.no_grad():
            keys, values = zip(*prefix(), strict=True)
        if len(num_heads) != len(keys):
            raise ValueError(
                f"num_heads must hold one number for each of {len(keys)} layers with a prefix, got "
                f"{list(num_heads)}"
            )
        counts = [check_count(f"num_heads[{i}]", heads) for i, heads in enumerate(num_heads)]
        gates = [key.new_zeros(heads) for key, heads in zip(keys, counts, strict=True)]
        return cls(
            keys,
            values,
            gates,
            num_frozen_tokens=prefix.num_frozen_tokens,
            dropout=prefix.dropout,
            layers=prefix.layers,
            num_layers=prefix.num_layers,
        )

    @property
    def num_heads(self) -> list[int | None]:
        """Query heads per layer of the model, None where it has no prefix."""
        return spread([len(gate) for gate in self.gates], self.layers, self.num_layers)

    def _gates(self) -> list[Tensor | None]:
        return spread(self.gates, self.layers, self.num_layers)

    @classmethod
    def _started(cls, start: Start, training: Training) -> "GatedPrefix":
        gates = [k.new_zeros(heads) for k, heads in zip(start.keys, start.num_heads, strict=True)]
        return cls(
            start.keys,
            start.values,
            gates,
            layers=start.layers,
            num_layers=start.num_layers,
            **training,
        )

    def _own_tensors(self) -> dict[str, Tensor]:
        return {f"gates.{layer}": g for layer, g in zip(self.layers, self.gates, strict=True)}

    @classmethod
    def _load(cls, stored: StoredPrefix) -> "GatedPrefix":
        own = stored.others()
        names = [f"gates.{layer}" for layer in stored.layers]
        if set(own) != set(names):
            raise ValueError(f"{stored.folder}: expected the tensors {names}, got {sorted(own)}")
        for name in names:
            check_floating(name, own[name], stored.folder / TENSORS_FILE)
        keys, values = zip(*stored.pairs(), strict=True)
        options: Any = stored.options()
        try:
            return cls(keys, values, [own[name] for name in names], **options)
        except ValueError as error:
            raise ValueError(f"{stored.folder}: {error}") from error


def _check_gates(gates: Sequence[Tensor], keys: Sequence[Tensor]) -> None:
    if len(gates) != len(keys):
        raise ValueError(f"gates must be as many as keys, {len(keys)}, got {len(gates)}")
    for i, (gate, key) in enumerate(zip(gates, keys, strict=True)):
        if not isinstance(gate, Tensor) or not gate.is_floating_point():
            raise TypeError(f"gates[{i}] must be floating point, got {describe(gate)}")
        if gate.ndim != 1 or not len(gate) or len(gate) % key.shape[0]:
            raise ValueError(
                f"gates[{i}] must be [H], with H a multiple of the key's {key.shape[0]} heads, got "
                f"{tuple(gate.shape)}"
            )
        if gate.device != key.device:
            raise ValueError(
                f"gates[{i}] must be on {key.device} like keys[{i}], got {gate.device}"
            )
