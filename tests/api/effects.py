"""How a test states the effect of a field of a body."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from serve_app.core.requests import ChatMessage, ChatPrompt


@dataclass(frozen=True, slots=True)
class Effect:
    """Fields of a body, and what they change.

    `engine` are the attributes of the request or query that reaches the engine, with their values. `answer` is whether
    the answer changes although the same reaches the engine. With neither, the fields have no effect.
    `base` replaces the shortest body of the path.
    """

    fields: dict[str, Any]
    engine: dict[str, Any] | None = None
    answer: bool = False
    base: dict[str, Any] | None = None


MODEL = Effect({"model": "org/large"}, {"model": "org/large", "temperature": 0, "top_p": 1.0})
USER: dict[str, Any] = {"role": "user", "content": "hi"}
CALL: dict[str, Any] = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f"}}


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


def with_variables(**variables: object) -> dict[str, Any]:
    return {"prompt": replace(prompt(), variables=json.dumps(variables))}
