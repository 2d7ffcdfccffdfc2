"""What a model does for one request, as spans under the generation's: admission, prefill, decode.

Instants are kept while it happens, by streams of requests that are traced only; the spans are made when it is over.
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
from serve_app.engines.native.stream import TokenStream
from serve_app.errors import ServeAppError

_W3C = TraceContextTextMapPropagator()

Admit = Callable[[Sequence[TokenStream]], list[ServeAppError | None]]


class TracedAdmitter:
    """Streams that tell of themselves in spans, and the admission that tells which of them came together."""

    def __init__(self, tracer: Tracer, admit: Admit) -> None:
        self._tracer = tracer
        self._admit = admit

    def open(self, request: GenerationRequest) -> TokenStream:
        """A stream for a request that has just come."""
        if not request.traceparent:
            return TokenStream(request)
        return TracedStream(request, self._tracer)

    def admit(self, streams: Sequence[TokenStream]) -> list[ServeAppError | None]:
        """See Engine.admit. A batch with traced members is a trace of its own, linked to their admissions and back."""
        members = [stream for stream in streams if isinstance(stream, TracedStream)]
        if not members:
            return self._admit(streams)
        links = [Link(member.admission) for member in members]
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
    """A stream that keeps the instants of its request. `admission` is the span of its way in."""

    def __init__(self, request: GenerationRequest, tracer: Tracer) -> None:
        super().__init__(request)
        self._wall = time.time_ns()
        self._tracer = tracer
        self._within = _W3C.extract({"traceparent": request.traceparent}, Context())
        self._span = tracer.start_span("admission", self._within, start_time=self._wall)
        self.admission: SpanContext = self._span.get_span_context()
        self._open = True
        self._admitted: float | None = None
        self._first: float | None = None
        self._latest: float | None = None
        self._given = 0
        self._finished = False
        self._failure = ""

    def admitted(self, instant: float, batch: SpanContext, outcome: ServeAppError | None) -> None:
        """On a thread of its own: it is through the turnstile."""
        self._admitted = instant
        if self._open:  # else its consumer has left meanwhile
            self._span.add_link(batch)
        if outcome is not None:
            self._failure = outcome.code

    def take(self) -> Chunk | ServeAppError | None:
        item = super().take()
        if isinstance(item, ServeAppError):
            self._failure = item.code
        if not isinstance(item, Chunk):
            return item
        first = self._first is None
        self._keep(item)
        return replace(item, began_ns=self._ns(self.arrived + item.queue_s)) if first else item

    def close(self) -> None:
        """Its consumer is done with it: the spans are made."""
        super().close()
        if self._open:
            self._open = False
            self._tell(time.monotonic())

    def _keep(self, chunk: Chunk) -> None:
        elapsed = [event.elapsed_s for event in chunk.events] or [time.monotonic() - self.arrived]
        self._first = self.arrived + elapsed[0] if self._first is None else self._first
        self._latest = self.arrived + elapsed[-1]
        self._given += len(chunk.events)
        self._finished = chunk.finished

    def _tell(self, now: float) -> None:
        """Each phase that was reached; the last of them ends, if the answer did not, in what ended it."""
        began = self.started
        # The model may begin before the turnstile's thread has looked at its clock.
        through = min(instant for instant in (self._admitted, began, now) if instant is not None)
        self._end_admission(through, last=began is None)
        if began is None:
            return
        prompt = {"serve_app.prompt_tokens": self.prompt_tokens, "serve_app.cached_tokens": self.cached_tokens}
        first = now if self._first is None else self._first
        self._phase("prefill", began, first, prompt, last=self._first is None)
        if self._first is not None and self._given and self._latest is not None:
            end = self._latest if self._finished else now
            self._phase("decode", first, end, {"serve_app.generated_tokens": self._given}, last=True)

    def _end_admission(self, through: float, last: bool) -> None:
        if last and self._failure:
            self._span.set_attribute("error.type", self._failure)
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end(self._ns(through))

    def _phase(self, name: str, start: float, end: float, attributes: Mapping[str, AttributeValue], last: bool) -> None:
        span = self._tracer.start_span(name, self._within, attributes=attributes, start_time=self._ns(start))
        if last and self._failure:
            span.set_attribute("error.type", self._failure)
            span.set_status(Status(StatusCode.ERROR))
        span.end(self._ns(end))

    def _ns(self, instant: float) -> int:
        return self._wall + int((instant - self.arrived) * 1e9)
