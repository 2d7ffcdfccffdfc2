"""The bodies of Anthropic's messages: conversations, tools, refused fields, and fields without effect."""

from __future__ import annotations

import json
import logging
from typing import Any

import httpx
import pytest
from hypothesis import given, strategies as st

from serve_app.api.anthropic.messages import (
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    Turn,
)
from serve_app.api.anthropic.schema import (
    ConversationFields,
    CountTokensBody,
    MessagesBody,
    OutputConfig,
    OutputFormat,
    ThinkingConfig,
)
from serve_app.api.anthropic.tools import CustomTool, ToolSelection
from serve_app.api.schema import Body
from serve_app.core.requests import ChatMessage, ChatPrompt, SamplingParams, Tool, ToolCall, ToolChoice

from .scripted import ScriptedEngine, ScriptedTelemetry, anthropic_error_of
from .test_bodies import CHARACTERS, SCALARS, anything
from .test_client_cases import documented, table

PATH, COUNT, CHATS = "/v1/messages", "/v1/messages/count_tokens", "/v1/chat/completions"
HI: dict[str, Any] = {"role": "user", "content": "hi"}
BODY: dict[str, Any] = {"messages": [HI], "max_tokens": 5}
PLACE = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "weather", "description": "Now.", "input_schema": PLACE}
CLOCK = {"name": "clock", "input_schema": {"type": "object", "properties": {}}}
USE = {"type": "tool_use", "id": "toolu_1", "name": "clock", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "noon"}
OBJECTS: dict[str, type[Body]] = {
    "body": MessagesBody,
    "`count_tokens`": CountTokensBody,
    "`thinking`": ThinkingConfig,
    "`output_config`": OutputConfig,
    "tool": CustomTool,
    "text block": TextBlock,
    "thinking block": ThinkingBlock,
    "redacted thinking block": RedactedThinkingBlock,
    "tool use block": ToolUseBlock,
    "tool result block": ToolResultBlock,
}


def text(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": one} for one in texts]


async def prompt_of(client: httpx.AsyncClient, engine: ScriptedEngine, path: str = PATH, **fields: Any) -> ChatPrompt:
    answer = await client.post(path, json=BODY | fields)
    assert answer.status_code == 200, answer.text
    prompt = engine.requests[-1].prompt
    assert isinstance(prompt, ChatPrompt)
    return prompt


async def refused(client: httpx.AsyncClient, fields: dict[str, Any], path: str = PATH) -> str:
    answer = await client.post(path, json=BODY | fields)
    assert answer.status_code == 400, answer.text
    kind, message = anthropic_error_of(answer)
    assert kind == "invalid_request_error"
    return message


# Conversations


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([HI], [ChatMessage("user", "hi")]),
        ([{"role": "user", "content": []}], [ChatMessage("user", "")]),
        ([{"role": "user", "content": text("a", "b")}], [ChatMessage("user", "ab")]),
        ([HI, HI], [ChatMessage("user", "hi\n\nhi")]),
        ([HI, HI | {"content": ""}], [ChatMessage("user", "hi")]),
        ([HI, {"role": "system", "content": "a"}, HI], ["hi", "a", "hi"]),
        (
            [HI, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": [USE]}, HI],
            [ChatMessage("user", "hi"), ChatMessage("assistant", "a", (ToolCall("toolu_1", "clock", "{}"),)), "hi"],
        ),
        (
            [HI, {"role": "assistant", "content": [{"type": "thinking", "thinking": "x", "signature": ""}]}, HI],
            [ChatMessage("user", "hi"), ChatMessage("assistant", "", reasoning="x"), ChatMessage("user", "hi")],
        ),
    ],
)
async def test_a_conversation_reaches_the_engine(
    client: httpx.AsyncClient, engine: ScriptedEngine, messages: list[Any], expected: list[Any]
) -> None:
    prompt = await prompt_of(client, engine, messages=messages)
    assert [
        message.content if isinstance(one, str) else message
        for message, one in zip(prompt.messages, expected, strict=True)
    ] == expected
    assert not prompt.continues


