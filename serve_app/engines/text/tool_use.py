"""Tool use of one answer: the grammar that the answer follows, and the parser that emits its tool calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from serve_app.core.requests import Grammar, SamplingParams, Tool, ToolChoice
from serve_app.engines.text.parameter_format import is_text, parameters_of
from serve_app.engines.text.protocol import AnswerPlan, Constraint
from serve_app.engines.text.tool_format import ToolCallFormat
from serve_app.engines.text.tool_grammar import arguments_grammar, tool_grammar
from serve_app.engines.text.tool_parser import ToolCallFormatParser
from serve_app.errors import InvalidRequest, ServeAppError

# The constraint of a new answer that follows a grammar, with `ignore_eos`.
Compile = Callable[[Grammar, bool], Constraint | ServeAppError]

_ANY_OBJECT = '{"type": "object"}'
NO_TOOL_SUPPORT = (
    "this model does not call tools: its chat template takes no tools, or writes tool calls in a format that is not "
    "supported. Remove tools from the request, or configure a chat template that takes tools, for example "
    "chat_template: builtin:chatml_tools"
)


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What the engine needs for one answer that may call tools.

    `params` are the request's, with `grammar`, and with special tokens in the text if the format consists of such
    tokens. The parser reads that text.
    """

    grammar: Grammar
    params: SamplingParams
    parser: ToolCallFormatParser


def plan_tool_use(
    call_format: ToolCallFormat | None, choice: ToolChoice, params: SamplingParams, compile: Compile
) -> AnswerPlan | ServeAppError:
    """The plan for an answer that may call tools, or the reason why the model or a grammar refuses them."""
    use = prepare_tool_use(call_format, choice, params)
    if isinstance(use, ServeAppError):
        return use
    constraint = compile(use.grammar, params.ignore_eos)
    if not isinstance(constraint, ServeAppError):
        return AnswerPlan(use.params, constraint, use.parser)
    loosened = replace(choice, tools=tuple(_loosened(tool, compile) for tool in choice.tools))
    return constraint if loosened == choice else plan_tool_use(call_format, loosened, params, compile)


def _loosened(tool: Tool, compile: Compile) -> Tool:
    """The tool with any object as arguments, if its schema cannot be compiled and need not be followed."""
    if tool.strict or not isinstance(compile(arguments_grammar(tool), False), ServeAppError):
        return tool
    return replace(tool, schema=_ANY_OBJECT)


def prepare_tool_use(
    call_format: ToolCallFormat | None, choice: ToolChoice, params: SamplingParams
) -> ToolUse | ServeAppError:
    """Tool use of one answer of a model with this format of calls; None: the model does not call tools."""
    if call_format is None:
        return InvalidRequest(NO_TOOL_SUPPORT, param="tools")
    hides_markers = bool(call_format.special_markers) and params.skip_special_tokens
    if hides_markers and params.include_stop_str_in_output:
        return InvalidRequest(
            "this model writes tool calls with special tokens, so an answer with tools cannot include the text that "
            "ended it; remove include_stop_str_in_output or tools",
            param="include_stop_str_in_output",
        )
    try:
        grammar = tool_grammar(call_format, choice, params.grammar)
    except InvalidRequest as error:
        return error
    skip_special_tokens = params.skip_special_tokens and not hides_markers
    params = replace(params, grammar=grammar, skip_special_tokens=skip_special_tokens)
    tools = choice.tools if call_format.parameters is not None else ()
    texts = {(tool.name, key) for tool in tools for key, one in parameters_of(tool).items() if is_text(one)}
    return ToolUse(grammar, params, ToolCallFormatParser(call_format, lambda *parameter: parameter in texts))
