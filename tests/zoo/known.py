"""Cells that are wrong and known to be, each with its reason: (family, situation) -> reason."""

KNOWN: dict[tuple[str, str], str] = {}
