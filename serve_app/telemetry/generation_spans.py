"""Records the span of one generation and its `queue` span, by OpenTelemetry's conventions for generative AI."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from opentelemetry.trace import Span, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from serve_app.core.engine import Engine
from serve_app.core.events import CANCELLED, EMBEDDED, Chunk
from serve_app.core.requests import ChatMessage, ChatPrompt, GenerationRequest, TextPrompt
from serve_app.errors import InternalError, ServeAppError
from serve_app.telemetry.span_clock import SpanClock

# The maximum number of characters of a prompt, and of an answer, in a span.
MAX_CONTENT = 16_384

_W3C = TraceContextTextMapPropagator()


async def traced(
    engine: Engine, request: GenerationRequest, tracer: Tracer, capture: bool
) -> AsyncGenerator[Chunk, None]:
    """The engine's chunks, with spans below the current one."""
    spans = _Generation(tracer, request, capture)
    try:
        async with aclosing(engine.generate(spans.request)) as chunks:
            async for chunk in chunks:
                spans.add(chunk)
                yield chunk
    except ServeAppError as error:
        spans.fail(error.code)
        raise
    except Exception:
        spans.fail(InternalError.code)
        raise
    finally:
        spans.end()


class _Generation:
    """The spans of one request until `end`. `request` is the request with the span as its `traceparent`."""

    def __init__(self, tracer: Tracer, request: GenerationRequest, capture: bool) -> None:
        self._clock = SpanClock()
        self._began = self._clock.began
        operation = request.operation
        self._span = tracer.start_span(
            f"{operation} {request.model}", attributes=_attributes(request, operation), start_time=self._began
        )
        within = set_span_in_context(self._span)
        self._queue: Span | None = tracer.start_span("queue", within, start_time=self._began)
        carrier: dict[str, str] = {}
        _W3C.inject(carrier, within)
        self.request = replace(request, traceparent=carrier["traceparent"])
        self._capture = capture
        self._text: list[str] = []
        self._content_left = MAX_CONTENT
        self._tokens = 0
        self._last: Chunk | None = None
        self._outcome = CANCELLED

    def add(self, chunk: Chunk) -> None:
        if self._queue is not None:
            now = self._clock.now()
            self._queue.end(min(max(self._began, chunk.began_ns), now))  # the clock of another machine can differ
            self._queue = None
            self._span.set_attribute("gen_ai.response.time_to_first_chunk", (now - self._began) / 1e9)
        self._last = chunk
        self._tokens += len(chunk.events)
        if self._capture and self._content_left > 0:
            text = "".join(event.text for event in chunk.events)[: self._content_left]
            self._content_left -= len(text)
            self._text.append(text)
        if chunk.finished:
            self._outcome = chunk.outcome

    def fail(self, code: str) -> None:
        self._outcome = code
        self._span.set_status(Status(StatusCode.ERROR))

    def end(self) -> None:
        """End the spans. It does not await anything, so that they end before the span of the call."""
        now, span, last = self._clock.now(), self._span, self._last
        if self._queue is not None:
            self._queue.end(now)
        finished = last is not None and last.finished
        span.set_attribute("serve_app.outcome", self._outcome)
        if not finished:
            span.set_attribute("error.type", self._outcome)
        elif self._outcome != EMBEDDED:
            span.set_attribute("gen_ai.response.finish_reasons", (self._outcome,))
        if last is not None:
            span.set_attribute("gen_ai.usage.input_tokens", last.prompt_tokens)
            span.set_attribute("gen_ai.usage.output_tokens", self._tokens)
            span.set_attribute("gen_ai.usage.cache_read.input_tokens", last.cached_tokens)
            if last.replayed:
                span.set_attribute("serve_app.replayed", True)
        if self._capture:
            self._set_content()
        span.end(now)

    def _set_content(self) -> None:
        messages = _messages(self.request)
        if messages:
            self._span.set_attribute("gen_ai.input.messages", json.dumps(messages, ensure_ascii=False))
        if self._text:
            answer = {**_message("assistant", "".join(self._text)), "finish_reason": self._outcome}
            self._span.set_attribute("gen_ai.output.messages", json.dumps([answer], ensure_ascii=False))


def _attributes(request: GenerationRequest, operation: str) -> dict[str, AttributeValue]:
    found: dict[str, AttributeValue] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "serve_app",
        "gen_ai.request.model": request.model,
        "gen_ai.response.id": request.id,
    }
    if request.assignment is not None:
        found |= {
            "serve_app.experiment": request.assignment.experiment,
            "serve_app.variant": request.assignment.variant,
        }
    if request.embed:
        return found
    params = request.params
    found |= {
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k,
        "gen_ai.request.frequency_penalty": params.frequency_penalty,
        "gen_ai.request.presence_penalty": params.presence_penalty,
    }
    if params.max_tokens is not None:
        found["gen_ai.request.max_tokens"] = params.max_tokens
    if params.seed is not None:
        found["gen_ai.request.seed"] = params.seed
    if params.stop:
        found["gen_ai.request.stop_sequences"] = params.stop
    return found


def _messages(request: GenerationRequest) -> list[dict[str, object]]:
    """The prompt in the conventions' form: of a long one the newest messages, of token ids nothing."""
    if isinstance(request.prompt, TextPrompt):
        return [_message("user", request.prompt.text[:MAX_CONTENT])]
    left, found = MAX_CONTENT, list[dict[str, object]]()
    for message in reversed(request.prompt.messages if isinstance(request.prompt, ChatPrompt) else ()):
        if left <= 0:
            break
        found.append({"role": message.role, "parts": _parts(message, left)})
        left -= len(message.content) + sum(len(call.arguments) for call in message.tool_calls)
    return found[::-1]


def _parts(message: ChatMessage, limit: int) -> list[dict[str, object]]:
    """The parts of a message, with at most `limit` characters."""
    content = message.content[:limit]
    if message.role == "tool":
        return [{"type": "tool_call_response", "id": message.tool_call_id, "response": content}]
    parts: list[dict[str, object]] = [{"type": "text", "content": content}] if content else []
    left = limit - len(content)
    for call in message.tool_calls:
        parts.append({"type": "tool_call", "id": call.id, "name": call.name, "arguments": call.arguments[:left]})
        left = max(0, left - len(call.arguments))
    return parts


def _message(role: str, text: str) -> dict[str, object]:
    return {"role": role, "parts": [{"type": "text", "content": text}]}
