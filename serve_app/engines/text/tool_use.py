"""Tool calls of one answer: the grammar that constrains it and the parser that divides it into deltas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from serve_app.core.events import Delta
from serve_app.core.requests import Grammar, SamplingParams


class ToolCallParser(Protocol):
    """Divides the text of an answer into content and tool calls, wherever the text is cut."""

    def feed(self, text: str) -> list[Delta]:
        """The deltas that this text completes."""
        ...

    def end(self) -> list[Delta]:
        """The deltas of the text that was held back, when no text follows."""
        ...


@dataclass(frozen=True, slots=True)
class ToolUse:
    """How an answer calls tools. `params` are the request's, changed so that the parser receives all it needs."""

    grammar: Grammar
    params: SamplingParams
    parser: ToolCallParser
