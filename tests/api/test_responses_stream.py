"""The events of a streamed response: their order, their numbers, and what they add up to."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from hypothesis import given, settings, strategies as st
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from serve_app.core.events import Delta, FinishReason, ReasoningDelta, TextDelta, ToolCallDelta
from serve_app.errors import NotReady, QueueFull

from .scripted import BEAT, Connection, ScriptedEngine, ScriptedTelemetry, Step, chunk, serve, with_heartbeats
from .test_bodies import anything
from .test_tools import chunks

PATH = "/v1/responses"
TOOLS = [{"type": "function", "name": "f"}]
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)

# A letter for each event; an item that begins has the letter of its type.
LETTERS = {
    "response.created": "C",
    "response.in_progress": "P",
    "response.content_part.added": "+",
    "response.output_text.delta": "t",
    "response.output_text.done": "T",
    "response.reasoning_text.delta": "z",
    "response.reasoning_text.done": "Z",
    "response.function_call_arguments.delta": "a",
    "response.function_call_arguments.done": "A",
    "response.content_part.done": "-",
    "response.output_item.done": ".",
    "response.completed": "X",
    "response.incomplete": "I",
    "error": "E",
    "response.failed": "F",
}
ITEM_LETTERS = {"message": "m", "reasoning": "r", "function_call": "f"}
ITEMS = r"(r\+z+Z-\.|m\+t*T-\.|fa*A\.)"
COMPLETE = re.compile(rf"CP{ITEMS}+[XI]")
FAILED = re.compile(rf"CP{ITEMS}*(r\+z*|m\+t*|fa*)?EF")


def events(text: str) -> list[dict[str, Any]]:
    """The data of every event, each of which has the name of its type and the form that OpenAI publishes."""
    assert text.endswith("\n\n")
    found = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        if block.startswith(":"):
            continue
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        EVENT.validate_python(event)
        found.append(event)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def letters(found: Sequence[dict[str, Any]]) -> str:
    return "".join(
        ITEM_LETTERS[one["item"]["type"]] if one["type"] == "response.output_item.added" else LETTERS[one["type"]]
        for one in found
    )


async def streamed(client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    answer = await client.post(PATH, json={"input": "hi", "stream": True} | fields)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/event-stream"
    assert "[DONE]" not in answer.text
    return events(answer.text)


def joined(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items that a client makes of the events: every event must fit to the item that it is about."""
    items: list[dict[str, Any]] = []
    for event in found:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            items.append(event["item"])
        if "output_index" in event:
            assert event["output_index"] == len(items) - 1
            assert event.get("item_id", items[-1]["id"]) == items[-1]["id"]
            assert event.get("content_index", 0) == 0
        if kind == "content_part.added":
            items[-1]["content"].append(event["part"])
        elif kind == "function_call_arguments.delta":
            items[-1]["arguments"] += event["delta"]
        elif kind.endswith(".delta"):
            items[-1]["content"][0]["text"] += event["delta"]
            items[-1]["content"][0].setdefault("logprobs", []).extend(event.get("logprobs", []))
        elif kind == "function_call_arguments.done":
            assert (event["name"], event["arguments"]) == (items[-1]["name"], items[-1]["arguments"])
        elif kind.endswith("_text.done"):
            assert event["text"] == items[-1]["content"][0]["text"]
        elif kind == "content_part.done":
            assert event["part"]["text"] == items[-1]["content"][0]["text"]
        elif kind == "output_item.done":
            items[-1]["status"] = event["item"]["status"]
            assert plain(event["item"]) == plain(items[-1])
    return items


def plain(item: dict[str, Any]) -> dict[str, Any]:
    """An item without the empty list of log probabilities that a reasoning text has after `joined`."""
    content = [{**part, "logprobs": part.get("logprobs", [])} for part in item.get("content", [])]
    return item | {"content": content} if content else item


