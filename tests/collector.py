"""An OpenTelemetry collector for tests: receives traces by OTLP over HTTP and keeps them."""

from __future__ import annotations

import gzip
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2


@dataclass(frozen=True)
class Span:
    """A received span. Ids are hexadecimal, times are ns since 1970; `error` is whether the status is ERROR."""

    trace_id: str
    id: str
    parent: str
    name: str
    kind: str
    start: int
    end: int
    attributes: dict[str, Any]
    links: frozenset[tuple[str, str]]
    error: bool
    resource: dict[str, Any]

    @property
    def key(self) -> tuple[str, str]:
        return self.trace_id, self.id


class Collector:
    """Listens on a free port of 127.0.0.1 within its context. `raw` has all exports, `headers` the last ones.

    Without `keep` it only counts the exports.
    """

    def __init__(self, keep: bool = True) -> None:
        self._keep = keep
        self._lock = threading.Lock()
        self._spans: list[Span] = []
        self.exports = 0
        self.raw = bytearray()
        self.headers: dict[str, str] = {}
        self._answers = threading.Event()
        self._answers.set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1/traces"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._answers.set()
        self._server.shutdown()
        self._server.server_close()

    def stall(self) -> None:
        """Accept exports from now on without answering them."""
        self._answers.clear()

    def resume(self) -> None:
        """Answer exports again. Those that wait are not stored."""
        self._answers.set()

    def spans(self) -> list[Span]:
        with self._lock:
            return list(self._spans)

    def traces(self) -> dict[str, list[Span]]:
        found: dict[str, list[Span]] = defaultdict(list)
        for span in self.spans():
            found[span.trace_id].append(span)
        return found

    def settle(self, quiet_s: float = 2, limit_s: float = 30) -> list[Span]:
        """All spans, once no span has arrived for `quiet_s` seconds or after `limit_s` seconds."""
        end, seen, since = time.monotonic() + limit_s, -1, time.monotonic()
        while time.monotonic() < end:
            if len(self.spans()) != seen:
                seen, since = len(self.spans()), time.monotonic()
            elif time.monotonic() - since >= quiet_s:
                break
            time.sleep(0.1)
        return self.spans()

    def receive(self, path: str, headers: dict[str, str], body: bytes) -> bytes:
        assert path == "/v1/traces", path
        plain = gzip.decompress(body) if headers.get("content-encoding") == "gzip" else body
        request = ExportTraceServiceRequest.FromString(plain)
        found = [
            _span(span, _values(group.resource.attributes))
            for group in request.resource_spans
            for scope in group.scope_spans
            for span in scope.spans
        ]
        with self._lock:
            self.exports += 1
            self.headers = headers
            if self._keep:
                self._spans += found
                self.raw += plain
        response: bytes = ExportTraceServiceResponse().SerializeToString()
        return response

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                if not collector._answers.is_set():
                    collector._answers.wait()
                    return
                headers = {name.lower(): value for name, value in self.headers.items()}
                response = collector.receive(self.path, headers, self.rfile.read(int(headers["content-length"])))
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", str(len(response)))
                self.end_headers()
                self.wfile.write(response)

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler


def _span(span: trace_pb2.Span, resource: dict[str, Any]) -> Span:
    return Span(
        trace_id=span.trace_id.hex(),
        id=span.span_id.hex(),
        parent=span.parent_span_id.hex(),
        name=span.name,
        kind=trace_pb2.Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        start=span.start_time_unix_nano,
        end=span.end_time_unix_nano,
        attributes=_values(span.attributes),
        links=frozenset((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
        error=span.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
        resource=resource,
    )


def _values(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs if isinstance(pair, KeyValue)}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(one) for one in value.array_value.values]
    return None if kind is None else getattr(value, kind)
