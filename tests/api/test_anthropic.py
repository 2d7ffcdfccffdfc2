"""Anthropic's messages: answers, streams, errors and token counts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import httpx
import pytest
from hypothesis import given, strategies as st

from serve_app.api.app import create_app
from serve_app.core.events import Delta, FinishReason, ReasoningDelta, TextDelta, ToolCallDelta
from serve_app.core.queries import ModelState, ModelStatus, Tokenize
from serve_app.core.requests import ChatMessage, ChatPrompt
from serve_app.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    NotReady,
    PromptTooLong,
    QueueFull,
    ServeAppError,
)

from .scripted import (
    BEAT,
    Connection,
    ScriptedEngine,
    ScriptedTelemetry,
    anthropic_error_of,
    app_config,
    check_anthropic_error,
    chunk,
    serve,
    with_heartbeats,
)
from .test_bodies import anything
from .test_tools import Answer, calls, chunks
from .toy import toy

PATH, COUNT = "/v1/messages", "/v1/messages/count_tokens"
HI: dict[str, Any] = {"role": "user", "content": "hi"}
BODY: dict[str, Any] = {"messages": [HI], "max_tokens": 100}
CALLS = [("weather", '{"city": "Łódź"}'), ("clock", "{}")]
REASONED: Answer = [[ReasoningDelta("H")], [ReasoningDelta("m.")], [], [TextDelta("Yes.")], []]


async def whole(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    answer = await client.post(PATH, json=BODY | fields)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def named_events(text: str) -> list[dict[str, Any]]:
    """The data of every event, which has the event's name as its type."""
    assert text.endswith("\n\n")
    found = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        document = json.loads(data.removeprefix("data: "))
        assert (name, data[:6]) == (f"event: {document['type']}", "data: ")
        found.append(document)
    return found


