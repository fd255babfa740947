"""The prefixes of an encoder-decoder model: up to three, as in Li & Liang (2021)."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from prefixattn.bank import PrefixBank
from prefixattn.files import read_json, write_json
from prefixattn.layers import Positions, PrefixSource
from prefixattn.prefix import Prefix
from prefixattn.stored import CONFIG_FILE as PREFIX_FILE
from prefixattn.stored import ENCODER_DECODER_FILE as CONFIG_FILE
from prefixattn.stored import TENSORS_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PARTS = ("encoder", "decoder", "cross")


class EncoderDecoderPrefix(nn.Module):
    """Prefixes for the encoder, for the decoder's own attention, and for its view of the encoder.

    A plain `Prefix` on an encoder-decoder is one for the decoder's own attention, as in PEFT.

    Args:
        encoder: beside the source text.
        decoder: beside the target text.
        cross: beside what the encoder made of the source; it has no places.

    Each may be of any kind: a `Prefix`, a `PrefixBank`, an `ExternalPrefix`.

    Raises:
        ValueError: no part was given, or two parts have the same parameters.
        TypeError: a part is no prefix.
    """

    def __init__(
        self,
        encoder: PrefixSource | None = None,
        decoder: PrefixSource | None = None,
        cross: PrefixSource | None = None,
    ) -> None:
        super().__init__()
        given = {"encoder": encoder, "decoder": decoder, "cross": cross}
        for name, prefix in given.items():
            if prefix is not None and not isinstance(prefix, PrefixSource):
                raise TypeError(f"{name} must be a Prefix, got a {type(prefix).__name__}")
            if prefix is not None:
                self.add_module(name, prefix)
        _check_apart(self.parts)
        if not self.parts:
            raise ValueError(f"one of {', '.join(PARTS)} must be given, got none")

    @property
    def parts(self) -> dict[str, PrefixSource]:
        """The prefixes that there are, by part."""
        return {name: p for name, p in self._modules.items() if isinstance(p, PrefixSource)}

    @property
    def positions(self) -> Positions:
        """The policy that the parts with places were made for.

        Raises:
            ValueError: they were made for different ones.
        """
        placed = [p for name, p in self.parts.items() if name != "cross"]
        policies: set[Positions] = {getattr(p, "positions", "shift") for p in placed}
        if len(policies) > 1:
            raise ValueError("the parts are for different positions: name one, positions=...")
        return policies.pop() if policies else "shift"

    @classmethod
    def random(
        cls,
        model: "PreTrainedModel",
        num_tokens: int,
        std: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> "EncoderDecoderPrefix":
        """All three parts, drawn as `Prefix.random` draws them.

        Args:
            model: an encoder-decoder model that ``attach`` supports.
            num_tokens: ``P``, at least 1, of each part.
            std: standard deviation, at least 0; 0 gives zeros.
            generator: a CPU generator.
        """
        draws = {p: Prefix.random(model, num_tokens, std, generator, part=p) for p in PARTS}
        return cls(**draws)

    @classmethod
    def from_text(
        cls, model: "PreTrainedModel", source: Tensor | None = None, target: Tensor | None = None
    ) -> "EncoderDecoderPrefix":
        """The keys and values that ``model`` itself computes for texts.

        Args:
            model: an encoder-decoder model that ``attach`` supports. A prefix that it has does not
                come into this one.
            source: ``[P]`` or ``[1, P]`` tokens for the encoder, and for the decoder's view of it.
                None: these two have no prefix.
            target: ``[P]`` or ``[1, P]`` tokens for the decoder's own attention. None: it has none.
        """
        texts = {"encoder": source, "decoder": target, "cross": source}
        return cls(
            **{
                part: Prefix.from_text(model, ids, part=part)
                for part, ids in texts.items()
                if ids is not None
            }
        )

    def save_pretrained(self, path: str | Path) -> None:
        """Write each part into a folder of its own below ``path``.

        An earlier prefix in the folder is replaced.

        Raises:
            TypeError: a part that has nothing to save, an `ExternalPrefix`.
        """
        folder = Path(path)
        for name, prefix in self.parts.items():
            if not isinstance(prefix, Prefix | PrefixBank):
                raise TypeError(f"{name} is a {type(prefix).__name__}, which cannot be saved")
        for name, prefix in self.parts.items():
            if isinstance(prefix, Prefix | PrefixBank):
                prefix.save_pretrained(folder / name)
            if isinstance(prefix, PrefixBank):
                _remove_prefix(folder / name)
        write_json(folder / CONFIG_FILE, {"format": "prefixattn", "parts": sorted(self.parts)})
        _remove_prefix(folder)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "EncoderDecoderPrefix":
        """The prefixes saved in the folder ``path``, or with a model that they were attached to.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged or of another format.
        """
        folder = Path(path)
        if not (folder / CONFIG_FILE).is_file() and (found := _attached(folder)) is not None:
            return found
        names = read_json(folder / CONFIG_FILE).get("parts")
        if not isinstance(names, list) or not names or any(n not in PARTS for n in names):
            raise ValueError(f"{folder / CONFIG_FILE}: parts must be some of {PARTS}, got {names}")
        return cls(**{name: _read(folder / name) for name in names})


def _check_apart(parts: dict[str, PrefixSource]) -> None:
    """Raise where two parts train the same numbers: no file of a model or of a prefix says so."""
    owners: dict[int, str] = {}
    for name, prefix in parts.items():
        for parameter in prefix.parameters():
            owner = owners.setdefault(id(parameter), name)
            if owner != name:
                raise ValueError(
                    f"{name} and {owner} must be prefixes of their own, got parameters that they "
                    "share, which saved files could not keep so: give one of them a "
                    "copy.deepcopy of the other's"
                )


def _attached(folder: Path) -> EncoderDecoderPrefix | None:
    """The prefixes among a model's weights; None where the folder holds no such weights."""
    from prefixattn.checkpoints.attached import is_attached, load_attached

    if not is_attached(folder):
        return None
    found = load_attached(folder)
    return found if isinstance(found, EncoderDecoderPrefix) else EncoderDecoderPrefix(decoder=found)


def _remove_prefix(folder: Path) -> None:
    """Take away a plain prefix's files, which would be read in the place of what is there now."""
    for name in (PREFIX_FILE, TENSORS_FILE):
        (folder / name).unlink(missing_ok=True)


def _read(folder: Path) -> Prefix | PrefixBank:
    """A prefix, or a bank: a folder of them."""
    if (folder / PREFIX_FILE).is_file() or not list(folder.glob(f"*/{PREFIX_FILE}")):
        return Prefix.from_pretrained(folder)
    return PrefixBank.from_folder(folder)
