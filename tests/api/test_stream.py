from __future__ import annotations

import logging
from collections.abc import Iterator
from contextvars import ContextVar

import httpx
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from serve_app.core.events import FinishReason
from serve_app.core.queries import ModelState, ModelStatus
from serve_app.core.requests import GenerationRequest
from serve_app.errors import DeadlineExceeded, NotReady

from .scripted import (
    BEAT,
    Connection,
    ScriptedEngine,
    ScriptedTelemetry,
    Step,
    chunk,
    error_of,
    events_of,
    serve,
    with_heartbeats,
)

PATHS: dict[str, dict[str, object]] = {
    "/generate_stream": {"prompt": "hi"},
    "/v1/completions": {"prompt": "hi", "stream": True},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "stream": True},
}
every_stream = pytest.mark.parametrize("path", PATHS)


async def stream(client: httpx.AsyncClient, path: str = "/generate_stream", **fields: object) -> httpx.Response:
    return await client.post(path, json=PATHS[path] | fields)


def terminals(path: str, text: str) -> int:
    """The number of events that end the stream."""
    found = events_of(text)
    if path == "/generate_stream":
        return sum(event["finished"] for event in found)
    assert found[-1] == "[DONE]"
    ends = [f for f in found[:-1] if "error" in f or any(c["finish_reason"] for c in f["choices"])]
    return len(ends)


async def test_events_of_a_stream(
    client: httpx.AsyncClient, engine: ScriptedEngine, telemetry: ScriptedTelemetry
) -> None:
    engine.plays(chunk(["bright"], None), chunk([" and", ""], FinishReason.LENGTH, start=1))
    answer = await stream(client)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    assert "content-length" not in answer.headers
    first, second, last = events_of(answer.text)
    assert first == {
        "token": "bright",
        "text": "bright",
        "finished": False,
        "metrics": {
            "ttft_ms": 50.0,
            "tpot_ms": None,
            "queue_ms": 2.0,
            "tokens_generated": 1,
            "tokens_per_second": 20.0,
            "elapsed_ms": 50.0,
        },
    }
    assert second["text"] == "bright and"
    assert second["metrics"]["tpot_ms"] == 10.0
    assert last["finished"] is True
    assert last["finish_reason"] == "length"
    assert last["usage"] == {
        "prompt_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens": 3,
        "total_tokens": 6,
    }
    assert engine.completed == 1
    assert telemetry.errors == []


async def test_a_stream_without_text_and_with_logprobs(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.plays(chunk(["a", "b"]))
    found = events_of((await stream(client, include_text=False, logprobs=2)).text)
    assert all("text" not in event for event in found)
    assert [event["logprobs"]["token"] for event in found] == ["a", "b"]


async def test_line_breaks_are_escaped(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    nasty = "a\nb\r\n\x85\u2028\u2029\x0b\x0cé😀"
    engine.plays(chunk([nasty]))
    answer = await stream(client)
    assert events_of(answer.text)[0]["token"] == nasty
    assert len(answer.text.splitlines()) == 2
    assert "é😀" in answer.text


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.text(max_size=8), min_size=1, max_size=4), min_size=1, max_size=6), st.sampled_from([*PATHS])
)
async def test_tokens_join_to_the_text(
    client: httpx.AsyncClient, engine: ScriptedEngine, flushes: list[list[str]], path: str
) -> None:
    *head, tail = flushes
    engine.plays(*(chunk(texts, None) for texts in head), chunk(tail))
    text = (await stream(client, path)).text
    whole = "".join(token for flush in flushes for token in flush)
    assert terminals(path, text) == 1
    found = [event for event in events_of(text) if event != "[DONE]"]
    if path == "/generate_stream":
        assert "".join(event["token"] for event in found) == found[-1]["text"] == whole
        assert len(found) == sum(map(len, flushes))
    elif path == "/v1/completions":
        assert "".join(event["choices"][0]["text"] for event in found) == whole
    else:
        assert "".join(event["choices"][0]["delta"]["content"] for event in found) == whole


@every_stream
async def test_an_error_before_the_first_heartbeat_is_a_status(
    client: httpx.AsyncClient, engine: ScriptedEngine, telemetry: ScriptedTelemetry, path: str
) -> None:
    engine.plays(0.001, NotReady("The model is being loaded.", retry_after_s=4))
    answer = await stream(client, path)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "4"
    assert len(telemetry.errors) == 1


@with_heartbeats
@every_stream
@pytest.mark.parametrize("early", [True, False])
async def test_an_error_after_the_start_is_an_event(
    client: httpx.AsyncClient, engine: ScriptedEngine, telemetry: ScriptedTelemetry, path: str, early: bool
) -> None:
    error = DeadlineExceeded("The request was not finished after 600 s.")
    engine.plays(BEAT if early else chunk(["a"], None), error)
    answer = await stream(client, path)
    assert answer.status_code == 200
    assert terminals(path, answer.text) == 1
    assert telemetry.errors == [(error, "small")]
    found = events_of(answer.text)
    if path == "/generate_stream":
        assert "event: error\ndata: " in answer.text
        body = {"code": "deadline_exceeded", "message": error.message, "param": None}
        assert found[-1] == {"error": {**body, "request_id": answer.headers["x-request-id"]}, "finished": True}
    else:
        body = {"message": error.message, "type": "server_error", "param": None, "code": "deadline_exceeded"}
        assert found[-2:] == [{"error": body}, "[DONE]"]


