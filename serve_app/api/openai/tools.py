"""The fields about tools in the body of a chat completion: tools, their choice, and the calls of earlier messages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from serve_app.api.body import parse_document
from serve_app.api.schema import ALLOWED, OBJECT, TEXT, Body, Nested
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
    description: Annotated[object, Replayed()] = None
    """TGI's answers have it, and Hugging Face's client adds it to answers."""

    def to_call(self, id: str) -> ToolCall:
        return ToolCall(id, self.name, self._as_text())

    def _as_text(self) -> str:
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
        return self.function.to_call(self.id)


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
    """Whether `parameters` with a rule that the service does not support are refused. Otherwise it is left out."""
    defer_loading: Annotated[object, Hint()] = None
    """Every tool is shown to the model."""


def for_template(name: str, description: str, parameters: dict[str, object] | None) -> str:
    """A tool as the chat template shows it to the model: OpenAI's form, in every dialect."""
    parameters = {"type": "object", "properties": {}} if parameters is None else parameters
    shown = {"name": name, "description": description, "parameters": parameters}
    return json.dumps({"type": "function", "function": shown}, ensure_ascii=False)


def check_distinct(names: Sequence[str], field: str) -> None:
    """Raises InvalidRequest if two tools have one name, which is in `field` of a tool."""
    twice = next((number for number, name in enumerate(names) if name in names[:number]), None)
    if twice is not None:
        raise InvalidRequest(
            f"Two tools have the name '{names[twice]}'. Give each tool a name of its own.",
            param=f"tools[{twice}].{field}",
        )


def check_chosen(names: Sequence[str], chosen: Sequence[str], optional: bool) -> None:
    """Raises InvalidRequest if a choice needs tools and there are none, or names another one than the tools `names`."""
    if not names and not optional:
        raise InvalidRequest(
            "Field 'tool_choice' requires a call, which requires 'tools'. Send tools.", param="tool_choice"
        )
    unknown = next((name for name in chosen if name not in names), None)
    if unknown is not None:
        raise InvalidRequest(
            f"Field 'tool_choice' names the function '{unknown}', which is not among the tools.", param="tool_choice"
        )


class OfferedTool(Body):
    type: Literal["function"]
    function: Function
    """The function that the model may call."""
    cache_control: Annotated[object, Hint()] = None
    """The prefix cache finds equal prompts without it."""
    defer_loading: Annotated[object, Hint()] = None
    """Every tool is shown to the model."""

    nested: ClassVar[Nested] = {"function": Function}

    def to_tool(self, number: int) -> Tool:
        parameters = self.function.parameters
        schema = _NO_PARAMETERS if parameters is None else {"type": "object"} | parameters
        field, strict = f"tools[{number}].function.parameters", self.function.strict is True
        return Tool(self.function.name, json.dumps(schema), field, strict)


class ChosenFunction(Body):
    name: Name
    """The name of the function."""


class ChosenTool(Body):
    type: Literal["function"]
    function: ChosenFunction
    """The function that the model must call."""

    nested: ClassVar[Nested] = {"function": ChosenFunction}


class AllowedTools(Body):
    mode: Literal["auto", "required"]
    """Whether the answer may or must be a call."""
    tools: Annotated[list[ChosenTool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]
    """The functions that the model may call."""

    nested: ClassVar[Nested] = {"tools": ChosenTool}


class AllowedToolsChoice(Body):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools
    """Some of the tools: the model sees all of them, and may call these."""

    nested: ClassVar[Nested] = {"allowed_tools": AllowedTools}


FunctionChoice = Annotated[
    Annotated[Literal["none", "auto"], Tag(TEXT)] | Annotated[ChosenFunction, Tag(OBJECT)],
    Discriminator(
        lambda value: TEXT if isinstance(value, str) else OBJECT if isinstance(value, dict) else None,
        custom_error_type="choice_type",
        custom_error_message="Input should be 'none', 'auto' or the function to call",
    ),
]


def _tag(value: object) -> str | None:
    if isinstance(value, dict):
        return ALLOWED if value.get("type") == "allowed_tools" else OBJECT
    return TEXT if isinstance(value, str) else None


Choice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag(TEXT)]
    | Annotated[ChosenTool, Tag(OBJECT)]
    | Annotated[AllowedToolsChoice, Tag(ALLOWED)],
    Discriminator(
        _tag,
        custom_error_type="choice_type",
        custom_error_message="Input should be 'none', 'auto', 'required', the function to call or the allowed tools",
    ),
]


class ToolFields(Body):
    """The fields of a chat about tools. `functions` and `function_call` are the older names of the first two."""

    tools: Annotated[list[OfferedTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    """Functions that the model may call, if its chat template takes tools."""
    tool_choice: Choice | None = None
    """`auto` (the default with tools), `none`, `required`, the function that the model must call, or allowed tools."""
    parallel_tool_calls: bool | None = None
    """Whether an answer may hold several calls; the default is true."""
    functions: Annotated[list[Function], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    """The older form of `tools`. A call is then in the answer's `function_call`."""
    function_call: FunctionChoice | None = None
    """The older form of `tool_choice`: `auto`, `none`, or the function that the model must call."""

    def for_template(self) -> tuple[str, ...]:
        functions = [tool.function for tool in self._offered()]
        return tuple(for_template(one.name, one.description, one.parameters) for one in functions)

    @property
    def may_call(self) -> bool:
        return bool(self._offered()) and "none" not in (self.tool_choice, self.function_call)

    @property
    def legacy_calls(self) -> bool:
        """Whether the answer has a call in the older form."""
        return bool(self.functions)

    def choice(self) -> ToolChoice | None:
        """The tools that the answer may call; None if it may call none. Raises InvalidRequest."""
        self._check()
        if not self.may_call:
            return None
        names, required = self._chosen()
        tools = [tool.to_tool(number) for number, tool in enumerate(self._offered())]
        one_named = required and names is not None and len(names) == 1
        return ToolChoice(
            tools=tuple(tool for tool in tools if names is None or tool.name in names),
            required=required,
            parallel=not (one_named or self.legacy_calls) and self.parallel_tool_calls is not False,
        )

    def _offered(self) -> Sequence[OfferedTool]:
        if self.functions:
            return [OfferedTool(type="function", function=function) for function in self.functions]
        return self.tools or ()

    def _chosen(self) -> tuple[Sequence[str] | None, bool]:
        """The names of the tools that the answer may call, None for all, and whether it must call one."""
        match self.tool_choice or self.function_call:
            case ChosenTool(function=function) | (ChosenFunction() as function):
                return [function.name], True
            case AllowedToolsChoice(allowed_tools=allowed):
                return [tool.function.name for tool in allowed.tools], allowed.mode == "required"
            case choice:
                return None, choice == "required"

    def _check(self) -> None:
        """Raises InvalidRequest if fields contradict each other."""
        if self.tools and self.functions:
            raise InvalidRequest("Field 'functions' is the older form of 'tools'. Send one of them.", param="functions")
        names = [tool.function.name for tool in self._offered()]
        check_distinct(names, "function.name")
        optional = all(one in (None, "none", "auto") for one in (self.tool_choice, self.function_call))
        check_chosen(names, self._chosen()[0] or (), optional)
