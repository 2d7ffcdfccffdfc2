"""What the gateway is told of every HTTP call."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from serve_app.api.app import create_app
from serve_app.errors import InternalError

from .scripted import POSTS, ScriptedGateway, Wire, app_config, chunk


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
        ("POST", "/health/", "other", 404),
    ],
)
async def test_a_call_is_told_by_the_pattern_of_its_route(
    client: httpx.AsyncClient, gateway: ScriptedGateway, method: str, path: str, route: str, status: int
) -> None:
    answer = await client.request(method, path)
    (call,) = gateway.calls
    assert (call.method, call.route, call.status) == (method, route, status) == (method, route, answer.status_code)
    assert gateway.open_calls == 0


async def test_bodies_are_counted_in_bytes(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    answer = await client.post("/generate", json=POSTS["/generate"])
    (call,) = gateway.calls
    assert (call.received, call.sent) == (len(answer.request.content), len(answer.content))
    assert 0 <= call.seconds < 10


async def test_a_body_that_is_too_long_is_not_read_to_its_end(
    client: httpx.AsyncClient, gateway: ScriptedGateway
) -> None:
    assert (await client.post("/generate", content=b" " * 30_000)).status_code == 413
    (call,) = gateway.calls
    assert (call.route, call.status) == ("/generate", 413)


async def test_a_stream_is_told_at_its_end(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    gateway.plays(chunk(["a"], None), InternalError("x"))
    answer = await client.post("/generate_stream", json=POSTS["/generate_stream"])
    (call,) = gateway.calls
    assert (call.status, call.sent) == (200, len(answer.content))


async def test_who_leaves_before_a_status_has_none(gateway: ScriptedGateway) -> None:
    gateway.plays(None)
    wire = Wire("/generate", POSTS["/generate"])
    served = asyncio.create_task(create_app(gateway, app_config())(wire.scope, wire.receive, wire.send))
    await gateway.crowded.wait()
    assert gateway.open_calls == 1
    wire.leave.set()
    await served
    (call,) = gateway.calls
    assert call.status is None
    assert gateway.open_calls == 0
