"""What a chat says of tools: which there are, which may or have to be called, and earlier calls."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, field_validator
from pydantic_core import PydanticCustomError

from serve_app.api.body import parse_document
from serve_app.api.schema import OBJECT, TEXT, Body, Nested
from serve_app.core.requests import ChatMessage, SamplingParams, ToolCall
from serve_app.engines.text.tool_format import ToolCallFormat
from serve_app.engines.text.tool_grammar import Tool, tool_grammar
from serve_app.errors import InvalidRequest

MOST_TOOLS = 128
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
CallId = Annotated[str, Field(min_length=1, max_length=128)]

_NOTHING: dict[str, object] = {"type": "object", "properties": {}, "additionalProperties": False}


class CalledFunction(Body):
    """`arguments` is the text of a JSON object."""

    name: Name
    arguments: str


class EarlierCall(Body):
    id: CallId
    type: Literal["function"]
    function: CalledFunction

    nested: ClassVar[Nested] = {"function": CalledFunction}

    def plain(self) -> ToolCall:
        return ToolCall(self.id, self.function.name, self.function.arguments)


Parameters = Annotated[dict[str, object], Field(json_schema_extra={"properties": {"type": {"const": "object"}}})]


class Function(Body):
    """`strict` is always so here: arguments that do not fit `parameters` cannot be said."""

    name: Name
    description: str = ""
    parameters: Parameters | None = None
    strict: bool | None = None

    @field_validator("parameters")
    @classmethod
    def _of_an_object(cls, schema: dict[str, object] | None) -> dict[str, object] | None:
        if schema is not None and schema.get("type", "object") != "object":
            raise PydanticCustomError("parameters", "Input should be a JSON schema of an object: type: object")
        return schema


class OfferedTool(Body):
    type: Literal["function"]
    function: Function

    nested: ClassVar[Nested] = {"function": Function}

    def told(self) -> str:
        """As a chat template wants it."""
        function = self.function
        parameters = {"type": "object", "properties": {}} if function.parameters is None else function.parameters
        about = {"name": function.name, "description": function.description, "parameters": parameters}
        return json.dumps({"type": "function", "function": about}, ensure_ascii=False)

    def plain(self, number: int) -> Tool:
        schema = self.function.parameters
        asked = _NOTHING if schema is None else {"type": "object"} | schema
        return Tool(self.function.name, asked, f"tools[{number}].function.parameters")


class ChosenFunction(Body):
    name: Name


class ChosenTool(Body):
    type: Literal["function"]
    function: ChosenFunction

    nested: ClassVar[Nested] = {"function": ChosenFunction}


def _word_or_tool(value: object) -> str | None:
    return TEXT if isinstance(value, str) else OBJECT if isinstance(value, dict) else None


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag(TEXT)] | Annotated[ChosenTool, Tag(OBJECT)],
    Discriminator(
        _word_or_tool,
        custom_error_type="choice_type",
        custom_error_message="Input should be none, auto, required or the function to call",
    ),
]


class ToolFields(Body):
    """The part of a chat's body that is about tools."""

    tools: Annotated[list[OfferedTool], Field(min_length=1, max_length=MOST_TOOLS, fail_fast=True)] | None = None
    """Functions that the model may call, if its chat template takes them."""
    tool_choice: ToolChoice | None = None
    """Whether it must, may or must not call, or which one."""
    parallel_tool_calls: bool | None = None
    """false: at most one call in an answer."""

    def offered(self) -> tuple[str, ...]:
        return tuple(tool.told() for tool in self.tools or ())

    @property
    def may_call(self) -> bool:
        return self.tools is not None and self.tool_choice != "none"

    def check_tools(self) -> None:
        """Raises InvalidRequest when fields contradict each other."""
        names = [tool.function.name for tool in self.tools or ()]
        twice = next((number for number, name in enumerate(names) if name in names[:number]), None)
        if twice is not None:
            raise InvalidRequest(
                f"two tools are called {names[twice]}; give each a name of its own",
                param=f"tools[{twice}].function.name",
            )
        for field in ("tool_choice", "parallel_tool_calls"):
            if self.tools is None and getattr(self, field) is not None:
                raise InvalidRequest(f"{field} goes with tools; send them or leave it out", param=field)
        chosen = self.tool_choice
        if isinstance(chosen, ChosenTool) and chosen.function.name not in names:
            raise InvalidRequest(
                f"tool_choice names {chosen.function.name}, which is none of the tools",
                param="tool_choice.function.name",
            )

    def constrained(self, params: SamplingParams, syntax: ToolCallFormat) -> SamplingParams:
        """So that an answer calls tools as it may or has to, by a model that writes calls like this.

        Raises InvalidRequest.
        """
        if syntax.hidden and params.skip_special_tokens and params.include_stop_str_in_output:
            raise InvalidRequest(
                "this model calls tools by special tokens, so what ends an answer cannot be left in its text; "
                "leave out include_stop_str_in_output or tools",
                param="include_stop_str_in_output",
            )
        chosen = self.tool_choice
        named = chosen.function.name if isinstance(chosen, ChosenTool) else None
        tools = [tool.plain(number) for number, tool in enumerate(self.tools or ())]
        tools = [tool for tool in tools if named is None or tool.name == named]
        must = named is not None or chosen == "required"
        several = named is None and self.parallel_tool_calls is not False
        return replace(
            params,
            grammar=tool_grammar(syntax, tools, must, several),
            skip_special_tokens=params.skip_special_tokens and not syntax.hidden,
        )


def with_names(messages: list[ChatMessage]) -> tuple[ChatMessage, ...]:
    """Messages of tools know which tool they are from.

    Raises InvalidRequest for one that answers no call before it, and for a call whose arguments are no object.
    """
    names: dict[str, str] = {}
    told = []
    for number, message in enumerate(messages):
        for place, call in enumerate(message.tool_calls):
            _check_arguments(call.arguments, f"messages[{number}].tool_calls[{place}].function.arguments")
            names[call.id] = call.name
        if message.role == "tool" and message.tool_call_id not in names:
            raise InvalidRequest(
                f"messages[{number}].tool_call_id is the id of no call before it; send the assistant's tool_calls too",
                param=f"messages[{number}].tool_call_id",
            )
        told.append(replace(message, name=message.name or names.get(message.tool_call_id, "")))
    return tuple(told)


def _check_arguments(text: str, param: str) -> None:
    try:
        parsed = parse_document(text.encode())
    except InvalidRequest:
        parsed = None
    if not isinstance(parsed, dict):
        raise InvalidRequest(f"{param} should be the text of a JSON object", param=param)
