"""Requests as widespread clients send them: fields that ask for nothing, hints, and answers that are sent back.

Each case is from a public bug report, or from what a client library sends with its defaults.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, get_args

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
from openai.types.responses import (
    EasyInputMessageParam,
    FunctionToolParam,
    ResponseFormatTextJSONSchemaConfigParam,
    ResponseFunctionToolCallParam,
    ResponseInputTextParam,
    ResponseOutputMessageParam,
    ResponseOutputRefusalParam,
    ResponseOutputTextParam,
    ResponseReasoningItemParam,
    ResponseTextConfigParam,
    ToolChoiceAllowedParam,
    ToolChoiceFunctionParam,
    response_create_params,
    response_includable,
    response_input_item_param,
    response_reasoning_item_param,
)
from openai.types.shared_params import Reasoning, ResponseFormatJSONObject, ResponseFormatText

from serve_app.api import unused
from serve_app.api.openai.messages import Message, TextPart
from serve_app.api.openai.response_format import JsonSchema, StructuredOutputs
from serve_app.api.openai.schema import ChatBody, CompletionBody, StreamOptions
from serve_app.api.openai.tools import CalledFunction, EarlierCall, Function, OfferedTool
from serve_app.api.openai_responses.items import (
    FunctionCallItem,
    FunctionCallOutputItem,
    InputPart,
    ItemReference,
    MessageItem,
    ReasoningItem,
    ReasoningPart,
    RefusalPart,
    SummaryPart,
)
from serve_app.api.openai_responses.schema import Includable, ResponsesBody
from serve_app.api.openai_responses.settings import (
    PlainFormat,
    ReasoningFields,
    ResponseStreamOptions,
    SchemaFormat,
    TextSettings,
)
from serve_app.api.openai_responses.tools import AllowedFunctions, FunctionTool, NamedFunction
from serve_app.api.schema import Body
from serve_app.core.events import Chunk, Logprobs, TokenLogprob
from serve_app.core.requests import ChatMessage, ChatPrompt, Grammar, ToolCall

from .scripted import ScriptedEngine, chunk, events_of
from .test_prompt_details import PROMPT

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
        {"reasoning_content": None},
        {"reasoning": None},
        {"reasoning": [{"type": "text"}]},
        {"reasoning_details": [{"type": "text"}]},
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
        (
            {"role": "assistant", "content": "a", "reasoning_content": "x"},
            ChatMessage("assistant", "a", reasoning="x"),
        ),
        ({"role": "assistant", "content": "a", "reasoning": "x"}, ChatMessage("assistant", "a", reasoning="x")),
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


@pytest.mark.parametrize("name", ["dummy", "tgi", "", None])
@pytest.mark.parametrize(
    ("path", "body"), [(CHATS, {"messages": [HI]}), (COMPLETIONS, {"prompt": "hi"}), ("/generate", {"inputs": "hi"})]
)
async def test_a_name_that_clients_of_tgi_send_stands_for_the_first_model(
    client: httpx.AsyncClient, engine: ScriptedEngine, path: str, body: dict[str, Any], name: str | None
) -> None:
    answer = await client.post(path, json=body | {"model": name})
    assert answer.status_code == 200, answer.text
    assert engine.requests[0].model == "small"


async def test_the_query_names_the_model_if_the_body_has_a_name_of_tgi(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    answer = await client.post("/generate?model=org/large", json={"inputs": "hi", "model": "tgi"})
    assert answer.status_code == 200, answer.text
    assert engine.requests[0].model == "org/large"


async def test_langchains_default_parameters_of_tgi_are_accepted(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    parameters: dict[str, Any] = {
        "max_new_tokens": 8,
        "top_p": 0.95,
        "typical_p": 0.95,
        "temperature": 0.8,
        "return_full_text": False,
    }
    parameters |= {"stop": [], "do_sample": False, "watermark": False}
    answer = await client.post("/generate", json={"inputs": "hi", "parameters": parameters})
    assert answer.status_code == 200, answer.text
    assert engine.requests[0].params.temperature == 0
    answer = await client.post("/generate", json={"inputs": "hi", "parameters": {"typical_p": 0.95}})
    assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("form", "kind", "text"),
    [
        ({"type": "json_object", "value": SCHEMA}, "json_schema", json.dumps(SCHEMA)),
        ({"type": "json_object", "schema": SCHEMA}, "json_schema", json.dumps(SCHEMA)),
        ({"type": "json", "value": SCHEMA}, "json_schema", json.dumps(SCHEMA)),
        ({"type": "regex", "value": "a+"}, "regex", "a+"),
    ],
)
async def test_the_forms_of_other_servers_are_accepted(
    client: httpx.AsyncClient, engine: ScriptedEngine, form: dict[str, Any], kind: str, text: str
) -> None:
    _, params, _ = await prompt_and_params(client, engine, CHATS, {"messages": [HI], "response_format": form})
    assert params.grammar == Grammar(kind, text, "response_format", strict=kind == "regex")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "form",
    [
        {"type": "json"},
        {"type": "regex", "value": SCHEMA},
        {"type": "regex", "value": ""},
        {"type": "json", "value": "a"},
        {"type": "text", "value": SCHEMA},
        {"type": "json_object", "value": SCHEMA, "schema": SCHEMA},
        {"type": "json_schema", "value": SCHEMA},
    ],
)
async def test_an_incomplete_form_is_refused(client: httpx.AsyncClient, form: dict[str, Any]) -> None:
    answer = await client.post(CHATS, json={"messages": [HI], "response_format": form})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "response_format")


async def test_a_strict_schema_stays_strict(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    for strict in (True, False, None):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": strict}}
        _, params, _ = await prompt_and_params(client, engine, CHATS, {"messages": [HI], "response_format": form})
        assert params.grammar.strict is (strict is True)


async def test_tools_and_a_schema_are_accepted_together(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "o", "schema": SCHEMA}}
    body = {"messages": [HI], "tools": [CLOCK], "response_format": form}
    _, params, choice = await prompt_and_params(client, engine, CHATS, body)
    assert params.grammar.kind == "json_schema"
    assert [tool.name for tool in choice.tools] == ["clock"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
    ],
)
async def test_a_contradiction_about_the_template_is_refused(
    client: httpx.AsyncClient, body: dict[str, Any], param: str
) -> None:
    answer = await client.post(CHATS, json={"messages": [HI]} | body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_variables_of_the_caller_override_those_of_the_reasoning_effort(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    body = {"messages": [HI], "reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True, "a": 1}}
    prompt, *_ = await prompt_and_params(client, engine, CHATS, body)
    assert json.loads(prompt.variables) == {"reasoning_effort": "none", "enable_thinking": True, "a": 1}


async def test_legacy_functions_have_a_conversation(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    messages = [
        HI,
        {"role": "assistant", "content": None, "function_call": {"name": "clock", "arguments": "{}"}},
        {"role": "function", "name": "clock", "content": "noon"},
    ]
    body = {"messages": messages, "functions": [{"name": "clock"}], "function_call": "auto"}
    prompt, _, choice = await prompt_and_params(client, engine, CHATS, body)
    assert prompt.messages[1:] == (
        ChatMessage("assistant", "", (ToolCall("call_clock", "clock", "{}"),)),
        ChatMessage("tool", "noon", tool_call_id="call_clock", name="clock"),
    )
    assert [tool.name for tool in choice.tools] == ["clock"]
    for wrong in ({"role": "function", "content": "noon"}, {"role": "function", "name": "watch", "content": "noon"}):
        answer = await client.post(CHATS, json=body | {"messages": [*messages[:2], wrong]})
        assert answer.status_code == 400, answer.text


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_without_an_answer_returns_the_prompt(
    client: httpx.AsyncClient, engine: ScriptedEngine, stream: bool
) -> None:
    """Evaluation programs score a text with it. The one token that the model computes is left out."""
    engine.script = lambda request: [replace(chunk(["x"]), prompt=PROMPT)]
    body = {"prompt": "hi", "max_tokens": 0, "echo": True, "logprobs": 1, "return_token_ids": True, "stream": stream}
    answer = await client.post(COMPLETIONS, json=body | ({"stream_options": {"include_usage": True}} if stream else {}))
    assert answer.status_code == 200, answer.text
    assert engine.requests[0].params.max_tokens == 1
    documents = events_of(answer.text)[:-1] if stream else [answer.json()]
    (choice,) = documents[0]["choices"]
    assert (choice["text"], choice["finish_reason"], choice["token_ids"]) == (PROMPT.text, "length", [])
    assert choice["logprobs"]["tokens"] == [token.text for token in PROMPT.tokens]
    assert documents[-1]["usage"]["completion_tokens"] == 0


async def test_the_bytes_of_a_token_that_is_a_part_of_a_character(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    event = chunk(["x"]).events[0]
    part = Logprobs(TokenLogprob(7, "\ufffd", -0.5, b"\xe4"), (TokenLogprob(8, "é", -1.0),))
    engine.plays(Chunk((replace(event, logprobs=part),), 3, 0.0))
    answer = await client.post(CHATS, json={"messages": [HI], "logprobs": True, "top_logprobs": 1})
    (token,) = answer.json()["choices"][0]["logprobs"]["content"]
    assert (token["token"], token["bytes"]) == ("\ufffd", [0xE4])
    assert token["top_logprobs"][0]["bytes"] == list("é".encode())


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
        (response_create_params.ResponseCreateParamsStreaming, ResponsesBody),
        (response_create_params.StreamOptions, ResponseStreamOptions),
        (Reasoning, ReasoningFields),
        (ResponseTextConfigParam, TextSettings),
        (ResponseFormatText, PlainFormat),
        (ResponseFormatJSONObject, PlainFormat),
        (ResponseFormatTextJSONSchemaConfigParam, SchemaFormat),
        (FunctionToolParam, FunctionTool),
        (ToolChoiceFunctionParam, NamedFunction),
        (ToolChoiceAllowedParam, AllowedFunctions),
        (EasyInputMessageParam, MessageItem),
        (response_input_item_param.Message, MessageItem),
        (ResponseOutputMessageParam, MessageItem),
        (ResponseInputTextParam, InputPart),
        (ResponseOutputTextParam, InputPart),
        (ResponseOutputRefusalParam, RefusalPart),
        (ResponseFunctionToolCallParam, FunctionCallItem),
        (response_input_item_param.FunctionCallOutput, FunctionCallOutputItem),
        (ResponseReasoningItemParam, ReasoningItem),
        (response_reasoning_item_param.Summary, SummaryPart),
        (response_reasoning_item_param.Content, ReasoningPart),
        (response_input_item_param.ItemReference, ItemReference),
    ],
)
def test_every_field_that_openai_publishes_is_declared(published: Any, body: type[Body]) -> None:
    """A new version of OpenAI's library fails here until the body declares its new fields."""
    assert published.__annotations__.keys() <= set(body.names())


