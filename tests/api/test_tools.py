"""Tools of a chat: what reaches the model, what is refused, and how calls come back."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from typing import Any

import httpx
import httpx2
import openai
import pytest

from serve_app.api.app import create_app
from serve_app.core.events import Chunk, FinishReason
from serve_app.core.queries import GetModelInfo, ModelInfo
from serve_app.core.requests import ChatMessage, ChatPrompt, GenerationRequest, ToolCall
from serve_app.engines.text.tool_format import ToolCallFormat
from serve_app.errors import NotReady

from .scripted import RESULTS, ScriptedEngine, ScriptedTelemetry, app_config, chunk, error_of, events_of
from .syntaxes import ALL, HERMES, LLAMA, MISTRAL, written

PATH = "/v1/chat/completions"
PLACE = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Now.", "parameters": PLACE}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
HI = {"role": "user", "content": "hi"}
CHAT: dict[str, Any] = {"messages": [HI], "tools": [WEATHER, CLOCK]}
BOTH = [("weather", '{"city": "Łódź"}'), ("clock", "{}")]


def info(syntax: ToolCallFormat | None) -> ModelInfo:
    known: ModelInfo = RESULTS[GetModelInfo]
    return replace(known, tools=syntax)


@pytest.fixture
def engine() -> ScriptedEngine:
    """A model that calls tools as Hermes does."""
    return ScriptedEngine(answers={**RESULTS, GetModelInfo: info(HERMES)})


def says(text: str, size: int = 3, finish: FinishReason = FinishReason.STOP) -> list[Chunk]:
    """An answer in tokens of so many characters, two a chunk."""
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    return [
        chunk(pieces[at : at + 2], finish if at + 2 >= len(pieces) else None, start=at)
        for at in range(0, len(pieces), 2)
    ]


async def choices(client: httpx.AsyncClient, **fields: Any) -> list[Any]:
    answer = await client.post(PATH, json=CHAT | fields)
    assert answer.status_code == 200, answer.text
    found: list[Any] = answer.json()["choices"]
    return found


async def deltas(client: httpx.AsyncClient, **fields: Any) -> list[Any]:
    """The choice of every frame."""
    answer = await client.post(PATH, json=CHAT | fields | {"stream": True})
    assert answer.status_code == 200, answer.text
    *found, end = events_of(answer.text)
    assert end == "[DONE]"
    return [frame["choices"][0] for frame in found]


def message(told: Iterable[Any]) -> dict[str, Any]:
    """The message that deltas come to, put together as a client does; ids are left out."""
    content, calls = "", list[dict[str, str]]()
    for delta in told:
        content += delta.get("content") or ""
        for call in delta.get("tool_calls", []):
            if "id" in call:
                assert call["index"] == len(calls)
                assert (call["type"], call["function"]["arguments"]) == ("function", "")
                calls.append({"name": call["function"]["name"], "arguments": ""})
            else:
                assert call["index"] == len(calls) - 1
                calls[-1]["arguments"] += call["function"]["arguments"]
    return {"content": content, "calls": calls}


# Answers


@pytest.mark.parametrize("syntax", ALL.values(), ids=ALL)
async def test_calls_of_a_whole_answer(
    client: httpx.AsyncClient, engine: ScriptedEngine, syntax: ToolCallFormat
) -> None:
    engine.results[GetModelInfo] = info(syntax)
    calls = BOTH if syntax.between else BOTH[:1]
    engine.plays(*says(written(syntax, *calls)))
    (choice,) = await choices(client)
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"] == {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": call["id"], "type": "function", "function": {"name": name, "arguments": arguments}}
            for call, (name, arguments) in zip(choice["message"]["tool_calls"], calls, strict=True)
        ],
    }
    ids = [call["id"] for call in choice["message"]["tool_calls"]]
    assert all(one.startswith("call_") for one in ids)
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("syntax", ALL.values(), ids=ALL)
@pytest.mark.parametrize("size", [1, 4, 1000])
async def test_a_stream_comes_to_the_same(
    client: httpx.AsyncClient, engine: ScriptedEngine, syntax: ToolCallFormat, size: int
) -> None:
    engine.results[GetModelInfo] = info(syntax)
    calls = BOTH if syntax.between else BOTH[:1]
    said = "One moment." if syntax.anywhere else ""
    engine.plays(*says(said + written(syntax, *calls), size))
    opening, *found = await deltas(client)
    assert opening["delta"] == {"role": "assistant", "content": ""}
    assert message(choice["delta"] for choice in found) == {
        "content": said,
        "calls": [{"name": name, "arguments": arguments} for name, arguments in calls],
    }
    assert [choice["finish_reason"] for choice in found] == [None] * (len(found) - 1) + ["tool_calls"]


async def test_an_answer_without_calls_is_as_any(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.plays(*says("Just <text"))
    (choice,) = await choices(client)
    assert (choice["message"], choice["finish_reason"]) == ({"role": "assistant", "content": "Just <text"}, "stop")
    found = await deltas(client)
    assert message(choice["delta"] for choice in found)["content"] == "Just <text"
    assert found[-1]["finish_reason"] == "stop"


async def test_what_was_cut_short_says_so(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.plays(*says('<tool_call>\n{"name": "weather", "arguments": {"ci', finish=FinishReason.LENGTH))
    (choice,) = await choices(client)
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"ci'}
    assert (await deltas(client))[-1]["finish_reason"] == "length"


async def test_each_of_several_answers_has_calls_of_its_own(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    def script(request: GenerationRequest) -> list[Chunk]:
        return says(written(HERMES, *BOTH[: request.index]) if request.index else "none")

    engine.script = script
    found = await choices(client, n=3)
    assert [len(choice["message"].get("tool_calls", [])) for choice in found] == [0, 1, 2]
    assert [choice["finish_reason"] for choice in found] == ["stop", "tool_calls", "tool_calls"]
    told = await deltas(client, n=3)
    for index in range(3):
        own = [choice for choice in told if choice["index"] == index]
        assert len(message(choice["delta"] for choice in own)["calls"]) == index
        assert own[-1]["finish_reason"] == found[index]["finish_reason"]


async def test_logprobs_are_told_of_every_token(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    text = "So " + written(HERMES, *BOTH)
    engine.plays(*says(text))
    (choice,) = await choices(client, logprobs=True)
    assert "".join(token["token"] for token in choice["logprobs"]["content"]) == text
    _, *found = await deltas(client, logprobs=True)
    assert "".join(token["token"] for one in found for token in one["logprobs"]["content"]) == text


async def test_a_token_that_makes_nothing_makes_no_frame(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.plays(*says(written(HERMES, BOTH[0]), size=1))
    assert all(choice["delta"] or choice["finish_reason"] for choice in await deltas(client))


# What reaches the model


async def test_tools_reach_the_template_as_openai_writes_them(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    await choices(client)
    prompt = engine.requests[0].prompt
    assert isinstance(prompt, ChatPrompt)
    plain = {"name": "clock", "description": "", "parameters": {"type": "object", "properties": {}}}
    assert [json.loads(tool) for tool in prompt.tools] == [WEATHER, {"type": "function", "function": plain}]


@pytest.mark.parametrize(
    ("fields", "begins", "several", "names"),
    [
        ({}, "start: TEXT |", True, ["weather", "clock"]),
        ({"tool_choice": "auto", "parallel_tool_calls": False}, "start: TEXT |", False, ["weather", "clock"]),
        ({"tool_choice": "required"}, 'start: "<tool_call>', True, ["weather", "clock"]),
        ({"tool_choice": "required", "parallel_tool_calls": False}, 'start: "<tool_call>', False, ["weather", "clock"]),
        ({"tool_choice": {"type": "function", "function": {"name": "clock"}}}, 'start: "<tool_call>', False, ["clock"]),
    ],
)
async def test_the_choice_is_a_grammar(
    client: httpx.AsyncClient,
    engine: ScriptedEngine,
    fields: dict[str, Any],
    begins: str,
    several: bool,
    names: list[str],
) -> None:
    await choices(client, **fields)
    grammar = engine.requests[0].params.grammar
    assert grammar is not None
    assert (grammar.kind, grammar.field) == ("lark", "tools")
    assert grammar.text.startswith(begins)
    assert ("more:" in grammar.text) is several
    assert [name for name in ("weather", "clock") if f'"{name}\\"' in grammar.text] == names
    fields_of = {"weather": "tools[0].function.parameters", "clock": "tools[1].function.parameters"}
    assert [part.field for part in grammar.parts] == [fields_of[name] for name in names]


async def test_without_a_choice_to_call_they_are_only_shown(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.plays(*says(written(HERMES, BOTH[0])))
    (choice,) = await choices(client, tool_choice="none", response_format={"type": "json_object"})
    assert "tool_calls" not in choice["message"]
    assert choice["message"]["content"] == written(HERMES, BOTH[0])
    request = engine.requests[0]
    assert request.params.grammar is not None
    assert request.params.grammar.kind == "json_object"
    assert isinstance(request.prompt, ChatPrompt)
    assert len(request.prompt.tools) == 2


@pytest.mark.parametrize(("syntax", "shown"), [(HERMES, False), (LLAMA, False), (MISTRAL, True)])
async def test_special_tokens_are_asked_for_where_calls_begin_with_one(
    client: httpx.AsyncClient, engine: ScriptedEngine, syntax: ToolCallFormat, shown: bool
) -> None:
    engine.results[GetModelInfo] = info(syntax)
    await choices(client)
    assert engine.requests[0].params.skip_special_tokens is not shown


async def test_a_conversation_goes_on_with_what_the_tool_said(
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


async def test_a_model_is_asked_once_what_it_is(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await choices(client)
    await choices(client)
    assert engine.queries == [("small", GetModelInfo())]
    await choices(client, model="org/large")
    assert engine.queries == [("small", GetModelInfo()), ("org/large", GetModelInfo())]


# What is refused

CALL = {"id": "c", "type": "function", "function": {"name": "clock", "arguments": "{}"}}


def tool(**function: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": "f"} | function}


def asked(**call: object) -> list[Any]:
    return [HI, {"role": "assistant", "tool_calls": [{**CALL, **call}]}]


@pytest.mark.parametrize(
    ("fields", "param", "expected"),
    [
        ({"tools": []}, "tools", "at least 1 item"),
        ({"tools": [CLOCK] * 129}, "tools", "at most 128 items"),
        ({"tools": [WEATHER, CLOCK, WEATHER]}, "tools[2].function.name", "two tools are called weather"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "should be 'function'"),
        ({"tools": [tool(name="a b")]}, "tools[0].function.name", "match pattern"),
        ({"tools": [tool(name="x" * 65)]}, "tools[0].function.name", "match pattern"),
        ({"tools": [tool(parameters=[])]}, "tools[0].function.parameters", "valid dictionary"),
        ({"tools": [tool(parameters={"type": "array"})]}, "tools[0].function.parameters", "schema of an object"),
        ({"tools": [tool(paramters={})]}, "tools[0].function.paramters", "did you mean parameters?"),
        ({"tool_choice": "any"}, "tool_choice", "'none', 'auto' or 'required'"),
        ({"tool_choice": 5}, "tool_choice", "none, auto, required or the function to call"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function", "is required"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "clock", "args": 1}}},
            "tool_choice.function.args",
            "the fields are name",
        ),
        (
            {"tool_choice": {"type": "function", "function": {"name": "watch"}}},
            "tool_choice.function.name",
            "none of the tools",
        ),
        ({"tools": None, "tool_choice": "none"}, "tool_choice", "goes with tools"),
        ({"tools": None, "parallel_tool_calls": True}, "parallel_tool_calls", "goes with tools"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls", "valid boolean"),
        ({"response_format": {"type": "json_object"}}, "response_format", "tool_choice: none"),
        ({"guided_regex": "a"}, "guided_regex", "and tools each say"),
        ({"messages": [HI | {"name": "me"}]}, "messages[0].name", "goes with role: tool only"),
        ({"messages": [HI | {"tool_call_id": "c"}]}, "messages[0].tool_call_id", "goes with role: tool only"),
        ({"messages": [HI | {"tool_calls": [CALL]}]}, "messages[0].tool_calls", "goes with role: assistant only"),
        ({"messages": [{"role": "tool", "content": ""}]}, "messages[0].tool_call_id", "is required in a message of"),
        ({"messages": [{"role": "assistant"}]}, "messages[0].content", "is required"),
        ({"messages": [{"role": "assistant", "tool_calls": []}]}, "messages[0].tool_calls", "at least 1 item"),
        (
            {"messages": [*asked(), {"role": "tool", "tool_call_id": "d", "content": ""}]},
            "messages[2].tool_call_id",
            "the id of no call before it",
        ),
        ({"messages": asked(xyz="x")}, "messages[1].tool_calls[0].xyz", "the fields are id, type, function"),
        *(
            (
                {"messages": asked(function={"name": "f", "arguments": arguments})},
                "messages[1].tool_calls[0].function.arguments",
                "the text of a JSON object",
            )
            for arguments in ("", "[]", "{", '{"a": NaN}', '{"a": "\\ud800"}', "[" * 100_000)
        ),
    ],
)
async def test_an_error_names_the_invalid_field(
    engine: ScriptedEngine, telemetry: ScriptedTelemetry, fields: dict[str, Any], param: str, expected: str
) -> None:
    app = create_app(engine, telemetry, app_config())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        answer = await client.post(PATH, json=CHAT | fields)
    assert answer.status_code == 422, answer.text
    error = error_of(answer)
    assert error["param"] == param
    assert expected in error["message"]
    assert engine.requests == []


@pytest.mark.parametrize("stream", [False, True])
async def test_a_model_that_calls_no_tools_says_what_would_help(
    client: httpx.AsyncClient, engine: ScriptedEngine, telemetry: ScriptedTelemetry, stream: bool
) -> None:
    engine.results[GetModelInfo] = info(None)
    answer = await client.post(PATH, json=CHAT | {"stream": stream})
    assert answer.status_code == 422
    assert error_of(answer)["param"] == "tools"
    assert "chat_template: builtin:chatml_tools" in error_of(answer)["message"]
    assert [model for _, model in telemetry.errors] == ["small"]


async def test_a_model_that_is_not_there_yet_is_asked_again(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.results[GetModelInfo] = NotReady("small is being loaded")
    assert (await client.post(PATH, json=CHAT)).status_code == 503
    engine.results[GetModelInfo] = info(HERMES)
    assert (await client.post(PATH, json=CHAT)).status_code == 200


async def test_the_end_of_an_answer_is_not_shown_with_the_signs_of_its_calls(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    engine.results[GetModelInfo] = info(MISTRAL)
    answer = await client.post(PATH, json=CHAT | {"include_stop_str_in_output": True})
    assert answer.status_code == 422
    assert error_of(answer)["param"] == "include_stop_str_in_output"


# The official client


@pytest.fixture
async def official(engine: ScriptedEngine, telemetry: ScriptedTelemetry) -> AsyncIterator[openai.AsyncOpenAI]:
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(create_app(engine, telemetry, app_config())))
    async with openai.AsyncOpenAI(base_url="http://test/v1", api_key="any", max_retries=0, http_client=http) as client:
        yield client


async def test_the_official_client_calls_and_tells_what_the_tool_said(
    official: openai.AsyncOpenAI, engine: ScriptedEngine
) -> None:
    engine.plays(*says(written(HERMES, *BOTH)))
    first: Any = await official.chat.completions.create(model="small", messages=[HI], tools=CHAT["tools"])  # type: ignore[list-item]
    said = first.choices[0].message
    assert [(call.function.name, call.function.arguments) for call in said.tool_calls] == BOTH
    results = [{"role": "tool", "tool_call_id": call.id, "content": "12"} for call in said.tool_calls]
    await official.chat.completions.create(
        model="small",
        messages=[HI, said, *results],  # type: ignore[list-item]
        tools=CHAT["tools"],
    )
    prompt = engine.requests[1].prompt
    assert isinstance(prompt, ChatPrompt)
    assert [message.name for message in prompt.messages[2:]] == ["weather", "clock"]
    assert [call.arguments for call in prompt.messages[1].tool_calls] == [arguments for _, arguments in BOTH]


async def test_the_official_client_puts_streamed_calls_together(
    official: openai.AsyncOpenAI, engine: ScriptedEngine
) -> None:
    engine.plays(*says("Well. " + written(HERMES, *BOTH)))
    async with official.chat.completions.stream(model="small", messages=[HI], tools=CHAT["tools"]) as stream:  # type: ignore[list-item]
        last = await stream.get_final_completion()
    choice = last.choices[0]
    assert (choice.message.content, choice.finish_reason) == ("Well.", "tool_calls")
    assert [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or []] == BOTH
