"""The effects of the fields of a request for a response, by body and field."""

from __future__ import annotations

import json
from typing import Any

from serve_app.core.requests import ChatMessage, ChatPrompt, Grammar, Tool, ToolCall, ToolChoice

from .effects import Effect
from .scripted import POSTS
from .test_fields import SCHEMA

HI = ChatMessage("user", "hi")
BASE = POSTS["/v1/responses"]
USER: dict[str, Any] = {"role": "user", "content": "hi"}
CALL: dict[str, Any] = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
RESULT: dict[str, Any] = {"type": "function_call_output", "call_id": "c", "output": "r"}
REASONING: dict[str, Any] = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "x"}]}
TOOLS: list[dict[str, Any]] = [{"type": "function", "name": name} for name in ("f", "g")]
NO_PARAMETERS = json.dumps({"type": "object", "properties": {}, "additionalProperties": False})
WITH_TOOLS = BASE | {"tools": TOOLS}
WITH_SCHEMA: dict[str, Any] = {"type": "json_schema", "name": "x", "schema": SCHEMA}
WITH_ANY_SCHEMA = WITH_SCHEMA | {"schema": {}}


def text(form: dict[str, Any]) -> dict[str, Any]:
    return {"text": {"format": form}}


def json_schema(schema: object) -> dict[str, Any]:
    return {"grammar": Grammar("json_schema", json.dumps(schema), "text.format", strict=False)}


def items(*more: dict[str, Any]) -> dict[str, Any]:
    return {"input": [USER, *more]}


def prompt(*messages: ChatMessage, tools: tuple[str, ...] = (), variables: str = "{}") -> dict[str, Any]:
    return {"prompt": ChatPrompt((HI, *messages), tools, variables)}


def tool(number: int, schema: str = NO_PARAMETERS, strict: bool = False) -> Tool:
    return Tool("fg"[number], schema, f"tools[{number}].parameters", strict)


def shown(name: str, description: str = "", parameters: object = None) -> str:
    parameters = {"type": "object", "properties": {}} if parameters is None else parameters
    function = {"name": name, "description": description, "parameters": parameters}
    return json.dumps({"type": "function", "function": function})


def one_tool(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "name": "f", **fields}]}


def choice(*numbers: int, required: bool = True, parallel: bool = True) -> dict[str, Any]:
    return {"tool_choice": ToolChoice(tuple(tool(number) for number in numbers), required, parallel)}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "name": name} for name in names]
    return {"tool_choice": {"type": "allowed_tools", "mode": mode, "tools": tools}}


def called(**changes: Any) -> dict[str, Any]:
    return items(CALL | changes)


def call(call: ToolCall) -> dict[str, Any]:
    return prompt(ChatMessage("assistant", "", (call,)))


def result(content: str = "r", name: str = "f") -> dict[str, Any]:
    return prompt(
        ChatMessage("assistant", "", (ToolCall("c", "f", "{}"),)),
        ChatMessage("tool", content, tool_call_id="c", name=name),
    )


def reasons(text: str) -> dict[str, Any]:
    return prompt(ChatMessage("assistant", "", reasoning=text))


LOGPROBS = {"include": ["message.output_text.logprobs"]}
PART: dict[str, Any] = {"type": "input_text", "text": "x"}
SAID = prompt(ChatMessage("user", "x"))
NAMED: dict[str, Any] = {"tool_choice": {"type": "function", "name": "f"}}

