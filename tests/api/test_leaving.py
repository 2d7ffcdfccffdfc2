from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, MutableMapping
from contextvars import ContextVar
from typing import Any

import httpx
import pytest
from starlette.middleware import Middleware

from serve_app.api import sse
from serve_app.api.app import create_app
from serve_app.api.middleware import OneRequestId
from serve_app.core.events import Chunk
from serve_app.core.requests import GenerationRequest

from .scripted import POSTS, ScriptedGateway, Wire, app_config, chunk

STREAMS = {
    "/generate_stream": POSTS["/generate_stream"],
    "/v1/completions": POSTS["/v1/completions"] | {"stream": True},
    "/v1/chat/completions": POSTS["/v1/chat/completions"] | {"stream": True},
}
every_post = pytest.mark.parametrize("path", POSTS)
every_stream = pytest.mark.parametrize("path", STREAMS)


def serve(gateway: ScriptedGateway, wire: Wire) -> asyncio.Task[None]:
    return asyncio.create_task(create_app(gateway, app_config())(wire.scope, wire.receive, wire.send))


def left_clean(gateway: ScriptedGateway) -> bool:
    """Every generator was closed, and nobody calls a client's leaving an error."""
    return gateway.closed == [request.id for request in gateway.requests] and gateway.refusals == []


@every_post
async def test_leaving_before_the_first_token_closes_the_generator(gateway: ScriptedGateway, path: str) -> None:
    gateway.plays(None)
    wire = Wire(path, POSTS[path])
    served = serve(gateway, wire)
    await gateway.crowded.wait()
    wire.leave.set()
    await served
    assert left_clean(gateway)
    assert wire.sent == []


@every_stream
async def test_leaving_in_the_middle_closes_the_generator(gateway: ScriptedGateway, path: str) -> None:
    gateway.plays(chunk(["a"], None), None)
    wire = Wire(path, STREAMS[path])
    served = serve(gateway, wire)
    await wire.wrote.wait()
    wire.leave.set()
    await served
    assert left_clean(gateway)
    assert gateway.completed == 0
    assert all(message.get("more_body", True) for message in wire.sent)


@every_stream
@pytest.mark.parametrize("fail_at", [0, 1, 2])
async def test_a_failed_write_closes_the_generator(gateway: ScriptedGateway, path: str, fail_at: int) -> None:
    gateway.plays(chunk(["a"], None), chunk(["b"], None, start=1), None)
    await serve(gateway, Wire(path, STREAMS[path], fail_at=fail_at))
    assert left_clean(gateway)
    assert gateway.running == 0


async def test_a_whole_answer_to_nobody_is_no_error(gateway: ScriptedGateway) -> None:
    await serve(gateway, Wire("/generate", POSTS["/generate"], fail_at=0))
    assert left_clean(gateway)
    assert gateway.completed == 1


@every_post
async def test_leaving_during_the_upload_asks_nothing_of_the_model(gateway: ScriptedGateway, path: str) -> None:
    wire = Wire(path, None, parts=[])
    wire.leave.set()
    await serve(gateway, wire)
    assert (gateway.requests, gateway.refusals, wire.sent) == ([], [], [])


@every_post
async def test_a_server_that_stops_closes_the_generator(gateway: ScriptedGateway, path: str) -> None:
    gateway.plays(None)
    served = serve(gateway, Wire(path, POSTS[path]))
    await gateway.crowded.wait()
    served.cancel()
    with pytest.raises(asyncio.CancelledError):
        await served
    assert left_clean(gateway)


class Chatty(Wire):
    """Sends one more part after the last, an empty one."""

    silent = False

    async def receive(self) -> Any:
        if self.parts == [] and not self.silent:
            self.silent = True
            return {"type": "http.request", "body": b"", "more_body": False}
        return await super().receive()


@every_post
async def test_a_part_after_the_last_is_not_taken_for_leaving(gateway: ScriptedGateway, path: str) -> None:
    gateway.plays(0.001, chunk(["a"]))
    wire = Chatty(path, POSTS[path])
    await serve(gateway, wire)
    assert wire.silent
    assert wire.status == 200
    assert gateway.completed == 1


async def test_an_id_that_the_server_puts_on_answers_is_on_them_once(gateway: ScriptedGateway) -> None:
    """The server's own is the one that it puts into the request; without one there is ours."""
    app = create_app(gateway, app_config(), around=[Middleware(OneRequestId)])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        assert "x-request-id" not in (await client.get("/health", headers={"x-request-id": "mine"})).headers
        assert (await client.get("/health")).headers["x-request-id"]
        assert (await client.get("/health", headers={"x-request-id": "no such"})).headers["x-request-id"] != "no such"


class Stalling(Wire):
    """Sends the beginning of a body, and no more."""

    async def receive(self) -> dict[str, Any]:
        if self.began:
            await asyncio.Event().wait()
        self.began = True
        return {"type": "http.request", "body": b"{", "more_body": True}

    began = False


@every_post
async def test_who_does_not_send_all_of_a_body_is_not_waited_for(gateway: ScriptedGateway, path: str) -> None:
    wire = Stalling(path, POSTS[path])
    app = create_app(gateway, app_config(request_timeout_s=0.05))
    async with asyncio.timeout(5):
        await app(wire.scope, wire.receive, wire.send)
    assert (gateway.requests, wire.sent) == ([], [])


class Full(Wire):
    """Its buffers are full, and nobody reads."""

    async def send(self, message: MutableMapping[str, Any]) -> None:
        await super().send(message)
        await asyncio.Event().wait()


@every_stream
async def test_who_does_not_read_holds_a_place_as_long_as_a_request_may_take(
    gateway: ScriptedGateway, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "UNREAD_S", 0.05)
    gateway.plays(chunk(["a"], None), None)
    wire = Full(path, STREAMS[path])
    app = create_app(gateway, app_config(request_timeout_s=0.05))
    async with asyncio.timeout(5):
        await app(wire.scope, wire.receive, wire.send)
    assert left_clean(gateway)
    assert all(message.get("more_body", True) for message in wire.sent), "the server cuts it: it is not whole"


class Traced(ScriptedGateway):
    """Puts a mark into the context for as long as it runs, as tracing does."""

    mark: ContextVar[str] = ContextVar("mark")

    async def stream(self, request: GenerationRequest, warm_wait_s: float | None = None) -> AsyncGenerator[Chunk, None]:
        token = self.mark.set(request.id)
        try:
            yield chunk(["a"], None)
        finally:
            self.mark.reset(token)  # fails in any other context
            self.closed.append(request.id)


@every_stream
async def test_a_generator_is_closed_in_the_context_of_its_steps(path: str) -> None:
    gateway = Traced()
    await serve(gateway, Wire(path, STREAMS[path], fail_at=1))
    assert len(gateway.closed) == 1
