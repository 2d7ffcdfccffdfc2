"""How a model writes calls of tools, learned from what its chat template makes of messages that hold some."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from serve_app.core.requests import ChatMessage, ToolCall

Json = dict[str, Any]
# Messages and tools to text, without the beginning of an answer. Raises whatever the template does.
Render = Callable[[list[Json], list[Json] | None], str]

_TOOL: Json = {
    "type": "function",
    "function": {
        "name": "sample",
        "description": "A sample.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string", "description": "A word."}}},
    },
}
_USER: Json = {"role": "user", "content": "Please."}
_CONTENT = "contentq7"
# Of the second one's texts each is the first one's with another ending.
_FIRST = ToolCall("call_idx7x1a", "nameq7x1a", '{"keyq7x1a": "valueq7x1a"}')
_SECOND = ToolCall("call_idx7x2b", "nameq7x2b", '{"keyq7x2b": "valueq7x2b"}')
_ENDINGS = ("q7x1a", "q7x2b")
_ARGUMENTS = re.compile(r'\{\s*"keyq7x1a"\s*:\s*"valueq7x1a"\s*\}')
_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")
_JSON_BEGINS = re.compile(r"\[?\s*\{")
_NAME_CHARACTER = re.compile(r"[A-Za-z0-9_-]")
# A shorter one would be met in any text.
_LEAST_MARKER = 3


@dataclass(frozen=True, slots=True)
class ToolCallFormat:
    """How a model writes calls of tools: `before`, two parts with `middle` between them, `after`.

    The parts are the tool's name and its arguments, a JSON object, in this order if `name_first`. With several calls
    `between` stands from one's second part to the next one's first; None: a message has one call only. From `trigger`
    on, a beginning of `before`, an answer is calls and nothing else; if not `anywhere`, only if it begins with that.

    Some of these texts' pieces are tokens of their own, no text to a grammar: `signs`, by text and id. Those that are
    special are `hidden`, and have to be asked for. `free` are ranges of the other such tokens, first and last id, that
    may stand in an answer before its calls.
    """

    before: str
    middle: str
    between: str | None
    after: str
    name_first: bool
    trigger: str
    anywhere: bool
    signs: tuple[tuple[str, int], ...] = ()
    hidden: tuple[str, ...] = ()
    free: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Signs:
    """A tokenizer's tokens that are no text to a grammar, by text; which of them are special, and which end answers."""

    ids: Mapping[str, int]
    special: Collection[int]
    ends: Collection[int]

    def within(self, texts: Iterable[str]) -> tuple[tuple[str, int], ...]:
        """Those that occur in the texts."""
        whole = "\0".join(texts)
        return tuple((sign, token) for sign, token in self.ids.items() if sign in whole)


@dataclass(frozen=True, slots=True)
class Manner:
    """What a template wants calls to be: arguments as an object or as its text, content empty or none, short ids."""

    arguments_as_text: bool = False
    null_content: bool = False
    short_ids: bool = False

    def message(self, message: ChatMessage) -> Json:
        if message.tool_calls:
            content = message.content or (None if self.null_content else "")
            return {"role": message.role, "content": content, "tool_calls": [self._call(c) for c in message.tool_calls]}
        if message.role == "tool":
            answered = {"tool_call_id": self.id(message.tool_call_id), "name": message.name}
            return {"role": message.role, "content": message.content, **answered}
        return {"role": message.role, "content": message.content}

    def _call(self, call: ToolCall) -> Json:
        arguments = call.arguments if self.arguments_as_text else json.loads(call.arguments)
        return {"id": self.id(call.id), "type": "function", "function": {"name": call.name, "arguments": arguments}}

    def id(self, id: str) -> str:
        if not self.short_ids or _SHORT_ID.fullmatch(id):
            return id
        return hashlib.sha256(id.encode()).hexdigest()[:9]


_MANNERS = [Manner(as_text, null, short) for as_text, null, short in product((False, True), repeat=3)]


@dataclass(frozen=True, slots=True)
class Convention:
    """A template's own: how its model writes calls, and what itself wants to be told of earlier ones."""

    syntax: ToolCallFormat
    manner: Manner


def learn(render: Render, signs: Signs) -> Convention | None:
    """None when the template ignores tools, or how it writes calls is not understood."""
    with_tools = _rendered(render, [_USER], [_TOOL])
    if with_tools is None or with_tools == _rendered(render, [_USER], None):
        return None
    for manner in _MANNERS:
        syntax = _Writing(render, signs, manner).syntax()
        if syntax is not None:
            return Convention(syntax, manner)
    return None


