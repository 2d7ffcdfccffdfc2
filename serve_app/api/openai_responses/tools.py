"""The fields about tools of a response: tools, and the choice among them."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from serve_app.api.openai.tools import (
    MAX_TOOLS,
    Function,
    Name,
    OfferedTool,
    check_chosen,
    check_distinct,
    for_template,
)
from serve_app.api.openai_responses.objects import (
    AllowedToolsObject,
    FunctionName,
    FunctionToolObject,
    ToolChoiceMode,
)
from serve_app.api.openai_responses.unused_fields import UnusedByTools
from serve_app.api.schema import TEXT, Body, Nested
from serve_app.core.requests import Tool, ToolChoice

FUNCTION, ALLOWED_TOOLS = "<function>", "<allowed_tools>"


class FunctionType(Body):
    """The first field of a tool, so that an error about another kind of tool names it."""

    type: Literal["function"]


class FunctionTool(UnusedByTools, Function, FunctionType):
    """A function that the model may call."""

    def to_tool(self, number: int) -> Tool:
        tool = OfferedTool(type="function", function=self).to_tool(number)
        return replace(tool, field=f"tools[{number}].parameters")

    def to_object(self) -> FunctionToolObject:
        return {
            "type": "function",
            "name": self.name,
            "description": self.description or None,
            "parameters": self.parameters,
            "strict": self.strict,
        }


class NamedFunction(Body):
    type: Literal["function"]
    name: Name
    """The name of the function."""

    def to_object(self) -> FunctionName:
        return {"type": "function", "name": self.name}


class AllowedFunctions(Body):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    """`auto`: the model decides whether the answer has calls; `required`: it has at least one."""
    tools: Annotated[list[NamedFunction], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]
    """The functions that the answer may call. The model sees the other tools of the request too."""

    nested: ClassVar[Nested] = {"tools": NamedFunction}

    def to_object(self) -> AllowedToolsObject:
        return {"type": "allowed_tools", "mode": self.mode, "tools": [tool.to_object() for tool in self.tools]}


def _tag(value: object) -> str | None:
    if isinstance(value, str):
        return TEXT
    kind = value.get("type") if isinstance(value, dict) else None
    return f"<{kind}>" if kind in ("function", "allowed_tools") else None


ResponseToolChoice = Annotated[
    Annotated[ToolChoiceMode, Tag(TEXT)]
    | Annotated[NamedFunction, Tag(FUNCTION)]
    | Annotated[AllowedFunctions, Tag(ALLOWED_TOOLS)],
    Discriminator(
        _tag,
        custom_error_type="choice_type",
        custom_error_message="Input should be 'none', 'auto', 'required', or an object of type 'function' or "
        "'allowed_tools'",
    ),
]


class ResponseToolFields(Body):
    """The fields of a request about tools."""

    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    """Functions that the model may call, if its chat template takes tools."""
    tool_choice: ResponseToolChoice | None = None
    """`auto` (the default), `none`, `required`, the function that the model must call, or the allowed functions."""
    parallel_tool_calls: bool | None = None
    """Whether an answer may hold several calls; the default is true."""

    nested: ClassVar[Nested] = {
        "tools": FunctionTool,
        "tool_choice": NamedFunction,
        FUNCTION: NamedFunction,
        ALLOWED_TOOLS: AllowedFunctions,
    }

    def for_template(self) -> tuple[str, ...]:
        return tuple(for_template(tool.name, tool.description, tool.parameters) for tool in self.tools or ())

    @property
    def may_call(self) -> bool:
        return bool(self.tools) and self.tool_choice != "none"

    def choice(self) -> ToolChoice | None:
        """The tools that the answer may call; None if it may call none. Raises InvalidRequest."""
        self._check_tools()
        if not self.may_call:
            return None
        names, required = self._chosen()
        tools = [tool.to_tool(number) for number, tool in enumerate(self.tools or ())]
        one_named = required and len(names) == 1
        return ToolChoice(
            tools=tuple(tool for tool in tools if not names or tool.name in names),
            required=required,
            parallel=not one_named and self.parallel_tool_calls is not False,
        )

    def choice_object(self) -> ToolChoiceMode | FunctionName | AllowedToolsObject:
        chosen = self.tool_choice
        return chosen.to_object() if isinstance(chosen, NamedFunction | AllowedFunctions) else chosen or "auto"

    def _chosen(self) -> tuple[list[str], bool]:
        """The names of the tools that the answer may call, none for all, and whether it must call one."""
        match self.tool_choice:
            case NamedFunction(name=name):
                return [name], True
            case AllowedFunctions(mode=mode, tools=tools):
                return [tool.name for tool in tools], mode == "required"
            case choice:
                return [], choice == "required"

    def _check_tools(self) -> None:
        """Raises InvalidRequest if fields contradict each other."""
        names = [tool.name for tool in self.tools or ()]
        check_distinct(names, "name")
        check_chosen(names, self._chosen()[0], optional=self.tool_choice in (None, "none", "auto"))
