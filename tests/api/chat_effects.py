"""The effects of the fields of a request for a chat, by body and field."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from serve_app.core.requests import (
    ChatMessage,
    Tool,
    ToolCall,
    ToolChoice,
)

from .effects import TOOL, USER, Effect, called, prompt, shown, turns, with_variables
from .scripted import POSTS
from .test_fields import SCHEMA

CHAT = POSTS["/v1/chat/completions"]
OTHER_TOOL: dict[str, Any] = {"type": "function", "function": {"name": "g"}}
NO_PARAMETERS = json.dumps({"type": "object", "properties": {}, "additionalProperties": False})
WITH_TOOL = CHAT | {"tools": [TOOL]}
WITH_TOOLS = CHAT | {"tools": [TOOL, OTHER_TOOL]}


def tool(name: str = "f", schema: str = NO_PARAMETERS) -> Tool:
    return Tool(name, schema, "tools[0].function.parameters")


def call_of(call: ToolCall) -> dict[str, Any]:
    return {"prompt": prompt(ChatMessage("assistant", "", (call,)))}


def offered(**function: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", **function}}]}


def offers(offer: Tool, template: tuple[str, ...]) -> dict[str, Any]:
    return {"tool_choice": ToolChoice((offer,)), "prompt": prompt(tools=template)}


def allowed(mode: str, name: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}}]
    return {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}}


RESULT = {
    "prompt": prompt(
        ChatMessage("assistant", "", (ToolCall("c", "f", "{}"),)), ChatMessage("tool", "r", tool_call_id="c", name="f")
    )
}

CHATS: dict[str, dict[str, Effect]] = {
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
            base=CHAT | {"tools": [TOOL, OTHER_TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}},
        )
    },
}
