"""The telemetry gets a report of every HTTP call."""

from __future__ import annotations

import httpx
import pytest

from serve_app.errors import InternalError

from .scripted import POSTS, Connection, ScriptedEngine, ScriptedTelemetry, chunk, serve


@pytest.mark.parametrize(
    ("method", "path", "route", "status"),
    [
        ("GET", "/health", "/health", 200),
        ("HEAD", "/metrics", "/metrics", 200),
        ("GET", "/v1/models/small", "/v1/models/{id:path}", 200),
        ("GET", "/v1/models/made/up", "/v1/models/{id:path}", 404),
        ("GET", "/playground/made-up", "/playground/{file}", 404),
        ("DELETE", "/generate", "/generate", 405),
        ("GET", "/made/up", "other", 404),
        ("BREW", "/made-up", "other", 404),
        ("POST", "/health/", "/health", 405),
        ("GET", "/v1/models//small///", "/v1/models/{id:path}", 200),
    ],
)
async def test_a_call_is_reported_with_the_pattern_of_its_route(
    client: httpx.AsyncClient,
    engine: ScriptedEngine,
    telemetry: ScriptedTelemetry,
    method: str,
    path: str,
    route: str,
    status: int,
) -> None:
    answer = await client.request(method, path)
    (call,) = telemetry.calls
    assert (call.method, call.route, call.status) == (method, route, status) == (method, route, answer.status_code)
    assert telemetry.open_calls == 0


async def test_a_call_is_reported_with_the_sizes_of_its_bodies(
    client: httpx.AsyncClient, engine: ScriptedEngine, telemetry: ScriptedTelemetry
) -> None:
    answer = await client.post("/generate", json=POSTS["/generate"])
    (call,) = telemetry.calls
    assert (call.received, call.sent) == (len(answer.request.content), len(answer.content))
    assert 0 <= call.seconds < 10


async def test_a_refused_body_is_reported_with_its_status(
    client: httpx.AsyncClient, engine: ScriptedEngine, telemetry: ScriptedTelemetry
) -> None:
    assert (await client.post("/generate", content=b" " * 30_000)).status_code == 413
    (call,) = telemetry.calls
    assert (call.route, call.status) == ("/generate", 413)


async def test_a_stream_is_reported_when_it_ends(
    client: httpx.AsyncClient, engine: ScriptedEngine, telemetry: ScriptedTelemetry
) -> None:
    engine.plays(chunk(["a"], None), InternalError("x"))
    answer = await client.post("/generate_stream", json=POSTS["/generate_stream"])
    (call,) = telemetry.calls
    assert (call.status, call.sent) == (200, len(answer.content))


async def test_a_disconnect_before_the_response_is_reported_without_a_status(
    engine: ScriptedEngine, telemetry: ScriptedTelemetry
) -> None:
    engine.plays(None)
    connection = Connection("/generate", POSTS["/generate"])
    call = serve(engine, telemetry, connection)
    await engine.reached.wait()
    assert telemetry.open_calls == 1
    connection.disconnect.set()
    await call
    (ended,) = telemetry.calls
    assert ended.status is None
    assert telemetry.open_calls == 0
