"""Detects the text format in which a model writes tool calls, by rendering sample messages with its chat template."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from serve_app.core.requests import ChatMessage, ToolCall
from serve_app.engines.text.parameter_format import ParameterFormat, detect_parameters

Json = dict[str, Any]
# Renders messages and tools without the beginning of an answer. Raises any exception that the template raises.
Render = Callable[[list[Json], list[Json] | None], str]

_SAMPLE_TOOL: Json = {
    "type": "function",
    "function": {
        "name": "sample",
        "description": "A sample.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string", "description": "A word."}}},
    },
}
_SAMPLE_USER = ChatMessage("user", "Please.")
_SAMPLE_CONTENT = "contentq7"
# Each text of the second call is the same text of the first call with another ending.
_FIRST_CALL = ToolCall("call_idx7x1a", "nameq7x1a", '{"keyq7x1a": "valueq7x1a"}')
_SECOND_CALL = ToolCall("call_idx7x2b", "nameq7x2b", '{"keyq7x2b": "valueq7x2b"}')
_ENDINGS = ("q7x1a", "q7x2b")
_KEYS, _VALUES = ("keyq7x1a", "keyq7x3c"), ("valueq7x1a", "valueq7x3c")
_TWO_PARAMETERS = replace(_FIRST_CALL, arguments=json.dumps(dict(zip(_KEYS, _VALUES, strict=True))))
_FIRST_ARGUMENTS = re.compile(r'\{\s*"keyq7x1a"\s*:\s*"valueq7x1a"\s*\}')
_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")
_JSON_BEGINS = re.compile(r"\[?\s*\{")
_NAME_CHARACTER = re.compile(r"[A-Za-z0-9_-]")
# Ordinary text would often contain a shorter trigger.
_MIN_TRIGGER_LENGTH = 3


@dataclass(frozen=True, slots=True)
class ToolCallFormat:
    """The text of tool calls: `before`, the first call's two parts with `middle` between them, `after`.

    The parts are the tool's name and its arguments, a JSON object, in this order if `name_first`. `between` separates
    the last part of a call from the first part of the next call; None: an answer holds at most one call. `trigger` is a
    beginning of `before`. After it the rest of an answer is tool calls; if not `anywhere`, only after a trigger at the
    beginning of the answer.

    `markers` are the tokens in these texts that a grammar matches by id and not by text: pairs of text and id. A
    decoder leaves the special ones, `special_markers`, out of the text by default. `content_markers` are ranges, first
    and last id, of the other tokens of this kind that an answer may hold before its calls, for example `<think>`.

    With `parameters` the arguments are a list of parameters in tags instead of a JSON object.
    """

    before: str
    middle: str
    between: str | None
    after: str
    name_first: bool
    trigger: str
    anywhere: bool
    markers: tuple[tuple[str, int], ...] = ()
    special_markers: tuple[str, ...] = ()
    content_markers: tuple[tuple[int, int], ...] = ()
    parameters: ParameterFormat | None = None


@dataclass(frozen=True, slots=True)
class MarkerTokens:
    """The tokens of a tokenizer that are not text to a grammar: ids by text; the special ones; the end tokens."""

    ids: Mapping[str, int]
    special: Collection[int]
    ends: Collection[int]

    def in_texts(self, texts: Iterable[str]) -> tuple[tuple[str, int], ...]:
        """The text and id of each marker that occurs in the texts."""
        joined = "\0".join(texts)
        return tuple((marker, token) for marker, token in self.ids.items() if marker in joined)


@dataclass(frozen=True, slots=True)
class MessageStyle:
    """The form of the messages that a chat template accepts.

    `arguments_as_text`: JSON text of a call's arguments instead of an object. `null_content`: None instead of empty
    content beside calls. `short_ids`: call ids of nine letters and digits. `content_parts`: content is a list with one
    part of type `text` instead of a string.
    """

    arguments_as_text: bool = False
    null_content: bool = False
    short_ids: bool = False
    content_parts: bool = False

    def message(self, message: ChatMessage) -> Json:
        """The message as the template accepts it. Raises ValueError for arguments that are not JSON."""
        fields: Json = {"role": message.role, "content": self._content(message)}
        if message.reasoning:
            fields["reasoning_content"] = message.reasoning
        if message.tool_calls:
            fields["tool_calls"] = [self._call(call) for call in message.tool_calls]
        if message.role == "tool":
            return fields | {"tool_call_id": self.call_id(message.tool_call_id), "name": message.name}
        return fields | ({"name": message.name} if message.name else {})

    def _content(self, message: ChatMessage) -> str | list[Json] | None:
        if message.tool_calls and not message.content and self.null_content:
            return None
        return [{"type": "text", "text": message.content}] if self.content_parts else message.content

    def call_id(self, id: str) -> str:
        if not self.short_ids or _SHORT_ID.fullmatch(id):
            return id
        return hashlib.sha256(id.encode()).hexdigest()[:9]

    def _call(self, call: ToolCall) -> Json:
        arguments = call.arguments if self.arguments_as_text else json.loads(call.arguments)
        function = {"name": call.name, "arguments": arguments}
        return {"id": self.call_id(call.id), "type": "function", "function": function}


_MESSAGE_STYLES = [MessageStyle(as_text, null, short) for as_text, null, short in product((False, True), repeat=3)]


@dataclass(frozen=True, slots=True)
class ToolTemplate:
    """A chat template that accepts tools: the format of calls that it writes, and the messages that it accepts."""

    call_format: ToolCallFormat
    message_style: MessageStyle


def wants_content_parts(render: Render) -> bool:
    """Whether a template shows the text of a user's message only if its content is a list of parts.

    Such a template iterates over the content. Of a string it would show nothing, without an error.
    """
    user = ChatMessage("user", _SAMPLE_CONTENT)
    as_text, as_parts = (
        _rendered(render, [MessageStyle(content_parts=parts).message(user)], None) for parts in (False, True)
    )
    return _SAMPLE_CONTENT not in (as_text or "") and _SAMPLE_CONTENT in (as_parts or "")


def detect_tool_template(render: Render, markers: MarkerTokens, content_parts: bool = False) -> ToolTemplate | None:
    """None if the template ignores tools, or writes calls in a format that is not supported."""
    user = MessageStyle(content_parts=content_parts).message(_SAMPLE_USER)
    with_tools = _rendered(render, [user], [_SAMPLE_TOOL])
    if with_tools is None or with_tools == _rendered(render, [user], None):
        return None
    for call_style in _MESSAGE_STYLES:
        style = replace(call_style, content_parts=content_parts)
        call_format = _FormatDetector(render, markers, style).detect()
        if call_format is not None:
            return ToolTemplate(call_format, style)
    return None


def _rendered(render: Render, messages: list[Json], tools: list[Json] | None) -> str | None:
    try:
        return render(messages, tools)
    except Exception:  # noqa: BLE001 - a template is foreign code: after any exception it does not accept the messages
        return None


@dataclass(frozen=True, slots=True)
class _FormatDetector:
    """Detects the format from a template's rendering of sample calls in one message style."""

    render: Render
    markers: MarkerTokens
    style: MessageStyle

    def detect(self) -> ToolCallFormat | None:
        one = self._rendered_calls(_FIRST_CALL)
        arguments = None if one is None else _FIRST_ARGUMENTS.search(one)
        if one is None or one.count(_FIRST_CALL.name) != 1:
            return None
        if arguments is None:
            return self._with_parameters(one)
        name_start = one.index(_FIRST_CALL.name)
        name = (name_start, name_start + len(_FIRST_CALL.name))
        (start, first_end), (second_start, end) = sorted((name, arguments.span()))
        before, middle, after = one[:start], one[first_end:second_start], one[end:]
        between = self._between(before, one[start:end], after)
        return self._format(before, middle, between, after, name_first=start == name_start)

    def _with_parameters(self, one: str) -> ToolCallFormat | None:
        """The format if the arguments are parameters in tags, after the name."""
        two = self._rendered_calls(_TWO_PARAMETERS)
        before, name, after_name = one.partition(_FIRST_CALL.name)
        if two is None or not two.startswith(before + name):
            return None
        found = detect_parameters(after_name, two.removeprefix(before + name), _KEYS, _VALUES)
        if found is None:
            return None
        parameters, length = found
        after = after_name[length:]
        if self._rendered_calls(replace(_FIRST_CALL, arguments="{}")) != before + name + after:
            return None
        between = self._between(before, name + after_name[:length], after)
        # The name ends where the first parameter, or the end of a call without parameters, begins.
        call_format = self._format(before, "", between, after, name_first=True, name_ends=[parameters.before, after])
        if call_format is None:
            return None
        markers = self.markers.in_texts(
            [*_texts_of(call_format), parameters.before, parameters.middle, parameters.after]
        )
        return replace(call_format, markers=markers, parameters=parameters)

    def _between(self, before: str, parts: str, after: str) -> str | None:
        """The text between two calls; None if the template refuses two calls or numbers them."""
        two = self._rendered_calls(_FIRST_CALL, _SECOND_CALL)
        start, end = before + parts, parts.replace(*_ENDINGS) + after
        if two is None or not two.startswith(start) or not two.endswith(end) or len(two) <= len(start) + len(end):
            return None
        return two[len(start) : len(two) - len(end)]

    def _format(
        self,
        before: str,
        middle: str,
        between: str | None,
        after: str,
        name_first: bool,
        name_ends: Sequence[str] = (),
    ) -> ToolCallFormat | None:
        """None if the end of a name or of a call could not be recognised, or a call contains an end token."""
        texts = [before, middle, between or "", after]
        after_name = name_ends or ([middle] if name_first else [between or "", after])
        markers = self.markers.in_texts(texts)
        if not before or not (middle or name_ends) or not (name_first or after):
            return None
        if any(_NAME_CHARACTER.match(text) for text in after_name):
            return None
        if any(token in self.markers.ends for _, token in markers):
            return None
        trigger, anywhere = _trigger(before, [marker for marker, _ in markers])
        excluded = {*self.markers.special, *self.markers.ends, *(token for _, token in markers)}
        return ToolCallFormat(
            before,
            middle,
            between,
            after,
            name_first,
            trigger,
            anywhere,
            markers,
            special_markers=tuple(marker for marker, token in markers if token in self.markers.special),
            content_markers=_ranges(token for token in self.markers.ids.values() if token not in excluded),
        )

    def _rendered_calls(self, *calls: ToolCall) -> str | None:
        """The assistant's turn with these calls, without the text around every turn and without the ids of calls."""
        plain = self._rendered_answer(ChatMessage("assistant", _SAMPLE_CONTENT))
        turn = self._rendered_answer(ChatMessage("assistant", "", tool_calls=calls))
        if plain is None or turn is None or plain.count(_SAMPLE_CONTENT) != 1:
            return None
        start, end = plain.split(_SAMPLE_CONTENT)
        if not turn.startswith(start.rstrip()):
            return None
        text = self._without_end(turn[len(start.rstrip()) :].strip(), end.strip())
        return _without_ids(text, [self.style.call_id(call.id) for call in calls])

    def _rendered_answer(self, answer: ChatMessage) -> str | None:
        return _rendered(self.render, [self.style.message(one) for one in (_SAMPLE_USER, answer)], [_SAMPLE_TOOL])

    def _without_end(self, text: str, end: str) -> str:
        if end and text.endswith(end):
            return text[: -len(end)]
        ends = [marker for marker, token in self.markers.ids.items() if token in self.markers.ends]
        return text[: min((text.index(marker) for marker in ends if marker in text), default=len(text))]


