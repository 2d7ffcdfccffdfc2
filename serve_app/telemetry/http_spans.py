"""One HTTP call as its span and its log line tell it: the layer around all others, and the gateway seen through it."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator
from contextvars import ContextVar
from dataclasses import dataclass

from opentelemetry import context
from opentelemetry.context import Context
from opentelemetry.trace import (
    Span,
    SpanKind,
    Status,
    StatusCode,
    Tracer,
    format_span_id,
    format_trace_id,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.api.gateway import Gateway
from serve_app.core.events import CANCELLED, Chunk
from serve_app.core.http import HttpCall
from serve_app.core.queries import A, ModelStatus, Query
from serve_app.core.requests import GenerationRequest
from serve_app.errors import InternalError, ServeAppError
from serve_app.telemetry.generation_spans import traced

log = logging.getLogger(__name__)

W3C = TraceContextTextMapPropagator()

_METHODS = {"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"}
# When a proxy in front had the request: "t=" and seconds since 1970, to a thousandth or a millionth, dot or none.
_ARRIVED = re.compile(r"t=([0-9]{10})\.?([0-9]{3}|[0-9]{6})?")
_OLDEST_NS = 60 * 10**9


@dataclass(slots=True)
class Call:
    """What is known of one HTTP call. `error` is the code of the last refusal in it, `fault` whether that was ours."""

    scope: Scope
    span: Span
    status: int | None = None
    complete: bool = False
    left: bool = False
    error: str = ""
    fault: bool = False

    @property
    def request_id(self) -> str:
        """Known once RequestId, which is further in, has named it."""
        name: str = self.scope.get("state", {}).get("request_id", "")
        return name

    @property
    def method(self) -> str:
        """From a closed set, as the semantic conventions have it."""
        return self.scope["method"] if self.scope["method"] in _METHODS else "_OTHER"

    @property
    def route(self) -> str:
        """The pattern of the path; "" for one that is not here."""
        return getattr(self.scope.get("route"), "path", "")


_CALL: ContextVar[Call | None] = ContextVar("call", default=None)


def ids() -> dict[str, str]:
    """What a log line that is written now is about: the call's `request_id`, `trace_id` and `span_id`, if known."""
    found: dict[str, str] = {}
    call, span = _CALL.get(), get_current_span().get_span_context()
    if call is not None and call.request_id:
        found["request_id"] = call.request_id
    if span.is_valid:
        found |= {"trace_id": format_trace_id(span.trace_id), "span_id": format_span_id(span.span_id)}
    return found


class Observe:
    """A SERVER span for each call, under the caller's `traceparent`; a sampled one is told its own in the answer.

    If a proxy in front says when it had the request, a span `proxy` from then on is the server's parent. `access_log`
    writes a line when a call has ended, that is when its stream has.
    """

    def __init__(self, app: ASGIApp, tracer: Tracer, access_log: bool) -> None:
        self.app = app
        self._tracer = tracer
        self._access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, headers = time.time_ns(), Headers(scope=scope)
        above = W3C.extract({name: headers[name] for name in W3C.fields if name in headers}, Context())
        arrived = arrival(headers.get("x-request-start", ""), began)
        proxy = None
        if arrived is not None:
            proxy = self._tracer.start_span("proxy", above, start_time=arrived)
            above = set_span_in_context(proxy, above)
        span = self._tracer.start_span(scope["method"], above, SpanKind.SERVER, start_time=began)
        if not (span.is_recording() or self._access_log):
            await self.app(scope, receive, send)
            return
        call = Call(scope, span)
        within, current = _CALL.set(call), context.attach(set_span_in_context(span, above))
        try:
            await self.app(scope, _heard(call, receive), _said(call, send))
        except asyncio.CancelledError:
            call.left = not call.complete
            raise
        except Exception:
            call.error, call.fault = call.error or InternalError.code, True
            raise
        finally:
            ended = time.time_ns()
            _tell(call, ended)
            if proxy is not None:
                proxy.end(ended)
            if self._access_log:
                _log(call, ended - began)
            context.detach(current)
            _CALL.reset(within)


