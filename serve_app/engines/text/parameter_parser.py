"""Reads the parameters of a tool call that are written in tags, and emits them as the text of a JSON object."""

from __future__ import annotations

import json
from collections.abc import Callable

from serve_app.engines.text.overlap import overlap
from serve_app.engines.text.parameter_format import ParameterFormat

_MAX_KEY_LENGTH = 128


class ParameterReader:
    """Reads the parameters of one call, in pieces of any size.

    `is_text` is whether the parameter of this name is a string, which stands in the answer as it is. Any other value is
    JSON; a value that is not JSON becomes a string.
    """

    def __init__(self, form: ParameterFormat, is_text: Callable[[str], bool]) -> None:
        self._form = form
        self._is_text = is_text
        self._state = self._between
        self._parameters = 0
        self._begun = False
        self.pending = ""
        self.emitted = False
        self.complete = False
        self.malformed = False

    def feed(self, text: str) -> str:
        """The JSON that this text completes. Text after the parameters stays in `pending`."""
        self.pending += text
        found = ""
        while not (self.complete or self.malformed):
            before = (self._state, self.pending)
            found += self._state()
            if (self._state, self.pending) == before:
                break
        self.emitted = self.emitted or bool(found)
        return found

    # Each state consumes pending text and returns the JSON that it completes.

    def _between(self) -> str:
        before = self._form.before
        if self.pending.startswith(before):
            self.pending, self._state = self.pending[len(before) :], self._key
        elif not before.startswith(self.pending):
            self.complete = True
            return "}" if self._parameters else "{}"
        return ""

    def _key(self) -> str:
        key, middle, rest = self.pending.partition(self._form.middle)
        if len(key) > _MAX_KEY_LENGTH:
            self.malformed = True
        if not middle or self.malformed:
            return ""
        self.pending, self._begun = rest, False
        self._state = self._text_value if self._is_text(key) else self._json_value
        self._parameters += 1
        return f"{'{' if self._parameters == 1 else ', '}{json.dumps(key, ensure_ascii=False)}: "

    def _text_value(self) -> str:
        value, after, rest = self.pending.partition(self._form.after)
        if not after:
            value = value[: len(value) - overlap(value, self._form.after)]
            rest = self.pending[len(value) :]
        self.pending = rest
        if not (value or after):
            return ""
        opening, self._begun = "" if self._begun else '"', True
        if after:
            self._state = self._between
        return opening + json.dumps(value, ensure_ascii=False)[1:-1] + ('"' if after else "")

    def _json_value(self) -> str:
        value, after, rest = self.pending.partition(self._form.after)
        if not after:
            return ""
        self.pending, self._state = rest, self._between
        try:
            json.loads(value)
        except (ValueError, RecursionError):
            return json.dumps(value, ensure_ascii=False)
        return value.strip()
