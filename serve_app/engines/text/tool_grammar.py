"""Writes the grammar of answers that may or must call tools, in llguidance's dialect of Lark."""

from __future__ import annotations

import json
import re
from functools import partial

from serve_app.core.requests import Grammar, Tool, ToolChoice
from serve_app.engines.text.json_schema import prepared_schema
from serve_app.engines.text.parameter_format import parameter_rules
from serve_app.engines.text.tool_format import ToolCallFormat
from serve_app.errors import InvalidRequest

_ANY_TEXT = "/(?s:.*)/"


def tool_grammar(call_format: ToolCallFormat, choice: ToolChoice, content: Grammar | None = None) -> Grammar:
    """Calls of the tools of `choice`, instead of free text or after it unless the choice is `required`.

    With `content`, a grammar for JSON, the answer follows it instead of free text, or calls tools. Raises
    InvalidRequest if a schema is not the text of a JSON object.
    """
    parallel = choice.parallel and call_format.between is not None
    tools = list(enumerate(choice.tools))
    rules = [
        *_start(call_format, choice.required, content),
        f"calls: call{' more*' if parallel else ''} {_literal(call_format, call_format.after)}",
        *([f"more: {_literal(call_format, call_format.between or '')} call"] if parallel else []),
        f"call: {' | '.join(f'call_{number}' for number, _ in tools)}",
        *(f"call_{number}: {_call(call_format, tool.name, f'arguments_{number}')}" for number, tool in tools),
        *(rule for number, tool in tools for rule in _arguments(call_format, tool, f"arguments_{number}")),
    ]
    parts = tuple(arguments_grammar(tool) for tool in choice.tools)
    return Grammar("lark", "\n".join(rules), "tools", parts if content is None else (*parts, content))


def arguments_grammar(tool: Tool) -> Grammar:
    """The grammar of the arguments of one tool."""
    return Grammar("json_schema", tool.schema, tool.field, strict=tool.strict)


def _start(call_format: ToolCallFormat, required: bool, content: Grammar | None) -> list[str]:
    calls = f"{_literal(call_format, call_format.before)} calls"
    if required:
        return [f"start: {calls}"]
    if content is None:
        return _optional(call_format)
    text = content.text if content.kind == "json_schema" else '{"type": "object"}'
    schema = _schema(text, content.strict, "the schema of the answer", content.field)
    return [f"start: {calls} | content", f"content: %json {schema}"]


def _literal(call_format: ToolCallFormat, text: str) -> str:
    """Literal text as terms of a grammar; markers are written by their token ids."""
    ids = dict(call_format.markers)
    pieces = re.split(f"({'|'.join(map(re.escape, ids))})", text) if ids else [text]
    return " ".join(f"<[{ids[piece]}]>" if piece in ids else json.dumps(piece) for piece in pieces if piece)


def _call(call_format: ToolCallFormat, name: str, arguments: str) -> str:
    if call_format.name_first:
        return f"{_literal(call_format, name + call_format.middle)} {arguments}"
    return f"{arguments} {_literal(call_format, call_format.middle + name)}"


def _optional(call_format: ToolCallFormat) -> list[str]:
    """Rules for free text, and for calls after a trigger, which is one marker or the same text in other tokens."""
    ranges = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in call_format.content_markers)
    content_marker = f"<[{ranges}]>"
    more_text = f" ({content_marker} TEXT)*" if ranges else ""
    trigger = json.dumps(call_format.trigger)
    if not call_format.anywhere:
        other = f"OTHER: {_ANY_TEXT} & ~({trigger} {_ANY_TEXT})"
        calls = f"{_literal(call_format, call_format.before)} calls"
        return [f"start: {calls} | OTHER{more_text}", f"TEXT: {_ANY_TEXT}", other]
    marker = dict(call_format.markers).get(call_format.trigger)
    spelled = f"(TEXT {content_marker})* spelled" if ranges else "spelled"
    rest = _literal(call_format, call_format.before.removeprefix(call_format.trigger))
    return [
        f"start: TEXT{more_text} | begin {rest} calls",
        f"begin: {spelled}" if marker is None else f"begin: {spelled} | TEXT{more_text} <[{marker}]>",
        f"spelled[lazy]: {_ANY_TEXT} {trigger}",
        f"TEXT: {_ANY_TEXT}",
    ]


def _arguments(call_format: ToolCallFormat, tool: Tool, rule: str) -> list[str]:
    """The rules for the arguments of a tool. Raises InvalidRequest."""
    name = f"the schema of the tool {tool.name}"
    schema = _schema(tool.schema, tool.strict, name, tool.field)
    form = call_format.parameters
    if form is None:
        return [f"{rule}: %json {schema}"]
    ends_in_token = any(form.after.startswith(marker) for marker, _ in call_format.markers)
    try:
        return parameter_rules(form, tool, rule, partial(_literal, call_format), ends_in_token)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{name} cannot be read: {error}", param=tool.field) from error


def _schema(text: str, strict: bool, name: str, field: str) -> str:
    try:
        return prepared_schema(text, strict)
    except TypeError as error:
        raise InvalidRequest(f"{name} is not a JSON object", param=field) from error
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{name} is not JSON: {error}", param=field) from error
