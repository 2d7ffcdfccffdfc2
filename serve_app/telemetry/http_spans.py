"""Records the span and the log line of an HTTP call, by wrapping the HTTP application, its engine and its telemetry."""

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

from serve_app.api.telemetry import ServiceTelemetry
from serve_app.core.engine import Engine, EngineLoad
from serve_app.core.events import CANCELLED, Chunk
from serve_app.core.experiments import Assignment
from serve_app.core.http import HttpCall
from serve_app.core.queries import A, ModelStatus, Query
from serve_app.core.requests import GenerationRequest
from serve_app.errors import InternalError, ServeAppError
from serve_app.telemetry.generation_spans import traced

log = logging.getLogger(__name__)

W3C = TraceContextTextMapPropagator()

_METHODS = {"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"}
# X-Request-Start: "t=" and the time since 1970 in seconds, ms or us, with or without a dot after the seconds.
_ARRIVED = re.compile(r"t=([0-9]{10})\.?([0-9]{3}|[0-9]{6})?")
_OLDEST_NS = 60 * 10**9


@dataclass(slots=True)
class Call:
    """The state of one HTTP call. `error` is the code of its last error, `fault` whether the service caused that."""

    scope: Scope
    span: Span
    status: int | None = None
    complete: bool = False
    left: bool = False
    error: str = ""
    fault: bool = False

    @property
    def request_id(self) -> str:
        """Set by the RequestId middleware, which is further inside; "" before."""
        name: str = self.scope.get("state", {}).get("request_id", "")
        return name

    @property
    def assignment(self) -> Assignment | None:
        """The variant of an experiment that answers the call."""
        found: Assignment | None = self.scope.get("state", {}).get("assignment")
        return found

    @property
    def method(self) -> str:
        """One of a closed set, as OpenTelemetry's semantic conventions require."""
        return self.scope["method"] if self.scope["method"] in _METHODS else "_OTHER"

    @property
    def route(self) -> str:
        """The pattern of the route; "" for a path without a route."""
        return getattr(self.scope.get("route"), "path", "")


_CALL: ContextVar[Call | None] = ContextVar("call", default=None)


def ids() -> dict[str, str]:
    """The `request_id`, `trace_id` and `span_id` of the current call, as far as they are known, for a log line."""
    found: dict[str, str] = {}
    call, span = _CALL.get(), get_current_span().get_span_context()
    if call is not None and call.request_id:
        found["request_id"] = call.request_id
    if span.is_valid:
        found |= {"trace_id": format_trace_id(span.trace_id), "span_id": format_span_id(span.span_id)}
    return found


class Observe:
    """ASGI middleware: a SERVER span for each call, whose parent is the `traceparent` of the caller.

    The response of a sampled call has its own `traceparent`. If a proxy sets X-Request-Start, a span `proxy` that
    begins at that instant is the parent. `access_log` writes a log line when a call, with its stream, has ended.
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
        parent = W3C.extract({name: headers[name] for name in W3C.fields if name in headers}, Context())
        arrived = arrival(headers.get("x-request-start", ""), began)
        proxy = None
        if arrived is not None:
            proxy = self._tracer.start_span("proxy", parent, start_time=arrived)
            parent = set_span_in_context(proxy, parent)
        span = self._tracer.start_span(scope["method"], parent, SpanKind.SERVER, start_time=began)
        if not (span.is_recording() or self._access_log):
            await self.app(scope, receive, send)
            return
        call = Call(scope, span)
        token, attached = _CALL.set(call), context.attach(set_span_in_context(span, parent))
        try:
            await self.app(scope, _watched_receive(call, receive), _watched_send(call, send))
        except asyncio.CancelledError:
            call.left = not call.complete
            raise
        except Exception:
            call.error, call.fault = call.error or InternalError.code, True
            raise
        finally:
            ended = time.time_ns()
            _end(call, ended)
            if proxy is not None:
                proxy.end(ended)
            if self._access_log:
                _log(call, ended - began)
            context.detach(attached)
            _CALL.reset(token)


def arrival(header: str, now: int) -> int | None:
    """The instant of an X-Request-Start header in ns since 1970. None without a plausible one in the last minute."""
    stated = _ARRIVED.fullmatch(header)
    if stated is None:
        return None
    instant = int((stated[1] + (stated[2] or "")).ljust(19, "0"))
    return instant if now - _OLDEST_NS <= instant <= now else None


def _end(call: Call, ended: int) -> None:
    """End the span. Neither a client that left nor a refused request is an error of the server."""
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
    fields: dict[str, object] = {
        "method": call.method,
        "route": call.route,
        "status": call.status,
        "error": _error(call),
        "duration_ms": round(took_ns / 1e6, 3),
    }
    if call.assignment is not None:
        fields |= {"experiment": call.assignment.experiment, "variant": call.assignment.variant}
    log.info("%s %s %s", call.method, call.route or "-", call.status or "-", extra={"fields": fields})


def _watched_receive(call: Call, receive: Receive) -> Receive:
    async def watched() -> Message:
        message = await receive()
        if message["type"] == "http.disconnect" and not call.complete:
            call.left = True
        return message

    return watched


def _watched_send(call: Call, send: Send) -> Send:
    async def watched(message: Message) -> None:
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

    return watched


class TracedEngine:
    """An engine with spans for every generation of a sampled call. `capture` puts prompts and answers into them."""

    def __init__(self, engine: Engine, tracer: Tracer, capture: bool) -> None:
        self._engine = engine
        self._tracer = tracer
        self._capture = capture

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        if not get_current_span().is_recording():
            return self._engine.generate(request)
        return traced(self._engine, request, self._tracer, self._capture)

    async def query(self, model: str, query: Query[A], deadline: float) -> A:
        return await self._engine.query(model, query, deadline)

    def health(self, model: str) -> ModelStatus:
        return self._engine.health(model)

    def load(self, model: str) -> EngineLoad:
        return self._engine.load(model)


class TracedTelemetry:
    """A telemetry that also notes errors in the span and the log line of the current call."""

    def __init__(self, telemetry: ServiceTelemetry) -> None:
        self._telemetry = telemetry

    def refused(self, error: ServeAppError, model: str | None) -> None:
        call = _CALL.get()
        if call is not None:
            call.error, call.fault = error.code, error.status >= 500
        self._telemetry.refused(error, model)

    def auth_refused(self, reason: str) -> None:
        self._telemetry.auth_refused(reason)

    def call_began(self) -> None:
        self._telemetry.call_began()

    def call_ended(self, call: HttpCall) -> None:
        self._telemetry.call_ended(call)

    def responses_stored(self, count: int, size: int, removed: int) -> None:
        self._telemetry.responses_stored(count, size, removed)

    async def exposition(self) -> bytes:
        return await self._telemetry.exposition()
