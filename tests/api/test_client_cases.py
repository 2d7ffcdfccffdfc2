"""Requests as widespread clients send them: fields that ask for nothing, hints, and answers that are sent back.

Each case is from a public bug report, or from what a client library sends with its defaults.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import httpx
import pytest
from openai.types import completion_create_params
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionContentPartTextParam,
    ChatCompletionDeveloperMessageParam,
    ChatCompletionMessageFunctionToolCallParam,
    ChatCompletionStreamOptionsParam,
    ChatCompletionSystemMessageParam,
    ChatCompletionToolMessageParam,
    ChatCompletionUserMessageParam,
    completion_create_params as chat_create_params,
)

from serve_app.api import unused
from serve_app.api.openai.messages import Message, TextPart
from serve_app.api.openai.schema import ChatBody, CompletionBody, StreamOptions
from serve_app.api.openai.tools import CalledFunction, EarlierCall, OfferedTool
from serve_app.api.schema import Body
from serve_app.core.requests import ChatMessage, ChatPrompt, ToolCall

from .scripted import ScriptedEngine, events_of

CHATS, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = {"role": "user", "content": "hi"}
CALL = {"id": "c", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
NOON = {"role": "tool", "tool_call_id": "c", "content": "noon"}

# Fields of a chat that ask for nothing, and hints.
CHAT_FIELDS: list[dict[str, Any]] = [
    {"store": False},
    {"metadata": {}},
    {"metadata": {"run": "7"}},
    {"service_tier": "auto"},
    {"service_tier": "default"},
    {"prompt_cache_key": "a"},
    {"prompt_cache_retention": "24h"},
    {"safety_identifier": "u"},
    {"modalities": ["text"]},
    {"reasoning_effort": None},
    {"reasoning_effort": "low"},
    {"verbosity": "low"},
    {"functions": None},
    {"functions": []},
    {"function_call": None},
    {"function_call": "none"},
    {"prediction": None},
    {"web_search_options": None},
    {"audio": None},
    {"best_of": 1},
    {"tools": []},
    {"tools": [], "tool_choice": "auto"},
    {"tool_choice": "none"},
    {"parallel_tool_calls": True},
    {"logprobs": False, "top_logprobs": 0},
    {"stop": ""},
    {"stop": []},
    {"seed": -1},
    {"top_k": -1},
    {"chat_template_kwargs": {}},
    {"add_generation_prompt": True},
    {"continue_final_message": False},
    {"response_format": {"type": "text"}},
]
COMPLETION_FIELDS: list[dict[str, Any]] = [
    {"suffix": None},
    {"suffix": ""},
    {"use_beam_search": False},
    {"length_penalty": 1.0},
    {"early_stopping": False},
    {"best_of": 1},
    {"seed": -1},
    {"top_k": -1},
    {"stop": None},
    {"typical_p": 1.0},
]


async def prompt_and_params(client: httpx.AsyncClient, engine: ScriptedEngine, path: str, body: Any) -> Any:
    engine.requests.clear()
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    (request,) = engine.requests
    return request.prompt, request.params, request.tool_choice


@pytest.mark.parametrize(
    ("path", "fields"), [*((CHATS, one) for one in CHAT_FIELDS), *((COMPLETIONS, one) for one in COMPLETION_FIELDS)]
)
async def test_a_field_that_asks_for_nothing_changes_nothing(
    client: httpx.AsyncClient, engine: ScriptedEngine, path: str, fields: dict[str, Any]
) -> None:
    base: dict[str, Any] = {"messages": [HI]} if path == CHATS else {"prompt": "hi"}
    without = await prompt_and_params(client, engine, path, base)
    assert await prompt_and_params(client, engine, path, base | fields) == without


@pytest.mark.parametrize(
    "field",
    [
        {"refusal": None},
        {"refusal": "no"},
        {"annotations": []},
        {"audio": None, "function_call": None},
        {"reasoning_content": "x"},
        {"reasoning_content": None},
        {"reasoning": "x"},
        {"provider_specific_fields": None},
        {"parsed": {"a": 1}},
        {"tool_calls": []},
        {"tool_calls": None},
        {"type": "text"},
        {"cache_control": {"type": "ephemeral"}},
    ],
)
async def test_an_answer_can_be_sent_back(
    client: httpx.AsyncClient, engine: ScriptedEngine, field: dict[str, Any]
) -> None:
    messages = [HI, {"role": "assistant", "content": "Hello.", **field}, HI]
    prompt, *_ = await prompt_and_params(client, engine, CHATS, {"messages": messages})
    assert prompt == ChatPrompt(
        (ChatMessage("user", "hi"), ChatMessage("assistant", "Hello."), ChatMessage("user", "hi"))
    )


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "assistant", "content": None}, ChatMessage("assistant", "")),
        ({"role": "assistant"}, ChatMessage("assistant", "")),
        ({"role": "user", "content": []}, ChatMessage("user", "")),
        ({"role": "user", "content": "hi", "type": "text"}, ChatMessage("user", "hi")),
        ({"role": "user", "content": "hi", "name": "alice"}, ChatMessage("user", "hi", name="alice")),
        ({"role": "system", "content": "a", "name": "the boss"}, ChatMessage("system", "a", name="the boss")),
        ({"role": "developer", "content": "a"}, ChatMessage("developer", "a")),
    ],
)
async def test_a_message_reaches_the_engine(
    client: httpx.AsyncClient, engine: ScriptedEngine, message: dict[str, Any], expected: ChatMessage
) -> None:
    prompt, *_ = await prompt_and_params(client, engine, CHATS, {"messages": [message]})
    assert prompt == ChatPrompt((expected,))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", "{}"),
        ('{"zone": "U', "{}"),
        ("[]", "{}"),
        ('{"a": NaN}', "{}"),
        ('{"a": "\\ud800"}', "{}"),
        ("[" * 10_000, "{}"),
        ('{"zone": "UTC"}', '{"zone": "UTC"}'),
        ({"zone": "Łódź"}, '{"zone": "Łódź"}'),
        ({}, "{}"),
    ],
)
async def test_a_call_without_valid_arguments_can_be_sent_back(
    client: httpx.AsyncClient, engine: ScriptedEngine, arguments: object, expected: str
) -> None:
    """Clients store a call without arguments as "", and `max_tokens` can cut the arguments off."""
    function = {"name": "clock", "arguments": arguments, "parsed_arguments": None}
    call = CALL | {"function": function, "index": 0, "extra_content": {}}
    messages = [HI, {"role": "assistant", "content": None, "tool_calls": [call]}, NOON]
    prompt, *_ = await prompt_and_params(client, engine, CHATS, {"messages": messages, "tools": [CLOCK]})
    assert prompt.messages[1].tool_calls == (ToolCall("c", "clock", expected),)


async def test_max_completion_tokens_overrides_max_tokens(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    for path, base in ((CHATS, {"messages": [HI]}), (COMPLETIONS, {"prompt": "hi"})):
        body = base | {"max_tokens": 9, "max_completion_tokens": 4}
        _, params, _ = await prompt_and_params(client, engine, path, body)
        assert params.max_tokens == 4


async def test_the_body_of_guidellm_has_the_usage_in_each_chunk(client: httpx.AsyncClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": False}
    body = {"prompt": "Test", "stream": True, "stream_options": options, "max_tokens": 3, "max_completion_tokens": 3}
    answer = await client.post(COMPLETIONS, json=body | {"stop": None, "ignore_eos": True})
    *tokens, last, done = events_of(answer.text)
    assert done == "[DONE]"
    assert [chunk["usage"]["completion_tokens"] for chunk in tokens] == list(range(1, len(tokens) + 1))
    assert (last["choices"], last["usage"]) == ([], tokens[-1]["usage"])


class BodyWithHint(Body):
    hint_of_this_test: Annotated[object, unused.Hint()] = None


def test_the_first_use_of_a_hint_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, unused.__name__):
        for value in (None, {}, {"a": "b"}, {"a": "b"}, "c"):
            BodyWithHint.parse({"hint_of_this_test": value})
    assert [record.getMessage() for record in caplog.records if record.name == unused.__name__] == [
        "a request has the field 'hint_of_this_test', which the service does not use"
    ]


@pytest.mark.parametrize(
    ("published", "body"),
    [
        (chat_create_params.CompletionCreateParamsBase, ChatBody),
        (completion_create_params.CompletionCreateParamsBase, CompletionBody),
        (ChatCompletionUserMessageParam, Message),
        (ChatCompletionSystemMessageParam, Message),
        (ChatCompletionDeveloperMessageParam, Message),
        (ChatCompletionAssistantMessageParam, Message),
        (ChatCompletionToolMessageParam, Message),
        (ChatCompletionContentPartTextParam, TextPart),
        (ChatCompletionStreamOptionsParam, StreamOptions),
        (ChatCompletionMessageFunctionToolCallParam, EarlierCall),
    ],
)
def test_every_field_that_openai_publishes_is_declared(published: Any, body: type[Body]) -> None:
    """A new version of OpenAI's library fails here until the body declares its new fields."""
    assert published.__annotations__.keys() <= set(body.names())


