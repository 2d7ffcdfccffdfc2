from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextvars import ContextVar

import httpx
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from serve_app.api.app import create_app
from serve_app.core.events import Chunk, FinishReason
from serve_app.core.requests import GenerationRequest
from serve_app.errors import DeadlineExceeded, NotReady

from .scripted import BEAT, ScriptedGateway, Step, Wire, app_config, chunk, frames

PATHS: dict[str, dict[str, object]] = {
    "/generate_stream": {"prompt": "hi"},
    "/v1/completions": {"prompt": "hi", "stream": True},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "stream": True},
}
every_stream = pytest.mark.parametrize("path", PATHS)


async def stream(client: httpx.AsyncClient, path: str = "/generate_stream", **fields: object) -> httpx.Response:
    return await client.post(path, json=PATHS[path] | fields)


def terminals(path: str, text: str) -> int:
    """How many frames of a stream end it."""
    found = frames(text)
    if path == "/generate_stream":
        return sum(frame["finished"] for frame in found)
    assert found[-1] == "[DONE]"
    ends = [f for f in found[:-1] if "error" in f or any(c["finish_reason"] for c in f["choices"])]
    return len(ends)


async def test_frames_of_a_stream(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    gateway.plays(chunk(["bright"], None), chunk([" and", ""], FinishReason.LENGTH, start=1))
    answer = await stream(client)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    assert "content-length" not in answer.headers
    first, second, last = frames(answer.text)
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
    assert gateway.completed == 1
    assert gateway.refusals == []


async def test_text_can_be_left_out_and_logprobs_added(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    gateway.plays(chunk(["a", "b"]))
    found = frames((await stream(client, include_text=False, logprobs=2)).text)
    assert all("text" not in frame for frame in found)
    assert [frame["logprobs"]["token"] for frame in found] == ["a", "b"]


async def test_line_breaks_stay_inside_a_frame(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    nasty = "a\nb\r\n\x85\u2028\u2029\x0b\x0cé😀"
    gateway.plays(chunk([nasty]))
    answer = await stream(client)
    assert frames(answer.text)[0]["token"] == nasty
    assert len(answer.text.splitlines()) == 2
    assert "é😀" in answer.text


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.text(max_size=8), min_size=1, max_size=4), min_size=1, max_size=6), st.sampled_from([*PATHS])
)
async def test_tokens_join_to_the_text(
    client: httpx.AsyncClient, gateway: ScriptedGateway, flushes: list[list[str]], path: str
) -> None:
    *head, tail = flushes
    gateway.plays(*(chunk(texts, None) for texts in head), chunk(tail))
    text = (await stream(client, path)).text
    whole = "".join(token for flush in flushes for token in flush)
    assert terminals(path, text) == 1
    found = [frame for frame in frames(text) if frame != "[DONE]"]
    if path == "/generate_stream":
        assert "".join(frame["token"] for frame in found) == found[-1]["text"] == whole
        assert len(found) == sum(map(len, flushes))
    elif path == "/v1/completions":
        assert "".join(frame["choices"][0]["text"] for frame in found) == whole
    else:
        assert "".join(frame["choices"][0]["delta"]["content"] for frame in found) == whole


@every_stream
async def test_an_error_within_the_first_wait_keeps_its_status(gateway: ScriptedGateway, path: str) -> None:
    gateway.plays(0.001, NotReady("loading; try again", retry_after_s=4))
    transport = httpx.ASGITransport(create_app(gateway, app_config(heartbeat_s=10)))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = await stream(client, path)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "4"
    assert len(gateway.refusals) == 1