def test_every_value_of_include_is_accepted() -> None:
    assert set(get_args(response_includable.ResponseIncludable)) <= set(get_args(Includable))


# The fields of vLLM's requests (vllm/entrypoints/openai/*/protocol.py, July 2026) that OpenAI's do not have.
VLLM_BOTH = """
use_beam_search top_k min_p repetition_penalty watermarking length_penalty stop_token_ids include_stop_str_in_output
ignore_eos min_tokens skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens truncation_side
prompt_logprobs logprob_token_ids allowed_token_ids bad_words structured_outputs priority request_id session_id
return_tokens_as_token_ids return_token_ids routed_experts_prompt_start return_token_offsets return_mm_kwargs cache_salt
kv_transfer_params ec_transfer_params vllm_xargs repetition_detection stream_interval thinking_token_budget
add_special_tokens echo
"""
VLLM_CHATS = """
include_reasoning add_generation_prompt continue_final_message documents chat_template chat_template_kwargs
media_io_kwargs mm_processor_kwargs return_prompt_text reasoning_effort
"""
VLLM_COMPLETIONS = "prompt_embeds response_format"


@pytest.mark.parametrize(("body", "own"), [(ChatBody, VLLM_CHATS), (CompletionBody, VLLM_COMPLETIONS)])
def test_every_field_that_vllm_publishes_is_declared(body: type[Body], own: str) -> None:
    assert {*VLLM_BOTH.split(), *own.split()} <= set(body.names())


