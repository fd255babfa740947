"""A prefix among the weights of the model that it was attached to, as in a Trainer's checkpoint.

The weights hold a prefix's numbers, and nothing of how it was attached and trained.
"""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from prefixattn.checkpoints.weights import holds, read_marked, weights_file
from prefixattn.encoder_decoder import PARTS, EncoderDecoderPrefix
from prefixattn.files import MOST_LAYERS, check_floating, read_json
from prefixattn.gated import GatedPrefix
from prefixattn.layers import LayerShape
from prefixattn.prefix import Prefix
from prefixattn.projected import ProjectedPrefix

MARK = "prefixattn."  # the name of the submodule that `attach` adds
CONFIG_FILE = "config.json"
NETWORK = ("embedding.weight", *(f"transform.{i}.{x}" for i in (0, 2) for x in ("weight", "bias")))
OF_LAYERS = re.compile(r"(keys|values|gates)\.\d+|frozen_(key|value)_\d+")


def is_attached(path: Path) -> bool:
    """Whether this is the folder of a model that was saved with a prefix attached."""
    return path.is_dir() and holds(path, MARK)


def load_attached(path: str | Path) -> Prefix | EncoderDecoderPrefix:
    """The prefix of a model that ``save_pretrained``, or a Trainer, saved with a prefix attached.

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: they are damaged, hold no prefix, or do not say enough of it.

    Warns:
        UserWarning: what the weights do not say, and what is taken for it.
    """
    folder = Path(path)
    state = read_marked(folder, MARK)
    for name, tensor in state.items():
        check_floating(MARK + name, tensor, folder)
    heads = {name.partition(".")[0] for name in state}
    if not state:
        raise ValueError(f"{weights_file(folder)} holds no prefix: none was attached")
    if any(".members." in f".{name}" for name in state):
        raise ValueError(
            f"{folder} holds a PrefixBank, whose weights do not name its members: save it by "
            "PrefixBank.save_pretrained"
        )
    if heads <= set(PARTS):
        parts = {}
        for part in heads:
            own = {n.partition(".")[2]: x for n, x in state.items() if n.startswith(f"{part}.")}
            parts[part] = _prefix(own, folder)
        found: Prefix | EncoderDecoderPrefix = EncoderDecoderPrefix(**parts)
    else:
        found = _prefix(state, folder)
        parts = {"": found}
    layers = " and ".join(str(prefix.num_layers) for prefix in parts.values())
    warnings.warn(
        f"{folder} holds a model's weights, which do not say how its prefix was attached: it is "
        f"taken to be for positions={found.positions!r}, for all of {layers} layers, and without "
        "dropout. Prefix.save_pretrained keeps these",
        stacklevel=4,  # of who called `load`, or `from_pretrained`
    )
    return found


def _prefix(state: Mapping[str, Tensor], folder: Path) -> Prefix:
    """One prefix of the tensors of its module, of the kind that has such tensors."""
    if set(state) == set(NETWORK):
        return _projected(state, folder)
    count = sum(name.startswith("keys.") for name in state)
    gates = [state[name] for i in range(count) if (name := f"gates.{i}") in state]
    frozen = "frozen_key_0" in state
    expected = count * (2 + bool(gates) + 2 * frozen)  # keys, values and what comes with them
    try:
        keys, values = ([_whole(state, x, i) for i in range(count)] for x in ("key", "value"))
        if len(state) != expected or not all(map(OF_LAYERS.fullmatch, state)):
            raise ValueError(f"expected keys, values and gates by layer, got {sorted(state)}")
        tokens = state["frozen_key_0"].shape[1] if frozen else 0
        if gates:
            return GatedPrefix(keys, values, gates, num_frozen_tokens=tokens)
        return Prefix(keys, values, num_frozen_tokens=tokens)
    except (LookupError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder}: the weights of its prefix do not fit: {error}") from error


def _whole(state: Mapping[str, Tensor], what: str, i: int) -> Tensor:
    """The key or the value of one layer, its frozen tokens first."""
    trained = state[f"{what}s.{i}"]
    frozen = state.get(f"frozen_{what}_{i}")
    return trained if frozen is None else torch.cat([frozen, trained], dim=1)


def _projected(state: Mapping[str, Tensor], folder: Path) -> ProjectedPrefix:
    """A network whose layers the model's configuration describes."""
    shapes = _shapes(folder)
    widths, total = sum(shape.width for shape in shapes), len(state["transform.2.bias"])
    if widths != total:
        raise ValueError(
            f"{folder} holds the network of a ProjectedPrefix, which gives {total} numbers a "
            f"token, and {CONFIG_FILE} describes layers of {widths} together: attach one like it "
            "to the model and load the weights into it"
        )
    (tokens, embedding), hidden = state["embedding.weight"].shape, len(state["transform.0.bias"])
    prefix = ProjectedPrefix(shapes, tokens, embedding, hidden)
    prefix.to(state["embedding.weight"].dtype).load_state_dict(dict(state))
    return prefix


def _shapes(folder: Path) -> list[LayerShape]:
    """Layers all alike, in the words of most configurations; none where these are missing."""
    config = read_json(folder / CONFIG_FILE)
    config = config.get("text_config") or config
    layers, heads, width = (
        config.get(name, 0) for name in ("num_hidden_layers", "num_attention_heads", "hidden_size")
    )
    key_heads = config.get("num_key_value_heads") or heads
    dim = config.get("head_dim") or (width // heads if heads else 0)
    if not all(type(size) is int and 0 < size <= MOST_LAYERS for size in (layers, key_heads, dim)):
        return []
    return [LayerShape(key_heads, dim, dim)] * layers
