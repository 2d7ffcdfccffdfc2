"""The fields about tools in the body of a chat completion: tools, their choice, and the calls of earlier messages."""

from __future__ import annotations

import json
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from serve_app.api.body import parse_document
from serve_app.api.schema import OBJECT, TEXT, Body, Nested
from serve_app.api.unused import Hint, Replayed
from serve_app.core.requests import Tool, ToolCall, ToolChoice
from serve_app.errors import InvalidRequest

MAX_TOOLS = 128
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
CallId = Annotated[str, Field(min_length=1, max_length=128)]

_NO_PARAMETERS: dict[str, object] = {"type": "object", "properties": {}, "additionalProperties": False}


class CalledFunction(Body):
    name: Name
    """The name of the function."""
    arguments: str | dict[str, object] = ""
    """A JSON object, or its text. Any other text, for example a call that was cut off, counts as `{}`."""
    parsed_arguments: Annotated[object, Replayed()] = None
    """OpenAI's client adds it to answers."""

    def as_text(self) -> str:
        """The text of a JSON object."""
        if isinstance(self.arguments, dict):
            return json.dumps(self.arguments, ensure_ascii=False)
        try:
            parsed = parse_document(self.arguments.encode())
        except InvalidRequest:
            parsed = None
        return self.arguments if isinstance(parsed, dict) else "{}"


class EarlierCall(Body):
    id: CallId
    """The id by which a message of role `tool` refers to the call."""
    type: Literal["function"]
    function: CalledFunction
    """The function and its arguments."""
    index: Annotated[object, Replayed()] = None
    """The calls of a stream have it."""
    extra_content: Annotated[object, Replayed()] = None
    """The answers of other services have it."""
    provider_specific_fields: Annotated[object, Replayed()] = None
    """LiteLLM adds it to answers."""

    nested: ClassVar[Nested] = {"function": CalledFunction}

    def to_call(self) -> ToolCall:
        return ToolCall(self.id, self.function.name, self.function.as_text())


def _check_type(schema: dict[str, object]) -> dict[str, object]:
    if schema.get("type", "object") != "object":
        raise PydanticCustomError("parameters", "Input should be a JSON schema of an object: type: object")
    return schema


Parameters = Annotated[
    dict[str, object],
    Field(json_schema_extra={"properties": {"type": {"const": "object"}}}),
    AfterValidator(_check_type),
]


class Function(Body):
    name: Name
    """The name of the function."""
    description: str = ""
    """A description for the model."""
    parameters: Parameters | None = None
    """The JSON schema of the arguments. Without it the function takes no arguments."""
    strict: bool | None = None
    """Accepted; arguments always follow `parameters`."""


def for_template(name: str, description: str, parameters: dict[str, object] | None) -> str:
    """A tool as the chat template shows it to the model: OpenAI's form, in every dialect."""
    parameters = {"type": "object", "properties": {}} if parameters is None else parameters
    shown = {"name": name, "description": description, "parameters": parameters}
    return json.dumps({"type": "function", "function": shown}, ensure_ascii=False)


class OfferedTool(Body):
    type: Literal["function"]
    function: Function
    """The function that the model may call."""
    cache_control: Annotated[object, Hint()] = None
    """The prefix cache finds equal prompts without it."""

    nested: ClassVar[Nested] = {"function": Function}

    def to_tool(self, number: int) -> Tool:
        parameters = self.function.parameters
        schema = _NO_PARAMETERS if parameters is None else {"type": "object"} | parameters
        return Tool(self.function.name, json.dumps(schema), f"tools[{number}].function.parameters")


class ChosenFunction(Body):
    name: Name
    """The name of the function."""


class ChosenTool(Body):
    type: Literal["function"]
    function: ChosenFunction
    """The function that the model must call."""

    nested: ClassVar[Nested] = {"function": ChosenFunction}


def _tag(value: object) -> str | None:
    return TEXT if isinstance(value, str) else OBJECT if isinstance(value, dict) else None


Choice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag(TEXT)] | Annotated[ChosenTool, Tag(OBJECT)],
    Discriminator(
        _tag,
        custom_error_type="choice_type",
        custom_error_message="Input should be 'none', 'auto', 'required' or the function to call",
    ),
]


class ToolFields(Body):
    """The fields of a chat about tools."""

    tools: Annotated[list[OfferedTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    """Functions that the model may call, if its chat template takes tools."""
    tool_choice: Choice | None = None
    """`auto` (the default with tools), `none`, `required`, or the function that the model must call."""
    parallel_tool_calls: bool | None = None
    """Whether an answer may hold several calls; the default is true."""

    def for_template(self) -> tuple[str, ...]:
        functions = [tool.function for tool in self.tools or ()]
        return tuple(for_template(one.name, one.description, one.parameters) for one in functions)

    @property
    def may_call(self) -> bool:
        return bool(self.tools) and self.tool_choice != "none"

    def choice(self) -> ToolChoice | None:
        """The tools that the answer may call; None if it may call none. Raises InvalidRequest."""
        self._check()
        if not self.may_call:
            return None
        chosen = self.tool_choice
        named = chosen.function.name if isinstance(chosen, ChosenTool) else None
        tools = [tool.to_tool(number) for number, tool in enumerate(self.tools or ())]
        return ToolChoice(
            tools=tuple(tool for tool in tools if named in (None, tool.name)),
            required=named is not None or chosen == "required",
            parallel=named is None and self.parallel_tool_calls is not False,
        )

    def _check(self) -> None:
        """Raises InvalidRequest if fields contradict each other."""
        names = [tool.function.name for tool in self.tools or ()]
        twice = next((number for number, name in enumerate(names) if name in names[:number]), None)
        if twice is not None:
            raise InvalidRequest(
                f"Two tools have the name '{names[twice]}'. Give each tool a name of its own.",
                param=f"tools[{twice}].function.name",
            )
        chosen = self.tool_choice
        if not self.tools and chosen not in (None, "none", "auto"):
            raise InvalidRequest(
                "Field 'tool_choice' requires a call, which requires 'tools'. Send tools.", param="tool_choice"
            )
        if isinstance(chosen, ChosenTool) and chosen.function.name not in names:
            raise InvalidRequest(
                f"Field 'tool_choice' names the function '{chosen.function.name}', which is not among the tools.",
                param="tool_choice.function.name",
            )
