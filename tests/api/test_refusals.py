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

from .scripted import POSTS, ScriptedGateway, Wire, app_config, chunk, told

every_post = pytest.mark.parametrize("path", POSTS)
# A batch tells of a model's refusals in its results.
every_generation = pytest.mark.parametrize("path", sorted(POSTS.keys() - {"/generate_batch"}))


@every_generation
@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (PromptTooLong("3000 tokens are over 2048; shorten it", param="prompt"), 422, "invalid_request_error"),
        (ModelNotFound("it has just gone", param="model"), 404, "invalid_request_error"),
        (QueueFull("8 requests wait already", retry_after_s=1), 429, "rate_limit_error"),
        (NotReady("it is being loaded", retry_after_s=2), 503, "server_error"),
        (DeadlineExceeded("600 s are over"), 504, "server_error"),
        (InternalError("the model failed on this request"), 500, "server_error"),
    ],
    ids=lambda value: value.code if isinstance(value, ServeAppError) else None,
)
async def test_every_error_has_its_status_in_both_dialects(
    client: httpx.AsyncClient, gateway: ScriptedGateway, path: str, error: ServeAppError, status: int, kind: str
) -> None:
    gateway.plays(error)
    answer = await client.post(path, json=POSTS[path])
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    found = told(answer)
    assert (found["code"], found["message"], found["param"]) == (error.code, error.message, error.param)
    assert found.get("type", kind) == kind
    assert gateway.refusals == [(error, "small")]


@every_generation
@pytest.mark.parametrize(("retry_s", "header"), [(None, None), (0.0, "1"), (0.2, "1"), (2.0, "2"), (2.1, "3")])
async def test_retry_after_is_rounded_up_to_whole_seconds(
    client: httpx.AsyncClient, gateway: ScriptedGateway, path: str, retry_s: float | None, header: str | None
) -> None:
    gateway.plays(QueueFull("8 requests wait already; try again later", retry_after_s=retry_s))
    answer = await client.post(path, json=POSTS[path])
    assert answer.headers.get("retry-after") == header


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
async def test_a_late_error_is_still_a_status_without_streaming(
    client: httpx.AsyncClient, gateway: ScriptedGateway, path: str
) -> None:
    gateway.plays(chunk(["a"], None), DeadlineExceeded("600 s are over"))
    assert (await client.post(path, json=POSTS[path])).status_code == 504
    assert len(gateway.refusals) == 1


@pytest.mark.parametrize("path", ["/nope", "/generate/", "/generate/x", "/v1", "/v1/nope"])
async def test_an_unknown_path_is_named(client: httpx.AsyncClient, gateway: ScriptedGateway, path: str) -> None:
    answer = await client.post(path, json={"prompt": "hi"})
    assert answer.status_code == 404
    assert told(answer)["code"] == "not_found"
    assert told(answer)["message"].startswith(f"there is no {path} here; ")
    assert [model for _, model in gateway.refusals] == [None]


async def test_a_path_is_quoted_as_it_was_sent(client: httpx.AsyncClient) -> None:
    assert "/a?b#c here" in told(await client.get("/a%3Fb%23c"))["message"]
    assert len(told(await client.get("/" + "x" * 5000))["message"]) < 400


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("GET", path, {"POST"}) for path in POSTS]
    + [("DELETE", path, {"GET", "HEAD"}) for path in ("/v1/models", "/v1/models/x", "/health", "/ready", "/metrics")],
)
async def test_a_wrong_method_is_told_the_right_ones(
    client: httpx.AsyncClient, gateway: ScriptedGateway, method: str, path: str, allowed: set[str]
) -> None:
    answer = await client.request(method, path)
    assert answer.status_code == 405
    assert set(answer.headers["allow"].split(", ")) == allowed
    assert told(answer)["code"] == "method_not_allowed"
    assert f"does not take {method}; use {answer.headers['allow']}" in told(answer)["message"]
    assert len(gateway.refusals) == 1