def arrival(header: str, now: int) -> int | None:
    """The instant, in ns, that X-Request-Start states. None if it states none, or one that cannot be."""
    stated = _ARRIVED.fullmatch(header)
    if stated is None:
        return None
    instant = int((stated[1] + (stated[2] or "")).ljust(19, "0"))
    return instant if now - _OLDEST_NS <= instant <= now else None


def _tell(call: Call, ended: int) -> None:
    """End its span. A client that left is no failure of the server's, nor is a request that it had to refuse."""
    span = call.span
    if span.is_recording():
        span.update_name(f"{call.method} {call.route}".rstrip())
        span.set_attributes(_attributes(call))
        if call.fault and not call.left:
            span.set_status(Status(StatusCode.ERROR))
    span.end(ended)


def _attributes(call: Call) -> dict[str, str | int]:
    found: dict[str, str | int | None] = {
        "http.request.method": call.method,
        "http.route": call.route or None,
        "http.response.status_code": call.status,
        "error.type": _error(call),
        "url.path": call.scope["path"][:256],
        "url.scheme": call.scope["scheme"],
        "network.protocol.version": call.scope.get("http_version"),
        "serve_app.request_id": call.request_id or None,
    }
    return {name: value for name, value in found.items() if value is not None}


def _error(call: Call) -> str | None:
    return CANCELLED if call.left else call.error or None


def _log(call: Call, took_ns: int) -> None:
    told: dict[str, object] = {"method": call.method, "route": call.route, "status": call.status, "error": _error(call)}
    told["duration_ms"] = round(took_ns / 1e6, 3)
    log.info("%s %s %s", call.method, call.route or "-", call.status or "-", extra={"told": told})


def _heard(call: Call, receive: Receive) -> Receive:
    async def heard() -> Message:
        message = await receive()
        if message["type"] == "http.disconnect" and not call.complete:
            call.left = True
        return message

    return heard


def _said(call: Call, send: Send) -> Send:
    async def said(message: Message) -> None:
        if message["type"] == "http.response.start":
            call.status = message["status"]
            if call.span.is_recording():
                own: dict[str, str] = {}
                W3C.inject(own, set_span_in_context(call.span, Context()))
                MutableHeaders(scope=message)["traceparent"] = own["traceparent"]
        try:
            await send(message)
        except OSError:
            call.left = True
            raise
        call.complete = message["type"] == "http.response.body" and not message.get("more_body", False)

    return said


class ObservedGateway:
    """The gateway with a span for every generation of a sampled call. To others it is the gateway itself.

    `capture` puts prompts and answers into the spans.
    """

    def __init__(self, gateway: Gateway, tracer: Tracer, capture: bool) -> None:
        self._gateway = gateway
        self._tracer = tracer
        self._capture = capture

    def stream(self, request: GenerationRequest, warm_wait_s: float | None = None) -> AsyncGenerator[Chunk, None]:
        if not get_current_span().is_recording():
            return self._gateway.stream(request, warm_wait_s)
        return traced(self._gateway, request, warm_wait_s, self._tracer, self._capture)

    async def query(self, model: str, question: Query[A], warm_wait_s: float) -> A:
        return await self._gateway.query(model, question, warm_wait_s)

    def waiting_on(self, model: str) -> str:
        return self._gateway.waiting_on(model)

    async def models(self) -> list[ModelStatus]:
        return await self._gateway.models()

    async def metrics(self) -> bytes:
        return await self._gateway.metrics()

    def refused(self, error: ServeAppError, model: str | None) -> None:
        call = _CALL.get()
        if call is not None:
            call.error, call.fault = error.code, error.status >= 500
        self._gateway.refused(error, model)

    def call_began(self) -> None:
        self._gateway.call_began()

    def call_ended(self, call: HttpCall) -> None:
        self._gateway.call_ended(call)