async def test_results_of_tools_are_messages_of_their_own(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    other = USE | {"id": "toolu_2", "name": "weather", "input": {"city": "Łódź"}}
    results = [
        RESULT | {"tool_use_id": "toolu_2", "content": text("rain", "y"), "is_error": False},
        RESULT | {"is_error": True},
        *text("So?", " When?"),
    ]
    answer = {"role": "assistant", "content": [*text("Well."), USE, other]}
    messages = [HI, answer, {"role": "user", "content": results}]
    prompt = await prompt_of(client, engine, messages=messages, tools=[WEATHER, CLOCK])
    calls = (ToolCall("toolu_1", "clock", "{}"), ToolCall("toolu_2", "weather", '{"city": "Łódź"}'))
    assert prompt.messages == (
        ChatMessage("user", "hi"),
        ChatMessage("assistant", "Well.", calls),
        ChatMessage("tool", "rainy", tool_call_id="toolu_2", name="weather"),
        ChatMessage("tool", "Error: noon", tool_call_id="toolu_1", name="clock"),
        ChatMessage("user", "So? When?"),
    )


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (RESULT | {"content": "Error: no such file", "is_error": True}, "Error: no such file"),
        (RESULT | {"content": "", "is_error": True}, "Error: "),
        ({"type": "tool_result", "tool_use_id": "toolu_1"}, ""),
        (RESULT | {"content": None, "is_error": None, "cache_control": {"type": "ephemeral"}}, ""),
    ],
)
async def test_the_text_of_a_result(
    client: httpx.AsyncClient, engine: ScriptedEngine, result: dict[str, Any], expected: str
) -> None:
    messages = [HI, {"role": "assistant", "content": [USE]}, {"role": "user", "content": [result]}]
    prompt = await prompt_of(client, engine, messages=messages)
    assert prompt.messages[2:] == (ChatMessage("tool", expected, tool_call_id="toolu_1", name="clock"),)


