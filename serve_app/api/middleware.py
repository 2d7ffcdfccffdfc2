"""Pure ASGI middleware around every route.

Outermost first: RequestId, OnePath, CallMetrics, CacheHeader, RateLimitHeaders (rate_limits.py), CatchAll, Authenticate
(auth.py), BodyLimits.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.api.error_handlers import ErrorHandlers
from serve_app.api.telemetry import ServiceTelemetry
from serve_app.config import Limits
from serve_app.core.cache_status import CacheReport, current_report
from serve_app.core.http import HttpCall
from serve_app.errors import BodyTooLarge, RequestTimeout

log = logging.getLogger(__name__)

_SAFE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class RequestId:
    """Names the request by the client's own id if that is safe in a log line, else by a new id.

    The header `request-id` repeats the id for Anthropic's clients, and `x-variant` names the variant of an experiment
    that answers. Sets `request_id` and `arrived`, an instant of
    `clock`, in the state of the request.
    """

    def __init__(self, app: ASGIApp, clock: Callable[[], float] = time.monotonic) -> None:
        self.app = app
        self.clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _SAFE_ID.fullmatch(given) else uuid4().hex

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = headers["request-id"] = request_id
                assignment = scope["state"].get("assignment")
                if assignment is not None:
                    headers["x-variant"] = assignment.variant
            await send(message)

        # A new dictionary, because a server can hand the same lifespan state to every request.
        scope["state"] = {**scope.get("state", {}), "request_id": request_id, "arrived": self.clock()}
        await self.app(scope, receive, send_with_id)


class OnePath:
    """Serves a path with repeated slashes, or with a slash at its end, as the path without them.

    A redirect would not serve clients that drop the body of a redirected POST.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            root: str = scope.get("root_path", "")
            parts = scope["path"].removeprefix(root).split("/")
            scope["path"] = f"{root}/{'/'.join(part for part in parts if part)}"
        await self.app(scope, receive, send)


class OneRequestId:
    """For a server that appends its own request id to every answer, as Ray does: removes ours if both are equal."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        of_server = Headers(scope=scope).get("x-request-id")

        async def send_without_copy(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if headers.get("x-request-id") == of_server:
                    del headers["x-request-id"]
            await send(message)

        await self.app(scope, receive, send_without_copy)


class CallMetrics:
    """Reports every HTTP call to the telemetry, by the pattern of its route, because clients can send any path."""

    def __init__(self, app: ASGIApp, telemetry: ServiceTelemetry) -> None:
        self.app = app
        self.telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, received, sent = time.monotonic(), 0, 0
        status: int | None = None

        async def counting_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return message

        async def counting_send(message: Message) -> None:
            nonlocal status, sent
            await send(message)
            status = message.get("status", status)
            sent += len(message.get("body", b""))

        self.telemetry.call_began()
        try:
            await self.app(scope, counting_receive, counting_send)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            seconds = time.monotonic() - began
            self.telemetry.call_ended(HttpCall(route, scope["method"], status, seconds, received, sent))


class CacheHeader:
    """Adds `x-cache`, what the response cache did for the requests of the call, to responses with such requests.

    A response to several requests that begins before all of them were looked up says what is known until then.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        report = CacheReport()

        async def send_with_status(message: Message) -> None:
            if message["type"] == "http.response.start" and report.status is not None:
                MutableHeaders(scope=message)["x-cache"] = report.status
            await send(message)

        before = current_report.set(report)
        try:
            await self.app(scope, receive, send_with_status)
        finally:
            current_report.reset(before)


class CatchAll:
    """Answers an unexpected exception with a 500 that names only the request id. A client that left is no error."""

    def __init__(self, app: ASGIApp, handlers: ErrorHandlers) -> None:
        self.app = app
        self.handlers = handlers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            await self._answer(scope, receive, _Sender(send))
        except ClientDisconnect:
            log.debug("Request %s: the client left.", scope["state"]["request_id"])

    async def _answer(self, scope: Scope, receive: Receive, sender: _Sender) -> None:
        try:
            await self.app(scope, receive, sender)
        except ClientDisconnect:
            raise
        except Exception as error:
            if sender.started:
                self.handlers.count_unknown(Request(scope), error)
                raise  # the server closes the connection, so that the client sees that the answer is not whole
            response = await self.handlers.unknown(Request(scope), error)
            await response(scope, receive, sender)


class _Sender:
    """Sends messages to the client. A write that fails raises ClientDisconnect, whatever the server raises."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False

    async def __call__(self, message: Message) -> None:
        self.started = True
        try:
            await self._send(message)
        except OSError:
            raise ClientDisconnect from None


class BodyLimits:
    """Refuses a body that is larger than `max_body_bytes`, or that does not arrive in time.

    An upload of a file has up to `max_file_bytes`. The size is that of the `content-length` header, or the number of
    bytes so far. A body is late if no byte arrives
    for `upload_timeout_s`, or if it is not complete after `request_timeout_s`. The error is raised from `receive`, so
    that the route's error handlers answer with it.
    """

    def __init__(self, app: ASGIApp, limits: Limits, max_file_bytes: int = 0) -> None:
        self.app = app
        self.limits = limits
        self.max_file_bytes = max_file_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        header = Headers(scope=scope).get("content-length", "")
        declared = int(header) if re.fullmatch(r"[0-9]{1,18}", header) else 0
        counted, complete = 0, False
        loop = asyncio.get_running_loop()
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        limit = max(self.limits.max_body_bytes, self.max_file_bytes if path == "/v1/files" else 0)
        deadline = loop.time() + self.limits.request_timeout_s

        async def limited_receive() -> Message:
            nonlocal counted, complete
            if complete:
                return await receive()
            _check_size(declared, limit)
            try:
                async with asyncio.timeout_at(min(loop.time() + self.limits.upload_timeout_s, deadline)):
                    message = await receive()
            except TimeoutError:
                raise self._late() from None
            counted += len(message.get("body", b""))
            _check_size(counted, limit)
            complete = not message.get("more_body", False)
            return message

        await self.app(scope, limited_receive, send)

    def _late(self) -> RequestTimeout:
        return RequestTimeout(
            f"The body did not arrive in time: no byte came for {self.limits.upload_timeout_s:g} s, or it was not "
            f"complete after {self.limits.request_timeout_s:g} s. Send it without pauses."
        )


def _check_size(size: int, limit: int) -> None:
    """Raises BodyTooLarge."""
    if size > limit:
        raise BodyTooLarge(f"The body is larger than {limit} bytes. Send a shorter prompt or fewer items.")
