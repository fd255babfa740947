"""An ASGI middleware: an adapter is chosen by ``model``, and listed among the models.

``--middleware prefixattn.vllm.middleware.ChooseByModel``
"""

from __future__ import annotations

import asyncio
import json
import logging
import reprlib
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from prefixattn.vllm.claim import PARAMETER, TRANSFER
from prefixattn.vllm.endpoints import LOAD_LORA, MODELS, ends_in, use_of
from prefixattn.vllm.served import base_names, serves, vllm_config, would_serve

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

NOTE = b"x-prefixattn-note"
HIDDEN = (
    "the server itself serves model {0}, so the prefix adapter of that name is not reached by "
    "model: ask for it by kv_transfer_params, or rename one of the two"
)
LOOKS, LOOK_SECONDS = 4, 1.0
logger = logging.getLogger("vllm.prefixattn")


class ChooseByModel:
    """Requests whose ``model`` is an adapter go to the base model with that adapter.

    A name that the server itself serves is the server's; where that hides an adapter, the log and
    the answer's header ``x-prefixattn-note`` say so. What is no JSON object is the server's to
    refuse.
    """

    def __init__(self, app: App) -> None:
        self.app = app
        self._folder: Any = None
        self._pool = ThreadPoolExecutor(LOOKS, "prefixattn-look")
        self._hidden: set[str] = set()
        self._looks: dict[str, asyncio.Task[None]] = {}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One connection."""
        method = scope.get("method") if scope["type"] == "http" else None
        if method == "POST" and _is_json(scope["headers"]):
            await self._post(scope, receive, send)
        elif method == "GET" and ends_in(scope["path"], MODELS):
            await self._list(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _post(self, scope: Message, receive: Receive, send: Send) -> None:
        inner = {**scope, "headers": _without_length(scope["headers"])}
        read, note = False, ""

        async def addressed() -> Message:
            """The body, once the server asks for it: after it knows the client, and its own app."""
            nonlocal read, note
            if read:
                return await receive()
            read = True
            body = await _body(receive)
            if body is None:
                return {"type": "http.disconnect"}
            if asked := _object(body):
                state = _state(inner)
                note = await self._note(asked, state, scope["path"])
                if (rewritten := await self._address(asked, state, scope["path"])) is not None:
                    body = json.dumps(rewritten).encode()
            return {"type": "http.request", "body": body}

        async def noted(message: Message) -> None:
            if note and message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (NOTE, note.encode())]}
            await send(message)

        await self.app(inner, addressed, noted)

    async def _address(self, asked: dict[str, Any], state: Any, path: str) -> dict[str, Any] | None:
        """A request to the base model with an adapter, where it was one to the adapter.

        Raises:
            HTTPException: the endpoint would lose the adapter (400), or adapters cannot be looked
                at (503).
        """
        name, given, use = asked.get("model"), asked.get(TRANSFER), use_of(path, asked)
        if isinstance(given, dict) and PARAMETER in given and use == "refused":
            raise refusal(400, f"{TRANSFER} names an adapter, which {path} cannot answer with")
        if not isinstance(name, str) or not name or serves(state, name):
            return None
        try:
            if not await self._has(name, state) or await would_serve(state, name):
                return None
            self._hidden.discard(name)
        except OSError as error:
            words = f"the server itself serves no model {reprlib.repr(name)}, and {error}"
            raise refusal(503, words) from error
        if use == "refused":
            words = f"model {name!r} is an adapter, which {path} cannot answer with; the base can"
            raise refusal(400, words)
        asked = asked | {"model": base_names(state)[0]}
        if use == "adapter":
            # Of two names none is taken: the front end refuses this, and shows both.
            chosen = name if given is None else {"model": name, TRANSFER: given}
            asked[TRANSFER] = {PARAMETER: chosen}
        return asked

    async def _list(self, scope: Message, receive: Receive, send: Send) -> None:
        inner = {**scope}
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
            if start[0]["status"] == 200 and listed and listed.get("data"):
                body = json.dumps(await self._listed(listed, _state(inner))).encode()
            length = (b"content-length", str(len(body)).encode())
            await send({**start[0], "headers": [*_without_length(start[0]["headers"]), length]})
            await send({"type": "http.response.body", "body": body})

        await self.app(inner, receive, extended)

    async def _listed(self, listed: dict[str, Any], state: Any) -> dict[str, Any]:
        """The server's list and the adapters behind it, each name once."""
        cards = listed["data"]
        own = {card["id"] for card in cards}
        folder = self._adapters(state)
        try:
            names = await self._in_thread(sorted, folder)
        except OSError as error:
            logger.warning("prefixattn: no adapters among the models: %s", error)
            names = []
        self._tell(own, own.intersection(names))
        of_base = cards[0] | {"parent": cards[0]["id"]}
        added = [of_base | {"id": name, "root": name} for name in names if name not in own]
        return listed | {"data": [*cards, *added]}

    async def _note(self, asked: dict[str, Any], state: Any, path: str) -> str:
        """What an answer says of an adapter that is hidden by the name that was asked for."""
        loads = ends_in(path, LOAD_LORA)
        name = asked.get("lora_name" if loads else "model")
        if not isinstance(name, str) or not (loads or serves(state, name)):
            return ""
        if name not in self._looks:  # a disk that hangs must not hold the base's requests
            look = asyncio.create_task(self._look(name, state))
            self._looks[name] = look
            look.add_done_callback(lambda _: self._looks.pop(name))
            await asyncio.wait([look], timeout=LOOK_SECONDS)
        return HIDDEN.format(ascii(name)) if name in self._hidden else ""

    async def _look(self, name: str, state: Any) -> None:
        """Note whether a name that the server serves is an adapter's too."""
        try:
            found = await self._has(name, state)
        except OSError:  # requests with an adapter are told
            found = False
        self._tell({name}, {name} if found else set())

    def _tell(self, names: set[str], hidden: set[str]) -> None:
        """Log what is ``hidden`` among ``names``, once."""
        for name in sorted(hidden - self._hidden):
            logger.warning("prefixattn: %s", HIDDEN.format(ascii(name)))
        self._hidden = self._hidden - names | hidden

    async def _has(self, name: str, state: Any) -> bool:
        folder = self._adapters(state)
        found: bool = await self._in_thread(folder.__contains__, name)
        return found

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, function, *arguments)

    def _adapters(self, state: Any) -> Any:
        """The folder; an empty one where the application has no engine with our connector."""
        if self._folder is None:
            config = vllm_config(state)
            if config is None:  # also where another application answers
                return ()
            from prefixattn.vllm.front_end import adapter_folder

            self._folder = adapter_folder(config)
        return self._folder


def refusal(status: int, words: str) -> Exception:
    """What the server answers in its own form where the reading of a request's body raises it."""
    from fastapi import HTTPException  # the server has it; without one there is nobody to answer

    return HTTPException(status, words)


def _state(scope: Message) -> Any:
    """Of the application that serves: one that is mounted puts itself into the scope."""
    return getattr(scope.get("app"), "state", None)


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


def _is_json(headers: Any) -> bool:
    """Whether a body may be JSON: it does not say that it is something else."""
    kinds = [value.lower() for name, value in headers if name.lower() == b"content-type"]
    return not kinds or b"json" in kinds[0]


def _without_length(headers: Any) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in headers if name.lower() != b"content-length"]
