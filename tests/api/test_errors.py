from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from serve_app.api.app import create_app
from serve_app.core.queries import ModelStatus
from serve_app.errors import (
    BodyTooLarge,
    DeadlineExceeded,
    InternalError,
    ModelNotFound,
    NotReady,
    PromptTooLong,
    QueueFull,
    ServeAppError,
)

from .scripted import POSTS, Connection, ScriptedEngine, ScriptedTelemetry, app_config, chunk, error_of, serve

every_post = pytest.mark.parametrize("path", POSTS)
# A batch has the errors of its items in its results.
every_generation = pytest.mark.parametrize("path", sorted(POSTS.keys() - {"/generate_batch"}))


@every_generation
@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (PromptTooLong("3000 tokens exceed 2048.", param="prompt"), 422, "invalid_request_error"),
        (ModelNotFound("The model was removed.", param="model"), 404, "invalid_request_error"),
        (QueueFull("8 requests wait.", retry_after_s=1), 429, "rate_limit_error"),
        (NotReady("The model is being loaded.", retry_after_s=2), 503, "server_error"),
        (DeadlineExceeded("The request was not finished after 600 s."), 504, "server_error"),
        (InternalError("The model failed on this request."), 500, "server_error"),
    ],
    ids=lambda value: value.code if isinstance(value, ServeAppError) else None,
)
async def test_every_error_has_its_status(
    client: httpx.AsyncClient,
    engine: ScriptedEngine,
    telemetry: ScriptedTelemetry,
    path: str,
    error: ServeAppError,
    status: int,
    kind: str,
) -> None:
    engine.plays(error)
    answer = await client.post(path, json=POSTS[path])
    assert answer.status_code == (400 if status == 422 and path.startswith("/v1") else status)
    assert answer.headers["content-type"] == "application/json"
    found = error_of(answer)
    code = "context_length_exceeded" if status == 422 and path.startswith("/v1") else error.code
    assert (found["code"], found["message"], found["param"]) == (code, error.message, error.param)
    assert found.get("type", kind) == kind
    assert telemetry.errors == [(error, "small")]


@every_generation
@pytest.mark.parametrize(("retry_s", "header"), [(None, None), (0.0, "1"), (0.2, "1"), (2.0, "2"), (2.1, "3")])
async def test_retry_after_is_rounded_up_to_whole_seconds(
    client: httpx.AsyncClient, engine: ScriptedEngine, path: str, retry_s: float | None, header: str | None
) -> None:
    engine.plays(QueueFull("8 requests wait.", retry_after_s=retry_s))
    answer = await client.post(path, json=POSTS[path])
    assert answer.headers.get("retry-after") == header


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
async def test_a_late_error_of_a_whole_answer_is_a_status(
    client: httpx.AsyncClient, engine: ScriptedEngine, telemetry: ScriptedTelemetry, path: str
) -> None:
    engine.plays(chunk(["a"], None), DeadlineExceeded("The request was not finished after 600 s."))
    assert (await client.post(path, json=POSTS[path])).status_code == 504
    assert len(telemetry.errors) == 1


@pytest.mark.parametrize("path", ["/nope", "/generate/x", "/v1", "/v1/nope", "/v1/v1/completions"])
async def test_an_unknown_path_is_a_404_with_the_path(
    client: httpx.AsyncClient, engine: ScriptedEngine, telemetry: ScriptedTelemetry, path: str
) -> None:
    answer = await client.post(path, json={"prompt": "hi"})
    assert answer.status_code == 404
    assert error_of(answer)["code"] == "not_found"
    assert error_of(answer)["message"].startswith(f"Path {path} does not exist. ")
    assert [model for _, model in telemetry.errors] == [None]


