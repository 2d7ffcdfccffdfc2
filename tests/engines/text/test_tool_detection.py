"""Tests of format detection with templates that are Python functions, for formats that no family in use writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from serve_app.engines.text.tool_format import MarkerTokens, Render, ToolCallFormat, detect_tool_template

END_MARKERS = MarkerTokens(ids={"<|end|>": 5, "<|eom|>": 6}, special={5, 6}, ends={5, 6})


def template(
    call: Callable[[str, str], str],
    role: str = "assistant",
    end: str = "<|end|>",
    accepts_content: bool = True,
    counts_calls: bool = False,
) -> Render:
    """Renders a call by a function of its name and the text of its arguments, in a turn with this role and end."""

    def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
        text = json.dumps(tools)
        for message in messages:
            if calls := [c["function"] for c in message.get("tool_calls", [])]:
                written = "\n".join(call(c["name"], json.dumps(c["arguments"])) for c in calls)
                text += f"<|{role}|>{f'<calls {len(calls)}>' if counts_calls else ''}{written}{end}"
            elif message["role"] == "assistant" and not accepts_content:
                raise ValueError("assistant messages must have tool calls")
            else:
                text += f"<|{message['role']}|>{message['content']}<|end|>"
        return text

    return render


def tagged(name: str, arguments: str) -> str:
    return f"<call>{name}: {arguments}</call>"


EXPECTED = ToolCallFormat(
    before="<call>",
    middle=": ",
    between="</call>\n<call>",
    after="</call>",
    name_first=True,
    trigger="<call>",
    anywhere=True,
)


@pytest.mark.parametrize("end", ["<|end|>", "<|eom|>"])
def test_end_of_the_turn_is_not_part_of_the_format(end: str) -> None:
    """A template may end turns with calls by another end token than other turns."""
    found = detect_tool_template(template(tagged, end=end), END_MARKERS)
    assert found is not None
    assert found.call_format == EXPECTED


@pytest.mark.parametrize(
    "render",
    [
        template(lambda name, arguments: f"<call>{name}x{arguments}</call>"),
        template(lambda name, arguments: f"<call>{arguments}{name}</call>"),
        template(lambda name, arguments: f"{name}: {arguments};"),
        template(lambda name, arguments: f"<call>{arguments}, {name}"),
        template(lambda name, arguments: f"<call>{name}: {arguments}<|end|></call>"),
        template(lambda name, arguments: f"<call>{name}, {name}: {arguments}</call>"),
        template(tagged, role="caller"),
        template(tagged, accepts_content=False),
    ],
    ids=[
        "a letter after the name",
        "no text between the parts",
        "no text before the name",
        "no text after a name at the end",
        "an end token in the call",
        "the name twice",
        "another role",
        "no plain assistant message",
    ],
)
def test_format_that_cannot_be_parsed_is_not_supported(render: Render) -> None:
    assert detect_tool_template(render, END_MARKERS) is None


def test_answer_holds_one_call_if_the_template_writes_the_number_of_calls() -> None:
    found = detect_tool_template(template(tagged, counts_calls=True), END_MARKERS)
    assert found is not None
    assert (found.call_format.before, found.call_format.between) == ("<calls 1><call>", None)


def test_template_that_does_not_change_with_tools_takes_no_tools() -> None:
    render = template(tagged)
    assert detect_tool_template(lambda messages, tools: render(messages, None), END_MARKERS) is None
