"""Makes the HTTP server of Ray Serve's proxies and replicas, uvicorn, answer as HTTP demands it, and bounds requests.

Everything here runs before Ray Serve looks at a request.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from serve_app.deployments import http_protocol
from serve_app.deployments.http_protocol import LIMITS, error_body
from serve_app.errors import BodyTooLarge

# Headers by which Ray Serve lets any client disable time limits and cancellation, or choose a replica.
_CONTROL = (b"x-request-timeout-seconds", b"x-request-disconnect-disabled", b"serve-multiplexed-model-id")
_CONTROL_PREFIX = b"x-serve-"
# Headers that Ray Serve decodes as UTF-8, and answers with status 500 if they are not. The service uses them too.
_DECODED = (b"x-request-id", b"traceparent", b"tracestate", b"baggage")
_MAX_DECODED = 1024
# The application refuses a request by its headers within this time.
_REFUSAL_S = 0.1


def middlewares() -> list[Middleware]:
    """Ray Serve calls this function, which RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names, in each of its servers."""
    http_protocol.install()
    # Ray applies the first one innermost.
    return [Middleware(BodyCap), Middleware(WithoutControlHeaders), Middleware(WithoutChunks), Middleware(LateContinue)]


class WithoutControlHeaders:
    """Removes headers that control Ray Serve, and those that Ray Serve would fail on.

    A header that Ray Serve decodes is removed unless it is printable ASCII of at most 1 kB. Ray Serve takes `_` and `-`
    in the names of some headers as equal, so that this class does too.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        session = os.environ.get("RAY_SERVE_SESSION_ID_HEADER_KEY", "x-session-id").lower().encode()
        self._decoded = frozenset([*_DECODED, _canonical(session)])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            # The list itself changes: uvicorn's cycle reads it too.
            scope["headers"][:] = [header for header in scope["headers"] if self._passes(*header)]
        await self.app(scope, receive, send)

    def _passes(self, name: bytes, value: bytes) -> bool:
        name = _canonical(name)
        if name in _CONTROL or name.startswith(_CONTROL_PREFIX):
            return False
        return name not in self._decoded or (len(value) <= _MAX_DECODED and _printable(value))


def _canonical(name: bytes) -> bytes:
    return name.lower().replace(b"_", b"-")


def _printable(value: bytes) -> bool:
    return value.isascii() and value.decode("ascii").isprintable()


class BodyCap:
    """Ends a request whose body has more than twice `LIMITS.max_body_bytes`, before the application has read it.

    Ray Serve reads the body of a request into memory while the request waits for the application, which has a lower
    limit of its own and answers in the dialect of the path.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        counted, started, refused = 0, False, False

        async def capped_receive() -> Message:
            nonlocal counted, refused
            if refused:
                return {"type": "http.disconnect"}
            message = await receive()
            counted += len(message.get("body", b""))
            if counted <= 2 * LIMITS.max_body_bytes:
                return message
            refused = True
            if not started:
                await _refuse_body(send)
            return {"type": "http.disconnect"}

        async def send_unless_refused(message: Message) -> None:
            nonlocal started
            if not refused:
                started = True
                await send(message)

        await self.app(scope, capped_receive, send_unless_refused)


async def _refuse_body(send: Send) -> None:
    error = BodyTooLarge(f"The body is larger than {LIMITS.max_body_bytes} bytes. Send a shorter one.")
    LIMITS.refused(error)
    body = error_body(error)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class WithoutChunks:
    """Ends an answer of unknown length to HTTP/1.0 by closing the connection (RFC 9112, section 6.1).

    uvicorn sends such an answer in chunks whatever the version of the request is, and HAProxy passes the chunks on. No
    ASGI message prevents this. Therefore this class, the outermost one, sets attributes of uvicorn's cycle.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        cycle = getattr(send, "__self__", None)
        if scope.get("http_version") != "1.0" or not isinstance(cycle, RequestResponseCycle):
            await self.app(scope, receive, send)
            return
        until_close = False

        async def send_without_chunks(message: Message) -> None:
            nonlocal until_close
            if message["type"] == "http.response.start":
                until_close = "content-length" not in Headers(raw=list(message["headers"]))
                if until_close:
                    cycle.chunked_encoding = False
            elif until_close:
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await self.app(scope, receive, send_without_chunks)


class LateContinue:
    """Invites a client that sends `Expect: 100-continue` to send its body only if the application does not refuse it.

    Ray Serve asks for the body before the application runs, and uvicorn then sends `100 Continue`. A client that
    receives this and the refusal together sends the whole body, after which HAProxy 2.8 closes the connection without
    the body of the refusal: in 5 of 1,000 uploads by curl on a busy machine.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        expects = scope["type"] == "http" and "100-continue" in Headers(scope=scope).get("expect", "").lower()
        if not expects:
            await self.app(scope, receive, send)
            return
        answered = asyncio.Event()
        waited = False

        async def receive_later() -> Message:
            nonlocal waited
            if not waited:
                waited = True
                with suppress(TimeoutError):
                    async with asyncio.timeout(_REFUSAL_S):
                        await answered.wait()
            return await receive()

        async def send_noting(message: Message) -> None:
            await send(message)
            answered.set()

        await self.app(scope, receive_later, send_noting)