async def test_a_path_is_quoted_and_cut(client: httpx.AsyncClient) -> None:
    assert "Path /a?b#c does" in error_of(await client.get("/a%3Fb%23c"))["message"]
    assert len(error_of(await client.get("/" + "x" * 5000))["message"]) < 400


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("GET", path, {"POST"}) for path in POSTS]
    + [("DELETE", path, {"GET", "HEAD"}) for path in ("/v1/models", "/v1/models/x", "/health", "/ready", "/metrics")],
)
async def test_a_wrong_method_is_a_405_with_the_allowed_methods(
    client: httpx.AsyncClient,
    engine: ScriptedEngine,
    telemetry: ScriptedTelemetry,
    method: str,
    path: str,
    allowed: set[str],
) -> None:
    answer = await client.request(method, path)
    assert answer.status_code == 405
    assert set(answer.headers["allow"].split(", ")) == allowed
    assert error_of(answer)["code"] == "method_not_allowed"
    assert f"does not take {method}. Use {answer.headers['allow']}." in error_of(answer)["message"]
    assert len(telemetry.errors) == 1


async def test_an_unknown_model_is_a_404_with_the_known_models(
    client: httpx.AsyncClient, engine: ScriptedEngine, telemetry: ScriptedTelemetry
) -> None:
    for path in POSTS:
        answer = await client.post(path, json=POSTS[path] | {"model": "h" * 1000})
        assert answer.status_code == 404
        assert (error_of(answer)["code"], error_of(answer)["param"]) == ("model_not_found", "model")
        assert "Known models: small, org/large." in error_of(answer)["message"]
        assert len(error_of(answer)["message"]) < 250
    assert [model for _, model in telemetry.errors] == [None] * len(POSTS)


@every_post
async def test_a_body_over_the_limit_is_refused_while_it_arrives(
    client: httpx.AsyncClient, engine: ScriptedEngine, telemetry: ScriptedTelemetry, path: str
) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b" " * 1000

    answer = await client.post(path, content=endless())
    assert answer.status_code == 413
    assert error_of(answer)["code"] == "body_too_large"
    assert "larger than 20000 bytes" in error_of(answer)["message"]
    assert len(telemetry.errors) == 1


async def test_a_declared_length_over_the_limit_is_refused_without_reading(
    engine: ScriptedEngine, telemetry: ScriptedTelemetry
) -> None:
    connection = Connection("/generate", None, parts=[b"{}"], headers=[(b"content-length", b"2000")])
    await serve(engine, telemetry, connection, max_body_bytes=1999)
    assert (connection.status, connection.parts) == (413, [b"{}"])
    assert [type(error) for error, _ in telemetry.errors] == [BodyTooLarge]


@pytest.mark.parametrize("declared", [b"1024", b"", b"-5", b"many", b"9" * 19, "²".encode("latin-1")])
async def test_an_invalid_content_length_is_ignored(
    engine: ScriptedEngine, telemetry: ScriptedTelemetry, declared: bytes
) -> None:
    body = b'{"prompt": "hi"}'.ljust(1024)
    connection = Connection(
        "/generate", None, parts=[body[:1000], body[1000:]], headers=[(b"content-length", declared)]
    )
    await serve(engine, telemetry, connection, max_body_bytes=1024)
    assert connection.status == 200


@every_generation
async def test_an_answer_without_an_end_is_a_500(
    client: httpx.AsyncClient, engine: ScriptedEngine, telemetry: ScriptedTelemetry, path: str
) -> None:
    """By its contract, an engine ends an answer with a finish reason or an error."""
    engine.plays(*([] if path == "/generate_stream" else [chunk(["a"], None)]))
    answer = await client.post(path, json=POSTS[path])
    assert (answer.status_code, error_of(answer)["code"]) == (500, "internal_error")
    assert [(error.code, model) for error, model in telemetry.errors] == [("internal_error", "small")]