@every_stream
@pytest.mark.parametrize("early", [True, False])
async def test_an_error_after_the_start_travels_in_band(
    client: httpx.AsyncClient, gateway: ScriptedGateway, path: str, early: bool
) -> None:
    error = DeadlineExceeded("600 s are over; ask for fewer tokens")
    gateway.plays(BEAT if early else chunk(["a"], None), error)
    answer = await stream(client, path)
    assert answer.status_code == 200
    assert terminals(path, answer.text) == 1
    assert gateway.refusals == [(error, "small")]
    found = frames(answer.text)
    if path == "/generate_stream":
        assert "event: error\ndata: " in answer.text
        told = {"code": "deadline_exceeded", "message": error.message, "param": None}
        assert found[-1] == {"error": {**told, "request_id": answer.headers["x-request-id"]}, "finished": True}
    else:
        told = {"message": error.message, "type": "server_error", "param": None, "code": "deadline_exceeded"}
        assert found[-2:] == [{"error": told}, "[DONE]"]


@every_stream
@pytest.mark.parametrize("word", ["warming", "queued"])
async def test_silence_is_filled_with_comments(
    client: httpx.AsyncClient, gateway: ScriptedGateway, path: str, word: str
) -> None:
    gateway.word = word
    gateway.plays(BEAT, chunk(["a"], None), BEAT, chunk(["b"], start=1))
    text = (await stream(client, path)).text
    beat = f": {word}\n\n"
    assert text.startswith(beat)
    head, _, tail = text.partition("data: ")
    assert set(head.split("\n\n")) == {f": {word}", ""}
    assert beat in tail
    assert terminals(path, text) == 1


@every_stream
@pytest.mark.parametrize("after", [0.05, RuntimeError("late"), NotReady("late"), chunk(["again"])])
async def test_nothing_follows_the_terminal_frame(
    client: httpx.AsyncClient, gateway: ScriptedGateway, path: str, after: float | Exception | Chunk
) -> None:
    gateway.plays(chunk(["a"]), after)
    text = (await stream(client, path)).text
    assert terminals(path, text) == 1
    assert "again" not in text
    assert ": warming" not in text
    assert gateway.refusals == []


@every_stream
@pytest.mark.parametrize("fault", [ValueError("secret"), OSError("secret"), asyncio.CancelledError("secret"), None])
async def test_a_fault_of_ours_mid_stream_is_opaque(
    client: httpx.AsyncClient,
    gateway: ScriptedGateway,
    path: str,
    fault: BaseException | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """None: the gateway breaks its contract and just ends."""
    gateway.plays(chunk(["a"], None), *([] if fault is None else [fault]))
    with caplog.at_level(logging.ERROR):
        answer = await stream(client, path)
    assert terminals(path, answer.text) == 1
    assert "internal_error" in answer.text
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] in answer.text
    assert answer.headers["x-request-id"] in caplog.text
    assert len(gateway.refusals) == 1


@every_stream
async def test_a_fault_of_ours_before_the_start_is_500(
    client: httpx.AsyncClient, gateway: ScriptedGateway, path: str
) -> None:
    gateway.plays()
    answer = await stream(client, path)
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert answer.headers["x-request-id"] in answer.text
    assert len(gateway.refusals) == 1


async def test_frames_of_one_chunk_are_one_write(gateway: ScriptedGateway) -> None:
    gateway.plays(chunk(["a"], None), chunk(["b", "c", "d"], start=1))
    wire = Wire("/generate_stream", {"prompt": "hi"})
    await create_app(gateway, app_config())(wire.scope, wire.receive, wire.send)
    bodies = [message["body"] for message in wire.sent[1:]]
    assert [body.count(b"data: ") for body in bodies] == [1, 3, 0]
    assert [message["more_body"] for message in wire.sent[1:]] == [True, True, False]


async def test_the_steps_of_one_stream_share_a_context(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    seen: ContextVar[str] = ContextVar("seen", default="no")

    def script(request: GenerationRequest) -> Iterator[Step]:
        seen.set("yes")
        yield chunk(["a"], None)
        yield chunk([seen.get()])

    gateway.script = script
    text = (await stream(client)).text
    assert frames(text)[-1]["text"] == "ayes"
    assert seen.get() == "no"


@every_stream
async def test_a_stream_waits_for_a_sleeping_model_as_long_as_the_request_may_take(
    client: httpx.AsyncClient, gateway: ScriptedGateway, path: str
) -> None:
    await stream(client, path)
    assert gateway.warm_waits == [None]
