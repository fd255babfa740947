"""The drop-in: a prefix beside the attention of a live transformers model or PEFT model.

Importing this package imports neither framework.
"""

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import nn

    from prefixattn.integrations.handle import Handle

__all__ = ["attach", "detach"]


def attach(
    model: "nn.Module",
    prefix: "nn.Module | None" = None,
    *,
    prefix_in_window: Literal["positions", "visible"] = "positions",
    positions: Literal["shift", "keep"] | None = None,
    implementation: str = "auto",
) -> "Handle":
    """Give ``model`` a prefix, in place; its KV cache goes on holding sequence tokens only.

    Its modules find the attention implementation ``"prefixattn"`` in their configuration, where no
    other model finds it, and hooks bring the prefix, or its ``forward`` where that is called by
    itself. Some of its modules have a subclass of their own class until ``detach``; no class that
    another model has is changed. Everything else (``generate``, ``Trainer``, checkpointing, static
    caches, ``torch.compile``) is called as before. To learn about the model, one forward of two
    tokens is run, in evaluation mode, uncompiled and without gradients.

    Args:
        model: a transformers model whose layers go through transformers' attention interface (or
            which we have taught to: Bloom, Falcon), or a ``PeftModel`` with a PREFIX_TUNING or
            CARTRIDGE adapter; also what torch.compile made of one.
        prefix: a `Prefix` of any kind, a `PrefixBank` or an `ExternalPrefix`; for an
            encoder-decoder an `EncoderDecoderPrefix`, or any of these for the decoder's own
            attention. It is moved to the model's device and registered as the submodule
            ``model.prefixattn``, so that optimizers, ``to(device)`` and DDP see it. What is
            trainable stays so: to train the prefix alone, freeze the model before attaching; and
            add LoRA before attaching, for PEFT freezes all that it finds. None for a
            ``PeftModel`` with a prefix of its own.
        prefix_in_window: on sliding-window layers, ``"positions"``: prefix token ``j`` of ``P``
            stands ``P - j`` places before the text and leaves the window like text (PEFT);
            ``"visible"``: every query sees the whole prefix. The same holds for layers that attend
            in chunks.
        positions: ``"shift"``: the text begins at position ``P`` (PEFT, Cartridges); ``"keep"``:
            positions are what they are without a prefix (AdapterHub, LLaMA-Adapter). None: what
            the prefix was made for: ``"keep"`` for a `GatedPrefix`, else ``"shift"`` where its
            file says nothing else. In a causal model, unless ``position_ids`` are passed, the text
            begins behind its left padding: it never comes between prefix and text.
        implementation: of `prefixattn.prefix_attention`.

    Returns:
        A handle; ``handle.detach()`` leaves the model as it was.

    Raises:
        ValueError: an argument does not fit the model, or the model is attached to already.
        NotImplementedError: the model cannot carry a prefix; the message names it and says why.
            The model is then as it was.
    """
    from prefixattn.integrations.carrier import Options
    from prefixattn.integrations.handle import attach_prefix

    policy = str(positions or getattr(prefix, "positions", "shift"))
    options = Options(prefix_in_window, policy, implementation)
    return attach_prefix(model, prefix, options)


def detach(model: "nn.Module") -> None:
    """Take the prefix off ``model``, where its handle is not at hand: a copy, or an unpickled one.

    Args:
        model: what `attach` was given, or the model inside it.

    Raises:
        ValueError: there is no prefix attached.
    """
    from prefixattn.integrations.handle import detach_prefix

    detach_prefix(model)


def __getattr__(name: str) -> Any:
    if name == "Handle":
        from prefixattn.integrations.handle import Handle

        return Handle
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
