"""Makes the HTTP server of Ray Serve's proxies and replicas, uvicorn, answer all clients as HTTP demands it."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

# The application refuses a request by its headers within this time.
_REFUSAL_S = 0.1


def middlewares() -> list[Middleware]:
    """Ray Serve calls this function, which RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names, in each of its servers."""
    return [Middleware(WithoutChunks), Middleware(LateContinue)]


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
