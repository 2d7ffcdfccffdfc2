"""Divides an answer into the reasoning at its beginning and the rest; a grammar applies to the rest."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence as Seq
from dataclasses import replace
from typing import Protocol

from serve_app.core.events import Delta, ReasoningDelta, TextDelta
from serve_app.engines.text.overlap import overlap
from serve_app.engines.text.protocol import AnswerParser, AnswerPlan, Constraint
from serve_app.engines.text.reasoning_format import ReasoningFormat
from serve_app.engines.text.tool_parser import StateParser, WordFilter
from serve_app.errors import InvalidRequest, ServeAppError

# The last tokens of a prompt that are searched for the start mark.
_TAIL_TOKENS = 16


class Vocabulary(Protocol):
    """What a tokenizer knows about tokens."""

    @property
    def special_texts(self) -> Mapping[str, int]:
        """The ids of the special tokens by their texts."""
        ...

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens with which the model ends an answer."""
        ...

    @property
    def vocabulary(self) -> int:
        """The number of token ids."""
        ...

    def token_text(self, token_id: int) -> str:
        """The text of one token decoded alone; special tokens by name."""
        ...

    def token_id(self, text: str) -> int | None:
        """The id of the added token with this text; None if there is none."""
        ...


def plan_with_reasoning(
    plan: AnswerPlan, marks: ReasoningFormat, prompt: Seq[int], tokens: Vocabulary
) -> AnswerPlan | InvalidRequest:
    """The plan of an answer that may begin with reasoning. The given plan is for the rest of the answer."""
    special = tuple(text for text in tokens.special_texts if text in marks.start + marks.end)
    hides_marks = bool(special) and plan.params.skip_special_tokens
    if hides_marks and plan.params.include_stop_str_in_output:
        return InvalidRequest(
            "this model marks its reasoning with special tokens, so an answer to a chat cannot include the text that "
            "ended it; remove include_stop_str_in_output",
            param="include_stop_str_in_output",
        )
    tail = "".join(map(tokens.token_text, prompt[-_TAIL_TOKENS:]))
    inside = tail.rstrip().endswith(marks.start)
    constraint = plan.constraint
    if constraint is not None:
        start_id = tokens.token_id(marks.start)
        constraint = ReasoningConstraint(constraint, marks.end, start_id, inside, tokens)
    params = replace(plan.params, skip_special_tokens=False) if hides_marks else plan.params
    parser = ReasoningParser(marks, plan.parser or ContentParser(special if hides_marks else ()), inside)
    return AnswerPlan(params, constraint, parser)


class ContentParser:
    """Parses an answer without tool calls: all of its text is content, but for `hidden` words."""

    def __init__(self, hidden: tuple[str, ...] = ()) -> None:
        self._filter = WordFilter(hidden)

    def feed(self, text: str) -> list[Delta]:
        """See `AnswerParser`."""
        kept = self._filter.feed(text)
        return [TextDelta(kept)] if kept else []

    def end(self) -> list[Delta]:
        """See `AnswerParser`."""
        kept = self._filter.end()
        return [TextDelta(kept)] if kept else []


class ReasoningParser(StateParser):
    """Parses one answer, in pieces of any size. `rest` parses what follows the reasoning.

    With `inside` the answer begins with reasoning, because the prompt ends with the start mark. Whitespace around the
    reasoning, and between it and the rest, is left out.
    """

    def __init__(self, reasoning_format: ReasoningFormat, rest: AnswerParser, inside: bool) -> None:
        super().__init__(self._inside if inside else self._before)
        self._format = reasoning_format
        self._rest = rest
        self._began = False

    def feed(self, text: str) -> list[Delta]:
        """The deltas that this text completes."""
        return self._advance(text)

    def end(self) -> list[Delta]:
        """The deltas still held back; called after the last text."""
        pending, self._pending = self._pending, ""
        if self._state == self._inside:
            return self._reasoning(pending.rstrip())
        return [*self._rest.feed(pending), *self._rest.end()]

    def _before(self) -> list[Delta]:
        start, text = self._format.start, self._pending.lstrip()
        if text.startswith(start):
            self._pending, self._state = text[len(start) :], self._inside
        elif not start.startswith(text):
            self._state = self._after
        return []

    def _inside(self) -> list[Delta]:
        text, end, after = self._pending.partition(self._format.end)
        if end:
            self._pending, self._state = after, self._between
            return self._reasoning(text.rstrip())
        # Whitespace is held back: it may be the last before the end mark.
        text = text[: len(text) - overlap(text, self._format.end)].rstrip()
        self._pending = self._pending[len(text) :]
        return self._reasoning(text)

    def _between(self) -> list[Delta]:
        self._pending = self._pending.lstrip()
        if self._pending:
            self._state = self._after
        return []

    def _after(self) -> list[Delta]:
        text, self._pending = self._pending, ""
        return self._rest.feed(text) if text else []

    def _reasoning(self, text: str) -> list[Delta]:
        if not self._began:
            text = text.lstrip()
        self._began = self._began or bool(text)
        return [ReasoningDelta(text)] if text else []


class ReasoningConstraint:
    """Applies a constraint after the reasoning, in which every token is allowed but those that end the answer.

    With `inside` the answer begins with reasoning; else it does if its first token is `start_id`.
    """

    def __init__(
        self, constraint: Constraint, end_mark: str, start_id: int | None, inside: bool, tokens: Vocabulary
    ) -> None:
        self._constraint = constraint
        self._end_mark = end_mark
        self._start_id = start_id
        self._inside = inside
        self._at_start = not inside
        self._token_text = tokens.token_text
        self._end_ids = tokens.end_ids
        self._any = _all_but(tokens.end_ids, tokens.vocabulary)
        self._tail = ""

    def allowed(self) -> bytes | bytearray | ServeAppError:
        """See `Constraint`."""
        if self._inside:
            return self._any
        bits = self._constraint.allowed()
        if isinstance(bits, ServeAppError) or not self._at_start or self._start_id is None:
            return bits
        bits = bytearray(bits)
        bits[self._start_id // 8] |= 1 << self._start_id % 8
        return bits

    def accept(self, token_id: int) -> bool:
        """See `Constraint`."""
        if self._inside:
            self._tail += self._token_text(token_id)
            self._inside = self._end_mark not in self._tail
            self._tail = self._tail[-len(self._end_mark) :]
            return token_id in self._end_ids
        if self._at_start and token_id == self._start_id:
            self._inside, self._at_start = True, False
            return False
        self._at_start = False
        return self._constraint.accept(token_id)


def _all_but(excluded: Collection[int], vocabulary: int) -> bytes:
    """One bit for each token of the vocabulary, lowest bit first; 0 for the excluded ones."""
    bits = bytearray(b"\xff") * -(-vocabulary // 8)
    for token in excluded:
        if token < vocabulary:
            bits[token // 8] &= ~(1 << token % 8)
    return bytes(bits)
