"""Makes the HTTP server of Ray Serve's proxies and replicas, uvicorn, answer HTTP/1.0 without chunks."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle


def middlewares() -> list[Middleware]:
    """Ray Serve calls this function, which RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names, in each of its servers."""
    return [Middleware(WithoutChunks)]


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
