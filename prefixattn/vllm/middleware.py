"""An ASGI middleware: an adapter is chosen by ``model``, and listed among the models.

``--middleware prefixattn.vllm.middleware.ChooseByModel``
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from prefixattn.vllm.claim import PARAMETER, TRANSFER
from prefixattn.vllm.front_end import adapter_folder

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

GENERATE = ("/v1/completions", "/v1/chat/completions")
MODELS = "/v1/models"


class ChooseByModel:
    """Requests whose ``model`` is an adapter go to the base model with that adapter.

    A name that the server itself serves is the server's. What is no JSON object is the server's to
    refuse.
    """

    def __init__(self, app: App) -> None:
        self.app = app
        self._folder: Any = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One connection."""
        route = (scope.get("method"), scope.get("path", ""))
        if scope["type"] == "http" and route in {("POST", path) for path in GENERATE}:
            await self._generate(scope, receive, send)
        elif scope["type"] == "http" and route == ("GET", MODELS):
            await self._list(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _generate(self, scope: Message, receive: Receive, send: Send) -> None:
        rewritten = False

        async def addressed() -> Message:
            """The body, once the server asks for it: after it knows the client."""
            nonlocal rewritten
            if rewritten:
                return await receive()
            rewritten = True
            body = await _body(receive)
            if body is None:
                return {"type": "http.disconnect"}
            return {"type": "http.request", "body": self._address(body, scope["app"].state)}

        await self.app({**scope, "headers": _without_length(scope["headers"])}, addressed, send)

    def _address(self, body: bytes, state: Any) -> bytes:
        """A request to the base model with an adapter, where it was one to the adapter."""
        asked = _object(body)
        name = asked.get("model") if asked else None
        if not asked or name in _served(state) or name not in self._adapters(state):
            return body
        given = asked.get(TRANSFER)
        # Of two names none is taken: the front end refuses this, and shows both.
        adapter = name if given is None else {"model": name, TRANSFER: given}
        return json.dumps(
            asked | {"model": _served(state)[0], TRANSFER: {PARAMETER: adapter}}
        ).encode()

    async def _list(self, scope: Message, receive: Receive, send: Send) -> None:
        start: list[Message] = []
        parts: list[bytes] = []

        async def extended(message: Message) -> None:
            if message["type"] == "http.response.start":
                start.append(message)
                return
            parts.append(message.get("body", b""))
            if message.get("more_body"):
                return
            body = b"".join(parts)
            listed = _object(body)
            if listed and listed.get("data"):
                state = scope["app"].state
                of_base = listed["data"][0] | {"parent": _served(state)[0]}
                names = [n for n in self._adapters(state) if n not in _served(state)]
                listed["data"] += [of_base | {"id": name, "root": name} for name in names]
                body = json.dumps(listed).encode()
            length = (b"content-length", str(len(body)).encode())
            await send({**start[0], "headers": [*_without_length(start[0]["headers"]), length]})
            await send({"type": "http.response.body", "body": body})

        await self.app(scope, receive, extended)

    def _adapters(self, state: Any) -> Any:
        if self._folder is None:
            self._folder = adapter_folder(state.engine_client.vllm_config)
        return self._folder


def _served(state: Any) -> list[str]:
    """The names that the server serves the base model by."""
    return [path.name for path in state.openai_serving_models.base_model_paths]


async def _body(receive: Receive) -> bytes | None:
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def _object(body: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _without_length(headers: Any) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in headers if name.lower() != b"content-length"]
