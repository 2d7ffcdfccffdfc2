"""Pure ASGI layers around every route, outermost first: RequestId, Measured, CatchAll, BodyLimit."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.api.error_handlers import ErrorHandlers
from serve_app.api.gateway import Gateway
from serve_app.core.http import HttpCall
from serve_app.errors import BodyTooLarge

log = logging.getLogger(__name__)

SAFE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class RequestId:
    """Names the request: the client's own id if it is harmless in a log line, else a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if SAFE_ID.fullmatch(given) else uuid4().hex

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        # A fresh dict: a server may hand the same lifespan state to every request.
        scope["state"] = {**scope.get("state", {}), "request_id": request_id, "arrived": time.monotonic()}
        await self.app(scope, receive, named)


class OneRequestId:
    """For a server that names requests too and appends their ids to every answer, as Ray does: the same one once."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        servers = Headers(scope=scope).get("x-request-id")

        async def once(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if headers.get("x-request-id") == servers:
                    del headers["x-request-id"]
            await send(message)

        await self.app(scope, receive, once)


class Measured:
    """Has the gateway count the call, by the pattern of its route: no caller can make up a name."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self.app = app
        self.gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, received, sent = time.monotonic(), 0, 0
        status: int | None = None

        async def counted_in() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return message

        async def counted_out(message: Message) -> None:
            nonlocal status, sent
            await send(message)
            status = message.get("status", status)
            sent += len(message.get("body", b""))

        self.gateway.call_began()
        try:
            await self.app(scope, counted_in, counted_out)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            seconds = time.monotonic() - began
            self.gateway.call_ended(HttpCall(route, scope["method"], status, seconds, received, sent))


class CatchAll:
    """Nothing unknown reaches the server: an exception is one opaque 500, a client that left is no error at all."""

    def __init__(self, app: ASGIApp, refusals: ErrorHandlers) -> None:
        self.app = app
        self.refusals = refusals

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            await self._answer(scope, receive, Wire(send))
        except ClientDisconnect:
            log.debug("request %s: the client left", scope["state"]["request_id"])

    async def _answer(self, scope: Scope, receive: Receive, wire: Wire) -> None:
        try:
            await self.app(scope, receive, wire)
        except ClientDisconnect:
            raise
        except Exception as error:
            if wire.started:
                raise  # the server cuts the connection, so the client sees that the answer is not whole
            response = await self.refusals.unknown(Request(scope), error)
            await response(scope, receive, wire)


class Wire:
    """The way to the client. A failed write means that the client left, whatever the server calls it."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False

    async def __call__(self, message: Message) -> None:
        self.started = True
        try:
            await self._send(message)
        except OSError:
            raise ClientDisconnect from None


class BodyLimit:
    """Refuses a body over `limit` bytes, by its declared length or by counting what comes in.

    The refusal is raised from `receive`, so that it takes the same way as every other error. Whoever has not sent all
    of a body after `patience_s` is taken for one who left.
    """

    def __init__(self, app: ASGIApp, limit: int, patience_s: float) -> None:
        self.app = app
        self.limit = limit
        self.patience_s = patience_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        header = Headers(scope=scope).get("content-length", "")
        declared = int(header) if re.fullmatch(r"[0-9]{1,18}", header) else 0
        counted, whole = 0, False
        deadline = asyncio.get_running_loop().time() + self.patience_s

        async def limited() -> Message:
            nonlocal counted, whole
            self._check(declared)
            try:
                async with asyncio.timeout_at(None if whole else deadline):
                    message = await receive()
            except TimeoutError:
                raise ClientDisconnect from None
            counted += len(message.get("body", b""))
            self._check(counted)
            whole = not message.get("more_body", False)
            return message

        await self.app(scope, limited, send)

    def _check(self, size: int) -> None:
        if size > self.limit:
            raise BodyTooLarge(f"the body is over {self.limit} bytes; send a shorter prompt or fewer items")
