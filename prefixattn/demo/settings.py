"""The demo's options and sizes. Importing this costs nothing; the rest of the demo loads torch."""

from dataclasses import dataclass, field
from pathlib import Path

from prefixattn.demo.cache import default_folder


@dataclass(frozen=True)
class BaseSizes:
    """The base model and its training. One step sees `batch * context` tokens."""

    vocab_size: int = 2048
    hidden_size: int = 192
    num_layers: int = 4
    num_heads: int = 6
    num_key_value_heads: int = 2
    steps: int = 240
    batch: int = 8
    context: int = 256
    matrix_lr: float = 2e-2  # Muon's, for the hidden matrices
    other_lr: float = 3e-3  # AdamW's, for embeddings and norms


@dataclass(frozen=True)
class TuneSizes:
    """The prefix and its training, and how much of the held-out half is looked at."""

    prefix_tokens: int = 64
    steps: int = 80
    batch: int = 16
    lr: float = 0.3
    measure_every: int = 20  # steps between two held-out losses
    held_out: int = 128  # functions for the held-out loss
    answered: int = 64  # of these, the functions that are answered for the overlap
    shown: int = 3  # of these, the answers that are printed


@dataclass(frozen=True)
class Settings:
    """The demo's options.

    Attributes:
        seed: of the base's and the prefix's training; the same numbers come out twice.
        output: folder for the adapter, the curves and the report; made where missing.
        cache: folder for the tokenizer and the base model.
        text: folder of Python source to learn from; None takes the running Python's library.
        threads: CPU threads, at least 1; None leaves PyTorch's choice.
        base: the base model's sizes. The defaults keep the demo under five minutes on two cores.
        tune: the tuning's sizes.
    """

    seed: int = 0
    output: Path = Path("prefixattn-demo")
    cache: Path = field(default_factory=default_folder)
    text: Path | None = None
    threads: int | None = None
    base: BaseSizes = BaseSizes()
    tune: TuneSizes = TuneSizes()

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {self.threads}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in [0, 2**63), got {self.seed}")
        for name in ("output", "cache"):
            if getattr(self, name).is_file():
                raise ValueError(f"{name} must be a folder, got the file {getattr(self, name)}")
