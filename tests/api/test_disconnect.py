"""Clients that disconnect, do not read, or do not send the whole body."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from starlette.middleware import Middleware

from serve_app.api.app import create_app
from serve_app.api.middleware import OneRequestId
from serve_app.core.events import Chunk
from serve_app.core.requests import GenerationRequest
from serve_app.errors import NotReady

from .scripted import (
    POSTS,
    Connection,
    ScriptedEngine,
    ScriptedTelemetry,
    Step,
    app_config,
    check_error,
    chunk,
    serve,
)

STREAMS = {
    "/generate_stream": POSTS["/generate_stream"],
    "/v1/completions": POSTS["/v1/completions"] | {"stream": True},
    "/v1/chat/completions": POSTS["/v1/chat/completions"] | {"stream": True},
    "/v1/responses": POSTS["/v1/responses"] | {"stream": True},
}
every_post = pytest.mark.parametrize("path", POSTS)
every_stream = pytest.mark.parametrize("path", STREAMS)


def is_cancelled(engine: ScriptedEngine, telemetry: ScriptedTelemetry) -> bool:
    """Whether every generator was closed, and nothing was counted as an error."""
    return engine.closed == [request.id for request in engine.requests] and telemetry.errors == []


@every_post
async def test_a_disconnect_before_the_first_token_closes_the_generator(
    engine: ScriptedEngine, telemetry: ScriptedTelemetry, path: str
) -> None:
    engine.plays(None)
    connection = Connection(path, POSTS[path])
    call = serve(engine, telemetry, connection)
    await engine.reached.wait()
    connection.disconnect.set()
    await call
    assert is_cancelled(engine, telemetry)
    assert connection.sent == []


@every_stream
async def test_a_disconnect_during_a_stream_closes_the_generator(
    engine: ScriptedEngine, telemetry: ScriptedTelemetry, path: str
) -> None:
    engine.plays(chunk(["a"], None), None)
    connection = Connection(path, STREAMS[path])
    call = serve(engine, telemetry, connection)
    await connection.written.wait()
    connection.disconnect.set()
    await call
    assert is_cancelled(engine, telemetry)
    assert engine.completed == 0
    assert all(message.get("more_body", True) for message in connection.sent)


@every_stream
@pytest.mark.parametrize("fail_at", [0, 1, 2])
async def test_a_failed_write_closes_the_generator(
    engine: ScriptedEngine, telemetry: ScriptedTelemetry, path: str, fail_at: int
) -> None:
    engine.plays(chunk(["a"], None), chunk(["b"], None, start=1), None)
    await serve(engine, telemetry, Connection(path, STREAMS[path], fail_at=fail_at))
    assert is_cancelled(engine, telemetry)
    assert engine.running == 0


@every_stream
async def test_a_failed_heartbeat_closes_the_generator(
    engine: ScriptedEngine, telemetry: ScriptedTelemetry, path: str
) -> None:
    engine.plays(None)
    async with asyncio.timeout(5):
        await serve(engine, telemetry, Connection(path, STREAMS[path], fail_at=0), heartbeat_s=0.01)
    assert is_cancelled(engine, telemetry)


async def test_a_failed_write_of_a_whole_answer_is_no_error(
    engine: ScriptedEngine, telemetry: ScriptedTelemetry
) -> None:
    await serve(engine, telemetry, Connection("/generate", POSTS["/generate"], fail_at=0))
    assert is_cancelled(engine, telemetry)
    assert engine.completed == 1


@every_post
async def test_a_disconnect_during_the_upload_makes_no_request(
    engine: ScriptedEngine, telemetry: ScriptedTelemetry, path: str
) -> None:
    connection = Connection(path, None, parts=[])
    connection.disconnect.set()
    await serve(engine, telemetry, connection)
    assert (engine.requests, telemetry.errors, connection.sent) == ([], [], [])


@every_post
async def test_a_cancelled_call_closes_the_generator(
    engine: ScriptedEngine, telemetry: ScriptedTelemetry, path: str
) -> None:
    engine.plays(None)
    call = serve(engine, telemetry, Connection(path, POSTS[path]))
    await engine.reached.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert is_cancelled(engine, telemetry)


class OneMorePart(Connection):
    """Sends an empty part after the last part of the body."""

    was_sent = False

    async def receive(self) -> Any:
        if self.parts == [] and not self.was_sent:
            self.was_sent = True
            return {"type": "http.request", "body": b"", "more_body": False}
        return await super().receive()


@every_post
async def test_an_empty_part_after_the_body_is_no_disconnect(
    engine: ScriptedEngine, telemetry: ScriptedTelemetry, path: str
) -> None:
    engine.plays(0.001, chunk(["a"]))
    connection = OneMorePart(path, POSTS[path])
    await serve(engine, telemetry, connection)
    assert connection.was_sent
    assert connection.status == 200
    assert engine.completed == 1


async def test_an_answer_has_one_request_id(engine: ScriptedEngine, telemetry: ScriptedTelemetry) -> None:
    """A server that adds its own id passes it to the application in the request."""
    app = create_app(engine, telemetry, app_config(), around=[Middleware(OneRequestId)])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        assert "x-request-id" not in (await client.get("/health", headers={"x-request-id": "mine"})).headers
        assert (await client.get("/health")).headers["x-request-id"]
        assert (await client.get("/health", headers={"x-request-id": "no such"})).headers["x-request-id"] != "no such"


class StalledUpload(Connection):
    """Sends the beginning of a body, and then nothing."""

    began = False

    async def receive(self) -> dict[str, Any]:
        if self.began:
            await asyncio.Event().wait()
        self.began = True
        return {"type": "http.request", "body": b"{", "more_body": True}


class SlowUpload(Connection):
    """Sends one byte of a body every 10 ms."""

    async def receive(self) -> dict[str, Any]:
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b" ", "more_body": True}


@pytest.mark.parametrize(
    ("kind", "limits"),
    [(StalledUpload, {"upload_timeout_s": 0.05}), (SlowUpload, {"request_timeout_s": 0.05})],
    ids=["stalled", "slow"],
)
@pytest.mark.parametrize("path", [*POSTS, "/", "/v1/embeddings", "/tokenize"])
async def test_an_upload_that_takes_too_long_is_a_408(
    engine: ScriptedEngine, telemetry: ScriptedTelemetry, path: str, kind: type[Connection], limits: dict[str, float]
) -> None:
    connection = kind(path, None)
    async with asyncio.timeout(5):
        await serve(engine, telemetry, connection, **limits)
    assert connection.status == 408
    headers = {name: value.decode() for name, value in connection.sent[0]["headers"]}
    assert headers[b"connection"] == "close"
    body = json.loads(connection.text)
    if path == "/":
        assert body["error_type"] == "validation"
    else:
        assert check_error(path, body, headers[b"x-request-id"])["code"] == "request_timeout"
    assert [(error.code, model) for error, model in telemetry.errors] == [("request_timeout", None)]
    assert [call.status for call in telemetry.calls] == [408]
    assert engine.requests == []


async def test_an_upload_that_continues_is_no_stall(engine: ScriptedEngine, telemetry: ScriptedTelemetry) -> None:
    class Continuing(Connection):
        async def receive(self) -> Any:
            await asyncio.sleep(0.03)
            return await super().receive()

    parts = [bytes([byte]) for byte in b'{"prompt": "hi"}']
    connection = Continuing("/generate", None, parts=parts)
    await serve(engine, telemetry, connection, upload_timeout_s=0.2)
    assert connection.status == 200


@dataclass
class NotReading(Connection):
    """The client reads some parts of the body, and no more: the next write blocks, because the buffers are full."""

    reads: int = 0

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.body":
            self.reads -= 1
            if self.reads < 0:
                await asyncio.Event().wait()
        await super().send(message)


# The number of parts that the client reads, and the script.
STALLS: dict[str, tuple[int, list[Step]]] = {
    "first token": (0, [chunk(["a"], None), None]),
    "second token": (1, [chunk(["a"], None), chunk(["b"], None, start=1), None]),
    "heartbeat": (0, [None]),
    "last token": (0, [chunk(["a"])]),
    "end": (1, [chunk(["a"])]),
    "error": (1, [chunk(["a"], None), NotReady("The replica was lost.")]),
}


@every_stream
@pytest.mark.parametrize(("reads", "steps"), STALLS.values(), ids=STALLS)
async def test_a_client_that_does_not_read_is_disconnected(
    engine: ScriptedEngine, telemetry: ScriptedTelemetry, path: str, reads: int, steps: list[Step]
) -> None:
    engine.plays(*steps)
    connection = NotReading(path, STREAMS[path], reads=reads)
    async with asyncio.timeout(5):
        await serve(engine, telemetry, connection, stalled_client_s=0.05, heartbeat_s=0.01)
    assert engine.running == 0
    assert engine.closed == [request.id for request in engine.requests]
    assert telemetry.open_calls == 0
    assert all(message.get("more_body", True) for message in connection.sent), "the response has no end"


class ContextEngine(ScriptedEngine):
    """Sets a context variable while a generator runs, as tracing does."""

    variable: ContextVar[str] = ContextVar("variable")

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        token = self.variable.set(request.id)
        try:
            yield chunk(["a"], None)
        finally:
            self.variable.reset(token)  # fails in any other context
            self.closed.append(request.id)


@every_stream
async def test_a_generator_is_closed_in_the_context_of_its_steps(telemetry: ScriptedTelemetry, path: str) -> None:
    engine = ContextEngine()
    await serve(engine, telemetry, Connection(path, STREAMS[path], fail_at=1))
    assert len(engine.closed) == 1
