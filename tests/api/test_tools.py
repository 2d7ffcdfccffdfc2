"""Tools of a chat: the choice that reaches the engine, invalid fields, and the encoding of tool calls."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import replace
from typing import Any

import httpx
import httpx2
import openai
import pytest
from hypothesis import given, strategies as st

from serve_app.api.app import create_app
from serve_app.core.events import Chunk, Delta, FinishReason, ReasoningDelta, TextDelta, ToolCallDelta
from serve_app.core.requests import ChatMessage, ChatPrompt, GenerationRequest, Tool, ToolCall, ToolChoice
from serve_app.errors import InvalidRequest

from .scripted import ScriptedEngine, ScriptedTelemetry, app_config, assert_invalid, error_of, events_of, tokens
from .test_bodies import anything

PATH = "/v1/chat/completions"
PLACE = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Now.", "parameters": PLACE}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
HI = {"role": "user", "content": "hi"}
CHAT: dict[str, Any] = {"messages": [HI], "tools": [WEATHER, CLOCK]}
CALLS = [("weather", '{"city": "Łódź"}'), ("clock", "{}")]

# The deltas of each token of an answer.
Answer = Sequence[Sequence[Delta]]


def chunks(answer: Answer, finish: FinishReason = FinishReason.STOP) -> list[Chunk]:
    """An answer in chunks of two tokens. The text of token i is "<i>", which no dialect may show beside deltas."""
    events = tokens([f"<{i}>" for i in range(len(answer))], finish)
    events = [replace(event, deltas=tuple(deltas)) for event, deltas in zip(events, answer, strict=True)]
    return [Chunk(tuple(events[at : at + 2]), 3, 0.002) for at in range(0, len(events), 2)]


def calls(*pairs: tuple[str, str], text: str = "", size: int = 3) -> Answer:
    """A text and tool calls: one token begins a call, one has each `size` characters, one ends it without a delta."""
    answer: list[list[Delta]] = [[TextDelta(text)]] if text else []
    for index, (name, arguments) in enumerate(pairs):
        pieces = [arguments[at : at + size] for at in range(0, len(arguments), size)]
        answer.append([ToolCallDelta(index, name)])
        answer += [[ToolCallDelta(index, arguments=piece)] for piece in pieces]
        answer.append([])
    return answer


async def choices(client: httpx.AsyncClient, **fields: Any) -> list[Any]:
    answer = await client.post(PATH, json=CHAT | fields)
    assert answer.status_code == 200, answer.text
    found: list[Any] = answer.json()["choices"]
    return found


async def streamed(client: httpx.AsyncClient, **fields: Any) -> list[Any]:
    """The choice of every event."""
    answer = await client.post(PATH, json=CHAT | fields | {"stream": True})
    assert answer.status_code == 200, answer.text
    *found, end = events_of(answer.text)
    assert end == "[DONE]"
    return [event["choices"][0] for event in found]


def message(deltas: Iterable[Any]) -> dict[str, Any]:
    """The message that the deltas make up for a client, without the ids of the calls."""
    content, found = "", list[dict[str, str]]()
    for delta in deltas:
        content += delta.get("content") or ""
        for call in delta.get("tool_calls", []):
            if "id" in call:
                assert call["index"] == len(found)
                assert call["type"] == "function"
                found.append({"name": call["function"]["name"], "arguments": call["function"]["arguments"]})
            else:
                assert call["index"] == len(found) - 1
                found[-1]["arguments"] += call["function"]["arguments"]
    return {"content": content, "calls": found}


# Answers


async def test_calls_of_a_whole_answer(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.plays(*chunks(calls(*CALLS)))
    (choice,) = await choices(client)
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"] == {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": call["id"], "type": "function", "function": {"name": name, "arguments": arguments}}
            for call, (name, arguments) in zip(choice["message"]["tool_calls"], CALLS, strict=True)
        ],
    }
    ids = [call["id"] for call in choice["message"]["tool_calls"]]
    assert all(one.startswith("call_") for one in ids)
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("size", [1, 4, 1000])
async def test_a_stream_has_the_same_calls(client: httpx.AsyncClient, engine: ScriptedEngine, size: int) -> None:
    engine.plays(*chunks(calls(*CALLS, text="One moment.", size=size)))
    opening, *found = await streamed(client)
    assert opening["delta"] == {"role": "assistant", "content": ""}
    assert message(choice["delta"] for choice in found) == {
        "content": "One moment.",
        "calls": [{"name": name, "arguments": arguments} for name, arguments in CALLS],
    }
    assert [choice["finish_reason"] for choice in found] == [None] * (len(found) - 1) + ["tool_calls"]


async def test_the_events_of_a_streamed_call(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.plays(*chunks([[TextDelta("Hi")], [], [ToolCallDelta(0, "f")], [ToolCallDelta(0, arguments="{}")], []]))
    _, *found = await streamed(client)
    call_id = found[1]["delta"]["tool_calls"][0]["id"]
    first = {"index": 0, "id": call_id, "type": "function", "function": {"name": "f", "arguments": ""}}
    assert [choice["delta"] for choice in found] == [
        {"content": "Hi"},
        {"tool_calls": [first]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]},
        {},
    ]


DELTAS = st.lists(st.tuples(st.text(max_size=3), st.lists(st.text(min_size=1, max_size=3), max_size=3)), max_size=4)


@anything
@given(parts=DELTAS, cuts=st.lists(st.integers(1, 3), min_size=1), finish=st.sampled_from(FinishReason))
async def test_any_division_into_tokens_has_the_same_message(
    client: httpx.AsyncClient,
    engine: ScriptedEngine,
    parts: list[tuple[str, list[str]]],
    cuts: list[int],
    finish: FinishReason,
) -> None:
    """Each part is a text and the pieces of the arguments of a call after it."""
    deltas: list[Delta] = []
    for index, (text, pieces) in enumerate(parts):
        deltas += [TextDelta(text), ToolCallDelta(index, "f"), *(ToolCallDelta(index, "", piece) for piece in pieces)]
    answer: list[list[Delta]] = [[]]
    for number, delta in enumerate(deltas):
        answer[-1].append(delta)
        if number % cuts[number % len(cuts)] == 0:
            answer.append([])
    engine.plays(*chunks(answer, finish))
    (choice,) = await choices(client)
    _, *found = await streamed(client)
    whole = choice["message"]
    functions = [call["function"] for call in whole.get("tool_calls", [])]
    content = "".join(text for text, _ in parts)
    assert message(one["delta"] for one in found) == {"content": content, "calls": functions}
    assert (whole["content"] or "", [call["arguments"] for call in functions]) == (
        content,
        ["".join(pieces) for _, pieces in parts],
    )
    expected = "tool_calls" if parts and finish is FinishReason.STOP else finish
    assert found[-1]["finish_reason"] == choice["finish_reason"] == expected


async def test_an_answer_without_calls_is_text(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    """The engine holds text back that can still become a call."""
    engine.plays(*chunks([[TextDelta("Just ")], [], [TextDelta("<text")]]))
    (choice,) = await choices(client)
    assert (choice["message"], choice["finish_reason"]) == ({"role": "assistant", "content": "Just <text"}, "stop")
    found = await streamed(client)
    assert message(choice["delta"] for choice in found)["content"] == "Just <text"
    assert found[-1]["finish_reason"] == "stop"


async def test_reasoning_is_apart_from_the_content(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    """Under both names that clients know. Tokens without a delta belong to the reasoning until the content begins."""
    engine.plays(*chunks([[], [ReasoningDelta("H")], [ReasoningDelta("m.")], [], [TextDelta("Yes.")], []]))
    answer = (await client.post(PATH, json=CHAT)).json()
    expected = {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm.", "reasoning": "Hm."}
    assert answer["choices"][0]["message"] == expected
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 4}
    deltas = [choice["delta"] for choice in await streamed(client)]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm."
    assert "".join(delta.get("reasoning", "") for delta in deltas) == "Hm."
    assert message(deltas)["content"] == "Yes."


async def test_an_answer_at_its_maximum_length_has_the_finish_reason_length(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    engine.plays(*chunks(calls(("weather", '{"ci')), FinishReason.LENGTH))
    (choice,) = await choices(client)
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"ci'}
    assert (await streamed(client))[-1]["finish_reason"] == "length"


async def test_each_of_several_answers_has_its_own_calls(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    def script(request: GenerationRequest) -> list[Chunk]:
        return chunks(calls(*CALLS[: request.index], text="" if request.index else "none"))

    engine.script = script
    found = await choices(client, n=3)
    assert [len(choice["message"].get("tool_calls", [])) for choice in found] == [0, 1, 2]
    assert [choice["finish_reason"] for choice in found] == ["stop", "tool_calls", "tool_calls"]
    events = await streamed(client, n=3)
    for index in range(3):
        own = [choice for choice in events if choice["index"] == index]
        assert len(message(choice["delta"] for choice in own)["calls"]) == index
        assert own[-1]["finish_reason"] == found[index]["finish_reason"]


async def test_every_token_has_logprobs_and_an_id(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    answer = calls(*CALLS, text="So ")
    engine.plays(*chunks(answer))
    (choice,) = await choices(client, logprobs=True, return_token_ids=True)
    texts, ids = [f"<{i}>" for i in range(len(answer))], list(range(len(answer)))
    assert [token["token"] for token in choice["logprobs"]["content"]] == texts
    assert choice["token_ids"] == ids
    _, *found = await streamed(client, logprobs=True, return_token_ids=True)
    assert [token["token"] for one in found for token in one["logprobs"]["content"]] == texts
    assert [token for one in found for token in one["token_ids"]] == ids


@pytest.mark.parametrize("size", [1, 1000])
async def test_a_call_of_the_older_form(client: httpx.AsyncClient, engine: ScriptedEngine, size: int) -> None:
    engine.plays(*chunks(calls(CALLS[0], size=size)))
    fields = {"tools": None, "functions": [WEATHER["function"]]}
    (choice,) = await choices(client, **fields)
    call = {"name": CALLS[0][0], "arguments": CALLS[0][1]}
    assert choice["message"] == {"role": "assistant", "content": None, "function_call": call}
    assert choice["finish_reason"] == "function_call"
    found = await streamed(client, **fields)
    parts = [one["delta"]["function_call"] for one in found if "function_call" in one["delta"]]
    assert [part["name"] for part in parts if "name" in part] == ["weather"]
    assert "".join(part["arguments"] for part in parts) == CALLS[0][1]
    assert found[-1]["finish_reason"] == "function_call"


async def test_reasoning_can_be_left_out(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.plays(*chunks([[ReasoningDelta("Hm.")], [TextDelta("Yes.")]]))
    (choice,) = await choices(client, include_reasoning=False)
    assert choice["message"] == {"role": "assistant", "content": "Yes."}
    found = await streamed(client, include_reasoning=False)
    assert not any("reasoning" in name for one in found for name in one["delta"])


async def test_a_token_with_two_deltas_is_two_events(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.plays(*chunks([[TextDelta("So"), ToolCallDelta(0, "f"), ToolCallDelta(0, arguments="{}")]]))
    _, *found = await streamed(client, logprobs=True, return_token_ids=True)
    assert [list(choice["delta"]) for choice in found] == [["content"], ["tool_calls"], ["tool_calls"]]
    assert [choice["token_ids"] for choice in found] == [[0], [], []]
    assert [len(choice["logprobs"]["content"]) for choice in found] == [1, 0, 0]
    assert [choice["finish_reason"] for choice in found] == [None, None, "tool_calls"]
    assert ["stop_reason" in choice for choice in found] == [False, False, True]


async def test_a_token_without_deltas_is_no_event(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.plays(*chunks(calls(CALLS[0], size=1)))
    assert all(choice["delta"] or choice["finish_reason"] for choice in await streamed(client))


# The request to the engine


async def test_tools_reach_the_template_in_openai_form(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await choices(client)
    prompt = engine.requests[0].prompt
    assert isinstance(prompt, ChatPrompt)
    plain = {"name": "clock", "description": "", "parameters": {"type": "object", "properties": {}}}
    assert [json.loads(tool) for tool in prompt.tools] == [WEATHER, {"type": "function", "function": plain}]


def choice_of(*numbers: int, required: bool = False, parallel: bool = True) -> ToolChoice:
    """The choice among some of the tools of CHAT."""
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    tools = (
        Tool("weather", json.dumps(PLACE), "tools[0].function.parameters"),
        Tool("clock", json.dumps(nothing), "tools[1].function.parameters"),
    )
    return ToolChoice(tuple(tools[number] for number in numbers), required, parallel)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, choice_of(0, 1)),
        ({"tool_choice": "auto", "parallel_tool_calls": True}, choice_of(0, 1)),
        ({"tool_choice": "auto", "parallel_tool_calls": False}, choice_of(0, 1, parallel=False)),
        ({"tool_choice": "required"}, choice_of(0, 1, required=True)),
        ({"tool_choice": "required", "parallel_tool_calls": False}, choice_of(0, 1, required=True, parallel=False)),
        (
            {"tool_choice": {"type": "function", "function": {"name": "clock"}}},
            choice_of(1, required=True, parallel=False),
        ),
        ({"tool_choice": "none"}, None),
        ({"tools": None}, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_the_choice_reaches_the_engine(
    client: httpx.AsyncClient, engine: ScriptedEngine, fields: dict[str, Any], expected: ToolChoice | None, stream: bool
) -> None:
    await client.post(PATH, json=CHAT | fields | {"stream": stream})
    (request,) = engine.requests
    assert request.tool_choice == expected
    assert request.params.grammar is None
    assert engine.queries == []


async def test_tools_that_may_not_be_called_are_only_shown(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    (choice,) = await choices(client, tool_choice="none", response_format={"type": "json_object"})
    assert choice["message"] == {"role": "assistant", "content": "some words"}
    request = engine.requests[0]
    assert request.params.grammar is not None
    assert request.params.grammar.kind == "json_object"
    assert isinstance(request.prompt, ChatPrompt)
    assert len(request.prompt.tools) == 2


async def test_a_conversation_continues_with_the_results_of_tools(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    other = {"id": "call_2", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        HI,
        {"role": "assistant", "content": None, "tool_calls": [call, other]},
        {"role": "tool", "tool_call_id": "call_2", "content": "sunny"},
        {"role": "tool", "tool_call_id": "call_1", "name": "watch", "content": [{"type": "text", "text": "noon"}]},
    ]
    await choices(client, messages=messages)
    prompt = engine.requests[0].prompt
    assert isinstance(prompt, ChatPrompt)
    calls = (ToolCall("call_1", "clock", "{}"), ToolCall("call_2", "weather", '{"city": "Rome"}'))
    assert prompt.messages == (
        ChatMessage("user", "hi"),
        ChatMessage("assistant", "", calls),
        ChatMessage("tool", "sunny", tool_call_id="call_2", name="weather"),
        ChatMessage("tool", "noon", tool_call_id="call_1", name="watch"),
    )


# Errors

CALL = {"id": "c", "type": "function", "function": {"name": "clock", "arguments": "{}"}}


def tool(**function: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": "f"} | function}


def with_call(**call: object) -> list[Any]:
    return [HI, {"role": "assistant", "tool_calls": [{**CALL, **call}]}]


@pytest.mark.parametrize(
    ("fields", "param", "expected"),
    [
        ({"tools": [CLOCK] * 129}, "tools", "at most 128 items"),
        ({"tools": [WEATHER, CLOCK, WEATHER]}, "tools[2].function.name", "Two tools have the name 'weather'"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "should be 'function'"),
        ({"tools": [tool(name="a b")]}, "tools[0].function.name", "match pattern"),
        ({"tools": [tool(name="x" * 65)]}, "tools[0].function.name", "match pattern"),
        ({"tools": [tool(parameters=[])]}, "tools[0].function.parameters", "valid dictionary"),
        ({"tools": [tool(parameters={"type": "array"})]}, "tools[0].function.parameters", "schema of an object"),
        ({"tools": [tool(paramters={})]}, "tools[0].function.paramters", "Did you mean 'parameters'?"),
        ({"tool_choice": "any"}, "tool_choice", "'none', 'auto' or 'required'"),
        ({"tool_choice": 5}, "tool_choice", "the function to call or the allowed tools"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function", "is required"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "clock", "args": 1}}},
            "tool_choice.function.args",
            "Known fields: name.",
        ),
        (
            {"tool_choice": {"type": "function", "function": {"name": "watch"}}},
            "tool_choice",
            "not among the tools",
        ),
        ({"tools": None, "tool_choice": "required"}, "tool_choice", "requires 'tools'"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "requires 'tools'"),
        ({"functions": [{"name": "f"}]}, "functions", "the older form of 'tools'"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls", "valid boolean"),
        ({"guided_regex": "a"}, "guided_regex", "a form of the answer that is not JSON"),
        ({"messages": [HI | {"tool_call_id": "c"}]}, "messages[0].tool_call_id", "role 'tool' only"),
        ({"messages": [HI | {"tool_calls": [CALL]}]}, "messages[0].tool_calls", "role 'assistant' only"),
        ({"messages": [{"role": "tool", "content": ""}]}, "messages[0].tool_call_id", "is required in a message of"),
        (
            {"messages": [*with_call(), {"role": "tool", "tool_call_id": "d", "content": ""}]},
            "messages[2].tool_call_id",
            "the id of no earlier call",
        ),
        ({"messages": with_call(xyz="x")}, "messages[1].tool_calls[0].xyz", "Known fields: id, type, function"),
    ],
)
async def test_an_error_names_the_invalid_field(
    engine: ScriptedEngine, telemetry: ScriptedTelemetry, fields: dict[str, Any], param: str, expected: str
) -> None:
    app = create_app(engine, telemetry, app_config())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        answer = await client.post(PATH, json=CHAT | fields)
    assert_invalid(answer)
    error = error_of(answer)
    assert error["param"] == param
    assert expected in error["message"]
    assert engine.requests == []


@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_of_the_engine_about_tools_is_a_400(
    client: httpx.AsyncClient, engine: ScriptedEngine, telemetry: ScriptedTelemetry, stream: bool
) -> None:
    engine.plays(InvalidRequest("The chat template of small takes no tools.", param="tools"))
    answer = await client.post(PATH, json=CHAT | {"stream": stream})
    assert (answer.status_code, error_of(answer)["param"]) == (400, "tools")
    assert [model for _, model in telemetry.errors] == ["small"]


# The official client


@pytest.fixture
async def official(engine: ScriptedEngine, telemetry: ScriptedTelemetry) -> AsyncIterator[openai.AsyncOpenAI]:
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(create_app(engine, telemetry, app_config())))
    async with openai.AsyncOpenAI(base_url="http://test/v1", api_key="any", max_retries=0, http_client=http) as client:
        yield client


async def test_the_openai_client_calls_and_sends_the_results(
    official: openai.AsyncOpenAI, engine: ScriptedEngine
) -> None:
    engine.plays(*chunks(calls(*CALLS)))
    first: Any = await official.chat.completions.create(model="small", messages=[HI], tools=CHAT["tools"])  # type: ignore[list-item]
    reply = first.choices[0].message
    assert [(call.function.name, call.function.arguments) for call in reply.tool_calls] == CALLS
    results = [{"role": "tool", "tool_call_id": call.id, "content": "12"} for call in reply.tool_calls]
    await official.chat.completions.create(
        model="small",
        messages=[HI, reply, *results],  # type: ignore[list-item]
        tools=CHAT["tools"],
    )
    prompt = engine.requests[1].prompt
    assert isinstance(prompt, ChatPrompt)
    assert [message.name for message in prompt.messages[2:]] == ["weather", "clock"]
    assert [call.arguments for call in prompt.messages[1].tool_calls] == [arguments for _, arguments in CALLS]


async def test_the_openai_client_joins_streamed_calls(official: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
    engine.plays(*chunks(calls(*CALLS, text="Well.")))
    async with official.chat.completions.stream(model="small", messages=[HI], tools=CHAT["tools"]) as stream:  # type: ignore[list-item]
        last = await stream.get_final_completion()
    choice = last.choices[0]
    assert (choice.message.content, choice.finish_reason) == ("Well.", "tool_calls")
    assert [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or []] == CALLS