def _rendered(render: Render, messages: list[Json], tools: list[Json] | None) -> str | None:
    try:
        return render(messages, tools)
    except Exception:  # noqa: BLE001 - a template is somebody's program: whatever it raises, it does not take these
        return None


@dataclass(frozen=True, slots=True)
class _Writing:
    """What a template makes of calls that it is told in one manner."""

    render: Render
    signs: Signs
    manner: Manner

    def syntax(self) -> ToolCallFormat | None:
        one = self._said(_FIRST)
        arguments = None if one is None else _ARGUMENTS.search(one)
        if one is None or arguments is None or one.count(_FIRST.name) != 1:
            return None
        name = (one.index(_FIRST.name), one.index(_FIRST.name) + len(_FIRST.name))
        (begin, first_ends), (second_begins, end) = sorted((name, arguments.span()))
        before, middle, after = one[:begin], one[first_ends:second_begins], one[end:]
        between = self._between(before, one[begin:end], after)
        return self._made(before, middle, between, after, name_first=begin == name[0])

    def _between(self, before: str, parts: str, after: str) -> str | None:
        """What stands between two calls; None if the template does not take two, or counts them."""
        two = self._said(_FIRST, _SECOND)
        start, end = before + parts, parts.replace(*_ENDINGS) + after
        if two is None or not two.startswith(start) or not two.endswith(end) or len(two) <= len(start) + len(end):
            return None
        return two[len(start) : len(two) - len(end)]

    def _made(
        self, before: str, middle: str, between: str | None, after: str, name_first: bool
    ) -> ToolCallFormat | None:
        texts = [before, middle, between or "", after]
        follow = [middle] if name_first else [between or "", after]
        signs = self.signs.within(texts)
        if not before or not middle or not (name_first or after) or any(_NAME_CHARACTER.match(text) for text in follow):
            return None
        if any(token in self.signs.ends for _, token in signs):
            return None
        trigger, anywhere = _trigger(before, [sign for sign, _ in signs])
        hidden = tuple(sign for sign, token in signs if token in self.signs.special)
        used = {token for _, token in signs}
        free = [t for t in self.signs.ids.values() if t not in used | {*self.signs.special, *self.signs.ends}]
        return ToolCallFormat(
            before, middle, between, after, name_first, trigger, anywhere, signs, hidden, _ranges(free)
        )

    def _said(self, *calls: ToolCall) -> str | None:
        """The assistant's turn with these calls, without what stands around every turn, and without the calls' ids."""
        plain = _rendered(self.render, [_USER, {"role": "assistant", "content": _CONTENT}], [_TOOL])
        said = _rendered(self.render, [_USER, self.manner.message(_message(calls))], [_TOOL])
        if plain is None or said is None or plain.count(_CONTENT) != 1:
            return None
        start, end = plain.split(_CONTENT)
        if not said.startswith(start.rstrip()):
            return None
        text = self._without_end(said[len(start.rstrip()) :].strip(), end.strip())
        return _without_ids(text, [self.manner.id(call.id) for call in calls])

    def _without_end(self, text: str, end: str) -> str:
        if end and text.endswith(end):
            return text[: -len(end)]
        names = [sign for sign, token in self.signs.ids.items() if token in self.signs.ends]
        return text[: min((text.index(name) for name in names if name in text), default=len(text))]


def _without_ids(text: str, ids: list[str]) -> str | None:
    """The text without members of JSON objects that are calls' ids; None if an id stands elsewhere."""
    for one in ids:
        text = re.sub(rf',\s*"\w+"\s*:\s*"{one}"|"\w+"\s*:\s*"{one}"\s*,\s*', "", text)
    left = any(part in text for one in ids for part in (one[:9], one[-5:]))  # shortened, for example
    return None if left else text.rstrip()


def _message(calls: tuple[ToolCall, ...]) -> ChatMessage:
    return ChatMessage("assistant", "", tool_calls=calls)


def _trigger(before: str, signs: list[str]) -> tuple[str, bool]:
    """What begins a call, and whether it does wherever it is met: a mark does, bare JSON does not."""
    first = next((sign for sign in signs if before.startswith(sign)), None)
    if first is not None:
        return first, True
    text = before[: min((before.index(sign) for sign in signs if sign in before), default=len(before))]
    found = _JSON_BEGINS.search(text)
    marker = (text[: found.start()] if found else text).rstrip()
    return (marker, True) if len(marker) >= _LEAST_MARKER else (text, False)


def _ranges(ids: Iterable[int]) -> tuple[tuple[int, int], ...]:
    ranges: list[tuple[int, int]] = []
    for token in sorted(ids):
        if ranges and ranges[-1][1] == token - 1:
            ranges[-1] = (ranges[-1][0], token)
        else:
            ranges.append((token, token))
    return tuple(ranges)