@with_heartbeats
@every_stream
@pytest.mark.parametrize(
    ("state", "word"),
    [(ModelState.READY, "queued"), *((s, "warming") for s in ModelState if s is not ModelState.READY)],
)
async def test_a_silent_stream_has_heartbeats(
    client: httpx.AsyncClient, engine: ScriptedEngine, path: str, state: ModelState, word: str
) -> None:
    engine.statuses["small"] = ModelStatus("small", state)
    engine.plays(BEAT, chunk(["a"], None), BEAT, chunk(["b"], start=1))
    text = (await stream(client, path)).text
    heartbeat = f": {word}\n\n"
    assert text.startswith(heartbeat)
    head, _, tail = text.partition("data: ")
    assert set(head.split("\n\n")) == {f": {word}", ""}
    assert heartbeat in tail
    assert terminals(path, text) == 1


@every_stream
async def test_no_heartbeat_follows_the_last_event(
    engine: ScriptedEngine, telemetry: ScriptedTelemetry, path: str
) -> None:
    """The generator takes longer than a heartbeat to end after its last chunk."""
    engine.plays(chunk(["a"]), 0.05)
    connection = Connection(path, PATHS[path])
    await serve(engine, telemetry, connection, heartbeat_s=0.01)
    assert terminals(path, connection.text) == 1
    assert "\n: " not in connection.text
    assert [message["body"] != b"" for message in connection.sent[1:]] == [True, False]
    assert telemetry.errors == []


@every_stream
@pytest.mark.parametrize("exception", [ValueError("secret"), OSError("secret"), None])
async def test_an_unexpected_exception_in_a_stream_is_an_opaque_error_event(
    client: httpx.AsyncClient,
    engine: ScriptedEngine,
    telemetry: ScriptedTelemetry,
    path: str,
    exception: Exception | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """None: the generator breaks its contract and ends without a finish reason."""
    engine.plays(chunk(["a"], None), *([] if exception is None else [exception]))
    with caplog.at_level(logging.ERROR):
        answer = await stream(client, path)
    assert terminals(path, answer.text) == 1
    assert "internal_error" in answer.text
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] in answer.text
    assert answer.headers["x-request-id"] in caplog.text
    assert [(error.code, model) for error, model in telemetry.errors] == [("internal_error", "small")]


@every_stream
async def test_an_answer_that_cannot_be_encoded_is_an_opaque_error_event(
    client: httpx.AsyncClient, engine: ScriptedEngine, telemetry: ScriptedTelemetry, path: str
) -> None:
    """UTF-8 cannot encode half of a surrogate pair."""
    engine.plays(chunk(["a"], None), chunk(["\ud800"], start=1))
    answer = await stream(client, path)
    assert terminals(path, answer.text) == 1
    assert "internal_error" in answer.text
    assert [(error.code, model) for error, model in telemetry.errors] == [("internal_error", "small")]
    assert engine.running == 0


@every_stream
async def test_an_answer_without_an_end_is_a_500(
    client: httpx.AsyncClient, engine: ScriptedEngine, telemetry: ScriptedTelemetry, path: str
) -> None:
    engine.plays()
    answer = await stream(client, path)
    assert answer.status_code == 500
    assert error_of(answer)["code"] == "internal_error"
    assert answer.headers["x-request-id"] in answer.text
    assert len(telemetry.errors) == 1


async def test_the_events_of_a_chunk_are_one_write(engine: ScriptedEngine, telemetry: ScriptedTelemetry) -> None:
    engine.plays(chunk(["a"], None), chunk(["b", "c", "d"], start=1))
    connection = Connection("/generate_stream", {"prompt": "hi"})
    await serve(engine, telemetry, connection)
    bodies = [message["body"] for message in connection.sent[1:]]
    assert [body.count(b"data: ") for body in bodies] == [1, 3, 0]
    assert [message["more_body"] for message in connection.sent[1:]] == [True, True, False]


async def test_the_steps_of_one_stream_share_a_context(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    seen: ContextVar[str] = ContextVar("seen", default="no")

    def script(request: GenerationRequest) -> Iterator[Step]:
        seen.set("yes")
        yield chunk(["a"], None)
        yield chunk([seen.get()])

    engine.script = script
    text = (await stream(client)).text
    assert events_of(text)[-1]["text"] == "ayes"
    assert seen.get() == "no"


@every_stream
async def test_a_stream_waits_for_a_sleeping_model_until_the_deadline(
    client: httpx.AsyncClient, engine: ScriptedEngine, path: str
) -> None:
    await stream(client, path)
    assert [request.wake_wait_s for request in engine.requests] == [None]