async def test_the_events_of_a_text(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.plays(chunk(["Par"], None), chunk(["is"], start=1))
    created, progress, added, part, *deltas, text, part_done, done, completed = await streamed(client)
    assert letters([created, progress, added, part, *deltas, text, part_done, done, completed]) == "CPm+ttT-.X"
    assert created["response"] == progress["response"]
    assert (created["response"]["status"], created["response"]["output"]) == ("in_progress", [])
    assert created["response"]["usage"] is None
    assert added["item"]["content"] == []
    assert part["part"] == {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    assert [delta["delta"] for delta in deltas] == ["Par", "is"]
    assert text["text"] == part_done["part"]["text"] == "Paris"
    assert completed["response"]["output"] == [done["item"]]
    assert completed["response"]["usage"]["output_tokens"] == 2
    assert completed["response"]["id"] == created["response"]["id"]


TEXTS = st.text(max_size=3)
# A kind and its pieces: reasoning, text, or a call whose first piece is in the delta with its name.
PARTS = st.lists(st.tuples(st.sampled_from("rmf"), st.lists(TEXTS, max_size=3)), max_size=5)


def deltas_of(parts: list[tuple[str, list[str]]]) -> list[Delta]:
    found: list[Delta] = []
    called = 0
    for kind, pieces in parts:
        if kind == "f":
            found.append(ToolCallDelta(called, "f", pieces[0] if pieces else ""))
            found += [ToolCallDelta(called, arguments=piece) for piece in pieces[1:]]
            called += 1
        else:
            found += [ReasoningDelta(piece) if kind == "r" else TextDelta(piece) for piece in pieces]
    return found


def expected(parts: list[tuple[str, list[str]]]) -> list[tuple[str, str]]:
    """The type and the text of each item."""
    found: list[tuple[str, str]] = []
    for kind, pieces in parts:
        text = "".join(pieces)
        if kind == "f" or (text and (not found or found[-1][0] != kind)):
            found.append((kind, text))
        elif text:
            found[-1] = (kind, found[-1][1] + text)
    return found or [("m", "")]


def summary(items: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    return [
        (ITEM_LETTERS[item["type"]], item["arguments"] if "arguments" in item else item["content"][0]["text"])
        for item in items
    ]


def without_ids(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in item.items() if name not in ("id", "call_id")} for item in items]


@with_heartbeats
@settings(anything, max_examples=40)
@given(
    parts=PARTS,
    cuts=st.lists(st.integers(1, 3), min_size=1),
    finish=st.sampled_from(FinishReason),
    logprobs=st.booleans(),
    broken=st.booleans(),
)
async def test_any_sequence_of_deltas_has_events_in_order(
    client: httpx.AsyncClient,
    engine: ScriptedEngine,
    parts: list[tuple[str, list[str]]],
    cuts: list[int],
    finish: FinishReason,
    logprobs: bool,
    broken: bool,
) -> None:
    answer: list[list[Delta]] = [[]]
    for number, delta in enumerate(deltas_of(parts)):
        answer[-1].append(delta)
        if number % cuts[number % len(cuts)] == 0:
            answer.append([])
    steps: list[Step] = [*chunks(answer, finish)]
    fields = {"include": ["message.output_text.logprobs"]} if logprobs else {}
    if broken:
        steps[-1] = NotReady("The replica was lost.", retry_after_s=1)
        steps.insert(0, BEAT)  # the response has begun
    engine.plays(*steps)
    found = await streamed(client, tools=TOOLS, **fields)
    response = found[-1]["response"]
    items = joined(found)
    if broken:
        assert FAILED.fullmatch(letters(found))
        assert summary(response["output"]) == summary(items)
        return
    assert COMPLETE.fullmatch(letters(found))
    assert found[-1]["type"] == f"response.{response['status']}"
    assert (response["status"] == "incomplete") == (finish is FinishReason.LENGTH)
    assert [plain(item) for item in response["output"]] == [plain(item) for item in items]
    assert summary(items) == expected(parts)
    assert len({item["id"] for item in items}) == len(items)
    whole = (await client.post(PATH, json={"input": "hi", "tools": TOOLS} | fields)).json()
    assert without_ids(whole["output"]) == without_ids(response["output"])
    assert whole["usage"] == response["usage"]


async def test_log_probabilities_come_with_their_text(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.plays(*chunks([[TextDelta("a")], [], [TextDelta("bc")]]))
    found = await streamed(client, include=["message.output_text.logprobs"])
    tokens = [[one["token"] for one in event["logprobs"]] for event in found if event["type"].endswith("text.delta")]
    assert tokens == [["<0>"], ["<1>", "<2>"]]
    (done,) = (event for event in found if event["type"] == "response.output_text.done")
    assert [one["token"] for one in done["logprobs"]] == ["<0>", "<1>", "<2>"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NotReady("Lost.", retry_after_s=1), "server_error"),
        (QueueFull("Full.", retry_after_s=1), "rate_limit_exceeded"),
    ],
)
async def test_a_late_error_fails_the_response(
    client: httpx.AsyncClient, engine: ScriptedEngine, telemetry: ScriptedTelemetry, error: Any, code: str
) -> None:
    engine.plays(chunk(["Par"], None), error)
    found = await streamed(client)
    assert letters(found) == "CPm+tEF"
    *_, event, failed = found
    assert (event["message"], event["code"], event["param"]) == (error.message, error.code, None)
    assert event["error"]["message"] == error.message
    response = failed["response"]
    assert (response["status"], response["error"]) == ("failed", {"code": code, "message": error.message})
    assert (response["output"][0]["status"], response["output"][0]["content"][0]["text"]) == ("incomplete", "Par")
    assert (await client.get(f"{PATH}/{response['id']}")).status_code == 404
    assert len(telemetry.errors) == 2


@with_heartbeats
async def test_an_error_before_the_first_token_is_an_event_after_a_heartbeat(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    """OpenAI's client needs response.created before every other event."""
    engine.plays(BEAT, NotReady("Lost.", retry_after_s=1))
    assert letters(await streamed(client)) == "CPEF"


async def test_a_response_is_stored_before_its_last_event(client: httpx.AsyncClient) -> None:
    completed = (await streamed(client))[-1]["response"]
    assert (await client.get(f"{PATH}/{completed['id']}")).json() == completed


async def test_a_stream_whose_client_leaves_is_not_stored(engine: ScriptedEngine, telemetry: ScriptedTelemetry) -> None:
    engine.plays(chunk(["a"], None), None)
    connection = Connection(PATH, {"input": "hi", "stream": True})
    call = serve(engine, telemetry, connection)
    await connection.written.wait()
    connection.disconnect.set()
    await call
    assert engine.closed == [engine.requests[0].id]
    assert (telemetry.stored, telemetry.errors) == ((0, 0), [])