async def test_the_answer_continues_a_last_message_of_the_assistant(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    prompt = await prompt_of(client, engine, messages=[HI, {"role": "assistant", "content": "The"}])
    assert prompt == ChatPrompt((ChatMessage("user", "hi"), ChatMessage("assistant", "The")), continues=True)


@pytest.mark.parametrize("system", ["Be brief.", text("Be ", "brief."), [text("Be brief.")[0] | {"citations": None}]])
async def test_the_system_prompt_is_the_first_message(
    client: httpx.AsyncClient, engine: ScriptedEngine, system: object
) -> None:
    prompt = await prompt_of(client, engine, system=system)
    assert prompt.messages == (ChatMessage("system", "Be brief."), ChatMessage("user", "hi"))
    assert len((await prompt_of(client, engine, system="")).messages) == 1


async def test_a_conversation_has_the_prompt_and_the_tools_of_a_chat(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    """A model cannot tell through which API a conversation came."""
    messages = [
        {"role": "user", "content": text("What ", "time?")},
        {"role": "assistant", "content": [*text("Well."), USE | {"input": {"zone": "Łódź"}}]},
        {"role": "user", "content": [RESULT]},
        {"role": "assistant", "content": "Noon."},
        HI,
    ]
    function = {"name": "clock", "arguments": '{"zone": "Łódź"}'}
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": text("What ", "time?")},
        {
            "role": "assistant",
            "content": "Well.",
            "tool_calls": [{"id": "toolu_1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "toolu_1", "content": "noon"},
        {"role": "assistant", "content": "Noon."},
        HI,
    ]
    functions: list[dict[str, Any]] = [
        {"type": "function", "function": {"name": "weather", "description": "Now.", "parameters": PLACE}},
        {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}},
    ]
    fields: dict[str, Any] = {"max_tokens": 5, "temperature": 0.5, "top_p": 0.5, "top_k": 3}
    of_message = await prompt_of(
        client, engine, messages=messages, system="Be brief.", tools=[WEATHER, CLOCK], stop_sequences=["x"], **fields
    )
    of_chat = await prompt_of(client, engine, CHATS, messages=chat, tools=functions, stop=["x"], **fields)
    assert of_message == of_chat
    assert engine.requests[0].params == engine.requests[1].params


async def test_the_defaults_are_those_of_the_model(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await prompt_of(client, engine)
    assert engine.requests[0].params == SamplingParams(max_tokens=5, temperature=0.2, top_p=0.9)


@pytest.mark.parametrize(
    ("fields", "variables"),
    [
        ({}, {}),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, {"enable_thinking": True}),
        ({"thinking": {"type": "adaptive", "display": "summarized"}}, {"enable_thinking": True}),
        ({"thinking": {"type": "between_tools"}}, {"enable_thinking": False}),
        ({"thinking": {"type": "disabled"}}, {"enable_thinking": False}),
        ({"output_config": {"effort": "high"}}, {"reasoning_effort": "high"}),
        (
            {"thinking": {"type": "enabled"}, "output_config": {"effort": "low"}},
            {"enable_thinking": True, "reasoning_effort": "low"},
        ),
    ],
)
@pytest.mark.parametrize("path", [PATH, COUNT])
async def test_thinking_is_a_variable_of_the_chat_template(
    client: httpx.AsyncClient, engine: ScriptedEngine, fields: dict[str, Any], variables: dict[str, Any], path: str
) -> None:
    body = BODY if path == PATH else {"messages": [HI]}
    assert (await client.post(path, json=body | fields)).status_code == 200
    prompt: Any = engine.requests[0].prompt if path == PATH else engine.queries[0][1].prompt  # type: ignore[attr-defined]
    assert json.loads(prompt.variables) == variables


async def test_the_user_is_logged(client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        await client.post(PATH, json=BODY | {"metadata": {"user_id": "me"}}, headers={"x-request-id": "mine"})
    assert any("mine-" in record.getMessage() and "user 'me'" in record.getMessage() for record in caplog.records)


# Tools


def choice_of(*numbers: int, required: bool = False, parallel: bool = True) -> ToolChoice:
    """The choice among some of the tools WEATHER and CLOCK."""
    tools = (
        Tool("weather", json.dumps(PLACE), "tools[0].input_schema"),
        Tool("clock", json.dumps(CLOCK["input_schema"]), "tools[1].input_schema"),
    )
    return ToolChoice(tuple(tools[number] for number in numbers), required, parallel)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, choice_of(0, 1)),
        ({"type": "auto"}, choice_of(0, 1)),
        ({"type": "auto", "disable_parallel_tool_use": True}, choice_of(0, 1, parallel=False)),
        ({"type": "any"}, choice_of(0, 1, required=True)),
        ({"type": "any", "disable_parallel_tool_use": True}, choice_of(0, 1, required=True, parallel=False)),
        ({"type": "tool", "name": "clock"}, choice_of(1, required=True)),
        ({"type": "none"}, None),
    ],
)
async def test_the_choice_reaches_the_engine(
    client: httpx.AsyncClient, engine: ScriptedEngine, choice: dict[str, Any] | None, expected: ToolChoice | None
) -> None:
    prompt = await prompt_of(client, engine, tools=[WEATHER, CLOCK], tool_choice=choice)
    assert engine.requests[0].tool_choice == expected
    assert len(prompt.tools) == 2


async def test_no_tools_are_no_choice(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    cases: list[dict[str, Any]] = [{}, {"tools": []}, {"tools": None, "tool_choice": {"type": "auto"}}]
    for fields in cases:
        await prompt_of(client, engine, **fields)
    assert [request.tool_choice for request in engine.requests] == [None] * 3


# Refusals


def content(*blocks: object) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(blocks)}]}


def answer(*blocks: object) -> dict[str, Any]:
    return {"messages": [HI, {"role": "assistant", "content": list(blocks)}]}


IMAGE = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}