OBJECTS: dict[str, type[Body]] = {
    "completion": CompletionBody,
    "chat": ChatBody,
    "`stream_options`": StreamOptions,
    "`structured_outputs`": StructuredOutputs,
    "message": Message,
    "text part": TextPart,
    "call": EarlierCall,
    "function of a call": CalledFunction,
    "tool": OfferedTool,
    "function": Function,
    "schema of an answer": JsonSchema,
    "response": ResponsesBody,
    "`stream_options` of a response": ResponseStreamOptions,
    "`reasoning`": ReasoningFields,
    "tool of a response": FunctionTool,
    "message item": MessageItem,
    "part of an item": InputPart,
    "call item": FunctionCallItem,
    "call output item": FunctionCallOutputItem,
    "reasoning item": ReasoningItem,
}


def unused_fields(objects: Mapping[str, type[Body]]) -> dict[tuple[str, str], tuple[unused.Unused, str]]:
    """Marker and description of each field that is not used, by object and name."""
    return {
        (title, field.alias or name): (marker, field.description or "")
        for title, body in objects.items()
        for name, field in body.model_fields.items()
        for marker in field.metadata
        if isinstance(marker, unused.Unused)
    }


def table(objects: Mapping[str, type[Body]]) -> list[str]:
    """The table of docs/api.md for these objects."""
    rows: dict[tuple[str, str], list[str]] = {}
    for (title, name), (marker, description) in unused_fields(objects).items():
        values = "any (hint)" if isinstance(marker, unused.Hint) else "any (answer)"
        if isinstance(marker, unused.UserName):
            values = "any (user)"
        if isinstance(marker, unused.Only):
            values = ", ".join(f"`{json.dumps(one)}`" for one in marker.values) or "none"
        rows.setdefault((name, f"{values} | {description}"), []).append(title)
    return [f"| `{name}` | {', '.join(titles)} | {rest} |" for (name, rest), titles in rows.items()]


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