OBJECTS: dict[str, type[Body]] = {
    "completion": CompletionBody,
    "chat": ChatBody,
    "`stream_options`": StreamOptions,
    "message": Message,
    "text part": TextPart,
    "call": EarlierCall,
    "function of a call": CalledFunction,
    "tool": OfferedTool,
}


def unused_fields(objects: Mapping[str, type[Body]]) -> dict[tuple[str, str], tuple[unused.Unused, str]]:
    """Marker and description of each field that is not used, by object and name."""
    return {
        (title, name): (marker, field.description or "")
        for title, body in objects.items()
        for name, field in body.model_fields.items()
        for marker in field.metadata
        if isinstance(marker, unused.Unused)
    }


def table(objects: Mapping[str, type[Body]]) -> list[str]:
    """The table of docs/api.md for these objects."""
    rows: dict[str, list[str]] = {}
    for (title, name), (marker, description) in unused_fields(objects).items():
        values = "any (hint)" if isinstance(marker, unused.Hint) else "any (answer)"
        if isinstance(marker, unused.Only):
            values = ", ".join(f"`{json.dumps(one)}`" for one in marker.values) or "none"
        rows.setdefault(f"| `{name}` | {{}} | {values} | {description} |", []).append(title)
    return [row.format(", ".join(titles)) for row, titles in rows.items()]


def documented(heading: str) -> list[str]:
    """The table below a heading of docs/api.md."""
    page = (Path(__file__).parents[2] / "docs/api.md").read_text()
    section = page.partition(f"\n{heading}\n")[2].partition("\n#")[0]
    return [line for line in section.splitlines() if line.startswith("| `")]


def test_the_table_of_fields_without_effect_is_up_to_date() -> None:
    """`python -m tests.api.test_client_cases` prints the table."""
    assert documented("### Fields without effect") == table(OBJECTS)


if __name__ == "__main__":
    print(*table(OBJECTS), sep="\n")
