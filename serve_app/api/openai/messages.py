"""The messages of a conversation, in OpenAI's form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from serve_app.api.body import parse_document
from serve_app.api.openai.tools import CallId, EarlierCall, Name
from serve_app.api.schema import LIST, TEXT, Body, Nested
from serve_app.core.requests import ChatMessage, ChatPrompt
from serve_app.errors import InvalidRequest


class TextPart(Body):
    type: Literal["text"]
    text: str
    """The text of the part."""


def _tag(value: object) -> str | None:
    """The union's member by the JSON type of the value, so that an error is reported for the intended member."""
    return TEXT if isinstance(value, str) else LIST if isinstance(value, list) else None


Content = Annotated[
    Annotated[str, Tag(TEXT)] | Annotated[list[TextPart], Field(min_length=1, fail_fast=True), Tag(LIST)],
    Discriminator(
        _tag,
        custom_error_type="content_type",
        custom_error_message="Input should be a string or a list of text parts",
    ),
]


_NULL, _NOT_NULL = {"type": "null"}, {"not": {"type": "null"}}
# The rules of Message's validators as a JSON schema.
_ROLES: Any = {
    "oneOf": [
        {
            "properties": {
                "role": {"enum": ["system", "user"]},
                "content": _NOT_NULL,
                **dict.fromkeys(("name", "tool_call_id", "tool_calls"), _NULL),
            },
            "required": ["content"],
        },
        {
            "properties": {"role": {"const": "assistant"}, "name": _NULL, "tool_call_id": _NULL},
            "anyOf": [
                {"required": ["content"], "properties": {"content": _NOT_NULL}},
                {"required": ["tool_calls"], "properties": {"tool_calls": _NOT_NULL}},
            ],
        },
        {
            "properties": {
                "role": {"const": "tool"},
                "content": _NOT_NULL,
                "tool_call_id": _NOT_NULL,
                "tool_calls": _NULL,
            },
            "required": ["content", "tool_call_id"],
        },
    ]
}


class Message(Body):
    """A message of the conversation. Its fields depend on the role."""

    model_config = ConfigDict(json_schema_extra=_ROLES)

    role: Literal["system", "user", "assistant", "tool"]
    """Who the message is from."""
    name: Name | None = None
    """Role `tool` only: the name of the tool; the default is that of the call."""
    tool_call_id: Annotated[CallId | None, Field(validate_default=True)] = None
    """Role `tool` only, and required there: the id of the call that the message is the result of."""
    tool_calls: Annotated[list[EarlierCall], Field(min_length=1, max_length=128, fail_fast=True)] | None = None
    """Role `assistant` only: the calls of the message."""
    content: Annotated[Content | None, Field(validate_default=True)] = None
    """The text. A message with `tool_calls` can leave it out."""

    nested: ClassVar[Nested] = {"tool_calls": EarlierCall, "content": TextPart}

    @field_validator("name", "tool_call_id")
    @classmethod
    def _check_tool_field(cls, value: str | None, info: ValidationInfo) -> str | None:
        role = info.data.get("role")
        if value is None and role == "tool" and info.field_name == "tool_call_id":
            raise PydanticCustomError("no_call", "Input is required in a message of role 'tool'")
        if value is not None and role not in ("tool", None):
            raise PydanticCustomError("no_tool", "Input is allowed in a message of role 'tool' only")
        return value

    @field_validator("tool_calls")
    @classmethod
    def _check_calls(cls, value: list[EarlierCall] | None, info: ValidationInfo) -> list[EarlierCall] | None:
        if info.data.get("role") not in ("assistant", None):
            raise PydanticCustomError("no_assistant", "Input is allowed in a message of role 'assistant' only")
        return value

    @field_validator("content")
    @classmethod
    def _check_content(cls, value: Content | None, info: ValidationInfo) -> Content | None:
        if value is None and info.data.get("tool_calls", "") is None:
            raise PydanticCustomError("missing", "Input is required")
        return value

    def to_message(self) -> ChatMessage:
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        calls = tuple(call.to_call() for call in self.tool_calls or ())
        return ChatMessage(self.role, text, calls, self.tool_call_id or "", self.name or "")


def to_prompt(messages: Sequence[Message], tools: tuple[str, ...] = ()) -> ChatPrompt:
    """The conversation, in which each message of role `tool` has the name of its tool.

    Raises InvalidRequest for a tool message without an earlier call, and for a call whose arguments are no JSON object.
    """
    names: dict[str, str] = {}
    found = []
    for number, message in enumerate(one.to_message() for one in messages):
        for place, call in enumerate(message.tool_calls):
            _check_arguments(call.arguments, f"messages[{number}].tool_calls[{place}].function.arguments")
            names[call.id] = call.name
        if message.role == "tool" and message.tool_call_id not in names:
            param = f"messages[{number}].tool_call_id"
            raise InvalidRequest(
                f"Field '{param}' is the id of no earlier call. Send the assistant's message with 'tool_calls' too.",
                param=param,
            )
        found.append(replace(message, name=message.name or names.get(message.tool_call_id, "")))
    return ChatPrompt(tuple(found), tools)


def _check_arguments(text: str, param: str) -> None:
    try:
        parsed = parse_document(text.encode())
    except InvalidRequest:
        parsed = None
    if not isinstance(parsed, dict):
        raise InvalidRequest(f"Field '{param}' should be the text of a JSON object.", param=param)
