"""The span and the log line of a call, and calls that are not sampled."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased
from opentelemetry.trace import NoOpTracer, StatusCode, Tracer, format_span_id
from starlette.applications import Starlette
from starlette.middleware import Middleware

from serve_app.api.app import create_app
from serve_app.errors import QueueFull
from serve_app.telemetry.generation_spans import MAX_CONTENT
from serve_app.telemetry.http_spans import Observe, TracedEngine, TracedTelemetry, arrival

from .scripted import Connection, ScriptedEngine, ScriptedTelemetry, app_config, chunk

NOW = 1_700_000_000_123_456_000
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-"


class TracedApp:
    """The application over a scripted engine, with tracing, and the spans of its calls."""

    def __init__(self, capture: bool = False, tracer: Tracer | None = None, access_log: bool = True) -> None:
        self.engine, self.telemetry = ScriptedEngine(), ScriptedTelemetry()
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(ParentBased(ALWAYS_ON), shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        tracer = tracer or provider.get_tracer("test")
        config = app_config(warm_wait_s=30, heartbeat_s=0.02)
        layer = Middleware(Observe, tracer=tracer, access_log=access_log)
        traced = TracedEngine(self.engine, tracer, capture)
        self.app: Starlette = create_app(traced, TracedTelemetry(self.telemetry), config, around=[layer])

    async def call(self, path: str, body: Any = None, method: str = "POST", **headers: str) -> httpx.Response:
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, json=body, headers=headers)

    def spans(self, name: str) -> Sequence[ReadableSpan]:
        return [span for span in self._exporter.get_finished_spans() if span.name == name]

    def all_spans(self) -> Sequence[ReadableSpan]:
        return self._exporter.get_finished_spans()

    def span(self, name: str) -> ReadableSpan:
        (span,) = self.spans(name)
        return span


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


async def test_a_call_is_reported_with_the_pattern_of_its_route() -> None:
    traced = TracedApp()
    answer = await traced.call("/v1/models/org/large?token=secret", method="GET", **{"x-request-id": "mine"})
    span = traced.span("GET /v1/models/{id:path}")
    assert attributes(span) == {
        "http.request.method": "GET",
        "http.route": "/v1/models/{id:path}",
        "http.response.status_code": 200,
        "url.path": "/v1/models/org/large",
        "url.scheme": "http",
        "network.protocol.version": "1.1",
        "serve_app.request_id": "mine",
    }
    context = span.get_span_context()
    assert context is not None
    assert answer.headers["traceparent"].split("-")[2] == format_span_id(context.span_id)
    assert span.status.status_code is StatusCode.UNSET


async def test_an_unknown_method_is_other() -> None:
    traced = TracedApp()
    assert (await traced.call("/generate", method="BREW")).status_code == 405
    assert attributes(traced.span("_OTHER /generate"))["http.request.method"] == "_OTHER"


async def test_a_generation_is_a_child_of_the_call_and_the_parent_of_the_request() -> None:
    traced = TracedApp()
    await traced.call("/generate", {"prompt": "one two", "max_tokens": 5}, traceparent=PARENT + "01")
    call, generation, queue = (traced.span(n) for n in ("POST /generate", "text_completion small", "queue"))
    assert call.parent is not None
    assert format_span_id(call.parent.span_id) == "b7ad6b7169203331"
    assert generation.parent == call.get_span_context()
    assert queue.parent == generation.get_span_context()
    (request,) = traced.engine.requests
    context = generation.get_span_context()
    assert context is not None
    assert request.traceparent == f"{PARENT[:36]}{format_span_id(context.span_id)}-01"


@pytest.mark.parametrize("replayed", [True, False])
async def test_the_span_of_a_replayed_answer_says_so(replayed: bool) -> None:
    traced = TracedApp()
    traced.engine.plays(replace(chunk(["a"]), replayed=replayed))
    await traced.call("/generate", {"prompt": "hi"})
    assert attributes(traced.span("text_completion small")).get("serve_app.replayed", False) is replayed


async def test_a_call_that_is_not_sampled_is_not_traced() -> None:
    traced = TracedApp()
    answer = await traced.call("/generate", {"prompt": "hi"}, traceparent=PARENT + "00")
    assert "traceparent" not in answer.headers
    assert traced.engine.requests[0].traceparent == ""
    assert traced._exporter.get_finished_spans() == ()


async def test_an_error_event_sets_the_error_of_the_call() -> None:
    traced = TracedApp()
    traced.engine.plays(chunk(["a"], None), RuntimeError("a secret"))
    assert '"code":"internal_error"' in (await traced.call("/generate_stream", {"prompt": "hi"})).text
    for name in ("POST /generate_stream", "text_completion small"):
        span = traced.span(name)
        assert attributes(span)["error.type"] == "internal_error"
        assert span.status.status_code is StatusCode.ERROR
        assert span.status.description is None
    assert attributes(traced.span("text_completion small"))["gen_ai.usage.output_tokens"] == 1


async def test_a_refused_request_is_no_error_of_the_server() -> None:
    traced = TracedApp()
    traced.engine.plays(QueueFull("later", retry_after_s=1))
    assert (await traced.call("/generate", {"prompt": "hi"})).status_code == 429
    span = traced.span("POST /generate")
    assert (attributes(span)["error.type"], span.status.status_code) == ("queue_full", StatusCode.UNSET)
    assert traced.span("text_completion small").status.status_code is StatusCode.ERROR


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
async def test_a_disconnect_is_cancelled(path: str) -> None:
    traced = TracedApp()
    traced.engine.plays(chunk(["a"], None), None)
    connection = Connection(path, {"prompt": "hi"})
    call = asyncio.create_task(traced.app(connection.scope, connection.receive, connection.send))
    await asyncio.wait_for(traced.engine.reached.wait(), 5)
    await asyncio.sleep(0.01)
    connection.disconnect.set()
    await asyncio.wait_for(call, 5)
    for name in (f"POST {path}", "text_completion small"):
        span = traced.span(name)
        assert (attributes(span)["error.type"], span.status.status_code) == ("cancelled", StatusCode.UNSET)
    assert attributes(traced.span(f"POST {path}")).get("http.response.status_code") == connection.status


async def test_a_failed_write_is_cancelled() -> None:
    traced = TracedApp()
    connection = Connection("/generate_stream", {"prompt": "one two"}, fail_at=1)
    await asyncio.wait_for(traced.app(connection.scope, connection.receive, connection.send), 5)
    assert attributes(traced.span("POST /generate_stream"))["error.type"] == "cancelled"


async def test_a_cancelled_call_is_cancelled() -> None:
    traced = TracedApp()
    traced.engine.plays(None)
    connection = Connection("/generate", {"prompt": "hi"})
    call = asyncio.create_task(traced.app(connection.scope, connection.receive, connection.send))
    await asyncio.wait_for(traced.engine.reached.wait(), 5)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert attributes(traced.span("POST /generate"))["error.type"] == "cancelled"


async def test_the_span_of_the_proxy_is_the_parent_of_the_call() -> None:
    traced = TracedApp()
    arrived = time.time_ns() // 1000 - 5000
    await traced.call("/health", method="GET", **{"x-request-start": f"t={arrived}"})
    call, proxy = traced.span("GET /health"), traced.span("proxy")
    assert call.parent == proxy.get_span_context()
    assert (proxy.parent, proxy.start_time, proxy.end_time) == (None, arrived * 1000, call.end_time)


@pytest.mark.parametrize(
    ("header", "instant"),
    [
        ("t=1700000000123456", NOW),
        ("t=1700000000123", 1_700_000_000_123_000_000),
        ("t=1700000000.123", 1_700_000_000_123_000_000),
        ("t=1700000000", 1_700_000_000_000_000_000),
        ("t=1699999999", 1_699_999_999_000_000_000),
        ("", None),
        ("1700000000123456", None),
        ("t=1700000000123457", None),  # in the future
        ("t=1699999940", None),  # older than a minute
        ("t=17000000001234567", None),
        ("t=-700000000", None),
        ("t=1700000000123456, t=1", None),
        ("t=" + "9" * 5000, None),
    ],
)
def test_an_implausible_request_start_is_ignored(header: str, instant: int | None) -> None:
    assert arrival(header, NOW) == instant


async def test_prompts_and_answers_are_captured_only_if_configured() -> None:
    plain, capturing = TracedApp(), TracedApp(capture=True)
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi there"}]
    for traced in (plain, capturing):
        await traced.call("/v1/chat/completions", {"messages": messages})
    assert [name for name in attributes(plain.span("chat small")) if name.endswith("messages")] == []
    span = attributes(capturing.span("chat small"))
    assert json.loads(span["gen_ai.input.messages"]) == [
        {"role": "system", "parts": [{"type": "text", "content": "be kind"}]},
        {"role": "user", "parts": [{"type": "text", "content": "hi there"}]},
    ]
    (answer,) = json.loads(span["gen_ai.output.messages"])
    assert answer == {
        "role": "assistant",
        "parts": [{"type": "text", "content": "some words"}],
        "finish_reason": "stop",
    }


async def test_captured_content_is_bounded_to_the_newest_messages() -> None:
    traced = TracedApp(capture=True)
    traced.engine.plays(chunk(["a" * MAX_CONTENT, "b"]))
    messages = [{"role": "user", "content": letter * (MAX_CONTENT - 10)} for letter in "xyz"]
    await traced.call("/v1/chat/completions", {"messages": messages})
    span = attributes(traced.span("chat small"))
    captured = json.loads(span["gen_ai.input.messages"])
    texts = [message["parts"][0]["content"] for message in captured]
    assert texts == ["y" * 10, "z" * (MAX_CONTENT - 10)]
    (answer,) = json.loads(span["gen_ai.output.messages"])
    assert answer["parts"][0]["content"] == "a" * MAX_CONTENT


async def test_captured_tool_calls_have_the_conventions_form() -> None:
    traced = TracedApp(capture=True)
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    messages = [
        {"role": "user", "content": "how is it?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "tool_call_id": "c1"},
    ]
    assert (await traced.call("/v1/chat/completions", {"messages": messages})).status_code == 200
    _, call_message, result = json.loads(attributes(traced.span("chat small"))["gen_ai.input.messages"])
    assert call_message == {
        "role": "assistant",
        "parts": [{"type": "tool_call", "id": "c1", "name": "weather", "arguments": '{"city": "Paris"}'}],
    }
    assert result == {
        "role": "tool",
        "parts": [{"type": "tool_call_response", "id": "c1", "response": "sunny"}],
    }


async def test_a_call_has_a_log_line_without_tracing(
    caplog: pytest.LogCaptureFixture, telemetry: ScriptedTelemetry
) -> None:
    traced = TracedApp(tracer=NoOpTracer())
    with caplog.at_level(logging.INFO, "serve_app.telemetry.http_spans"):
        answer = await traced.call("/generate", {"prompt": "hi", "max_tokens": -1})
    assert "traceparent" not in answer.headers
    (record,) = (record for record in caplog.records if record.name == "serve_app.telemetry.http_spans")
    assert record.getMessage() == "POST /generate 422"
    line: dict[str, Any] = record.__dict__["fields"]
    assert line.pop("duration_ms") > 0
    assert line == {"method": "POST", "route": "/generate", "status": 422, "error": "invalid_request"}


async def test_keys_are_in_no_span_and_no_log_line(caplog: pytest.LogCaptureFixture) -> None:
    traced = TracedApp(capture=True)
    secret = "sk-serve-0123456789ab-CANARY"
    with caplog.at_level(logging.DEBUG):
        for header in ("authorization", "x-api-key"):
            await traced.call("/generate", {"prompt": "hi"}, **{header: f"Bearer {secret}"})
            await traced.call("/generate", {"prompt": 3}, **{header: secret})
    spans = traced.spans("POST /generate")
    assert len(spans) == 4
    shown = caplog.text + "".join(span.to_json() for span in traced.all_spans())
    assert "CANARY" not in shown
