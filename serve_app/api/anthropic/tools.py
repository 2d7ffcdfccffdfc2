"""The fields about tools in the bodies of Anthropic's API."""

from __future__ import annotations

import json
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from serve_app.api.openai.tools import MAX_TOOLS, Parameters, check_distinct, for_template
from serve_app.api.schema import MAX_NAME_LENGTH, Body, Nested
from serve_app.api.unused import Hint, Only
from serve_app.core.requests import Tool, ToolChoice
from serve_app.errors import InvalidRequest

ToolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,128}$")]


class CustomTool(Body):
    type: Literal["custom"] = "custom"
    name: ToolName
    """The name of the tool."""
    description: str = ""
    """A description for the model."""
    input_schema: Parameters
    """The JSON schema of the input."""
    strict: bool = False
    """Whether a schema with unsupported keywords is refused. The input follows the supported ones in any case."""
    cache_control: Annotated[object, Hint()] = None
    """The prefix cache finds equal prompts without it."""
    allowed_callers: Annotated[object, Only(["direct"], reason="only the model calls tools")] = None
    """Only the model calls tools."""
    defer_loading: Annotated[object, Only(False, reason="the service has no search for tools")] = None
    """The service has no search for tools."""
    eager_input_streaming: Annotated[object, Hint()] = None
    """A stream always has the input of a call while the model generates it."""
    input_examples: Annotated[object, Hint()] = None
    """Chat templates have no place for them."""

    def to_tool(self, number: int) -> Tool:
        schema = json.dumps({"type": "object"} | self.input_schema)
        return Tool(self.name, schema, f"tools[{number}].input_schema", self.strict)


def _refuse_other_tools(value: object) -> object:
    """Anthropic's own tools have other types. Their names end with a date."""
    kind = value.get("type", "custom") if isinstance(value, dict) else "custom"
    if isinstance(kind, str) and kind != "custom":
        message = "Input is a tool of type '{kind}', which the service does not have. Send tools of type 'custom'"
        raise PydanticCustomError("tool_type", message, {"kind": kind[:MAX_NAME_LENGTH]})
    return value


OfferedCustomTool = Annotated[CustomTool, BeforeValidator(_refuse_other_tools)]


class ToolSelection(Body):
    type: Literal["auto", "any", "tool", "none"]
    """Whether the answer may call tools, must call any of them, must call the named one, or may call none."""
    name: ToolName | None = None
    """The name of the tool, for type `tool` only."""
    disable_parallel_tool_use: bool = False
    """Whether the answer has at most one call."""


class OfferedTools(Body):
    """The fields of a conversation about tools."""

    tools: Annotated[list[OfferedCustomTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    """Tools that the model may call, if its chat template takes tools."""
    tool_choice: ToolSelection | None = None
    """How the model uses the tools. The default is `{"type": "auto"}`."""

    nested: ClassVar[Nested] = {"tools": CustomTool, "tool_choice": ToolSelection}

    def for_template(self) -> tuple[str, ...]:
        return tuple(for_template(tool.name, tool.description, tool.input_schema) for tool in self.tools or ())

    @property
    def may_call(self) -> bool:
        return bool(self.tools) and self._selection.type != "none"

    @property
    def _selection(self) -> ToolSelection:
        return self.tool_choice or ToolSelection(type="auto")

    def choice(self) -> ToolChoice | None:
        """The tools that the answer may call; None if it may call none. Raises InvalidRequest."""
        self._check()
        if not self.may_call:
            return None
        selection = self._selection
        tools = [tool.to_tool(number) for number, tool in enumerate(self.tools or ())]
        return ToolChoice(
            tools=tuple(tool for tool in tools if selection.name in (None, tool.name)),
            required=selection.type in ("any", "tool"),
            parallel=not selection.disable_parallel_tool_use,
        )

    def _check(self) -> None:
        """Raises InvalidRequest if fields contradict each other."""
        names = [tool.name for tool in self.tools or ()]
        check_distinct(names, "name")
        selection = self._selection
        if not names and selection.type in ("any", "tool"):
            raise InvalidRequest(
                "Field 'tool_choice' requires a call, which requires 'tools'. Send tools.", param="tool_choice"
            )
        if (selection.type == "tool") != (selection.name is not None):
            raise InvalidRequest(
                "Field 'tool_choice.name' is required if, and only if, the type is 'tool'.", param="tool_choice.name"
            )
        if selection.name not in (None, *names):
            raise InvalidRequest(
                f"Field 'tool_choice' names the tool '{selection.name}', which is not among the tools.",
                param="tool_choice.name",
            )