@every_generation
async def test_an_unexpected_exception_is_an_opaque_500(
    client: httpx.AsyncClient,
    engine: ScriptedEngine,
    telemetry: ScriptedTelemetry,
    path: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine.plays(RuntimeError("secret"))
    answer = await client.post(path, json=POSTS[path], headers={"x-request-id": "mine-1"})
    assert answer.status_code == 500
    assert error_of(answer)["code"] == "internal_error"
    assert "Quote request mine-1" in error_of(answer)["message"]
    assert "secret" not in answer.text
    assert "mine-1" in caplog.text
    assert "secret" in caplog.text
    assert [(error.code, model) for error, model in telemetry.errors] == [("internal_error", "small")]


class BrokenEngine(ScriptedEngine):
    def health(self, model: str) -> ModelStatus:
        raise RuntimeError("secret")


async def test_an_unexpected_exception_outside_of_generation_is_an_opaque_500(
    caplog: pytest.LogCaptureFixture, telemetry: ScriptedTelemetry
) -> None:
    engine = BrokenEngine()
    transport = httpx.ASGITransport(create_app(engine, telemetry, app_config()))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = await client.get("/ready")
    assert answer.status_code == 500
    assert error_of(answer)["code"] == "internal_error"
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] in caplog.text
    assert [(error.code, model) for error, model in telemetry.errors] == [("internal_error", None)]


class BrokenServer(Connection):
    """A server that fails when it should send the body."""

    async def send(self, message: Any) -> None:
        if self.sent:
            raise RuntimeError("the server is broken")
        self.sent.append(message)


async def test_an_exception_after_the_response_began_is_counted_and_raised(
    engine: ScriptedEngine, telemetry: ScriptedTelemetry
) -> None:
    connection = BrokenServer("/generate", POSTS["/generate"])
    with pytest.raises(RuntimeError, match="the server is broken"):
        await serve(engine, telemetry, connection)
    assert [message["type"] for message in connection.sent] == ["http.response.start"]
    assert [(error.code, model) for error, model in telemetry.errors] == [("internal_error", "small")]


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/nope", "/health"])
@pytest.mark.parametrize("given", ["a", "A-z_0.9:x", "x" * 128])
async def test_a_safe_request_id_is_kept(client: httpx.AsyncClient, path: str, given: str) -> None:
    answer = await client.post(path, json={"prompt": "hi"}, headers={"x-request-id": given})
    assert answer.headers.get_list("x-request-id") == [given]


@pytest.mark.parametrize("given", ["", " ", "a b", "x" * 129, "a\tb", "é", "a;b", "<a>"])
async def test_an_unsafe_request_id_is_replaced(
    client: httpx.AsyncClient, engine: ScriptedEngine, given: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine.plays(RuntimeError("late"))
    with caplog.at_level(logging.ERROR):
        answer = await client.post("/generate", json={"prompt": "hi"}, headers=[(b"x-request-id", given.encode())])
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])
    assert answer.headers["x-request-id"] in caplog.text


async def test_calls_with_the_same_id_have_different_generations(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    for _ in range(2):
        await client.post("/generate", json={"prompt": "hi"}, headers={"x-request-id": "mine"})
    first, second = (request.id for request in engine.requests)
    assert first != second
    assert first.startswith("mine-")
    assert second.startswith("mine-")


async def test_lifespan_events_pass_every_middleware(engine: ScriptedEngine, telemetry: ScriptedTelemetry) -> None:
    events = iter(["lifespan.startup", "lifespan.shutdown"])
    sent: list[str] = []

    async def receive() -> dict[str, Any]:
        return {"type": next(events)}

    async def send(message: Any) -> None:
        sent.append(message["type"])

    await create_app(engine, telemetry, app_config())({"type": "lifespan", "asgi": {"version": "3.0"}}, receive, send)
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


async def test_a_mounted_app_has_errors_in_the_dialect_of_the_path(
    engine: ScriptedEngine, telemetry: ScriptedTelemetry
) -> None:
    transport = httpx.ASGITransport(create_app(engine, telemetry, app_config()), root_path="/llm")
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = await client.get("/llm/v1/nope")
    assert answer.status_code == 404
    assert "type" in answer.json()["error"]