async def streamed(client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    """Every event of a stream except the pings."""
    answer = await client.post(PATH, json=BODY | fields | {"stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/event-stream"
    return [event for event in named_events(answer.text) if event != {"type": "ping"}]


# For each type of a block: the type of its deltas, and the field that they extend.
PIECES = {
    "text": ("text_delta", "text", "text"),
    "thinking": ("thinking_delta", "thinking", "thinking"),
    "tool_use": ("input_json_delta", "partial_json", "input"),
}


def message_of(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The message that a stream makes up for a client. Checks the order and the indices of the events."""
    start, *blocks, delta, stop = events
    assert (start["type"], delta["type"], stop) == ("message_start", "message_delta", {"type": "message_stop"})
    message: dict[str, Any] = start["message"]
    assert (message["content"], message["stop_reason"], message["stop_sequence"]) == ([], None, None)
    assert message["usage"]["output_tokens"] == 0
    content: list[dict[str, Any]] = []
    remaining = iter(blocks)
    for event in remaining:
        assert (event["type"], event["index"]) == ("content_block_start", len(content))
        content.append(block_of(event, remaining))
    return {**message, "content": content, **delta["delta"], "usage": delta["usage"]}


def block_of(start: dict[str, Any], events: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """The block that begins with `start`. Takes its events, up to its end."""
    block: dict[str, Any] = start["content_block"]
    kind, source, target = PIECES[block["type"]]
    text = ""
    for event in events:
        assert event["index"] == start["index"]
        if event["type"] == "content_block_stop":
            break
        assert event["type"] == "content_block_delta"
        assert "signature" not in block or not block["signature"], "the signature is the last delta"
        if event["delta"]["type"] == "signature_delta":
            assert block["type"] == "thinking"
            block["signature"] = event["delta"]["signature"]
        else:
            assert event["delta"] == {"type": kind, source: event["delta"][source]}
            text += event["delta"][source]
    else:
        raise AssertionError("the block has no end")
    if block["type"] != "tool_use":
        return block | {target: text}
    assert block["input"] == {}
    return block | {"input": parsed(text)}


def parsed(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return {}


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    """The message without its ids, which are checked."""
    assert message["id"].startswith("msg_")
    blocks = [dict(block) for block in message["content"]]
    ids = [block.pop("id") for block in blocks if block["type"] == "tool_use"]
    assert all(one.startswith("toolu_") for one in ids)
    assert len(set(ids)) == len(ids)
    return {name: value for name, value in message.items() if name != "id"} | {"content": blocks}


# Answers


async def test_a_whole_message(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.plays(replace(chunk(["some", " words"]), cached_tokens=2))
    assert await whole(client) == {
        "id": f"msg_{engine.requests[0].id}",
        "type": "message",
        "role": "assistant",
        "model": "small",
        "content": [{"type": "text", "text": "some words"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 1,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 2,
            "output_tokens": 2,
        },
    }


async def test_a_streamed_message(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.plays(*(replace(one, cached_tokens=2) for one in (chunk(["some"], None), chunk(["", " words"], start=1))))
    found = await streamed(client)
    usage = {"input_tokens": 1, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 2, "output_tokens": 3}
    message: dict[str, Any] = {
        "id": f"msg_{engine.requests[0].id}",
        "type": "message",
        "role": "assistant",
        "model": "small",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": usage | {"output_tokens": 0},
    }
    assert found == [
        {"type": "message_start", "message": message},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "some"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": " words"}},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None}, "usage": usage},
        {"type": "message_stop"},
    ]


async def test_calls_are_blocks_with_their_input(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.plays(*chunks(calls(*CALLS, text="Well.")))
    message = await whole(client)
    assert message["stop_reason"] == "tool_use"
    assert without_ids(message)["content"] == [
        {"type": "text", "text": "Well."},
        {"type": "tool_use", "name": "weather", "input": {"city": "Łódź"}},
        {"type": "tool_use", "name": "clock", "input": {}},
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"city": "Łó', {}),
        ('{"days": 3, "city": "Ł', {"days": 3}),
        ('{"days": [1, 2', {"days": [1, 2]}),
        ("", {}),
        ("[1]", {}),
        ('{"days": 1e999}', {}),
        ('{"days": NaN}', {}),
        ('{"city": "\\ud800"}', {}),
        ("days: 3", {}),
        ('{"a":' * 10_000, {}),
    ],
)
async def test_the_input_of_a_cut_off_call_has_what_can_be_parsed(
    client: httpx.AsyncClient, engine: ScriptedEngine, arguments: str, expected: object
) -> None:
    engine.plays(*chunks(calls(("weather", arguments), size=1000), FinishReason.LENGTH))
    (block,) = (await whole(client))["content"]
    assert (block["name"], block["input"]) == ("weather", expected)


async def test_reasoning_is_a_block_with_a_signature(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.plays(*chunks(REASONED))
    message = await whole(client)
    thinking, text = message["content"]
    assert thinking == {"type": "thinking", "thinking": "Hm.", "signature": thinking["signature"]}
    assert thinking["signature"]
    assert text == {"type": "text", "text": "Yes."}
    assert message["usage"]["output_tokens_details"] == {"thinking_tokens": 3}
    assert engine.requests[0].separate_reasoning
    # The answer can be sent back.
    await whole(client, messages=[HI, {"role": "assistant", "content": message["content"]}, HI])
    prompt = engine.requests[1].prompt
    assert isinstance(prompt, ChatPrompt)
    assert prompt.messages[1] == ChatMessage("assistant", "Yes.", reasoning="Hm.")


async def test_reasoning_can_be_omitted(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.plays(*chunks(REASONED))
    thinking = {"type": "enabled", "budget_tokens": 1024, "display": "omitted"}
    message = await whole(client, thinking=thinking)
    assert message["content"][0]["thinking"] == ""
    assert message["content"][0]["signature"]
    assert without_ids(message_of(await streamed(client, thinking=thinking))) == without_ids(message)


@pytest.mark.parametrize(
    ("answer", "finish", "stopped_by", "expected"),
    [
        ([[TextDelta("a")]], FinishReason.STOP, None, ("end_turn", None)),
        ([[TextDelta("a")]], FinishReason.STOP, "x", ("stop_sequence", "x")),
        (calls(CALLS[0]), FinishReason.STOP, None, ("tool_use", None)),
        (calls(CALLS[0]), FinishReason.STOP, "x", ("stop_sequence", "x")),
        (calls(CALLS[0]), FinishReason.LENGTH, None, ("model_context_window_exceeded", None)),
        ([[TextDelta("a")]] * 100, FinishReason.LENGTH, None, ("max_tokens", None)),
        ([[TextDelta("a")]] * 99, FinishReason.LENGTH, None, ("model_context_window_exceeded", None)),
    ],
)
async def test_the_stop_reason(
    client: httpx.AsyncClient,
    engine: ScriptedEngine,
    answer: Answer,
    finish: FinishReason,
    stopped_by: str | None,
    expected: tuple[str, str | None],
) -> None:
    *first, last = chunks(answer, finish)
    *events, end = last.events
    engine.plays(*first, replace(last, events=(*events, replace(end, stopped_by=stopped_by))))
    for message in (await whole(client), message_of(await streamed(client))):
        assert (message["stop_reason"], message["stop_sequence"]) == expected


async def test_an_answer_without_text_has_no_blocks(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.plays(chunk([""]))
    assert (await whole(client))["content"] == []
    assert [event["type"] for event in await streamed(client)] == ["message_start", "message_delta", "message_stop"]


TEXTS = st.lists(st.text(max_size=4), max_size=3)
PARTS = st.lists(
    st.tuples(st.just("text"), TEXTS)
    | st.tuples(st.just("reasoning"), TEXTS)
    | st.tuples(st.just("call"), st.sampled_from(["", '{"a": "é\\n", "b": [1]}', "{}", '{"a', "[1]"])),
    max_size=6,
)


def deltas(parts: Sequence[tuple[str, Any]]) -> list[Delta]:
    """Deltas as an engine emits them: the first one of a call has its name, and calls are numbered."""
    found: list[Delta] = []
    number = -1
    for kind, value in parts:
        if kind == "call":
            number += 1
            found.append(ToolCallDelta(number, "f"))
            found += [ToolCallDelta(number, arguments=value[at : at + 5]) for at in range(0, len(value), 5)]
        else:
            found += [TextDelta(text) if kind == "text" else ReasoningDelta(text) for text in value]
    return found


@anything
@given(
    parts=PARTS,
    sizes=st.lists(st.integers(0, 3), min_size=1, max_size=8),
    finish=st.sampled_from(FinishReason),
    omitted=st.booleans(),
)
async def test_a_stream_makes_up_the_whole_message(
    client: httpx.AsyncClient,
    engine: ScriptedEngine,
    parts: list[tuple[str, Any]],
    sizes: list[int],
    finish: FinishReason,
    omitted: bool,
) -> None:
    """Tokens have any number of deltas. `message_of` checks the order of the events."""
    remaining, answer = deltas(parts), list[list[Delta]]()
    while remaining:
        size = sizes[len(answer) % len(sizes)] if any(sizes) else 1
        answer.append(remaining[:size])
        remaining = remaining[size:]
    engine.plays(*chunks([*answer, []], finish))
    thinking = {"thinking": {"type": "enabled", "display": "omitted"}} if omitted else {}
    message = await whole(client, **thinking)
    kinds = [block["type"] for block in message["content"]]
    assert kinds.count("tool_use") == sum(kind == "call" for kind, _ in parts)
    assert all(one != other or one == "tool_use" for one, other in pairwise(kinds))
    joined = message_of(await streamed(client, **thinking))
    for streamed_block, block in zip(joined["content"], message["content"], strict=True):
        if block["type"] == "tool_use" and not isinstance(streamed_block["input"], dict):
            streamed_block["input"] = {}  # the stream has the text as it was generated
    assert without_ids(joined) == without_ids(message)


# Heartbeats


@with_heartbeats
@pytest.mark.parametrize("state", [ModelState.READY, ModelState.LOADING])
async def test_a_silent_stream_has_pings(client: httpx.AsyncClient, engine: ScriptedEngine, state: ModelState) -> None:
    engine.statuses["small"] = ModelStatus("small", state)
    engine.plays(BEAT, chunk(["a"], None), BEAT, chunk(["b"], start=1))
    answer = await client.post(PATH, json=BODY | {"stream": True})
    kinds = [event["type"] for event in named_events(answer.text)]
    assert kinds[0] == "ping"
    assert "ping" in kinds[kinds.index("content_block_delta") :]
    assert kinds[-1] == "message_stop"
    assert "\n:" not in answer.text


# Errors


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (InvalidRequest("Wrong.", param="tools"), 400, "invalid_request_error"),
        (ModelNotFound("The model was removed.", param="model"), 404, "not_found_error"),
        (QueueFull("8 requests wait.", retry_after_s=1), 429, "rate_limit_error"),
        (NotReady("The model is being loaded.", retry_after_s=1), 529, "overloaded_error"),
        (DeadlineExceeded("The request was not finished after 600 s."), 504, "timeout_error"),
        (InternalError("The model failed on this request."), 500, "api_error"),
    ],
    ids=lambda value: value.code if isinstance(value, ServeAppError) else None,
)
async def test_every_error_has_its_status(
    engine: ScriptedEngine, telemetry: ScriptedTelemetry, error: ServeAppError, status: int, kind: str, stream: bool
) -> None:
    engine.plays(error)
    transport = httpx.ASGITransport(create_app(engine, telemetry, app_config()))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = await client.post(PATH, json=BODY | {"stream": stream})
    assert answer.status_code == status
    assert anthropic_error_of(answer) == (kind, error.message)
    assert answer.headers.get("retry-after") == (None if error.retry_after_s is None else "1")
    assert telemetry.errors == [(error, "small")]


@with_heartbeats
@pytest.mark.parametrize("early", [True, False])
async def test_an_error_after_the_start_is_an_event(
    client: httpx.AsyncClient, engine: ScriptedEngine, telemetry: ScriptedTelemetry, early: bool
) -> None:
    error = NotReady("The replica was lost.", retry_after_s=1)
    engine.plays(BEAT if early else chunk(["a"], None), error)
    answer = await client.post(PATH, json=BODY | {"stream": True})
    assert answer.status_code == 200
    *others, last = named_events(answer.text)
    assert check_anthropic_error(last, answer.headers["request-id"]) == ("overloaded_error", error.message)
    assert [one["type"] for one in others if one["type"] != "ping"] == (
        [] if early else ["message_start", "content_block_start", "content_block_delta"]
    )
    assert telemetry.errors == [(error, "small")]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            PromptTooLong("Shorten it.", "prompt", None, 70, 63),
            "prompt is too long: 70 tokens > 63 maximum. Shorten it.",
        ),
        (PromptTooLong("Shorten it.", "prompt"), "prompt is too long. Shorten it."),
    ],
)
async def test_a_prompt_that_is_too_long_has_the_words_of_anthropic(
    client: httpx.AsyncClient, engine: ScriptedEngine, error: ServeAppError, expected: str
) -> None:
    engine.plays(error)
    answer = await client.post(PATH, json=BODY)
    assert (answer.status_code, anthropic_error_of(answer)) == (400, ("invalid_request_error", expected))


async def test_an_engine_reports_the_size_of_a_prompt_that_is_too_long() -> None:
    async with toy() as (client, _):
        answer = await client.post(PATH, json=BODY | {"messages": [HI | {"content": "x" * 100}]})
    kind, message = anthropic_error_of(answer)
    assert (answer.status_code, kind) == (400, "invalid_request_error")
    assert message.startswith("prompt is too long: 1")
    assert " tokens > 63 maximum. This model's maximum context length is 64 tokens" in message


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", PATH, 405, "invalid_request_error"),
        ("GET", COUNT, 405, "invalid_request_error"),
        ("POST", "/v1/messages/batches", 404, "not_found_error"),
    ],
)
async def test_an_error_of_routing(client: httpx.AsyncClient, method: str, path: str, status: int, kind: str) -> None:
    answer = await client.request(method, path)
    assert (answer.status_code, anthropic_error_of(answer)[0]) == (status, kind)


@pytest.mark.parametrize("path", [PATH, COUNT])
async def test_an_error_of_the_body(
    client: httpx.AsyncClient, engine: ScriptedEngine, telemetry: ScriptedTelemetry, path: str
) -> None:
    for content, status, kind in (
        (b"{", 400, "invalid_request_error"),
        (b"[]", 400, "invalid_request_error"),
        (b" " * 30_000, 413, "request_too_large"),
    ):
        answer = await client.post(path, content=content)
        assert (answer.status_code, anthropic_error_of(answer)[0]) == (status, kind)
    assert len(telemetry.errors) == 3
    connection = Connection(path, None, parts=[])
    await serve(engine, telemetry, connection, upload_timeout_s=0.01)
    assert connection.status == 408
    assert json.loads(connection.text)["error"]["type"] == "timeout_error"


async def test_an_unexpected_exception_is_opaque(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.plays(RuntimeError("secret"))
    answer = await client.post(PATH, json=BODY)
    assert (answer.status_code, anthropic_error_of(answer)[0]) == (500, "api_error")
    assert "secret" not in answer.text


async def test_the_headers_of_anthropic(client: httpx.AsyncClient) -> None:
    headers = {"x-api-key": "any", "anthropic-version": "2023-06-01", "anthropic-beta": "a,b", "x-request-id": "mine"}
    for body, status in ((BODY, 200), (BODY | {"stream": True}, 200), ({}, 400)):
        answer = await client.post(PATH + "?beta=true", json=body, headers=headers)
        assert answer.status_code == status
        assert (answer.headers["request-id"], answer.headers["x-request-id"]) == ("mine", "mine")


# Token counts


async def test_tokens_are_counted(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    fields = {"model": "org/large", "system": "Be brief.", "tools": [{"name": "f", "input_schema": {"type": "object"}}]}
    answer = await client.post(COUNT, json={"messages": [HI], **fields})
    assert (answer.status_code, answer.json()) == (200, {"input_tokens": 2})
    await client.post(PATH, json=BODY | fields)
    assert engine.queries == [("org/large", Tokenize(engine.requests[0].prompt))]


async def test_an_error_of_a_token_count(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.results[Tokenize] = NotReady("The model is being loaded.", retry_after_s=3)
    answer = await client.post(COUNT, json={"messages": [HI]})
    assert (answer.status_code, answer.headers["retry-after"]) == (529, "3")
    assert anthropic_error_of(answer) == ("overloaded_error", "The model is being loaded.")
    answer = await client.post(COUNT, json=BODY)
    assert (answer.status_code, "Unknown field 'max_tokens'" in answer.text) == (400, True)


# The same conversation in OpenAI's API


async def test_a_conversation_has_the_answer_of_a_chat() -> None:
    messages = [HI, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "so"}]
    async with toy() as (client, engine):
        fields = {"messages": messages, "max_tokens": 8, "temperature": 0}
        message = (await client.post(PATH, json=fields)).json()
        chat = (await client.post("/v1/chat/completions", json=fields)).json()
    anthropic, openai = engine.requests
    assert (anthropic.prompt, anthropic.params) == (openai.prompt, openai.params)
    assert message["content"][0]["text"] == chat["choices"][0]["message"]["content"] != ""
    assert message["stop_reason"] == "max_tokens"
