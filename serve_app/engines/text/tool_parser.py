"""Calls of tools in an answer's text, found as the text comes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from serve_app.engines.text.overlap import overlap
from serve_app.engines.text.tool_format import ToolCallFormat

MOST_NAME = 64
_OF_NAMES = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")
# What changes where a JSON object stands: a string's end or escape inside one, brackets and strings outside.
_INSIDE = re.compile(r'["\\]')
_OUTSIDE = re.compile(r'["{}\[\]]')


@dataclass(frozen=True, slots=True)
class Content:
    """Text that is no call."""

    text: str


@dataclass(frozen=True, slots=True)
class Begun:
    """A call of this tool; its arguments follow."""

    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of the last call's arguments, exactly as the model wrote them."""

    text: str


News = Content | Begun | Arguments
State = Callable[[], list[News]]


@dataclass(frozen=True, slots=True)
class Call:
    name: str
    arguments: str


def parse(syntax: ToolCallFormat, text: str) -> tuple[str, list[Call]]:
    """A whole answer: what is no call, and its calls."""
    parser, content = CallParser(syntax), ""
    calls: list[Call] = []
    for news in (*parser.feed(text), *parser.end()):
        match news:
            case Content(more):
                content += more
            case Begun(name):
                calls.append(Call(name, ""))
            case Arguments(more):
                calls[-1] = Call(calls[-1].name, calls[-1].arguments + more)
    return content, calls


class CallParser:
    """Takes an answer in pieces, wherever they are cut, and tells what they are as soon as that is sure.

    What does not follow the syntax is content, from the beginning of the call that does not, and so is all after it.
    Space before a trigger belongs to it. Special tokens of the syntax are no content.
    """

    def __init__(self, syntax: ToolCallFormat) -> None:
        self._syntax = syntax
        self._state: State = self._before
        self._held = ""  # not looked at yet, or not enough
        self._taken = ""  # of a call that may still turn out to be none
        self._name = ""
        self._arguments = ""
        self._object = _Object()
        self._content = _Without(syntax.hidden)

    def feed(self, text: str) -> list[News]:
        self._held += text
        found: list[News] = []
        while True:
            before = (self._state, self._held)
            found += self._state()
            if (self._state, self._held) == before:
                return self._shown(found)

    def end(self) -> list[News]:
        """What was held back, once nothing can follow."""
        # The beginning of what stands after a call says nothing.
        text = "" if self._state == self._after else self._taken + self._held
        self._taken = self._held = ""
        shown = self._content.feed(text) + self._content.end()
        return [Content(shown)] if shown else []

    def _shown(self, found: list[News]) -> list[News]:
        texts = [Content(self._content.feed(news.text)) if isinstance(news, Content) else news for news in found]
        return [news for news in texts if not isinstance(news, Content) or news.text]

    # Each state takes what it can, and names the next one when it is done; when it does neither, it needs more text.

    def _before(self) -> list[News]:
        """Text, until a trigger."""
        syntax, held = self._syntax, self._held
        if not syntax.anywhere:
            if held.startswith(syntax.trigger):
                self._state = self._opening
            elif not syntax.trigger.startswith(held):
                self._state = self._rest
            return []
        at = held.find(syntax.trigger)
        if at >= 0:
            self._state = self._opening
        end = len(held[: at if at >= 0 else len(held) - overlap(held, syntax.trigger)].rstrip())
        self._held = held[end:]
        return [Content(held[:end])]

    def _opening(self) -> list[News]:
        return self._literal(self._syntax.before, self._first, len(self._held) - len(self._held.lstrip()))

    def _first(self) -> list[News]:
        return self._take_name(self._middle) if self._syntax.name_first else self._take_object(self._middle)

    def _middle(self) -> list[News]:
        return self._literal(self._syntax.middle, self._second)

    def _second(self) -> list[News]:
        return self._take_object(self._after) if self._syntax.name_first else self._take_name(self._after)

    def _after(self) -> list[News]:
        """Another call, or the end of all of them."""
        between, after, held = self._syntax.between or "", self._syntax.after, self._held
        if between and held.startswith(between):
            # If it turns out to be none, what ended the call before is still no content.
            self._taken, self._held, self._state = between.removeprefix(after), held[len(between) :], self._first
        elif not after.startswith(held) and not between.startswith(held):
            self._held, self._state = held.removeprefix(after), self._rest
        return []

    def _rest(self) -> list[News]:
        text, self._held = self._taken + self._held, ""
        self._taken = ""
        return [Content(text)]

    def _literal(self, text: str, then: State, space: int = 0) -> list[News]:
        held = self._held[space:]
        if held.startswith(text):
            self._take(space + len(text))
            self._state = then
        elif not text.startswith(held):
            self._state = self._rest
        return []

    def _take_name(self, then: State) -> list[News]:
        length = next((at for at, char in enumerate(self._held) if char not in _OF_NAMES), len(self._held))
        if length > MOST_NAME or (length == 0 and self._held):
            self._state = self._rest
        elif length < len(self._held):
            self._name = self._held[:length]
            self._take(length)
            self._state = then
            return [] if self._syntax.name_first else [self._begin(), Arguments(self._arguments)]
        return []

    def _take_object(self, then: State) -> list[News]:
        if not self._object.begun:  # a grammar may allow space before it
            self._take(len(self._held) - len(self._held.lstrip()))
        first = self._held and not self._object.begun
        if first and self._held[0] != "{":
            self._state = self._rest
            return []
        piece = self._held[: self._object.feed(self._held)]
        self._take(len(piece))
        self._arguments = piece if first else self._arguments + piece
        if self._object.complete:
            self._object = _Object()
            self._state = then
        if not self._syntax.name_first or not piece:
            return []
        return [self._begin(), Arguments(piece)] if first else self._more(piece)

    def _begin(self) -> Begun:
        self._taken = ""
        return Begun(self._name)

    def _more(self, piece: str) -> list[News]:
        self._taken = ""
        return [Arguments(piece)]

    def _take(self, length: int) -> None:
        self._taken += self._held[:length]
        self._held = self._held[length:]


class _Object:
    """Where a text is in a JSON object that begins it."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self.begun = False

    @property
    def complete(self) -> bool:
        return self.begun and self._depth == 0

    def feed(self, text: str) -> int:
        """How much of the text is the object's."""
        at = 0
        while at < len(text) and not self.complete:
            at = self._step(text, at)
        return at

    def _step(self, text: str, at: int) -> int:
        """Over what says nothing, and one character that does."""
        if self._escaped:
            self._escaped = False
            return at + 1
        found = (_INSIDE if self._in_string else _OUTSIDE).search(text, at)
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


class _Without:
    """A text without some words, wherever it is cut."""

    def __init__(self, words: tuple[str, ...]) -> None:
        self._words = sorted(words, key=len, reverse=True)
        self._longest = len(self._words[0]) if words else 0
        self._held = ""

    def feed(self, text: str) -> str:
        if not self._words:
            return text
        self._held += text
        kept, at = "", 0
        while at < len(self._held):
            rest = self._held[at : at + self._longest]
            if any(len(rest) < len(word) and word.startswith(rest) for word in self._words):
                break
            word = next((word for word in self._words if rest.startswith(word)), "")
            kept += "" if word else rest[0]
            at += len(word) or 1
        self._held = self._held[at:]
        return kept

    def end(self) -> str:
        text, self._held = self._held, ""
        return text
