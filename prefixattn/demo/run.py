"""What `prefixattn demo` starts."""

import os
from typing import TYPE_CHECKING

from prefixattn.demo.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console

    from prefixattn.demo.report import Findings


def run(settings: Settings, console: "Console | None" = None) -> "Findings":
    """Run the demo: print what happens to `console`, leave the results in `settings.output`.

    It asks no network for anything. An interruption leaves the cache and earlier results whole.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when Hugging Face's libraries are first imported
    from prefixattn.demo.flow import demonstrate

    return demonstrate(settings, console)
