"""Divides the text of an answer into content and tool calls while it is generated."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from serve_app.core.events import Delta, TextDelta, ToolCallDelta
from serve_app.engines.text.overlap import overlap
from serve_app.engines.text.parameter_format import ParameterFormat
from serve_app.engines.text.parameter_parser import ParameterReader
from serve_app.engines.text.tool_format import ToolCallFormat

MAX_NAME_LENGTH = 64
_NAME_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")
# The characters that change the state of the scan of a JSON object, inside and outside its strings.
_IN_STRING = re.compile(r'["\\]')
_OUTSIDE_STRINGS = re.compile(r'["{}\[\]]')

_State = Callable[[], list[Delta]]
# Whether a parameter of a tool, both by name, is a string.
IsText = Callable[[str, str], bool]


class StateParser:
    """Base class of parsers that read one answer in pieces of any size.

    Each state consumes pending text and sets the next state. A state that does neither needs more text.
    """

    def __init__(self, state: _State) -> None:
        self._state = state
        self._pending = ""  # text that no state has consumed

    def _advance(self, text: str) -> list[Delta]:
        """The deltas that this text completes."""
        self._pending += text
        deltas: list[Delta] = []
        while True:
            before = (self._state, self._pending)
            deltas += self._state()
            if (self._state, self._pending) == before:
                return deltas


class ToolCallFormatParser(StateParser):
    """Parses one answer, in pieces of any size. Emits each piece as soon as its meaning is certain.

    Text that does not follow the format is content, from the beginning of the malformed call to the end of the answer.
    Whitespace before a trigger belongs to the trigger. Special tokens of the format are never content.
    """

    def __init__(self, call_format: ToolCallFormat, is_text: IsText = lambda tool, parameter: True) -> None:
        """`is_text` is whether a parameter of a tool is a string; only formats with parameters need it."""
        super().__init__(self._before_calls)
        self._format = call_format
        self._is_text = is_text
        self._reader: ParameterReader | None = None
        self._candidate = ""  # consumed text of a call that may still turn out to be content
        self._calls = 0
        self._name = ""
        self._arguments = ""
        self._object = _JsonObjectScanner()
        self._content = WordFilter(call_format.special_markers)

    def feed(self, text: str) -> list[Delta]:
        """The deltas that this text completes."""
        return self._without_markers(self._advance(text))

    def end(self) -> list[Delta]:
        """The deltas still held back; called after the last text."""
        # A beginning of the format's end after a complete call is not content.
        text = "" if self._state == self._after_call else self._candidate + self._pending
        self._candidate = self._pending = ""
        content = self._content.feed(text) + self._content.end()
        return [TextDelta(content)] if content else []

    def _without_markers(self, deltas: list[Delta]) -> list[Delta]:
        filtered = (
            TextDelta(self._content.feed(delta.text)) if isinstance(delta, TextDelta) else delta for delta in deltas
        )
        return [delta for delta in filtered if not isinstance(delta, TextDelta) or delta.text]

    def _before_calls(self) -> list[Delta]:
        call_format, pending = self._format, self._pending
        if not call_format.anywhere:
            if pending.startswith(call_format.trigger):
                self._state = self._opening
            elif not call_format.trigger.startswith(pending):
                self._state = self._only_content
            return []
        start = pending.find(call_format.trigger)
        if start >= 0:
            self._state = self._opening
        else:
            start = len(pending) - overlap(pending, call_format.trigger)
        content = pending[:start].rstrip()
        self._pending = pending[len(content) :]
        return [TextDelta(content)]

    def _opening(self) -> list[Delta]:
        whitespace = len(self._pending) - len(self._pending.lstrip())
        return self._consume_literal(self._format.before, self._first_part, whitespace)

    def _first_part(self) -> list[Delta]:
        consume = self._consume_name if self._format.name_first else self._consume_arguments
        return consume(self._between_parts)

    def _between_parts(self) -> list[Delta]:
        return self._consume_literal(self._format.middle, self._second_part)

    def _second_part(self) -> list[Delta]:
        if self._format.parameters is not None:
            return self._consume_parameters(self._format.parameters)
        consume = self._consume_arguments if self._format.name_first else self._consume_name
        return consume(self._after_call)

    def _after_call(self) -> list[Delta]:
        """Before another call, or the end of all calls."""
        between, after, pending = self._format.between or "", self._format.after, self._pending
        if between and pending.startswith(between):
            # If the next call is malformed, the end of this call is still not content.
            self._candidate, self._pending = between.removeprefix(after), pending[len(between) :]
            self._state = self._first_part
        elif not after.startswith(pending) and not between.startswith(pending):
            self._pending, self._state = pending.removeprefix(after), self._only_content
        return []

    def _only_content(self) -> list[Delta]:
        text, self._pending = self._candidate + self._pending, ""
        self._candidate = ""
        return [TextDelta(text)]

    def _consume_literal(self, literal: str, next_state: _State, whitespace: int = 0) -> list[Delta]:
        pending = self._pending[whitespace:]
        if pending.startswith(literal):
            self._consume(whitespace + len(literal))
            self._state = next_state
        elif not literal.startswith(pending):
            self._state = self._only_content
        return []

    def _consume_name(self, next_state: _State) -> list[Delta]:
        pending = self._pending
        length = next((i for i, char in enumerate(pending) if char not in _NAME_CHARACTERS), len(pending))
        if length > MAX_NAME_LENGTH or (length == 0 and pending):
            self._state = self._only_content
        elif length < len(pending):
            self._name = pending[:length]
            self._consume(length)
            self._state = next_state
            return [] if self._format.name_first else [self._call_delta(), self._arguments_delta(self._arguments)]
        return []

    def _consume_arguments(self, next_state: _State) -> list[Delta]:
        if not self._object.begun:  # grammars allow whitespace before an object
            self._consume(len(self._pending) - len(self._pending.lstrip()))
        first = self._pending and not self._object.begun
        if first and self._pending[0] != "{":
            self._state = self._only_content
            return []
        piece = self._pending[: self._object.feed(self._pending)]
        self._consume(len(piece))
        self._arguments = piece if first else self._arguments + piece
        if self._object.complete:
            self._object = _JsonObjectScanner()
            self._state = next_state
        if not self._format.name_first or not piece:
            return []
        return [self._call_delta(), self._arguments_delta(piece)] if first else [self._arguments_delta(piece)]

    def _consume_parameters(self, form: ParameterFormat) -> list[Delta]:
        reader = self._reader = self._reader or ParameterReader(form, partial(self._is_text, self._name))
        begins, text = not reader.emitted, self._pending
        self._consume(len(text))
        piece = reader.feed(text)
        if reader.complete or reader.malformed:
            self._pending, self._candidate = reader.pending, self._candidate.removesuffix(reader.pending)
            self._state, self._reader = (self._after_call if reader.complete else self._only_content), None
        if reader.emitted:  # the call is certain: a parameter that is cut off is not content
            self._candidate = ""
        if not piece:
            return []
        return [self._call_delta(), self._arguments_delta(piece)] if begins else [self._arguments_delta(piece)]

    def _consume(self, length: int) -> None:
        self._candidate += self._pending[:length]
        self._pending = self._pending[length:]

    def _call_delta(self) -> ToolCallDelta:
        self._calls += 1
        return ToolCallDelta(self._calls - 1, name=self._name)

    def _arguments_delta(self, piece: str) -> ToolCallDelta:
        self._candidate = ""
        return ToolCallDelta(self._calls - 1, arguments=piece)


class _JsonObjectScanner:
    """Finds the end of a JSON object in text that begins with it."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self.begun = False

    @property
    def complete(self) -> bool:
        return self.begun and self._depth == 0

    def feed(self, text: str) -> int:
        """The number of characters that belong to the object."""
        position = 0
        while position < len(text) and not self.complete:
            position = self._step(text, position)
        return position

    def _step(self, text: str, position: int) -> int:
        """Skip to the next character that changes the state; return the position after it."""
        if self._escaped:
            self._escaped = False
            return position + 1
        found = (_IN_STRING if self._in_string else _OUTSIDE_STRINGS).search(text, position)
        if found is None:
            return len(text)
        match found[0]:
            case '"':
                self._in_string = not self._in_string
            case "\\":
                self._escaped = True
            case "{" | "[":
                self._depth, self.begun = self._depth + 1, True
            case _:
                self._depth -= 1
        return found.end()


class WordFilter:
    """Removes words from a text that comes in pieces of any size."""

    def __init__(self, words: tuple[str, ...]) -> None:
        self._words = sorted(words, key=len, reverse=True)
        self._longest = len(self._words[0]) if words else 0
        self._pending = ""

    def feed(self, text: str) -> str:
        if not self._words:
            return text
        self._pending += text
        kept, position = "", 0
        while position < len(self._pending):
            rest = self._pending[position : position + self._longest]
            if any(len(rest) < len(word) and word.startswith(rest) for word in self._words):
                break
            word = next((word for word in self._words if rest.startswith(word)), "")
            kept += "" if word else rest[0]
            position += len(word) or 1
        self._pending = self._pending[position:]
        return kept

    def end(self) -> str:
        text, self._pending = self._pending, ""
        return text
