"""Pure ASGI middleware for the header `Idempotency-Key`: requests with the same key run once, and get one answer.

The header is that of draft-ietf-httpapi-idempotency-key-header. As in Stripe's API a key belongs to a tenant, a
replayed answer has the header `Idempotent-Replayed: true`, and only an answer of a request that succeeded is kept.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from contextlib import suppress
from contextvars import Context, copy_context
from dataclasses import dataclass
from functools import partial

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.api.error_handlers import ErrorHandlers
from serve_app.api.telemetry import ServiceTelemetry
from serve_app.core.tenants import ANYONE, Identity
from serve_app.errors import InvalidRequest, NotReady, ServeAppError
from serve_app.jobs.answers import AnswerStore, KeptAnswer, Place, reused

# RFC 8941 strings, which the draft asks for, have quotation marks; Stripe and most clients send none.
_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_ANSWERS_STREAMS = ("/generate_stream",)
# Ray Serve cancels the calls that were made in the context of a request whose client has left.
_OF_THE_SERVER = "Serve internal"


@dataclass(frozen=True, slots=True)
class _Flight:
    """A request that runs. It ends also if its client leaves, because the client can ask again."""

    fingerprint: bytes
    task: asyncio.Task[KeptAnswer]


class Idempotency:
    """Around the routes, and within the middleware that limits and decodes bodies.

    Streams and uploads ignore the key, because an answer is kept as a whole. An error while the body is read, or in
    the use of the key, is answered by `handlers`.
    """

    def __init__(self, app: ASGIApp, store: AnswerStore, handlers: ErrorHandlers, telemetry: ServiceTelemetry) -> None:
        self.app = app
        self.store = store
        self.handlers = handlers
        self.telemetry = telemetry
        self._flights: dict[Place, _Flight] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = Headers(scope=scope).get("idempotency-key") if scope["type"] == "http" else None
        if key is None or scope["method"] != "POST" or _is_upload(scope):
            await self.app(scope, receive, send)
            return
        try:
            body = await _read(receive)
            if _is_streamed(scope, body):
                await self.app(scope, _Replay(body, receive), send)
                return
            answer, replayed = await self._answer(scope, key, body)
        except ServeAppError as error:
            response = await self.handlers.known(Request(scope), error)
            await response(scope, receive, send)
            return
        await _send(answer, replayed, send)

    async def _answer(self, scope: Scope, key: str, body: bytes) -> tuple[KeptAnswer, bool]:
        """The answer to a request, and whether it is that of another one. Raises ServeAppError."""
        place, fingerprint = _place(scope, key), _fingerprint(scope, body)
        flight = self._flights.get(place)
        if flight is None:
            task = asyncio.create_task(self._run(scope, place, fingerprint, body), context=_detached())
            flight = self._flights[place] = _Flight(fingerprint, task)
            task.add_done_callback(partial(self._ended, place))
            answer = await asyncio.shield(task)
            return answer, scope["state"].get("replayed", False)
        if flight.fingerprint != fingerprint:
            self.telemetry.key_used("refused")
            raise reused(place)
        self.telemetry.key_used("joined")
        return await asyncio.shield(flight.task), True

    def _ended(self, place: Place, task: asyncio.Task[KeptAnswer]) -> None:
        del self._flights[place]
        if not task.cancelled():
            task.exception()  # if all clients have left, asyncio would log that it was not retrieved

    async def _run(self, scope: Scope, place: Place, fingerprint: bytes, body: bytes) -> KeptAnswer:
        """The answer of the store, or of the application. Raises ServeAppError, and what the application raises."""
        try:
            kept = await self.store.claim(place, fingerprint)
        except ServeAppError:
            self.telemetry.key_used("refused")
            raise
        if kept is not None:
            self.telemetry.key_used("replayed")
            scope["state"]["replayed"] = True
            return kept
        self.telemetry.key_used("executed")
        recorder = _Recorder()
        succeeded = False
        try:
            await self.app(scope, _Replay(body, _never), recorder)
            answer = recorder.answer()
            succeeded = answer.status < 300
        finally:
            # If the database fails now, the key is free when its lease ends.
            with suppress(NotReady):
                await (self.store.keep(place, fingerprint, answer) if succeeded else self.store.give_up(place))
        return answer


def _is_upload(scope: Scope) -> bool:
    return Headers(scope=scope).get("content-type", "").lower().startswith("multipart/")


def _path(scope: Scope) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _is_streamed(scope: Scope, body: bytes) -> bool:
    """Whether the answer is a stream. A body that is not JSON is not: the route refuses it."""
    if _path(scope) in _ANSWERS_STREAMS:
        return True
    if b'"stream"' not in body:
        return False
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return False
    return isinstance(document, dict) and bool(document.get("stream"))


def _place(scope: Scope, key: str) -> Place:
    """Raises InvalidRequest."""
    key = key.strip()
    if not _KEY.fullmatch(key):
        raise InvalidRequest("Header 'Idempotency-Key' should be 1 to 255 printable ASCII characters without spaces.")
    identity: Identity = scope["state"].get("identity", ANYONE)
    return Place(identity.tenant, key)


def _fingerprint(scope: Scope, body: bytes) -> bytes:
    """Equal for requests with the same path, query and body."""
    digest = hashlib.sha256(_path(scope).encode())
    for part in (scope.get("query_string", b""), body):
        digest.update(len(part).to_bytes(8) + part)
    return digest.digest()


def _detached() -> Context:
    """The context of the current call without the variables of Ray Serve."""
    context = Context()
    for variable, value in copy_context().items():
        if not variable.name.startswith(_OF_THE_SERVER):
            context.run(variable.set, value)
    return context


async def _read(receive: Receive) -> bytes:
    """The whole body. Raises ClientDisconnect, and what `receive` raises."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


async def _never() -> Message:
    """The client of a request with a key is not waited for."""
    await asyncio.Event().wait()
    raise AssertionError("nothing sets the event")


class _Replay:
    """Receives a body that was read, and then what `rest` receives."""

    def __init__(self, body: bytes, rest: Receive) -> None:
        self._body: bytes | None = body
        self._rest = rest

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._rest()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


class _Recorder:
    """Keeps the messages of a response."""

    def __init__(self) -> None:
        self._status = 500
        self._headers: tuple[tuple[str, str], ...] = ()
        self._parts: list[bytes] = []

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._headers = tuple(
                (name.decode("latin-1"), value.decode("latin-1")) for name, value in message["headers"]
            )
        elif message["type"] == "http.response.body":
            self._parts.append(message.get("body", b""))

    def answer(self) -> KeptAnswer:
        return KeptAnswer(self._status, self._headers, b"".join(self._parts))


async def _send(answer: KeptAnswer, replayed: bool, send: Send) -> None:
    headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in answer.headers]
    if replayed:
        headers.append((b"idempotent-replayed", b"true"))
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body, "more_body": False})
