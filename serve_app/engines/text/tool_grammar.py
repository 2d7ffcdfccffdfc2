"""What an answer may look like when tools may, or have to, be called: a grammar in llguidance's dialect of Lark."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from serve_app.core.requests import Grammar
from serve_app.engines.text.tool_format import ToolCallFormat

# Between the parts of a JSON document; without a bound an unsure model writes spaces until its tokens are used up.
_SPACE = r" |\r?\n[ \t]{0,24}"
_ANY = "/(?s:.*)/"


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool that may be called: its name, the JSON schema of its arguments, and what the caller calls that schema."""

    name: str
    schema: dict[str, object]
    field: str


def tool_grammar(syntax: ToolCallFormat, tools: Sequence[Tool], must: bool, several: bool) -> Grammar:
    """Calls of these tools, one or `several`; if not `must`, free text instead of them or before them."""
    several = several and syntax.between is not None
    rules = [
        *([f"start: {_text(syntax, syntax.before)} calls"] if must else _freely(syntax)),
        f"calls: call{' more*' if several else ''} {_text(syntax, syntax.after)}",
        *([f"more: {_text(syntax, syntax.between or '')} call"] if several else []),
        f"call: {' | '.join(f'call_{number}' for number in range(len(tools)))}",
        *(f"call_{number}: {_call(syntax, tool.name, f'arguments_{number}')}" for number, tool in enumerate(tools)),
        *(f"arguments_{number}: %json {_document(tool.schema)}" for number, tool in enumerate(tools)),
    ]
    parts = tuple(Grammar("json_schema", json.dumps(tool.schema), tool.field) for tool in tools)
    return Grammar("lark", "\n".join(rules), "tools", parts)


def _text(syntax: ToolCallFormat, text: str) -> str:
    """Literal text as terms of a grammar: tokens of their own stand by their ids."""
    ids = dict(syntax.signs)
    pieces = re.split(f"({'|'.join(map(re.escape, ids))})", text) if ids else [text]
    return " ".join(f"<[{ids[piece]}]>" if piece in ids else json.dumps(piece) for piece in pieces if piece)


def _call(syntax: ToolCallFormat, name: str, arguments: str) -> str:
    if syntax.name_first:
        return f"{_text(syntax, name + syntax.middle)} {arguments}"
    return f"{arguments} {_text(syntax, syntax.middle + name)}"


def _freely(syntax: ToolCallFormat) -> list[str]:
    """Free text, and calls as soon as it comes to their trigger, be that spelt or a token of its own."""
    ranges = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in syntax.free)
    free = f"<[{ranges}]>"
    more = f" ({free} TEXT)*" if ranges else ""
    trigger = json.dumps(syntax.trigger)
    if not syntax.anywhere:
        other = f"OTHER: {_ANY} & ~({trigger} {_ANY})"
        return [f"start: {_text(syntax, syntax.before)} calls | OTHER{more}", f"TEXT: {_ANY}", other]
    sign = dict(syntax.signs).get(syntax.trigger)
    spelt = f"(TEXT {free})* spelt" if ranges else "spelt"
    return [
        f"start: TEXT{more} | begin {_text(syntax, syntax.before.removeprefix(syntax.trigger))} calls",
        f"begin: {spelt}" if sign is None else f"begin: {spelt} | TEXT{more} <[{sign}]>",
        f"spelt[lazy]: {_ANY} {trigger}",
        f"TEXT: {_ANY}",
    ]


def _document(schema: dict[str, object]) -> str:
    return json.dumps(schema | {"x-guidance": {"whitespace_pattern": _SPACE}})
