"""The messages of a conversation, in OpenAI's form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from serve_app.api.openai.tools import CalledFunction, CallId, EarlierCall
from serve_app.api.openai.unused_fields import UnusedByMessages
from serve_app.api.schema import LIST, TEXT, Body, Nested
from serve_app.api.unused import Hint, Replayed
from serve_app.core.requests import ChatMessage, ChatPrompt
from serve_app.errors import InvalidRequest


class TextPart(Body):
    type: Literal["text"]
    text: str
    """The text of the part."""
    annotations: Annotated[object, Replayed()] = None
    """OpenAI's answers have it."""
    cache_control: Annotated[object, Hint()] = None
    """The prefix cache finds equal prompts without it."""
    prompt_cache_breakpoint: Annotated[object, Hint()] = None
    """The prefix cache finds equal prompts without it."""


def _tag(value: object) -> str | None:
    """The union's member by the JSON type of the value, so that an error is reported for the intended member."""
    return TEXT if isinstance(value, str) else LIST if isinstance(value, list) else None


Content = Annotated[
    Annotated[str, Tag(TEXT)] | Annotated[list[TextPart], Field(fail_fast=True), Tag(LIST)],
    Discriminator(
        _tag,
        custom_error_type="content_type",
        custom_error_message="Input should be a string or a list of text parts",
    ),
]


_NULL, _NOT_NULL = {"type": "null"}, {"not": {"type": "null"}}
_NOTHING: Any = {"enum": [None, []]}
# The rules of Message's validators as a JSON schema.
_ROLES: Any = {
    "oneOf": [
        {
            "properties": {
                "role": {"enum": ["system", "developer", "user"]},
                "content": _NOT_NULL,
                "tool_call_id": _NULL,
                "tool_calls": _NOTHING,
                "function_call": _NULL,
            },
            "required": ["content"],
        },
        {"properties": {"role": {"const": "assistant"}, "tool_call_id": _NULL}},
        {
            "properties": {
                "role": {"const": "function"},
                "content": _NOT_NULL,
                "name": {"type": "string", "minLength": 1},
                "tool_call_id": _NULL,
                "tool_calls": _NOTHING,
                "function_call": _NULL,
            },
            "required": ["content", "name"],
        },
        {
            "properties": {
                "role": {"const": "tool"},
                "content": _NOT_NULL,
                "tool_call_id": _NOT_NULL,
                "tool_calls": _NOTHING,
                "function_call": _NULL,
            },
            "required": ["content", "tool_call_id"],
        },
    ]
}


def _text_only(reasoning: object) -> object:
    """Some services answer with reasoning in another form, which no chat template takes."""
    return reasoning if isinstance(reasoning, str) else None


class Message(UnusedByMessages):
    """A message of the conversation. Its fields depend on the role."""

    model_config = ConfigDict(json_schema_extra=_ROLES)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    """Who the message is from. `developer` is `system`, if the chat template has no role `developer`.

    `function` is the older form of `tool`: the result of the latest `function_call` to the function `name`.
    """
    name: Annotated[str, Field(max_length=256)] | None = None
    """The name of the speaker, for a chat template that shows it. Role `tool`: the tool; the default is the call's."""
    tool_call_id: Annotated[CallId | None, Field(validate_default=True)] = None
    """Role `tool` only, and required there: the id of the call that the message is the result of."""
    tool_calls: Annotated[list[EarlierCall], Field(max_length=128, fail_fast=True)] | None = None
    """Role `assistant` only: the calls of the message."""
    function_call: CalledFunction | None = None
    """Role `assistant` only: the call of the message, in the older form."""
    reasoning_content: Annotated[str | None, BeforeValidator(_text_only)] = None
    """Role `assistant`: the reasoning before the answer, for a chat template that shows it."""
    reasoning: Annotated[str | None, BeforeValidator(_text_only)] = None
    """Another name of `reasoning_content`."""
    content: Annotated[Content | None, Field(validate_default=True)] = None
    """The text. A message of role `assistant` can leave it out."""

    nested: ClassVar[Nested] = {"tool_calls": EarlierCall, "content": TextPart, "function_call": CalledFunction}

    @field_validator("tool_call_id")
    @classmethod
    def _check_tool_field(cls, value: str | None, info: ValidationInfo) -> str | None:
        role = info.data.get("role")
        if value is None and role == "tool":
            raise PydanticCustomError("no_call", "Input is required in a message of role 'tool'")
        if value is not None and role not in ("tool", None):
            raise PydanticCustomError("no_tool", "Input is allowed in a message of role 'tool' only")
        return value

    @field_validator("tool_calls", "function_call")
    @classmethod
    def _check_calls(cls, value: object, info: ValidationInfo) -> object:
        if value and info.data.get("role") not in ("assistant", None):
            raise PydanticCustomError("no_assistant", "Input is allowed in a message of role 'assistant' only")
        return value

    @field_validator("content")
    @classmethod
    def _check_content(cls, value: Content | None, info: ValidationInfo) -> Content | None:
        if value is None and info.data.get("role") not in ("assistant", None):
            raise PydanticCustomError("missing", "Input is required")
        if info.data.get("role") == "function" and not info.data.get("name"):
            raise PydanticCustomError("no_name", "Input of role 'function' requires 'name'")
        return value

    def to_message(self) -> ChatMessage:
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        calls = tuple(call.to_call() for call in self.tool_calls or ())
        if self.function_call is not None:
            calls = (*calls, self.function_call.to_call(_legacy_id(self.function_call.name)))
        name, reasoning = self.name or "", self.reasoning_content or self.reasoning or ""
        if self.role == "function":
            return ChatMessage("tool", text, tool_call_id=_legacy_id(name), name=name)
        return ChatMessage(self.role, text, calls, self.tool_call_id or "", name, reasoning)


def _legacy_id(name: str) -> str:
    """The id of a call in the older form, which has none."""
    return f"call_{name}"


def to_prompt(messages: Sequence[Message], tools: tuple[str, ...] = ()) -> ChatPrompt:
    """The conversation, in which each message of role `tool` has the name of its tool.

    Raises InvalidRequest for a tool message without an earlier call.
    """
    names: dict[str, str] = {}
    found = []
    for number, message in enumerate(one.to_message() for one in messages):
        names |= {call.id: call.name for call in message.tool_calls}
        if message.role == "tool" and message.tool_call_id not in names:
            param = f"messages[{number}].tool_call_id"
            raise InvalidRequest(
                f"Field '{param}' is the id of no earlier call. Send the assistant's message with 'tool_calls' too.",
                param=param,
            )
        found.append(replace(message, name=message.name or names.get(message.tool_call_id, "")))
    return ChatPrompt(tuple(found), tools)