async def test_an_unknown_model_lists_the_known_ones(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    for path in POSTS:
        answer = await client.post(path, json=POSTS[path] | {"model": "h" * 1000})
        assert answer.status_code == 404
        assert (told(answer)["code"], told(answer)["param"]) == ("model_not_found", "model")
        assert "the models here are: small, org/large" in told(answer)["message"]
        assert len(told(answer)["message"]) < 250
    assert [model for _, model in gateway.refusals] == [None] * len(POSTS)


@every_post
async def test_a_body_over_the_limit_is_refused_while_it_comes(
    client: httpx.AsyncClient, gateway: ScriptedGateway, path: str
) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b" " * 1000

    answer = await client.post(path, content=endless())
    assert answer.status_code == 413
    assert told(answer)["code"] == "body_too_large"
    assert "over 20000 bytes" in told(answer)["message"]
    assert len(gateway.refusals) == 1


async def test_a_declared_length_is_refused_before_the_body_is_read(gateway: ScriptedGateway) -> None:
    wire = Wire("/generate", None, parts=[b"{}"], headers=[(b"content-length", b"2000")])
    await create_app(gateway, app_config(max_body_bytes=1999))(wire.scope, wire.receive, wire.send)
    assert (wire.status, wire.parts) == (413, [b"{}"])
    assert [type(error) for error, _ in gateway.refusals] == [BodyTooLarge]


@pytest.mark.parametrize("declared", [b"1024", b"", b"-5", b"many", b"9" * 19, "²".encode("latin-1")])
async def test_a_body_at_the_limit_passes_whatever_nonsense_is_declared(
    gateway: ScriptedGateway, declared: bytes
) -> None:
    body = b'{"prompt": "hi"}'.ljust(1024)
    wire = Wire("/generate", None, parts=[body[:1000], body[1000:]], headers=[(b"content-length", declared)])
    await create_app(gateway, app_config(max_body_bytes=1024))(wire.scope, wire.receive, wire.send)
    assert wire.status == 200


@every_generation
async def test_a_fault_of_ours_is_an_opaque_500(
    client: httpx.AsyncClient, gateway: ScriptedGateway, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    gateway.plays(RuntimeError("secret"))
    answer = await client.post(path, json=POSTS[path], headers={"x-request-id": "mine-1"})
    assert answer.status_code == 500
    assert told(answer)["code"] == "internal_error"
    assert "quote request mine-1" in told(answer)["message"]
    assert "secret" not in answer.text
    assert "mine-1" in caplog.text
    assert "secret" in caplog.text
    assert [(error.code, model) for error, model in gateway.refusals] == [("internal_error", "small")]


class Broken(ScriptedGateway):
    async def models(self) -> list[ModelStatus]:
        raise RuntimeError("secret")


async def test_a_fault_outside_generation_is_an_opaque_500_too(caplog: pytest.LogCaptureFixture) -> None:
    gateway = Broken()
    transport = httpx.ASGITransport(create_app(gateway, app_config()))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = await client.get("/ready")
    assert answer.status_code == 500
    assert told(answer)["code"] == "internal_error"
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] in caplog.text
    assert [(error.code, model) for error, model in gateway.refusals] == [("internal_error", None)]


class Falling(Wire):
    """A server that fails by itself when the body should go out."""

    async def send(self, message: Any) -> None:
        if self.sent:
            raise RuntimeError("the server is broken")
        self.sent.append(message)


async def test_a_begun_answer_is_never_followed_by_another(gateway: ScriptedGateway) -> None:
    wire = Falling("/generate", POSTS["/generate"])
    with pytest.raises(RuntimeError, match="the server is broken"):
        await create_app(gateway, app_config())(wire.scope, wire.receive, wire.send)
    assert [message["type"] for message in wire.sent] == ["http.response.start"]


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/nope", "/health"])
@pytest.mark.parametrize("given", ["a", "A-z_0.9:x", "x" * 128])
async def test_a_harmless_request_id_is_kept(client: httpx.AsyncClient, path: str, given: str) -> None:
    answer = await client.post(path, json={"prompt": "hi"}, headers={"x-request-id": given})
    assert answer.headers.get_list("x-request-id") == [given]


@pytest.mark.parametrize("given", ["", " ", "a b", "x" * 129, "a\tb", "é", "a;b", "<a>"])
async def test_any_other_request_id_is_replaced(
    client: httpx.AsyncClient, gateway: ScriptedGateway, given: str, caplog: pytest.LogCaptureFixture
) -> None:
    gateway.plays(RuntimeError("late"))
    with caplog.at_level(logging.ERROR):
        answer = await client.post("/generate", json={"prompt": "hi"}, headers=[(b"x-request-id", given.encode())])
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])
    assert answer.headers["x-request-id"] in caplog.text


async def test_two_calls_with_one_id_are_two_generations(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    for _ in range(2):
        await client.post("/generate", json={"prompt": "hi"}, headers={"x-request-id": "mine"})
    first, second = (request.id for request in gateway.requests)
    assert first != second
    assert first.startswith("mine-")
    assert second.startswith("mine-")


async def test_start_and_end_of_the_server_pass_every_layer(gateway: ScriptedGateway) -> None:
    events = iter(["lifespan.startup", "lifespan.shutdown"])
    sent: list[str] = []

    async def receive() -> dict[str, Any]:
        return {"type": next(events)}

    async def send(message: Any) -> None:
        sent.append(message["type"])

    await create_app(gateway, app_config())({"type": "lifespan", "asgi": {"version": "3.0"}}, receive, send)
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


async def test_a_mounted_app_still_knows_its_dialects(gateway: ScriptedGateway) -> None:
    transport = httpx.ASGITransport(create_app(gateway, app_config()), root_path="/llm")
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = await client.get("/llm/v1/nope")
    assert answer.status_code == 404
    assert "type" in answer.json()["error"]