RESPONSES: dict[str, dict[str, Effect]] = {
    "ResponsesBody": {
        "model": Effect({"model": "org/large"}, {"model": "org/large", "temperature": 0, "top_p": 1.0}),
        "input": Effect({"input": "a"}, {"prompt": ChatPrompt((ChatMessage("user", "a"),))}),
        "instructions": Effect({"instructions": "a"}, {"prompt": ChatPrompt((ChatMessage("system", "a"), HI))}),
        # It continues no response here; see test_responses_stored.py.
        "previous_response_id": Effect({"previous_response_id": None}),
        "max_output_tokens": Effect({"max_output_tokens": 5}, {"max_tokens": 5}),
        "include": Effect(LOGPROBS, {"logprobs": 0}),
        "top_logprobs": Effect({"top_logprobs": 3}, {"logprobs": 3}, base=BASE | LOGPROBS),
        "text": Effect(text(WITH_SCHEMA), json_schema(SCHEMA)),
        "reasoning": Effect(
            {"reasoning": {"effort": "low"}},
            prompt(variables='{"reasoning_effort": "low", "enable_thinking": true}'),
            base=BASE,
        ),
        # What it leaves out is in test_responses_truncation.py.
        "truncation": Effect({"truncation": "auto"}, answer=True),
        "store": Effect({"store": False}, answer=True),
        "stream": Effect({"stream": True}, {"wake_wait_s": None}),
        "stream_options": Effect({"stream_options": {}}, base=BASE | {"stream": True}),
        **{
            name: Effect({name: value}, answer=True)
            for name, value in [
                ("metadata", {"a": "b"}),
                ("max_tool_calls", 3),
                ("prompt_cache_key", "a"),
                ("safety_identifier", "a"),
                ("user", "me"),
            ]
        },
    },
    "ResponseToolFields": {
        "tools": Effect({"tools": TOOLS}, choice(0, 1, required=False) | prompt(tools=(shown("f"), shown("g")))),
        "tool_choice": Effect({"tool_choice": "required"}, choice(0, 1), base=WITH_TOOLS),
        "parallel_tool_calls": Effect(
            {"parallel_tool_calls": False}, choice(0, 1, required=False, parallel=False), base=WITH_TOOLS
        ),
    },
    "FunctionType": {"type": Effect(one_tool(), choice(0, required=False) | prompt(tools=(shown("f"),)))},
    "NamedFunction": {
        "type": Effect(NAMED, choice(0, parallel=False), base=WITH_TOOLS),
        "name": Effect(
            {"tool_choice": {"type": "function", "name": "g"}}, choice(1, parallel=False), base=WITH_TOOLS | NAMED
        ),
    },
    "AllowedFunctions": {
        "type": Effect(allowed("auto", "g"), choice(1, required=False), base=WITH_TOOLS),
        "mode": Effect(allowed("required", "g"), choice(1, parallel=False), base=WITH_TOOLS | allowed("auto", "g")),
        "tools": Effect(allowed("required", "f", "g"), choice(0, 1), base=WITH_TOOLS | allowed("required", "g")),
    },
    "TextSettings": {
        "format": Effect(text({"type": "json_object"}), {"grammar": Grammar("json_object", field="text.format")}),
        "verbosity": Effect({"text": {"verbosity": "low"}}, answer=True),
    },
    "PlainFormat": {
        "type": Effect(text({"type": "json_object"}), {"grammar": Grammar("json_object", field="text.format")})
    },
    "SchemaFormat": {
        "type": Effect(text(WITH_SCHEMA), json_schema(SCHEMA), base=BASE | text({"type": "text"})),
        "description": Effect(text(WITH_SCHEMA | {"description": "A."}), answer=True, base=BASE | text(WITH_SCHEMA)),
    },
    "ReasoningFields": {
        "effort": Effect(
            {"reasoning": {"effort": "none"}},
            prompt(variables='{"reasoning_effort": "none", "enable_thinking": false}'),
        ),
        "summary": Effect({"reasoning": {"summary": "auto"}}, answer=True),
    },
    "InputPart": {
        name: Effect(items({"role": "user", "content": [PART]}), SAID, base=items()) for name in ("type", "text")
    },
    "RefusalPart": {
        name: Effect(
            items({"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}),
            prompt(ChatMessage("assistant", "No.")),
            base=items(),
        )
        for name in ("type", "refusal")
    },
    "MessageItem": {
        "type": Effect(items({"type": "message", **USER}), base=items(USER)),
        # Ids are seen in the list of input items.
        "id": Effect(items({"id": "msg_1", **USER}), base=items(USER)),
        "role": Effect(items({"role": "system", "content": "x"}), prompt(ChatMessage("system", "x")), base=items()),
        "content": Effect(items({"role": "user", "content": "x"}), SAID, base=items()),
    },
    "FunctionCallItem": {
        "type": Effect(called(), call(ToolCall("c", "f", "{}")), base=items()),
        "id": Effect(called(id="fc_1"), base=called()),
        "call_id": Effect(called(call_id="d"), call(ToolCall("d", "f", "{}")), base=called()),
    },
    "FunctionCallOutputItem": {
        "type": Effect(items(CALL, RESULT), result(), base=called()),
        "id": Effect(items(CALL, RESULT | {"id": "fco_1"}), base=items(CALL, RESULT)),
        "call_id": Effect(
            items(CALL | {"call_id": "d", "name": "g"}, CALL, RESULT),
            prompt(
                ChatMessage("assistant", "", (ToolCall("d", "g", "{}"), ToolCall("c", "f", "{}"))),
                ChatMessage("tool", "r", tool_call_id="c", name="f"),
            ),
            base=items(CALL | {"call_id": "d", "name": "g"}, CALL, RESULT | {"call_id": "d"}),
        ),
        "output": Effect(items(CALL, RESULT | {"output": [PART]}), result("x"), base=items(CALL, RESULT)),
        "name": Effect(items(CALL, RESULT | {"name": "g"}), result(name="g"), base=items(CALL, RESULT)),
    },
    "SummaryPart": {
        name: Effect(
            items({"type": "reasoning", "summary": [{"type": "summary_text", "text": "y"}]}), reasons("y"), base=items()
        )
        for name in ("type", "text")
    },
    "ReasoningPart": {name: Effect(items(REASONING), reasons("x"), base=items()) for name in ("type", "text")},
    # The first request, which has the base as its body, stores the item.
    "ItemReference": {
        name: Effect(
            items({"type": "item_reference", "id": "msg_1"}),
            base=items({"id": "msg_1", "role": "user", "content": "x"}),
        )
        for name in ("type", "id")
    },
    "ReasoningItem": {
        "type": Effect(items(REASONING), reasons("x"), base=items()),
        "id": Effect(items(REASONING | {"id": "rs_1"}), base=items(REASONING)),
        "summary": Effect(
            items({"type": "reasoning", "summary": [{"type": "summary_text", "text": "y"}]}), reasons("y"), base=items()
        ),
        "content": Effect(
            items(REASONING | {"summary": [{"type": "summary_text", "text": "y"}]}),
            reasons("x"),
            base=items({"type": "reasoning", "summary": [{"type": "summary_text", "text": "y"}]}),
        ),
    },
}