@pytest.mark.parametrize(
    ("fields", "field", "expected"),
    [
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": None}, "max_tokens", "valid integer"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"temperature": 1.1}, "temperature", "less than or equal to 1"),
        ({"top_k": -1}, "top_k", "greater than or equal to 0"),
        ({"stop_sequences": [""]}, "stop_sequences[0]", "at least 1 character"),
        ({"stop_sequences": "x"}, "stop_sequences", "valid list"),
        ({"temprature": 1}, "temprature", "Did you mean 'temperature'?"),
        ({"seed": 1}, "seed", "Unknown field"),
        ({"messages": [{"role": "tool", "content": ""}]}, "messages[0].role", "'user', 'assistant' or 'system'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is required"),
        ({"messages": [HI | {"content": 3}]}, "messages[0].content", "a string or a list of content blocks"),
        ({"messages": [HI | {"name": "me"}]}, "messages[0].name", "Known fields: role, content."),
        (content(IMAGE), "messages[0].content[0]", "a block of type 'image', which is not supported here"),
        (content({"type": "document"}), "messages[0].content[0]", "a block of type 'document'"),
        (content({"type": "x" * 100}), "messages[0].content[0]", f"a block of type '{'x' * 64}'"),
        (content({"type": "{x}"}), "messages[0].content[0]", "a block of type '{x}'"),
        (content({"text": "a"}), "messages[0].content[0]", "a content block: an object with a type"),
        (content({"type": ["text"]}), "messages[0].content[0]", "a content block: an object with a type"),
        (content("a"), "messages[0].content[0]", "a content block: an object with a type"),
        (content({"type": "text"}), "messages[0].content[0].text", "is required"),
        (content({"type": "text", "text": "", "txt": ""}), "messages[0].content[0].txt", "Did you mean 'text'?"),
        (content(USE | {"inputs": {}}), "messages[0].content[0].inputs", "Did you mean 'input'?"),
        (content(USE | {"input": "{}"}), "messages[0].content[0].input", "valid dictionary"),
        (content(USE | {"toolset_name": "x"}), "messages[0].content[0].toolset_name", "has no toolsets"),
        (content(RESULT | {"content": [IMAGE]}), "messages[0].content[0].content[0]", "Supported types: text."),
        (content(RESULT | {"is_eror": True}), "messages[0].content[0].is_eror", "Did you mean 'is_error'?"),
        (
            content(RESULT | {"content": [{"type": "text", "text": "", "a": 1}]}),
            "messages[0].content[0].content[0].a",
            "Known fields: type, text, ",
        ),
        (content(USE), "messages[0].content[0]", "'user' can have blocks of the types 'text', 'tool_result' only"),
        (answer(RESULT), "messages[1].content[0]", "A message of role 'assistant' can have blocks of"),
        (
            {"messages": [{"role": "system", "content": [RESULT]}]},
            "messages[0].content[0]",
            "A message of role 'system' can have blocks of the types 'text' only",
        ),
        (content(RESULT), "messages[0].content[0].tool_use_id", "the id of no earlier call"),
        (answer(USE), "messages[1]", "Send the results of its calls"),
        ({"system": 3}, "system", "a string or a list of content blocks"),
        ({"system": [IMAGE]}, "system[0]", "Supported types: text."),
        ({"system": [{"type": "text", "text": "", "x": 1}]}, "system[0].x", "Known fields: type, text"),
        ({"thinking": {"type": "off"}}, "thinking.type", "'enabled', 'adaptive', 'between_tools' or 'disabled'"),
        (
            {"thinking": {"type": "enabled", "buget_tokens": 1}},
            "thinking.buget_tokens",
            "Did you mean 'budget_tokens'?",
        ),
        ({"metadata": {"user": "me"}}, "metadata.user", "Did you mean 'user_id'?"),
        ({"metadata": {"user_id": "x" * 513}}, "metadata.user_id", "at most 512"),
        ({"output_config": {"format": {"type": "json"}}}, "output_config.format.type", "'json_schema'"),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {}, "name": "x"}}},
            "output_config.format.name",
            "Known fields: type, schema.",
        ),
        (
            {
                "output_config": {"format": {"type": "json_schema", "schema": {}}},
                "output_format": {"type": "json_schema", "schema": {}},
            },
            "output_format",
            "Send one of them",
        ),
        ({"tools": [CLOCK] * 129}, "tools", "at most 128 items"),
        ({"tools": [WEATHER, CLOCK, WEATHER]}, "weather", "Two tools have the name 'weather'"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]", "type 'web_search_20250305'"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0]", "Send tools of type 'custom'"),
        ({"tools": [CLOCK | {"name": "a b"}]}, "tools[0].name", "match pattern"),
        ({"tools": [{"name": "a"}]}, "tools[0].input_schema", "is required"),
        ({"tools": [CLOCK | {"input_schema": {"type": "array"}}]}, "tools[0].input_schema", "schema of an object"),
        ({"tools": [CLOCK | {"desciption": ""}]}, "tools[0].desciption", "Did you mean 'description'?"),
        ({"tools": [CLOCK | {"defer_loading": True}]}, "tools[0].defer_loading", "no search for tools"),
        ({"tools": [CLOCK | {"allowed_callers": ["x"]}]}, "tools[0].allowed_callers", "only the model calls tools"),
        ({"tool_choice": "auto"}, "tool_choice", "should be an object"),
        ({"tool_choice": {"type": "any"}}, "tool_choice", "requires 'tools'"),
        ({"tools": [CLOCK], "tool_choice": {"type": "tool"}}, "tool_choice.name", "is required if, and only if"),
        ({"tools": [CLOCK], "tool_choice": {"type": "any", "name": "clock"}}, "tool_choice.name", "only if, the type"),
        ({"tools": [CLOCK], "tool_choice": {"type": "tool", "name": "watch"}}, "tool_choice", "not among the tools"),
        ({"tools": [CLOCK], "tool_choice": {"type": "auto", "parallel": 1}}, "tool_choice.parallel", "Known fields"),
        ({"service_tier": "priority"}, "service_tier", "has one tier"),
        ({"speed": "fast"}, "speed", "has one speed"),
        ({"inference_geo": "eu"}, "inference_geo", "does not choose a region"),
        ({"container": "c"}, "container", "has no containers"),
        ({"container": {"skills": [1]}}, "container", "has no containers"),
        ({"mcp_servers": [{"type": "url"}]}, "mcp_servers", "calls no tools itself"),
        ({"compaction": {"type": "summarize"}}, "compaction", "does not summarize"),
        ({"thread": {"id": "x"}}, "thread", "stores no conversations"),
    ],
)
async def test_an_error_names_the_wrong_field(
    client: httpx.AsyncClient,
    engine: ScriptedEngine,
    telemetry: ScriptedTelemetry,
    fields: dict[str, Any],
    field: str,
    expected: str,
) -> None:
    message = await refused(client, fields)
    assert f"'{field}'" in message
    assert expected in message
    assert len(telemetry.errors) == 1
    assert engine.requests == []


