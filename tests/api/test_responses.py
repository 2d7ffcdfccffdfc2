"""OpenAI's Responses API: the items of the input, the prompt that reaches the engine, and whole responses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import httpx
import pytest
from openai.types.responses import Response, ResponseInputItemParam
from pydantic import TypeAdapter

from serve_app.core.events import Chunk, FinishReason, ReasoningDelta, TextDelta, ToolCallDelta
from serve_app.core.requests import ChatMessage, ChatPrompt, ToolCall, ToolChoice
from serve_app.errors import InvalidRequest

from .scripted import ScriptedEngine, ScriptedTelemetry, assert_invalid, chunk, error_of
from .test_responses_stream import events
from .test_tools import CALLS, PLACE, Answer, calls, chunks

PATH, CHATS = "/v1/responses", "/v1/chat/completions"
HI = {"role": "user", "content": "hi"}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "name": "weather", "description": "Now.", "parameters": PLACE, "strict": True},
    {"type": "function", "name": "clock"},
]
CALL: dict[str, Any] = {"type": "function_call", "call_id": "c1", "name": "clock", "arguments": "{}"}
NOON: dict[str, Any] = {"type": "function_call_output", "call_id": "c1", "output": "noon"}
THOUGHT: dict[str, Any] = {"type": "reasoning", "id": "rs_1", "summary": []}
LOGPROBS = {"include": ["message.output_text.logprobs"]}


async def create(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    answer = await client.post(PATH, json={"input": "hi"} | fields)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    Response.model_validate(found)
    return found


async def messages(client: httpx.AsyncClient, engine: ScriptedEngine, **fields: Any) -> tuple[ChatMessage, ...]:
    """The messages that reach the engine."""
    engine.requests.clear()
    await create(client, **fields)
    (request,) = engine.requests
    assert isinstance(request.prompt, ChatPrompt)
    return request.prompt.messages


def assistant(content: str = "", *calls: ToolCall, reasoning: str = "") -> ChatMessage:
    return ChatMessage("assistant", content, calls, reasoning=reasoning)


# Responses

# Published fields of features that the service does not have.
ABSENT = {"access_programs", "conversation", "image", "input_transformations", "moderation", "prompt", "tool_usage"}
ABSENT |= {"prompt_cache_diagnostics", "prompt_cache_options", "prompt_cache_retention"}


async def test_a_response_has_every_published_field(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.plays(chunk(["Par", "is"]))
    found = await create(client, instructions="Be brief.", metadata={"run": "7"}, user="me", tools=TOOLS)
    assert found.keys() == (Response.model_fields.keys() - ABSENT) | {"store"}
    (message,) = found.pop("output")
    assert message == {
        "id": message["id"],
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": "Paris", "annotations": [], "logprobs": []}],
    }
    assert found["id"].startswith("resp_")
    assert message["id"].startswith("msg_")
    assert 0 <= found.pop("completed_at") - found.pop("created_at") <= 5
    assert found == {
        "id": found["id"],
        "object": "response",
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        "model": "small",
        "usage": {
            "input_tokens": 3,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": 2,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 5,
        },
        "background": False,
        "instructions": "Be brief.",
        "max_output_tokens": None,
        "max_tool_calls": None,
        "metadata": {"run": "7"},
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "prompt_cache_key": None,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": None,
        "service_tier": "default",
        "store": True,
        "temperature": 0.2,
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "tool_choice": "auto",
        "tools": [
            TOOLS[0],
            {"type": "function", "name": "clock", "description": None, "parameters": None, "strict": None},
        ],
        "top_logprobs": 0,
        "top_p": 0.9,
        "truncation": "disabled",
        "user": "me",
    }


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "name": "clock"}),
        ("tool_choice", {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "clock"}]}),
        ("reasoning", {"effort": "high", "summary": "auto"}),
        ("max_output_tokens", 7),
        ("parallel_tool_calls", False),
        ("truncation", "auto"),
    ],
)
async def test_a_response_repeats_the_fields_of_its_request(client: httpx.AsyncClient, field: str, value: Any) -> None:
    assert (await create(client, tools=TOOLS, **{field: value}))[field] == value


async def test_a_schema_is_repeated(client: httpx.AsyncClient) -> None:
    form = {"type": "json_schema", "name": "place", "schema": PLACE, "strict": True}
    found = await create(client, text={"format": form, "verbosity": "low"})
    assert found["text"] == {"format": form | {"description": None}, "verbosity": "low"}


async def test_reasoning_text_and_calls_are_items(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    answer = [[ReasoningDelta("H")], [], [ReasoningDelta("m.")], *calls(*CALLS, text="Wait.")]
    engine.plays(*chunks(answer))
    found = await create(client, tools=TOOLS)
    assert engine.requests[0].separate_reasoning
    reasoning, message, *called = found["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    assert (reasoning["type"], reasoning["summary"], reasoning["status"]) == ("reasoning", [], "completed")
    assert message["content"][0]["text"] == "Wait."
    assert [(one["type"], one["name"], one["arguments"], one["status"]) for one in called] == [
        ("function_call", name, arguments, "completed") for name, arguments in CALLS
    ]
    ids = [item["id"] for item in found["output"]] + [one["call_id"] for one in called]
    assert [one.partition("_")[0] for one in ids] == ["rs", "msg", "fc", "fc", "call", "call"]
    assert len(set(ids)) == len(ids)
    assert found["usage"]["output_tokens_details"] == {"reasoning_tokens": 3}


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_at_its_maximum_length_is_incomplete(
    client: httpx.AsyncClient, engine: ScriptedEngine, stream: bool
) -> None:
    engine.plays(*chunks([[TextDelta("So")], [ToolCallDelta(0, "clock", '{"a')]], FinishReason.LENGTH))
    answer = await client.post(PATH, json={"input": "hi", "stream": stream, "tools": TOOLS})
    found = events(answer.text)[-1]["response"] if stream else answer.json()
    assert (found["status"], found["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert found["completed_at"] is None
    assert [item["status"] for item in found["output"]] == ["completed", "incomplete"]
    assert found["output"][1]["arguments"] == '{"a'


async def test_an_answer_without_text_is_an_empty_message(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    """Clients of agents look for a message in the output."""
    engine.plays(chunk([""]))
    (message,) = (await create(client))["output"]
    assert (message["type"], message["content"][0]["text"], message["status"]) == ("message", "", "completed")


async def test_log_probabilities_are_those_of_the_text(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    """Token 2 is held back until token 3. The tokens of the reasoning and of the call are not in the text."""
    answer: Answer = [[ReasoningDelta("H")], [TextDelta("a")], [], [TextDelta("bc")], [ToolCallDelta(0, "clock")], []]
    engine.plays(*chunks(answer))
    found = await create(client, **LOGPROBS, top_logprobs=1, tools=TOOLS)
    part = found["output"][1]["content"][0]
    assert [token["token"] for token in part["logprobs"]] == ["<1>", "<2>", "<3>"]
    assert part["logprobs"][0] == {
        "token": "<1>",
        "bytes": [60, 49, 62],
        "logprob": -0.5,
        "top_logprobs": [{"token": "é", "bytes": [195, 169], "logprob": -9999.0}],
    }
    assert engine.requests[0].params.logprobs == 1


# Input


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([HI], [ChatMessage("user", "hi")]),
        ([{"type": "message", **HI, "status": "completed"}], [ChatMessage("user", "hi")]),
        ([{"role": "developer", "content": "a"}, HI], [ChatMessage("developer", "a"), ChatMessage("user", "hi")]),
        (
            [{"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]}],
            [ChatMessage("user", "ab")],
        ),
        (
            [{"role": "assistant", "content": [{"type": "output_text", "text": "a", "annotations": []}]}],
            [assistant("a")],
        ),
        ([{"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}], [assistant("No.")]),
        (
            [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}],
            [assistant("a"), assistant("b")],
        ),
        ([CALL, NOON], [assistant("", ToolCall("c1", "clock", "{}")), ChatMessage("tool", "noon", (), "c1", "clock")]),
        (
            [{"role": "assistant", "content": "a"}, CALL, CALL | {"call_id": "c2"}],
            [assistant("a", ToolCall("c1", "clock", "{}"), ToolCall("c2", "clock", "{}"))],
        ),
        (
            [CALL, {"role": "assistant", "content": "b"}, CALL | {"call_id": "c2"}],
            [assistant("b", ToolCall("c1", "clock", "{}"), ToolCall("c2", "clock", "{}"))],
        ),
        (
            [CALL, NOON, {"role": "assistant", "content": "b"}],
            [
                assistant("", ToolCall("c1", "clock", "{}")),
                ChatMessage("tool", "noon", (), "c1", "clock"),
                assistant("b"),
            ],
        ),
        (
            [THOUGHT | {"content": [{"type": "reasoning_text", "text": "Hm."}]}, {"role": "assistant", "content": "a"}],
            [assistant("a", reasoning="Hm.")],
        ),
        (
            [THOUGHT | {"summary": [{"type": "summary_text", "text": "Hm."}], "encrypted_content": "x"}, CALL],
            [assistant("", ToolCall("c1", "clock", "{}"), reasoning="Hm.")],
        ),
        (
            [
                {"role": "assistant", "content": "a"},
                THOUGHT | {"content": [{"type": "reasoning_text", "text": "Hm."}]},
                {"role": "assistant", "content": "b"},
            ],
            [assistant("a"), assistant("b", reasoning="Hm.")],
        ),
        (
            [CALL | {"arguments": '{"zone'}, NOON | {"output": [{"type": "input_text", "text": "12"}]}],
            [assistant("", ToolCall("c1", "clock", "{}")), ChatMessage("tool", "12", (), "c1", "clock")],
        ),
    ],
)
async def test_items_are_messages_of_the_prompt(
    client: httpx.AsyncClient, engine: ScriptedEngine, items: list[Any], expected: list[ChatMessage]
) -> None:
    assert await messages(client, engine, input=items) == tuple(expected)


async def test_instructions_are_the_first_message(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    assert await messages(client, engine, instructions="Be brief.") == (
        ChatMessage("system", "Be brief."),
        ChatMessage("user", "hi"),
    )


async def test_a_chat_has_the_same_prompt(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    function = {key: value for key, value in TOOLS[0].items() if key != "type"}
    call = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    chat = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            HI,
            {"role": "assistant", "content": "One moment.", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "noon"},
            {
                "role": "assistant",
                "content": [{"type": "text", "text": "No"}, {"type": "text", "text": "on."}],
                "reasoning_content": "Hm.",
            },
            {"role": "user", "content": "Thanks. Łódź?"},
        ],
        "tools": [{"type": "function", "function": function}, {"type": "function", "function": {"name": "clock"}}],
        "max_tokens": 9,
        "seed": 3,
        "reasoning_effort": "low",
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }
    assert (await client.post(CHATS, json=chat)).status_code == 200
    content = [{"type": "output_text", "text": "No"}, {"type": "output_text", "text": "on."}]
    await create(
        client,
        instructions="Be brief.",
        input=[
            HI,
            {"role": "assistant", "content": "One moment."},
            CALL,
            NOON,
            THOUGHT | {"content": [{"type": "reasoning_text", "text": "Hm."}]},
            {"role": "assistant", "content": content},
            {"role": "user", "content": "Thanks. Łódź?"},
        ],
        tools=TOOLS,
        max_output_tokens=9,
        seed=3,
        reasoning={"effort": "low"},
        tool_choice="required",
        parallel_tool_calls=False,
    )
    of_chat, of_response = engine.requests
    assert of_response.prompt == of_chat.prompt
    assert of_response.params == of_chat.params
    assert of_response.separate_reasoning == of_chat.separate_reasoning

    def without_paths(choice: ToolChoice | None) -> ToolChoice:
        assert choice is not None
        return replace(choice, tools=tuple(replace(tool, field="") for tool in choice.tools))

    assert without_paths(of_response.tool_choice) == without_paths(of_chat.tool_choice)


async def test_an_output_can_be_sent_back(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.plays(*chunks([[ReasoningDelta("Hm.")], *calls(*CALLS, text="Wait.")]))
    output = (await create(client, tools=TOOLS, store=False))["output"]
    TypeAdapter(list[ResponseInputItemParam]).validate_python(output)
    results = [
        {"type": "function_call_output", "call_id": item["call_id"], "output": "12"}
        for item in output
        if item["type"] == "function_call"
    ]
    _, answer, *tools = await messages(client, engine, input=[HI, *output, *results])
    assert (answer.content, answer.reasoning) == ("Wait.", "Hm.")
    assert [(call.name, call.arguments) for call in answer.tool_calls] == CALLS
    assert [(one.role, one.name, one.content) for one in tools] == [("tool", name, "12") for name, _ in CALLS]


# Refusals


@pytest.mark.parametrize(
    ("fields", "param", "expected"),
    [
        ({"input": None}, "input", "a string or a list of items"),
        ({"input": []}, "input", "at least 1 item"),
        ({"input": ["hi"]}, "input[0]", "should be an object"),
        ({"input": [HI, {}]}, "input[1].role", "is required."),
        ({"input": [{"role": "user"}]}, "input[0].content", "is required."),
        ({"input": [HI | {"role": "tool"}]}, "input[0].role", "'system', 'developer', 'user' or 'assistant'"),
        ({"input": [HI | {"content": 5}]}, "input[0].content", "a string or a list of text parts"),
        ({"input": [HI | {"contents": "x"}]}, "input[0].contents", "Did you mean 'content'?"),
        ({"input": [CALL | {"argumnts": "x"}]}, "input[0].argumnts", "Did you mean 'arguments'?"),
        ({"input": [CALL, NOON | {"outptu": "x"}]}, "input[1].outptu", "Did you mean 'output'?"),
        ({"input": [THOUGHT | {"sumary": []}]}, "input[0].sumary", "Did you mean 'summary'?"),
        ({"input": [{"id": "a", "idd": "b"}]}, "input[0].idd", "Did you mean 'id'?"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": "a", "txt": "b"}]}]},
            "input[0].content[0].txt",
            "Did you mean 'text'?",
        ),
        (
            {"input": [{"role": "assistant", "content": [{"type": "refusal", "refusal": "a", "refusl": "b"}]}]},
            "input[0].content[0].refusl",
            "Did you mean 'refusal'?",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0].type",
            "should be 'input_text' or 'output_text'",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]},
            "input[0].content[0].type",
            "should be 'input_text' or 'output_text'",
        ),
        ({"input": [{"type": "web_search_call", "id": "ws_1"}]}, "input[0]", "'message', 'function_call', "),
        ({"input": [NOON]}, "input[0].call_id", "the id of no earlier call"),
        ({"instruction": "a"}, "instruction", "Did you mean 'instructions'?"),
        ({"max_tokens": 5}, "max_tokens", "Unknown field"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
        ({"background": True}, "background", "can only be null or false"),
        ({"conversation": "conv_1"}, "conversation", "use 'previous_response_id'"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", "stores no prompts"),
        ({"service_tier": "flex"}, "service_tier", 'can only be null or "auto" or "default"'),
        ({"truncation": "middle"}, "truncation", "'auto' or 'disabled'"),
        ({"include": ["all"]}, "include[0]", "'message.output_text.logprobs'"),
        ({"top_logprobs": 2}, "top_logprobs", "requires 'message.output_text.logprobs'"),
        ({"top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"stream_options": {}}, "stream_options", "stream: true"),
        ({"metadata": {"a": 1}}, "metadata.a", "valid string"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata", "at most 16"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort", "'none', 'minimal'"),
        ({"reasoning": {"efort": "low"}}, "reasoning.efort", "Did you mean 'effort'?"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "'text' or 'json_object'"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "is required."),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {}, "shema": {}}}},
            "text.format.shema",
            "Did you mean 'schema'?",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "should be 'function'"),
        ({"tools": [{"type": "custom", "name": "a"}]}, "tools[0].type", "should be 'function'"),
        ({"tools": [TOOLS[1] | {"async": True}]}, "tools[0].async", "can only be null or false"),
        ({"tools": [TOOLS[1], TOOLS[1]]}, "tools[1].name", "Two tools have the name 'clock'"),
        ({"tool_choice": "required"}, "tool_choice", "requires 'tools'"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice", "type 'function' or 'allowed_tools'"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "x"}}, "tool_choice", "not among the tools"),
        (
            {
                "tools": TOOLS,
                "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "x"}]},
            },
            "tool_choice",
            "not among the tools",
        ),
        (
            {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "mcp"}]}},
            "tool_choice.tools[0].type",
            "should be 'function'",
        ),
        ({"tools": TOOLS, "guided_regex": "a"}, "guided_regex", "a JSON schema, or tool_choice: none"),
        ({"text": {"format": {"type": "json_object"}}, "guided_regex": "a"}, "guided_regex", "Send one"),
    ],
)
async def test_an_error_names_the_wrong_field(
    client: httpx.AsyncClient,
    engine: ScriptedEngine,
    telemetry: ScriptedTelemetry,
    fields: dict[str, Any],
    param: str,
    expected: str,
) -> None:
    answer = await client.post(PATH, json={"input": "hi"} | fields)
    assert_invalid(answer)
    error = error_of(answer)
    assert (error["param"], error["code"], error["type"]) == (param, "invalid_request", "invalid_request_error")
    assert expected in error["message"]
    assert engine.requests == []
    assert len(telemetry.errors) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": None, "tool_choice": None, "text": None, "reasoning": None, "include": None, "metadata": None},
        {"include": ["reasoning.encrypted_content", "web_search_call.action.sources"]},
        {"input": [HI | {"type": None}]},
        {"tools": [], "context_management": []},
        {"background": False, "service_tier": "auto", "prompt_cache_retention": "24h"},
    ],
)
async def test_fields_that_ask_for_nothing_are_accepted(client: httpx.AsyncClient, fields: dict[str, Any]) -> None:
    await create(client, **fields)


async def test_an_error_of_the_engine_is_a_status(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.plays(InvalidRequest("The chat template of small takes no tools.", param="tools"))
    for stream in (False, True):
        answer = await client.post(PATH, json={"input": "hi", "tools": TOOLS, "stream": stream})
        assert (answer.status_code, error_of(answer)["param"]) == (400, "tools")


async def test_chunks_without_tokens_change_nothing(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.plays(Chunk((), 3, 0.0), chunk(["a"]))
    assert (await create(client))["output"][0]["content"][0]["text"] == "a"
