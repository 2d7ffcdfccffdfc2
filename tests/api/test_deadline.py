"""Every part of a call spends from the one deadline of the call."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from serve_app.api.app import create_app
from serve_app.core.events import Chunk
from serve_app.core.queries import GetModelInfo
from serve_app.core.requests import GenerationRequest

from .scripted import Clock, ScriptedEngine, ScriptedTelemetry, Step, app_config, chunk, error_of, events_of

TIMEOUT_S = 600
BEFORE, AFTER = TIMEOUT_S - 1, TIMEOUT_S + 1


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def client(
    engine: ScriptedEngine, telemetry: ScriptedTelemetry, clock: Clock
) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(engine, telemetry, app_config(request_timeout_s=TIMEOUT_S, warm_wait_s=30), clock=clock)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client


def first_turn_takes(engine: ScriptedEngine, clock: Clock, seconds: float) -> None:
    """The requests that run first take `seconds` of the clock. The others run after them, and end at once."""
    began = clock.now

    def script(request: GenerationRequest) -> Iterator[Step]:
        if clock.now == began:
            yield 0.005  # until every request of the first turn has begun
            clock.now = began + seconds
        yield Chunk((), 3, 0.0, embedding=(1.0,)) if request.embed else chunk(["a"])

    engine.script = script


MANY: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": ["a"] * 40},
    "/v1/embeddings": {"input": ["a"] * 40},
    "/generate_batch": {"prompts": ["a"] * 40},
}
SEVERAL = {"prompt": ["a"] * 5, "n": 8}
streamed = pytest.mark.parametrize("body", [MANY["/v1/completions"], SEVERAL], ids=["prompts", "answers"])


@streamed
async def test_a_stream_whose_time_is_up_ends_with_an_error_event(
    client: httpx.AsyncClient, engine: ScriptedEngine, telemetry: ScriptedTelemetry, clock: Clock, body: dict[str, Any]
) -> None:
    first_turn_takes(engine, clock, AFTER)
    answer = await client.post("/v1/completions", json=body | {"stream": True})
    assert answer.status_code == 200
    *_, error, end = events_of(answer.text)
    assert error["error"]["code"] == "deadline_exceeded"
    assert "not finished after 600 s" in error["error"]["message"]
    assert end == "[DONE]"
    assert [(error.code, model) for error, model in telemetry.errors] == [("deadline_exceeded", "small")]
    assert (len(engine.requests), engine.running) == (32, 0)


@streamed
async def test_requests_whose_turn_comes_late_have_the_deadline_of_the_call(
    client: httpx.AsyncClient, engine: ScriptedEngine, telemetry: ScriptedTelemetry, clock: Clock, body: dict[str, Any]
) -> None:
    began = clock.now
    first_turn_takes(engine, clock, BEFORE)
    answer = await client.post("/v1/completions", json=body | {"stream": True})
    *_, last, end = events_of(answer.text)
    assert ("error" in last, end, telemetry.errors) == (False, "[DONE]", [])
    assert {request.deadline for request in engine.requests} == {began + TIMEOUT_S}
    assert [request.arrived for request in engine.requests] == [began] * 32 + [began + BEFORE] * 8


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/embeddings"])
async def test_a_whole_call_whose_time_is_up_is_a_504(
    client: httpx.AsyncClient, engine: ScriptedEngine, telemetry: ScriptedTelemetry, clock: Clock, path: str
) -> None:
    first_turn_takes(engine, clock, AFTER)
    answer = await client.post(path, json=MANY[path])
    assert (answer.status_code, error_of(answer)["code"]) == (504, "deadline_exceeded")
    assert [(error.code, model) for error, model in telemetry.errors] == [("deadline_exceeded", "small")]
    assert (len(engine.requests), engine.running) == (32, 0)


async def test_the_items_of_a_batch_whose_time_is_up_fail(
    client: httpx.AsyncClient, engine: ScriptedEngine, telemetry: ScriptedTelemetry, clock: Clock
) -> None:
    first_turn_takes(engine, clock, AFTER)
    answer = await client.post("/generate_batch", json=MANY["/generate_batch"])
    results = answer.json()["results"]
    assert [result["text"] for result in results[:32]] == ["a"] * 32
    assert [result["error"]["code"] for result in results[32:]] == ["deadline_exceeded"] * 8
    assert [(error.code, model) for error, model in telemetry.errors] == [("deadline_exceeded", "small")] * 8
    assert len(engine.requests) == 32


@pytest.mark.parametrize(
    ("path", "body"), [("/tokenize", {"prompt": "a"}), ("/tokenize", {"inputs": "a"}), ("/detokenize", {"tokens": [1]})]
)
async def test_a_query_has_warm_wait_s(
    client: httpx.AsyncClient, engine: ScriptedEngine, clock: Clock, path: str, body: dict[str, Any]
) -> None:
    assert (await client.post(path, json=body)).status_code == 200
    assert set(engine.deadlines) == {clock.now + 30}


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
async def test_a_query_after_an_answer_has_the_rest_of_the_time(
    client: httpx.AsyncClient, engine: ScriptedEngine, clock: Clock, path: str
) -> None:
    began = clock.now
    first_turn_takes(engine, clock, BEFORE)
    await client.post(path, json={"inputs": "a", "parameters": {"details": True}})
    assert engine.queries == [("small", GetModelInfo())]
    assert engine.deadlines == [began + TIMEOUT_S]


async def test_a_client_can_shorten_its_time_and_not_lengthen_it(
    client: httpx.AsyncClient, engine: ScriptedEngine, clock: Clock
) -> None:
    times = {"2500": 2.5, "0.5": 0.0005, "600001": TIMEOUT_S, "999999999999": TIMEOUT_S}
    for given in times:
        answer = await client.post("/v1/completions", json={"prompt": "a"}, headers={"x-request-timeout-ms": given})
        assert answer.status_code == 200
    assert [round(request.deadline - clock.now, 6) for request in engine.requests] == list(times.values())
    assert {request.first_token_deadline for request in engine.requests} == {None}


async def test_a_client_can_limit_the_time_to_the_first_token(
    client: httpx.AsyncClient, engine: ScriptedEngine, clock: Clock
) -> None:
    for given in ("1500", "600001"):
        await client.post("/generate", json={"prompt": "a"}, headers={"x-first-token-timeout-ms": given})
    assert [request.starts_by - clock.now for request in engine.requests] == [1.5, TIMEOUT_S]
    assert {request.deadline for request in engine.requests} == {clock.now + TIMEOUT_S}


@pytest.mark.parametrize("header", ["x-request-timeout-ms", "x-first-token-timeout-ms"])
@pytest.mark.parametrize("given", ["0", "-1", "nan", "inf", "1e3", "", "2 s", "1,2", "٣", "9" * 13, "0.0"])
@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/messages"])
async def test_a_time_that_is_no_positive_number_is_refused(
    client: httpx.AsyncClient, engine: ScriptedEngine, path: str, header: str, given: str
) -> None:
    body: dict[str, Any] = {"prompt": "a"}
    if path == "/v1/messages":
        body = {"model": "small", "max_tokens": 1, "messages": [{"role": "user", "content": "a"}]}
    answer = await client.post(path, json=body, headers=[(header.encode(), given.encode())])
    assert answer.status_code == (422 if path == "/generate" else 400)
    assert "milliseconds above 0" in answer.json()["error"]["message"]
    assert engine.requests == []


async def test_the_time_given_twice_is_refused(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    headers = [("x-request-timeout-ms", "500"), ("x-request-timeout-ms", "0")]
    answer = await client.post("/generate", json={"prompt": "a"}, headers=headers)
    assert (answer.status_code, error_of(answer)["code"], engine.requests) == (422, "invalid_request", [])


async def test_the_header_of_ray_serve_does_not_change_the_time(
    client: httpx.AsyncClient, engine: ScriptedEngine, clock: Clock
) -> None:
    for given in ("0", "-1", "nan", "1000000"):
        await client.post("/generate", json={"prompt": "a"}, headers={"x-request-timeout-seconds": given})
    assert {request.deadline for request in engine.requests} == {clock.now + TIMEOUT_S}
