"""Tests of the division of an answer into content and tool calls, for text in one piece and in many."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings, strategies as st

from serve_app.core.events import TextDelta, ToolCallDelta
from serve_app.engines.text.tool_format import ToolCallFormat
from serve_app.engines.text.tool_parser import ToolCallFormatParser

from .call_formats import DEEPSEEK, FORMATS, HERMES, LLAMA, MISTRAL, NAME_LAST, Call, parse, write_calls

each_format = pytest.mark.parametrize("call_format", FORMATS.values(), ids=FORMATS)

NAMES = st.text("abcXYZ019_-", min_size=1, max_size=64)
# Strings that look like ends of calls, and every kind of JSON escape.
STRINGS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ['"', "\\", "{", "}", "]}", '"}', "</tool_call>", "<tool_call>", "}\n</tool_call>", "[TOOL_CALLS]"]
    ),
)
VALUES = st.recursive(
    STRINGS | st.integers() | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(STRINGS, inner, max_size=3),
    max_leaves=6,
)
ARGUMENTS = st.builds(
    lambda value, ascii_only, indent: json.dumps(value, ensure_ascii=ascii_only, indent=indent),
    st.dictionaries(STRINGS, VALUES, max_size=3),
    st.booleans(),
    st.sampled_from([None, 1]),
)
CALLS = st.lists(st.tuples(NAMES, ARGUMENTS), min_size=1, max_size=3)
ANY_FORMAT = st.sampled_from(list(FORMATS.values()))
CUTS = st.lists(st.integers(0, 10**6), max_size=20)


def cut(text: str, places: list[int]) -> list[str]:
    """The text in pieces, cut at these places modulo its length."""
    cuts = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in pairwise(cuts)]


def malformed(draw: st.DrawFn, call_format: ToolCallFormat) -> str:
    """The elements of calls in any order."""
    elements = [call_format.before, call_format.middle, call_format.between or "", call_format.after]
    elements += [call_format.trigger, "name", '{"a": 1}', " ", "\n", "{", "}", '"', "é"]
    return "".join(draw(st.lists(st.sampled_from(elements), max_size=8)))


@given(ANY_FORMAT, st.sampled_from(["", "Well.", "I will\n  look: <tool", "é{}"]), CALLS)
def test_parser_finds_all_written_calls_and_the_content_before_them(
    call_format: ToolCallFormat, content: str, calls: list[tuple[str, str]]
) -> None:
    calls = calls if call_format.between else calls[:1]
    content = content if call_format.anywhere else ""
    expected = [Call(*call) for call in calls]
    assert parse(call_format, content + write_calls(call_format, *calls)) == (content, expected)


@given(ANY_FORMAT, CALLS, CUTS, st.integers(0, 10**6))
def test_result_does_not_depend_on_the_pieces_of_a_truncated_answer(
    call_format: ToolCallFormat, calls: list[tuple[str, str]], cuts: list[int], length: int
) -> None:
    text = "So \n" + write_calls(call_format, *(calls if call_format.between else calls[:1]))
    text = text[: length % (len(text) + 1)]
    assert parse(call_format, *cut(text, cuts)) == parse(call_format, *text) == parse(call_format, text)


@settings(max_examples=300)
@given(st.data(), ANY_FORMAT, CUTS)
def test_result_does_not_depend_on_the_pieces_of_a_malformed_answer(
    data: st.DataObject, call_format: ToolCallFormat, cuts: list[int]
) -> None:
    text = data.draw(st.composite(lambda draw: malformed(draw, call_format))())
    content, calls = parse(call_format, text)
    assert parse(call_format, *cut(text, cuts)) == parse(call_format, *text) == (content, calls)
    assert not any(marker in content for marker in call_format.special_markers)


@each_format
def test_content_is_emitted_as_soon_as_it_cannot_begin_a_call(call_format: ToolCallFormat) -> None:
    parser = ToolCallFormatParser(call_format)
    emitted = [parser.feed(piece) for piece in ("Hello", " ", "you", "!")]
    texts = ["Hello", "", " you", "!"] if call_format.anywhere else ["Hello", " ", "you", "!"]
    assert emitted == [[TextDelta(text)] if text else [] for text in texts]


def test_arguments_are_emitted_as_they_are_generated() -> None:
    parser = ToolCallFormatParser(HERMES)
    assert parser.feed('Hi <tool_call>\n{"name": "f", "argum') == [TextDelta("Hi")]
    assert parser.feed('ents": ') == []
    assert parser.feed('{"a') == [ToolCallDelta(0, name="f"), ToolCallDelta(0, arguments='{"a')]
    assert parser.feed('": "}"') == [ToolCallDelta(0, arguments='": "}"')]
    assert parser.feed("}}\n</tool_call>") == [ToolCallDelta(0, arguments="}")]
    assert parser.end() == []


def test_call_is_emitted_at_its_end_if_the_name_is_last() -> None:
    parser = ToolCallFormatParser(NAME_LAST)
    assert parser.feed('<call>{"arguments": {"a": 1}, "name": "f') == []
    assert parser.feed('"}</call>') == [ToolCallDelta(0, name="f"), ToolCallDelta(0, arguments='{"a": 1}')]


@each_format
def test_calls_are_numbered_from_zero(call_format: ToolCallFormat) -> None:
    parser = ToolCallFormatParser(call_format)
    calls = [("f", "{}"), ("g", '{"a": 1}'), ("f", "{}")][: 3 if call_format.between else 1]
    deltas = parser.feed(write_calls(call_format, *calls))
    assert deltas == [
        delta
        for index, (name, arguments) in enumerate(calls)
        for delta in (ToolCallDelta(index, name=name), ToolCallDelta(index, arguments=arguments))
    ]


@pytest.mark.parametrize(
    ("call_format", "text", "content", "calls"),
    [
        (HERMES, "", "", []),
        (HERMES, "no call ", "no call ", []),
        (HERMES, 'a <tool_call>\n{"na', 'a <tool_call>\n{"na', []),
        (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": "x', "", [Call("f", '{"a": "x')]),
        (HERMES, '<tool_call>\n{"name": "f", "arguments": 5}', '<tool_call>\n{"name": "f", "arguments": 5}', []),
        (HERMES, '<tool_call>\n{"name": "", "arguments": {}}', '<tool_call>\n{"name": "", "arguments": {}}', []),
        (HERMES, '<tool_call>\n{"name": "f", "arguments": {}}\n</tool', "", [Call("f", "{}")]),
        (HERMES, write_calls(HERMES, ("f", "{}")) + " and so on", " and so on", [Call("f", "{}")]),
        (HERMES, write_calls(HERMES, ("f", "{}")) + "\n<tool_call>\nno", "\n<tool_call>\nno", [Call("f", "{}")]),
        (HERMES, f'<tool_call>\n{{"name": "{"x" * 65}', f'<tool_call>\n{{"name": "{"x" * 65}', []),
        (MISTRAL, '[TOOL_CALLS] [{"nam', ' [{"nam', []),
        (MISTRAL, "[TOOL_CALLS] [TOOL_CALLS] hm", "  hm", []),
        (DEEPSEEK, "<|calls|><|call|>func", "func", []),
        (LLAMA, 'a {"name": "f", "parameters": {}}', 'a {"name": "f", "parameters": {}}', []),
        (LLAMA, '{"name": "f", "parameters": {}}', "", [Call("f", "{}")]),
        (LLAMA, '{"name', '{"name', []),
        (NAME_LAST, '<call>{"arguments": \n {"a": 1}, "name": "f"}</call>', "", [Call("f", '{"a": 1}')]),
    ],
)
def test_text_that_does_not_follow_the_format_is_content(
    call_format: ToolCallFormat, text: str, content: str, calls: list[Call]
) -> None:
    assert parse(call_format, text) == (content, calls)
