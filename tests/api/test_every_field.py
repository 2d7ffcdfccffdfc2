"""Every field of every body has an effect that a test shows, and an unknown field is refused.

A new field fails here until EFFECTS has an entry for it. That a field which reaches the engine works there is tested in
the engine's tests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any, get_args

import httpx
import pytest
from pydantic import ValidationError

import serve_app.api.app  # noqa: F401 (imports the bodies of every route)
from serve_app.api.operations import OPERATIONS
from serve_app.api.sampling import SamplingFields
from serve_app.api.schema import Body
from serve_app.api.unused import Unused
from serve_app.core.events import Chunk
from serve_app.core.requests import (
    ChatMessage,
    ChatPrompt,
    Grammar,
    GrammarKind,
    TextPrompt,
    TokenPrompt,
    Tool,
    ToolCall,
    ToolChoice,
)

from .effects import Effect
from .response_effects import RESPONSES
from .scripted import POSTS, ScriptedEngine
from .test_fields import SCHEMA
from .test_prompt_details import with_details
from .toy import toy

COMPLETIONS, CHATS, EMBEDDINGS = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"
MESSAGES = "/v1/messages"
CHAT = POSTS[CHATS]


# The sampling fields, which the native and OpenAI's bodies share.
SAMPLING = {
    "temperature": Effect({"temperature": 0.7}, {"temperature": 0.7}),
    "top_p": Effect({"top_p": 0.5}, {"top_p": 0.5}),
    "top_k": Effect({"top_k": 4}, {"top_k": 4}),
    "min_p": Effect({"min_p": 0.1}, {"min_p": 0.1}),
    "repetition_penalty": Effect({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
    "presence_penalty": Effect({"presence_penalty": -2}, {"presence_penalty": -2}),
    "frequency_penalty": Effect({"frequency_penalty": 2}, {"frequency_penalty": 2}),
    "seed": Effect({"seed": 7}, {"seed": 7}),
    "stop": Effect({"stop": ["x"]}, {"stop": ("x",)}),
    "stop_token_ids": Effect({"stop_token_ids": [7]}, {"stop_token_ids": (7,)}),
    "ignore_eos": Effect({"ignore_eos": True}, {"ignore_eos": True}),
    "min_tokens": Effect({"min_tokens": 2}, {"min_tokens": 2}),
    "logit_bias": Effect({"logit_bias": {"7": 1}}, {"logit_bias": ((7, 1),)}),
    "skip_special_tokens": Effect({"skip_special_tokens": False}, {"skip_special_tokens": False}),
    "include_stop_str_in_output": Effect({"include_stop_str_in_output": True}, {"include_stop_str_in_output": True}),
    "guided_json": Effect(
        {"guided_json": SCHEMA}, {"grammar": Grammar("json_schema", json.dumps(SCHEMA), "guided_json")}
    ),
    "guided_regex": Effect({"guided_regex": "a+"}, {"grammar": Grammar("regex", "a+", "guided_regex")}),
    "guided_choice": Effect({"guided_choice": ["a"]}, {"grammar": Grammar("choice", '["a"]', "guided_choice")}),
    "guided_grammar": Effect(
        {"guided_grammar": 'start: "a"'}, {"grammar": Grammar("lark", 'start: "a"', "guided_grammar")}
    ),
    "truncate_prompt_tokens": Effect({"truncate_prompt_tokens": 5}, {"truncate_prompt_tokens": 5}),
    "priority": Effect({"priority": -3}, {"priority": -3}),
    "cache_salt": Effect({"cache_salt": "mine"}, {"cache_salt": "mine"}),
}

MODEL = Effect({"model": "org/large"}, {"model": "org/large", "temperature": 0, "top_p": 1.0})
QUERIED_MODEL = Effect({"model": "org/large"}, {"model": "org/large"})
GRAMMAR = Grammar("json_schema", json.dumps(SCHEMA), "response_format", strict=False)
WITH_SCHEMA: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
WITH_ANY_SCHEMA: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}
USER: dict[str, Any] = {"role": "user", "content": "hi"}
CALL: dict[str, Any] = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f"}}
OTHER_TOOL: dict[str, Any] = {"type": "function", "function": {"name": "g"}}
NO_PARAMETERS = json.dumps({"type": "object", "properties": {}, "additionalProperties": False})
WITH_TOOL = CHAT | {"tools": [TOOL]}
WITH_TOOLS = CHAT | {"tools": [TOOL, OTHER_TOOL]}


def parts(**more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, **more}}


def tool(name: str = "f", schema: str = NO_PARAMETERS) -> Tool:
    return Tool(name, schema, "tools[0].function.parameters")


def shown(description: str = "", name: str = "f", parameters: object = None) -> tuple[str, ...]:
    parameters = {"type": "object", "properties": {}} if parameters is None else parameters
    function = {"name": name, "description": description, "parameters": parameters}
    return (json.dumps({"type": "function", "function": function}),)


def prompt(*messages: ChatMessage, tools: tuple[str, ...] = ()) -> ChatPrompt:
    return ChatPrompt((ChatMessage("user", "hi"), *messages), tools)


def turns(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [USER, *messages]}


def called(**changes: Any) -> dict[str, Any]:
    """A conversation with a call of a tool."""
    return turns({"role": "assistant", "tool_calls": [CALL | changes]})


def call_of(call: ToolCall) -> dict[str, Any]:
    return {"prompt": prompt(ChatMessage("assistant", "", (call,)))}


def offered(**function: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", **function}}]}


def offers(offer: Tool, template: tuple[str, ...]) -> dict[str, Any]:
    return {"tool_choice": ToolChoice((offer,)), "prompt": prompt(tools=template)}


# Conversations and tools in Anthropic's form.

MESSAGE: dict[str, Any] = {"messages": [USER], "max_tokens": 8}
USE: dict[str, Any] = {"type": "tool_use", "id": "c", "name": "f", "input": {}}
RESULT_BLOCK: dict[str, Any] = {"type": "tool_result", "tool_use_id": "c"}
CUSTOM: dict[str, Any] = {"name": "f", "input_schema": {"type": "object"}}
WITH_CUSTOM = MESSAGE | {"tools": [CUSTOM]}
FORMAT: dict[str, Any] = {"type": "json_schema", "schema": SCHEMA}
ANY_FORMAT: dict[str, Any] = {"type": "json_schema", "schema": {}}


def blocks(*of_assistant: dict[str, Any], results: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    """A conversation with an answer of these blocks, and these results after it."""
    return turns({"role": "assistant", "content": list(of_assistant)}, {"role": "user", "content": list(results)})


def answered(content: str = "", calls: tuple[ToolCall, ...] = (), reasoning: str = "") -> dict[str, Any]:
    return {"prompt": prompt(ChatMessage("assistant", content, calls, reasoning=reasoning), ChatMessage("user", ""))}


def result(text: str = "", id: str = "c") -> dict[str, Any]:
    """A conversation with a call and its result."""
    called = ChatMessage("assistant", "", (ToolCall(id, "f", "{}"),))
    return {"prompt": prompt(called, ChatMessage("tool", text, tool_call_id=id, name="f"))}


def custom(name: str = "f", schema: object = None, strict: bool = False) -> Tool:
    return Tool(name, json.dumps({"type": "object"} if schema is None else schema), "tools[0].input_schema", strict)


def shown_custom(name: str = "f", description: str = "", schema: object = None) -> tuple[str, ...]:
    return shown(description, name, {"type": "object"} if schema is None else schema)


def offers_custom(offer: Tool, template: tuple[str, ...]) -> dict[str, Any]:
    return {"tool_choice": ToolChoice((offer,)), "prompt": prompt(tools=template)}


def with_variables(**variables: object) -> dict[str, Any]:
    return {"prompt": replace(prompt(), variables=json.dumps(variables))}


def grammar_of(field: str) -> dict[str, Any]:
    return {"grammar": Grammar("json_schema", json.dumps(SCHEMA), field)}


def structured(field: str, kind: GrammarKind, text: str = "") -> dict[str, Any]:
    return {"grammar": Grammar(kind, text, f"structured_outputs.{field}")}


def allowed(mode: str, name: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}}]
    return {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}}


RESULT = {
    "prompt": prompt(
        ChatMessage("assistant", "", (ToolCall("c", "f", "{}"),)), ChatMessage("tool", "r", tool_call_id="c", name="f")
    )
}
INPUTS: dict[str, Any] = {"inputs": "a b"}

# TGI's parameters that make an answer sampled, and what reaches the engine then.
SAMPLING_PARAMETERS: list[tuple[str, Any, dict[str, Any]]] = [
    ("do_sample", True, {"temperature": 0.2}),
    ("temperature", 0.7, {"temperature": 0.7}),
    ("top_k", 4, {"temperature": 0.2, "top_k": 4}),
    ("top_p", 0.5, {"temperature": 0.2, "top_p": 0.5}),
]

# By path, then by body and field.
EFFECTS: dict[str, dict[str, dict[str, Effect]]] = {
    "/generate": {
        "NativeFields": {
            "model": MODEL,
            "max_tokens": Effect({"max_tokens": 5}, {"max_tokens": 5}),
            "do_sample": Effect({"do_sample": False}, {"temperature": 0}),
            "logprobs": Effect({"logprobs": 2}, {"logprobs": 2}),
        },
        "GenerateBody": {"prompt": Effect({"prompt": "a"}, {"prompt": TextPrompt("a")})},
        "TgiBody": {
            "model": Effect(INPUTS | {"model": "org/large"}, {"model": "org/large", "top_p": 1.0}, base=INPUTS),
            "inputs": Effect({"inputs": "c"}, {"prompt": TextPrompt("c")}, base=INPUTS),
            "parameters": Effect({"parameters": {"max_new_tokens": 5}}, {"max_tokens": 5}, base=INPUTS),
        },
        "Parameters": {
            name: Effect({"parameters": {name: value}}, {attribute: becomes}, base=INPUTS)
            for name, value, attribute, becomes in [
                ("max_new_tokens", 5, "max_tokens", 5),
                ("repetition_penalty", 1.2, "repetition_penalty", 1.2),
                ("frequency_penalty", -2, "frequency_penalty", -2),
                ("seed", 9, "seed", 9),
                ("stop", ["x"], "stop", ("x",)),
                ("truncate", 7, "truncate_prompt_tokens", 7),
            ]
        }
        | {
            name: Effect(
                {"parameters": {"seed": 1, name: value}},
                engine,
                base=INPUTS | {"parameters": {"seed": 1}},
            )
            for name, value, engine in SAMPLING_PARAMETERS
        }
        | {
            "return_full_text": Effect({"parameters": {"return_full_text": True}}, answer=True, base=INPUTS),
            "details": Effect({"parameters": {"details": True}}, {"logprobs": 0}, base=INPUTS),
            "decoder_input_details": Effect(
                {"parameters": {"details": True, "decoder_input_details": True}},
                {"prompt_logprobs": 0, "prompt_details": True},
                base=INPUTS | {"parameters": {"details": True}},
            ),
            "best_of": Effect(
                {"parameters": {"do_sample": True, "details": True, "seed": 1, "best_of": 2}},
                {"count": 2, "group": True},
                base=INPUTS | {"parameters": {"do_sample": True, "details": True, "seed": 1}},
            ),
            "top_n_tokens": Effect(
                {"parameters": {"details": True, "top_n_tokens": 3}},
                {"logprobs": 3},
                base=INPUTS | {"parameters": {"details": True}},
            ),
            "grammar": Effect(
                {"parameters": {"grammar": {"type": "regex", "value": "a"}}},
                {"grammar": Grammar("regex", "a", "parameters.grammar")},
                base=INPUTS,
            ),
            **{name: Effect({"parameters": {name: None}}, base=INPUTS) for name in ("typical_p",)},
        },
        "GrammarField": {
            "type": Effect(
                {"parameters": {"grammar": {"type": "json", "value": "{}"}}},
                {"grammar": Grammar("json_schema", "{}", "parameters.grammar")},
                base=INPUTS | {"parameters": {"grammar": {"type": "regex", "value": "{}"}}},
            ),
            "value": Effect(
                {"parameters": {"grammar": {"type": "regex", "value": "b"}}},
                {"grammar": Grammar("regex", "b", "parameters.grammar")},
                base=INPUTS | {"parameters": {"grammar": {"type": "regex", "value": "a"}}},
            ),
        },
    },
    "/": {"TgiBody": {"stream": Effect({"stream": True}, {"logprobs": 0, "wake_wait_s": None}, base=INPUTS)}},
    "/generate_stream": {"StreamBody": {"include_text": Effect({"include_text": False}, answer=True)}},
    "/generate_batch": {
        "BatchBody": {
            "prompts": Effect({"prompts": ["a", "b"]}, {"prompt": TextPrompt("a"), "count": 2}),
            "requests": Effect({"prompts": None, "requests": [{"prompt": "a"}]}, {"prompt": TextPrompt("a")}),
        }
    },
    COMPLETIONS: {
        "OpenAIFields": {
            "model": MODEL,
            "n": Effect({"n": 2}, {"count": 2, "group": True}),
            "response_format": Effect({"response_format": WITH_SCHEMA}, {"grammar": GRAMMAR}),
            "stream": Effect({"stream": True}, {"wake_wait_s": None}),
            "stream_options": Effect(
                {"stream": True, "stream_options": {"include_usage": True}},
                answer=True,
                base={"prompt": "hi", "stream": True},
            ),
            "user": Effect({"user": "me"}),
            "prompt_logprobs": Effect({"prompt_logprobs": 2}, {"prompt_logprobs": 2}),
            "return_token_ids": Effect({"return_token_ids": True}, {"prompt_details": True}),
            "max_completion_tokens": Effect({"max_completion_tokens": 5}, {"max_tokens": 5}),
            "structured_outputs": Effect(
                {"structured_outputs": {"json_object": True}}, structured("json_object", "json_object")
            ),
        },
        "StructuredOutputs": {
            "json": Effect({"structured_outputs": {"json": "{}"}}, structured("json", "json_schema", "{}")),
            "regex": Effect({"structured_outputs": {"regex": "a"}}, structured("regex", "regex", "a")),
            "choice": Effect({"structured_outputs": {"choice": ["a"]}}, structured("choice", "choice", '["a"]')),
            "grammar": Effect({"structured_outputs": {"grammar": "a"}}, structured("grammar", "lark", "a")),
            "json_object": Effect(
                {"structured_outputs": {"json_object": True}}, structured("json_object", "json_object")
            ),
        },
        "StreamOptions": {
            "include_usage": Effect(
                {"stream_options": {"include_usage": True}},
                answer=True,
                base={"prompt": "hi", "stream": True, "stream_options": {}},
            ),
            "continuous_usage_stats": Effect(
                {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
                answer=True,
                base={"prompt": "hi", "stream": True, "stream_options": {"include_usage": True}},
            ),
        },
        "ResponseFormat": {
            "type": Effect(
                {"response_format": {"type": "json_object"}},
                {"grammar": Grammar("json_object", field="response_format")},
            ),
            "json_schema": Effect(
                {"response_format": WITH_SCHEMA},
                {"grammar": GRAMMAR},
                base={"prompt": "hi", "response_format": WITH_ANY_SCHEMA},
            ),
            **{
                name: Effect({"response_format": {"type": "json_object", name: SCHEMA}}, {"grammar": GRAMMAR})
                for name in ("schema", "value")
            },
        },
        "JsonSchema": {
            "schema": Effect(
                {"response_format": WITH_SCHEMA},
                {"grammar": GRAMMAR},
                base={"prompt": "hi", "response_format": WITH_ANY_SCHEMA},
            ),
            **{
                name: Effect(
                    {"response_format": parts(**{name: value})}, base={"prompt": "hi", "response_format": WITH_SCHEMA}
                )
                for name, value in [("name", "y")]
            },
            "strict": Effect(
                {"response_format": parts(strict=True)},
                {"grammar": Grammar("json_schema", json.dumps(SCHEMA), "response_format")},
                base={"prompt": "hi", "response_format": WITH_SCHEMA},
            ),
        },
        "CompletionBody": {
            "prompt": Effect({"prompt": [7]}, {"prompt": TokenPrompt((7,))}),
            "max_tokens": Effect({"max_tokens": 5}, {"max_tokens": 5}),
            "logprobs": Effect({"logprobs": 2}, {"logprobs": 2}),
            "best_of": Effect({"best_of": 2}, {"count": 2, "group": True, "logprobs": 0}),
            "echo": Effect({"echo": True}, {"prompt_details": True}),
            "add_special_tokens": Effect({"add_special_tokens": False}, {"prompt": TextPrompt("hi", False)}),
        },
    },
    CHATS: {
        "ChatBody": {
            "messages": Effect({"messages": [USER, USER]}, {"prompt": prompt(ChatMessage("user", "hi"))}),
            "max_tokens": Effect({"max_tokens": 5}, {"max_tokens": 5}),
            "logprobs": Effect({"logprobs": True}, {"logprobs": 0}),
            "top_logprobs": Effect({"top_logprobs": 3}, {"logprobs": 3}, base=CHAT | {"logprobs": True}),
            "reasoning_effort": Effect(
                {"reasoning_effort": "low"}, with_variables(reasoning_effort="low", enable_thinking=True)
            ),
            "include_reasoning": Effect({"include_reasoning": False}),
        },
        "TemplateFields": {
            "chat_template_kwargs": Effect({"chat_template_kwargs": {"a": 1}}, with_variables(a=1)),
            "documents": Effect({"documents": [{"text": "x"}]}, with_variables(documents=[{"text": "x"}])),
            "add_generation_prompt": Effect(
                {"add_generation_prompt": False}, {"prompt": replace(prompt(), begins_answer=False)}
            ),
            "continue_final_message": Effect(
                {"continue_final_message": True}, {"prompt": replace(prompt(), continues=True)}
            ),
        },
        "Message": {
            "role": Effect(turns({"role": "system", "content": "x"}), {"prompt": prompt(ChatMessage("system", "x"))}),
            "content": Effect(turns({"role": "user", "content": "x"}), {"prompt": prompt(ChatMessage("user", "x"))}),
            "tool_calls": Effect(called(), call_of(ToolCall("c", "f", "{}"))),
            "function_call": Effect(
                turns({"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}}),
                call_of(ToolCall("call_f", "f", "{}")),
            ),
            **{
                name: Effect(
                    turns({"role": "assistant", "content": "x", name: "y"}),
                    {"prompt": prompt(ChatMessage("assistant", "x", reasoning="y"))},
                    base=CHAT | turns({"role": "assistant", "content": "x"}),
                )
                for name in ("reasoning_content", "reasoning")
            },
            "tool_call_id": Effect(
                turns(called()["messages"][1], {"role": "tool", "content": "r", "tool_call_id": "c"}), RESULT
            ),
            "name": Effect(
                turns(called()["messages"][1], {"role": "tool", "content": "r", "tool_call_id": "c", "name": "g"}),
                {
                    "prompt": prompt(
                        ChatMessage("assistant", "", (ToolCall("c", "f", "{}"),)),
                        ChatMessage("tool", "r", tool_call_id="c", name="g"),
                    )
                },
            ),
        },
        "TextPart": {
            name: Effect(
                turns({"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]}),
                {"prompt": prompt(ChatMessage("user", "xy"))},
            )
            for name in ("type", "text")
        },
        "EarlierCall": {
            "id": Effect(called(id="d"), call_of(ToolCall("d", "f", "{}")), base=called()),
            "type": Effect(called(type="function"), base=called()),
            "function": Effect(
                called(function={"name": "g", "arguments": "{}"}), call_of(ToolCall("c", "g", "{}")), base=called()
            ),
        },
        "CalledFunction": {
            "name": Effect(
                called(function={"name": "g", "arguments": "{}"}), call_of(ToolCall("c", "g", "{}")), base=called()
            ),
            "arguments": Effect(
                called(function={"name": "f", "arguments": '{"a": 1}'}),
                call_of(ToolCall("c", "f", '{"a": 1}')),
                base=called(),
            ),
        },
        "ToolFields": {
            "tools": Effect({"tools": [TOOL]}, offers(tool(), shown())),
            "tool_choice": Effect(
                {"tool_choice": "required"}, {"tool_choice": ToolChoice((tool(),), True)}, base=WITH_TOOL
            ),
            "parallel_tool_calls": Effect(
                {"parallel_tool_calls": False}, {"tool_choice": ToolChoice((tool(),), parallel=False)}, base=WITH_TOOL
            ),
            "functions": Effect(
                {"functions": [{"name": "f"}]},
                {"tool_choice": ToolChoice((tool(),), parallel=False), "prompt": prompt(tools=shown())},
            ),
            "function_call": Effect(
                {"function_call": {"name": "f"}},
                {"tool_choice": ToolChoice((tool(),), True, False)},
                base=CHAT | {"functions": [{"name": "f"}]},
            ),
        },
        "AllowedToolsChoice": {
            name: Effect(allowed("auto", "f"), {"tool_choice": ToolChoice((tool(),))}, base=WITH_TOOLS)
            for name in ("type", "allowed_tools")
        },
        "AllowedTools": {
            "mode": Effect(
                allowed("required", "f"),
                {"tool_choice": ToolChoice((tool(),), True, False)},
                base=WITH_TOOLS | allowed("auto", "f"),
            ),
            "tools": Effect(
                allowed("auto", "g"),
                {"tool_choice": ToolChoice((Tool("g", NO_PARAMETERS, "tools[1].function.parameters"),))},
                base=WITH_TOOLS | allowed("auto", "f"),
            ),
        },
        "OfferedTool": {
            "type": Effect({"tools": [TOOL]}, offers(tool(), shown())),
            "function": Effect({"tools": [OTHER_TOOL]}, offers(tool("g"), shown(name="g")), base=WITH_TOOL),
        },
        "Function": {
            "name": Effect(offered(name="g"), offers(tool("g"), shown(name="g")), base=WITH_TOOL),
            "description": Effect(offered(description="Any."), {"prompt": prompt(tools=shown("Any."))}, base=WITH_TOOL),
            "parameters": Effect(
                offered(parameters=SCHEMA),
                offers(tool(schema=json.dumps(SCHEMA)), shown(parameters=SCHEMA)),
                base=WITH_TOOL,
            ),
            "strict": Effect(
                offered(strict=True), {"tool_choice": ToolChoice((replace(tool(), strict=True),))}, base=WITH_TOOL
            ),
        },
        "ChosenTool": {
            name: Effect(
                {"tool_choice": {"type": "function", "function": {"name": "f"}}},
                {"tool_choice": ToolChoice((tool(),), True, False)},
                base=WITH_TOOL,
            )
            for name in ("type", "function")
        },
        "ChosenFunction": {
            "name": Effect(
                {"tool_choice": {"type": "function", "function": {"name": "g"}}},
                {"tool_choice": ToolChoice((Tool("g", NO_PARAMETERS, "tools[1].function.parameters"),), True, False)},
                base=CHAT
                | {"tools": [TOOL, OTHER_TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}},
            )
        },
    },
    MESSAGES: {
        "MessagesBody": {
            "max_tokens": Effect({"max_tokens": 5}, {"max_tokens": 5}),
            "temperature": Effect({"temperature": 0.7}, {"temperature": 0.7}),
            "top_p": Effect({"top_p": 0.5}, {"top_p": 0.5}),
            "top_k": Effect({"top_k": 4}, {"top_k": 4}),
            "stop_sequences": Effect({"stop_sequences": ["x"]}, {"stop": ("x",)}),
            "stream": Effect({"stream": True}, {"wake_wait_s": None}),
            "metadata": Effect({"metadata": {"user_id": "me"}}),
        },
        "RequestMetadata": {"user_id": Effect({"metadata": {"user_id": "me"}})},
        "ConversationFields": {
            "model": MODEL,
            "messages": Effect({"messages": [USER, USER]}, {"prompt": ChatPrompt((ChatMessage("user", "hi\n\nhi"),))}),
            "system": Effect(
                {"system": "x"}, {"prompt": ChatPrompt((ChatMessage("system", "x"), ChatMessage("user", "hi")))}
            ),
            "thinking": Effect({"thinking": {"type": "enabled"}}, with_variables(enable_thinking=True)),
            "output_config": Effect({"output_config": {"effort": "low"}}, with_variables(reasoning_effort="low")),
            "output_format": Effect({"output_format": FORMAT}, grammar_of("output_format")),
        },
        "ThinkingConfig": {
            "type": Effect(
                {"thinking": {"type": "disabled"}},
                with_variables(enable_thinking=False),
                base=MESSAGE | {"thinking": {"type": "adaptive"}},
            ),
            # Of an answer with reasoning; test_anthropic.py has one.
            "display": Effect(
                {"thinking": {"type": "enabled", "display": "omitted"}},
                base=MESSAGE | {"thinking": {"type": "enabled"}},
            ),
        },
        "OutputConfig": {
            "effort": Effect({"output_config": {"effort": "max"}}, with_variables(reasoning_effort="max")),
            "format": Effect({"output_config": {"format": FORMAT}}, grammar_of("output_config.format")),
        },
        "OutputFormat": {
            name: Effect(
                {"output_format": FORMAT}, grammar_of("output_format"), base=MESSAGE | {"output_format": ANY_FORMAT}
            )
            for name in ("type", "schema")
        },
        "Turn": {
            "role": Effect(turns({"role": "system", "content": "x"}), {"prompt": prompt(ChatMessage("system", "x"))}),
            "content": Effect(
                turns({"role": "assistant", "content": "x"}),
                {"prompt": replace(prompt(ChatMessage("assistant", "x")), continues=True)},
            ),
        },
        "TextBlock": {
            name: Effect(blocks({"type": "text", "text": "x"}, {"type": "text", "text": "y"}), answered("xy"))
            for name in ("type", "text")
        },
        "ThinkingBlock": {
            name: Effect(blocks({"type": "thinking", "thinking": "x"}), answered(reasoning="x"))
            for name in ("type", "thinking")
        },
        "RedactedThinkingBlock": {"type": Effect(blocks({"type": "redacted_thinking", "data": "x"}), answered())},
        "ToolUseBlock": {
            "type": Effect(blocks(USE), answered(calls=(ToolCall("c", "f", "{}"),))),
            "id": Effect(blocks(USE | {"id": "d"}), answered(calls=(ToolCall("d", "f", "{}"),))),
            "name": Effect(blocks(USE | {"name": "g"}), answered(calls=(ToolCall("c", "g", "{}"),))),
            "input": Effect(blocks(USE | {"input": {"a": 1}}), answered(calls=(ToolCall("c", "f", '{"a": 1}'),))),
        },
        "ToolResultBlock": {
            "type": Effect(blocks(USE, results=(RESULT_BLOCK,)), result()),
            "tool_use_id": Effect(
                blocks(USE | {"id": "d"}, results=(RESULT_BLOCK | {"tool_use_id": "d"},)), result(id="d")
            ),
            "content": Effect(blocks(USE, results=(RESULT_BLOCK | {"content": "r"},)), result("r")),
            "is_error": Effect(
                blocks(USE, results=(RESULT_BLOCK | {"content": "r", "is_error": True},)), result("Error: r")
            ),
        },
        "OfferedTools": {
            "tools": Effect({"tools": [CUSTOM]}, offers_custom(custom(), shown_custom())),
            "tool_choice": Effect(
                {"tool_choice": {"type": "any"}}, {"tool_choice": ToolChoice((custom(),), True)}, base=WITH_CUSTOM
            ),
        },
        "CustomTool": {
            "type": Effect({"tools": [CUSTOM | {"type": "custom"}]}, base=WITH_CUSTOM),
            "name": Effect(
                {"tools": [CUSTOM | {"name": "g"}]}, offers_custom(custom("g"), shown_custom("g")), base=WITH_CUSTOM
            ),
            "description": Effect(
                {"tools": [CUSTOM | {"description": "Any."}]},
                {"prompt": prompt(tools=shown_custom(description="Any."))},
                base=WITH_CUSTOM,
            ),
            "input_schema": Effect(
                {"tools": [CUSTOM | {"input_schema": SCHEMA}]},
                offers_custom(custom(schema=SCHEMA), shown_custom(schema=SCHEMA)),
                base=WITH_CUSTOM,
            ),
            "strict": Effect(
                {"tools": [CUSTOM | {"strict": True}]},
                {"tool_choice": ToolChoice((custom(strict=True),))},
                base=WITH_CUSTOM,
            ),
        },
        "ToolSelection": {
            "type": Effect({"tool_choice": {"type": "none"}}, {"tool_choice": None}, base=WITH_CUSTOM),
            "name": Effect(
                {"tool_choice": {"type": "tool", "name": "f"}},
                {"tool_choice": ToolChoice((custom(),), True)},
                base=WITH_CUSTOM,
            ),
            "disable_parallel_tool_use": Effect(
                {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
                {"tool_choice": ToolChoice((custom(),), parallel=False)},
                base=WITH_CUSTOM,
            ),
        },
    },
    EMBEDDINGS: {
        "EmbeddingsBody": {
            "model": Effect({"model": "small"}),
            "input": Effect({"input": "b"}, {"prompt": TextPrompt("b")}),
            "encoding_format": Effect({"encoding_format": "base64"}, answer=True),
            "dimensions": Effect({"dimensions": 2}),
            "user": Effect({"user": "me"}),
            "truncate_prompt_tokens": Effect({"truncate_prompt_tokens": 5}, {"truncate_prompt_tokens": 5}),
            "priority": Effect({"priority": 1}, {"priority": 1}),
        }
    },
    "/v1/responses": RESPONSES,
    "/tokenize": {
        "TokenizeBody": {
            "model": QUERIED_MODEL,
            "prompt": Effect({"prompt": "b"}, {"prompt": TextPrompt("b")}),
            "messages": Effect({"prompt": None, "messages": [USER]}, {"prompt": prompt()}),
            "tools": Effect({"tools": [TOOL]}, {"prompt": prompt(tools=shown())}, base={"messages": [USER]}),
            "add_special_tokens": Effect({"add_special_tokens": False}, {"special_tokens": False}),
            "return_token_strs": Effect({"return_token_strs": True}, answer=True),
        },
        "TokenizeInputsBody": {
            "model": Effect({"model": "org/large"}, {"model": "org/large"}, base={"inputs": "a"}),
            "inputs": Effect({"inputs": "b"}, {"prompt": TextPrompt("b")}, base={"inputs": "a"}),
        },
    },
    "/detokenize": {
        "DetokenizeBody": {
            "model": QUERIED_MODEL,
            "tokens": Effect({"tokens": [7]}, {"token_ids": (7,)}),
        }
    },
}
BASES: dict[str, dict[str, Any]] = {
    **POSTS,
    "/": INPUTS,
    MESSAGES: MESSAGE,
    EMBEDDINGS: {"input": "a"},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [1]},
}
CASES = [
    pytest.param(path, effect, id=f"{path} {body}.{field}")
    for path, of_bodies in EFFECTS.items()
    for body, effects in of_bodies.items()
    for field, effect in effects.items()
] + [
    pytest.param(path, effect, id=f"{path} SamplingFields.{field}")
    for path in POSTS
    for field, effect in SAMPLING.items()
]


def bodies(of: type[Body] = Body) -> Iterator[type[Body]]:
    """Every class of a body, whole or nested."""
    for body in of.__subclasses__():
        if body.__module__.startswith("serve_app."):
            yield body
            yield from bodies(body)


every_body = pytest.mark.parametrize(
    "body", {body.__name__: body for body in bodies()}.values(), ids=lambda b: b.__name__
)


def own_fields(body: type[Body]) -> set[str]:
    """The fields that this class declares itself, and uses."""
    return {
        field.alias or name
        for name, field in body.model_fields.items()
        if name in body.__annotations__ and not any(isinstance(one, Unused) for one in field.metadata)
    }


def test_every_field_has_an_effect() -> None:
    listed = {
        (body, field) for of_bodies in EFFECTS.values() for body, effects in of_bodies.items() for field in effects
    }
    listed |= {("SamplingFields", field) for field in SAMPLING}
    assert listed == {(body.__name__, field) for body in bodies() for field in own_fields(body)}
    assert SAMPLING.keys() == set(SamplingFields.names())


def test_the_document_has_no_other_bodies() -> None:
    documented = [get_args(one.body) or (one.body,) for one in OPERATIONS if one.body is not None]
    assert {body for each in documented for body in each} <= set(bodies())


@every_body
def test_an_unknown_field_is_refused(body: type[Body]) -> None:
    with pytest.raises(ValidationError) as refused:
        body.model_validate({"surely_unknown": None})
    assert [error["loc"] for error in refused.value.errors() if error["type"] == "extra_forbidden"] == [
        ("surely_unknown",)
    ]


@every_body
def test_every_field_is_documented(body: type[Body]) -> None:
    """A field with one possible value needs no description."""
    undocumented = {
        field.alias or name
        for name, field in body.model_fields.items()
        if not field.description and len(get_args(field.annotation)) != 1
    }
    assert undocumented <= {"type", "text"}


def reached(engine: ScriptedEngine) -> dict[str, Any]:
    """The attributes of the first request or query that reached the engine, without ids and times."""
    if not engine.requests:
        model, query = engine.queries[0]
        return {"model": model} | {field.name: getattr(query, field.name) for field in fields(query)}  # type: ignore[arg-type]
    request = engine.requests[0]
    found = {field.name: getattr(one, field.name) for one in (request, request.params) for field in fields(one)}
    found |= {"group": request.group != "", "count": len(engine.requests)}
    return {name: value for name, value in found.items() if name not in ("id", "params", "arrived", "deadline")}


TIMES_AND_IDS = re.compile(r'"(id|item_id|created|created_at|completed_at|elapsed_ms)":("[^"]*"|[0-9.]+)')


async def sent(
    client: httpx.AsyncClient, engine: ScriptedEngine, path: str, body: dict[str, Any]
) -> tuple[dict[str, Any], str]:
    """What reached the engine, and the answer without ids and times of its own."""
    engine.requests.clear()
    engine.queries.clear()
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return reached(engine), TIMES_AND_IDS.sub("", answer.text)


@pytest.mark.parametrize(("path", "effect"), CASES)
async def test_a_field_has_its_effect_and_no_other(
    client: httpx.AsyncClient, engine: ScriptedEngine, path: str, effect: Effect
) -> None:
    if path == EMBEDDINGS:
        engine.script = lambda request: [Chunk((), 1, 0.0, embedding=(1.0, 2.0))]
    else:
        engine.script = with_details
    base = effect.base or BASES[path]
    before, answer_before = await sent(client, engine, path, base)
    after, answer_after = await sent(client, engine, path, base | effect.fields)
    assert {name: value for name, value in after.items() if before.get(name) != value} == (effect.engine or {})
    if effect.engine is None:
        assert (answer_before != answer_after) == effect.answer


async def test_requests_with_different_salts_share_no_cache() -> None:
    async with toy() as (client, _):

        async def cached(**fields: str) -> int:
            answer = await client.post("/generate", json={"prompt": "a" * 40, "max_tokens": 1, **fields})
            found: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            return found

        assert [await cached(), await cached()] == [0, 32]
        assert [await cached(cache_salt="mine"), await cached(cache_salt="mine")] == [0, 32]
        assert await cached(cache_salt="yours") == 0