BODIES: tuple[type[Body], ...] = (*OBJECTS.values(), Turn, ToolSelection, OutputFormat)
NAMES = st.sampled_from(sorted({name for body in BODIES for name in body.names()}))
KINDS = st.sampled_from(
    ["text", "thinking", "redacted_thinking", "tool_use", "tool_result", "enabled", "any", "custom"]
)
DOCUMENTS = st.recursive(
    SCALARS | KINDS | st.sampled_from([USE, RESULT, CLOCK, HI]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | CHARACTERS, inner, max_size=4),
    max_leaves=12,
)


@anything
@given(path=st.sampled_from([PATH, COUNT]), fields=st.dictionaries(NAMES | CHARACTERS, DOCUMENTS, max_size=2))
async def test_any_variation_of_a_valid_body_gets_an_answer(
    client: httpx.AsyncClient, telemetry: ScriptedTelemetry, path: str, fields: dict[str, Any]
) -> None:
    telemetry.errors.clear()
    body = (BODY if path == PATH else {"messages": [HI]}) | fields
    answer = await client.post(path, content=json.dumps(body))
    if answer.status_code != 200:
        assert 400 <= answer.status_code < 500
        assert anthropic_error_of(answer)
    assert len(telemetry.errors) == (answer.status_code != 200)


# Fields without effect


@pytest.mark.parametrize(
    "fields",
    [
        {"cache_control": {"type": "ephemeral"}},
        {"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}},
        {"service_tier": "auto"},
        {"service_tier": "standard_only"},
        {"speed": "standard"},
        {"diagnostics": {"previous_message_id": None}},
        {"mcp_servers": []},
        {"tools": []},
        {"tool_choice": {"type": "none"}},
        {"metadata": {}},
        {"metadata": {"user_id": None}},
        {"stop_sequences": []},
        {"output_config": {}},
        {"container": None, "inference_geo": None, "thinking": None, "system": None, "stream": None},
        {"messages": [HI | {"content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]}]},
    ],
)
async def test_a_field_that_asks_for_nothing_changes_nothing(
    client: httpx.AsyncClient, engine: ScriptedEngine, fields: dict[str, Any]
) -> None:
    assert await prompt_of(client, engine, **fields) == await prompt_of(client, engine)
    with_fields, without = engine.requests
    assert (with_fields.params, with_fields.tool_choice) == (without.params, without.tool_choice)


def test_the_table_of_fields_without_effect_is_up_to_date() -> None:
    """`python -m tests.api.test_anthropic_fields` prints the table."""
    assert documented("### Messages: fields without effect") == table(OBJECTS)


def test_the_bodies_share_their_fields() -> None:
    assert set(CountTokensBody.names()) == set(ConversationFields.names()) < set(MessagesBody.names())


if __name__ == "__main__":
    print(*table(OBJECTS), sep="\n")
