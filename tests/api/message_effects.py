"""The effects of the fields of a request for a message of Anthropic's API, by body and field."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from serve_app.core.requests import (
    ChatMessage,
    ChatPrompt,
    Grammar,
    Tool,
    ToolCall,
    ToolChoice,
)

from .effects import MODEL, USER, Effect, prompt, shown, turns, with_variables
from .test_fields import SCHEMA

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


def grammar_of(field: str) -> dict[str, Any]:
    return {"grammar": Grammar("json_schema", json.dumps(SCHEMA), field)}


MESSAGES: dict[str, dict[str, Effect]] = {
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
}
