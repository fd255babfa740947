"""Bringing a prefix to attention modules whose layer does not hand keywords on."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import nn

from prefixattn.integrations.carrier import KEYWORD, Carrier
from prefixattn.integrations.derived import derive
from prefixattn.integrations.per_thread import PerThread
from prefixattn.integrations.undo import Undoing

RELAYED = "prefixattn_carrier"
"""The attribute of an attention module that holds the carrier while its layer runs in a thread."""

SENDER = "prefixattn_sender"
RECEIVERS = "prefixattn_receivers"


class Sender(Protocol):
    """Who knows the carrier of the forward that runs now."""

    current: PerThread[Carrier]


def relay(
    layer: nn.Module, attentions: Sequence[nn.Module], sender: Sender | None, undo: Undoing
) -> None:
    """Have ``layer`` lend its keyword to ``attentions`` whenever it runs.

    Checkpointing runs a layer's forward again with the keywords of its first run, so that a
    recomputation sees the same prefix, whatever has run in between.

    Args:
        layer: the module that is checkpointed, if any is.
        attentions: modules inside it.
        sender: where the keyword does not reach even ``layer``: who gives it to each call.
        undo: learns how to take every step back.
    """
    for module in attentions:
        setattr(module, RELAYED, PerThread[Carrier]())
        undo.callback(delattr, module, RELAYED)
    for name, content in ((SENDER, sender), (RECEIVERS, list(attentions))):
        setattr(layer, name, content)
        undo.callback(delattr, layer, name)
    undo.callback(derive(layer, _lends))


def _lends(old: type) -> dict[str, Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        sender = getattr(self, SENDER)
        if sender is not None:
            kwargs[KEYWORD] = sender.current.get()
        return old.__call__(self, *args, **kwargs)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        carrier = kwargs.pop(KEYWORD, None)
        lent = [getattr(module, RELAYED) for module in getattr(self, RECEIVERS)]
        for each in lent:
            each.set(carrier)
        try:
            return old.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        finally:
            for each in lent:
                each.set(None)

    return {"__call__": call, "forward": forward}
