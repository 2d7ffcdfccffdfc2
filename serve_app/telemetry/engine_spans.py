"""Records the spans admission, prefill and decode of a request in the model's process, below its generation span.

The stream of a traced request keeps the instants; its spans are created when the request has ended. A request that is
not traced has a plain TokenStream.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from opentelemetry.context import Context
from opentelemetry.trace import Link, SpanContext, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from serve_app.core.events import Chunk
from serve_app.core.requests import GenerationRequest
from serve_app.engines.stream import TokenStream
from serve_app.errors import ServeAppError

_W3C = TraceContextTextMapPropagator()

# Another thread can run between two readings of a clock, for 5 ms where it holds the interpreter's lock.
_CLOCK_GAP_S = 100e-6
_CLOCK_READINGS = 5

Admit = Callable[[Sequence[TokenStream]], list[ServeAppError | None]]


class TracedAdmitter:
    """Opens the streams of requests, and admits them with a span for each batch that has a traced request."""

    def __init__(self, tracer: Tracer, admit: Admit) -> None:
        self._tracer = tracer
        self._admit = admit

    def open(self, request: GenerationRequest) -> TokenStream:
        """The stream of a request that has just reached this process. Called on the event loop."""
        if not request.traceparent:
            return TokenStream(request)
        return TracedStream(request, self._tracer)

    def admit(self, streams: Sequence[TokenStream]) -> list[ServeAppError | None]:
        """Admit streams: see ReplicaEngine.admit. Called on the admission thread.

        The span of a batch is a trace of its own. It has a link to the admission span of each traced request, and that
        span has a link to the batch.
        """
        traced = [stream for stream in streams if isinstance(stream, TracedStream)]
        if not traced:
            return self._admit(streams)
        links = [Link(stream.admission) for stream in traced]
        size = {"serve_app.batch.size": len(streams)}
        span = self._tracer.start_span("admit batch", Context(), attributes=size, links=links)
        outcomes = self._admit(streams)
        instant = time.monotonic()
        span.end()
        for stream, outcome in zip(streams, outcomes, strict=True):
            if isinstance(stream, TracedStream):
                stream.admitted(instant, span.get_span_context(), outcome)
        return outcomes


class TracedStream(TokenStream):
    """A stream that keeps the instants of its request. `admission` identifies the request's admission span."""

    def __init__(self, request: GenerationRequest, tracer: Tracer) -> None:
        super().__init__(request)
        self._opened, self._opened_ns = read_clocks()
        self._tracer = tracer
        self._parent = _W3C.extract({"traceparent": request.traceparent}, Context())
        self._admission = tracer.start_span("admission", self._parent, start_time=self._opened_ns)
        self.admission: SpanContext = self._admission.get_span_context()
        self._has_open_spans = True
        self._admitted_at: float | None = None
        self._first_at: float | None = None
        self._last_at: float | None = None
        self._tokens_sent = 0
        self._finished = False
        self._failure = ""
        self._failed_at: float | None = None

    def admitted(self, instant: float, batch: SpanContext, outcome: ServeAppError | None) -> None:
        """The engine has admitted or refused the request. Called on the admission thread."""
        self._admitted_at = instant
        if self._has_open_spans:  # otherwise the client has disconnected meanwhile
            self._admission.add_link(batch)
        if outcome is not None:
            self._failure, self._failed_at = outcome.code, instant

    def take(self) -> Chunk | ServeAppError | None:
        item = super().take()
        if isinstance(item, ServeAppError):
            self._failure, self._failed_at = item.code, time.monotonic()
        if not isinstance(item, Chunk):
            return item
        first = self._first_at is None
        self._record(item)
        return replace(item, began_ns=self._ns(self.arrived + item.queue_s)) if first else item

    def close(self) -> None:
        """Close the stream and create the spans. Further calls do nothing."""
        super().close()
        if self._has_open_spans:
            self._has_open_spans = False
            # The ingress ends its span when it has the error, which can be before this stream is closed.
            self._create_spans(time.monotonic() if self._failed_at is None else self._failed_at)

    def _record(self, chunk: Chunk) -> None:
        elapsed = [event.elapsed_s for event in chunk.events] or [time.monotonic() - self.arrived]
        self._first_at = self.arrived + elapsed[0] if self._first_at is None else self._first_at
        self._last_at = self.arrived + elapsed[-1]
        self._tokens_sent += len(chunk.events)
        self._finished = chunk.finished

    def _create_spans(self, ended: float) -> None:
        """Create a span for each phase that began. The last one ends at `ended` if the response is incomplete."""
        began = self.started
        # The engine can start the prefill before the admission thread has read its clock.
        end = min(instant for instant in (self._admitted_at, began, ended) if instant is not None)
        self._end_admission(end, last=began is None)
        if began is None:
            return
        prompt = {"serve_app.prompt_tokens": self.prompt_tokens, "serve_app.cached_tokens": self.cached_tokens}
        first = ended if self._first_at is None else self._first_at
        self._phase("prefill", began, first, prompt, last=self._first_at is None)
        if self._first_at is not None and self._tokens_sent and self._last_at is not None:
            end = self._last_at if self._finished else ended
            self._phase("decode", first, end, {"serve_app.generated_tokens": self._tokens_sent}, last=True)

    def _end_admission(self, end: float, last: bool) -> None:
        if last and self._failure:
            self._admission.set_attribute("error.type", self._failure)
            self._admission.set_status(Status(StatusCode.ERROR))
        self._admission.end(self._ns(end))

    def _phase(self, name: str, start: float, end: float, attributes: Mapping[str, AttributeValue], last: bool) -> None:
        span = self._tracer.start_span(name, self._parent, attributes=attributes, start_time=self._ns(start))
        if last and self._failure:
            span.set_attribute("error.type", self._failure)
            span.set_status(Status(StatusCode.ERROR))
        span.end(self._ns(end))

    def _ns(self, instant: float) -> int:
        """An instant of the monotonic clock, in ns since 1970."""
        return self._opened_ns + int((instant - self._opened) * 1e9)


def read_clocks() -> tuple[float, int]:
    """One instant on the monotonic clock, in s, and on the wall clock, in ns since 1970."""
    readings = []
    for _ in range(_CLOCK_READINGS):
        before, wall, after = time.monotonic(), time.time_ns(), time.monotonic()
        readings.append((after - before, before, wall))
        if after - before <= _CLOCK_GAP_S:
            break
    _, instant, wall = min(readings)
    return instant, wall