def _texts_of(call_format: ToolCallFormat) -> list[str]:
    return [call_format.before, call_format.middle, call_format.between or "", call_format.after]


def _without_ids(text: str, ids: list[str]) -> str | None:
    """The text without the JSON members that hold call ids; None if an id occurs elsewhere."""
    for call_id in ids:
        text = re.sub(rf',\s*"\w+"\s*:\s*"{call_id}"|"\w+"\s*:\s*"{call_id}"\s*,\s*', "", text)
    remains = any(part in text for call_id in ids for part in (call_id[:9], call_id[-5:]))  # a template may shorten ids
    return None if remains else text.rstrip()


def _trigger(before: str, markers: list[str]) -> tuple[str, bool]:
    """The text that starts calls, and whether it does so anywhere: a tag or a marker does, bare JSON does not."""
    first = next((marker for marker in markers if before.startswith(marker)), None)
    if first is not None:
        return first, True
    text = before[: min((before.index(marker) for marker in markers if marker in before), default=len(before))]
    json_begins = _JSON_BEGINS.search(text)
    tag = (text[: json_begins.start()] if json_begins else text).rstrip()
    return (tag, True) if len(tag) >= _MIN_TRIGGER_LENGTH else (text, False)


def _ranges(ids: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Ids as ranges of consecutive ids: first and last id of each."""
    ranges: list[tuple[int, int]] = []
    for token in sorted(ids):
        if ranges and ranges[-1][1] == token - 1:
            ranges[-1] = (ranges[-1][0], token)
        else:
            ranges.append((token, token))
    return tuple(ranges)
