"""Detects the marks between which a model writes its reasoning, by rendering sample messages with its chat template."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from serve_app.core.requests import ChatMessage
from serve_app.engines.text.tool_format import MessageStyle

Render = Callable[[list[dict[str, Any]], bool], str]

_REASONING, _CONTENT = "reasoningq7", "contentq7"
_USER = ChatMessage("user", "Please.")
_ANSWER = ChatMessage("assistant", _CONTENT, reasoning=_REASONING)
# Marks of templates that leave the reasoning of earlier answers out, so that a sample does not show them.
_KNOWN = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
)
# A tag, or several in a row with words between them, at the end of a text: <think>, <|channel|>analysis<|message|>.
_TAGS = re.compile(r"(?:<[^<>\s]+>|\[[A-Z_]+\])(?:\w*(?:<[^<>\s]+>|\[[A-Z_]+\]))*$")


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """An answer can begin with reasoning between the texts `start` and `end`."""

    start: str
    end: str


def detect_reasoning(render: Render, style: MessageStyle, source: str) -> ReasoningFormat | None:
    """The marks of the template with this source; None for a model without reasoning.

    `render` takes messages, and whether the beginning of an answer follows. It raises what the template raises.
    """
    known = (ReasoningFormat(start, end) for start, end in _KNOWN if end in source)
    return _rendered_marks(render, style) or next(known, None)


def _rendered_marks(render: Render, style: MessageStyle) -> ReasoningFormat | None:
    user, answer = style.message(_USER), style.message(_ANSWER)
    try:
        text, opening = render([user, answer], False), render([user], True)
    except Exception:  # noqa: BLE001 - a template is foreign code: after any exception it shows no reasoning
        return None
    before, found, rest = text.partition(_REASONING)
    end, content, _ = rest.partition(_CONTENT)
    tags = _TAGS.search(before.rstrip().removeprefix(opening.rstrip()))
    return ReasoningFormat(tags[0], end.strip()) if found and content and tags and end.strip() else None
