"""How a request says which adapter it is for, from the client to the connector.

The client names it: ``kv_transfer_params={"prefixattn": NAME}``. The front end writes the adapter's
digest into the salt of the request's block hashes: blocks of two contents never meet, and a client
can neither write such a salt nor reach such blocks without their adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

PARAMETER = "prefixattn"
NAMESPACE = "prefixattn:"
TRANSFER = "kv_transfer_params"


@dataclass(frozen=True)
class Claim:
    """An adapter as a request carries it.

    Attributes:
        name: its folder's.
        digest: of its content, hexadecimal.
        num_tokens: ``P``, the placeholders in front of the text.
    """

    name: str
    digest: str
    num_tokens: int

    def salt(self, of_client: str | None) -> str:
        """The request's ``cache_salt``; a client's own still keeps its blocks apart."""
        return NAMESPACE + self.digest + (f":{of_client}" if of_client else "")

    def parameters(self) -> dict[str, Any]:
        """What the front end puts in place of the client's ``kv_transfer_params``."""
        return {PARAMETER: asdict(self)}


def name_of(parameters: Any) -> str | None:
    """The adapter that a client asks for; None: none.

    Raises:
        ValueError: the client asks for something else.
    """
    if parameters is None:
        return None
    name = parameters.get(PARAMETER) if isinstance(parameters, Mapping) else None
    if not isinstance(name, str) or set(parameters) != {PARAMETER}:
        raise ValueError(
            f'{TRANSFER} must be {{"{PARAMETER}": the name of an adapter}}, got {parameters!r}'
        )
    return name


def claim_of(salt: str | None, parameters: Mapping[str, Any] | None) -> Claim | None:
    """The adapter of a request that the front end has seen; its salt decides.

    Raises:
        RuntimeError: the two disagree, which the front end never writes.
    """
    held = (parameters or {}).get(PARAMETER)
    if salt is None or not salt.startswith(NAMESPACE):
        if held is not None:
            raise RuntimeError("a request names an adapter and has not been through the front end")
        return None
    claim = Claim(**held) if isinstance(held, Mapping) else None
    if claim is None or salt.removeprefix(NAMESPACE).split(":")[0] != claim.digest:
        raise RuntimeError(f"a request's cache_salt {salt!r} is not of its adapter {held!r}")
    return claim
