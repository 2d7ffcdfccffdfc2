"""Calls of tools in a text: whole, and in pieces however they are cut."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from serve_app.engines.text.tool_format import ToolCallFormat
from serve_app.engines.text.tool_parser import Arguments, Begun, Call, CallParser, Content, News, parse

from .syntaxes import ALL, HERMES, LLAMA, MARKS, MISTRAL, NAME_LAST, written

each = pytest.mark.parametrize("syntax", ALL.values(), ids=ALL)

NAMES = st.text("abcXYZ019_-", min_size=1, max_size=64)
# Strings that look like the ends of things, and escapes of every kind.
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
    lambda value, plain, indent: json.dumps(value, ensure_ascii=plain, indent=indent),
    st.dictionaries(STRINGS, VALUES, max_size=3),
    st.booleans(),
    st.sampled_from([None, 1]),
)
CALLS = st.lists(st.tuples(NAMES, ARGUMENTS), min_size=1, max_size=3)
SYNTAXES = st.sampled_from(list(ALL.values()))


def together(news: list[News]) -> tuple[str, list[Call]]:
    content, calls = "", list[Call]()
    for one in news:
        match one:
            case Content(text):
                content += text
            case Begun(name):
                calls.append(Call(name, ""))
            case Arguments(text):
                calls.append(Call(calls[-1].name, calls.pop().arguments + text))
    return content, calls


def in_pieces(syntax: ToolCallFormat, text: str, cuts: list[int]) -> tuple[str, list[Call]]:
    parser = CallParser(syntax)
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    news = [one for begin, end in pairwise(places) for one in parser.feed(text[begin:end])]
    return together([*news, *parser.end()])


def nearly(draw: st.DrawFn, syntax: ToolCallFormat) -> str:
    """Text made of what calls are made of, in any order."""
    words = [syntax.before, syntax.middle, syntax.between or "", syntax.after, syntax.trigger, "name", '{"a": 1}']
    return "".join(draw(st.lists(st.sampled_from([*words, " ", "\n", "{", "}", '"', "é"]), max_size=8)))


@given(SYNTAXES, st.sampled_from(["", "Well.", "I will\n  look: <tool", "é{}"]), CALLS)
def test_what_is_written_is_found_again(syntax: ToolCallFormat, said: str, calls: list[tuple[str, str]]) -> None:
    calls = calls if syntax.between else calls[:1]
    text = said if syntax.anywhere else ""
    assert parse(syntax, text + written(syntax, *calls)) == (text, [Call(*call) for call in calls])


@given(SYNTAXES, CALLS, st.lists(st.integers(0, 10**6), max_size=20), st.integers(0, 10**6))
def test_a_cut_of_the_answer_or_of_its_pieces_changes_nothing(
    syntax: ToolCallFormat, calls: list[tuple[str, str]], cuts: list[int], length: int
) -> None:
    """The whole is a beginning of what the model would have written, as max_tokens may cut it."""
    text = "So \n" + written(syntax, *(calls if syntax.between else calls[:1]))
    text = text[: length % (len(text) + 1)]
    whole = parse(syntax, text)
    assert in_pieces(syntax, text, cuts) == in_pieces(syntax, text, list(range(len(text)))) == whole


@settings(max_examples=300)
@given(st.data(), SYNTAXES, st.lists(st.integers(0, 10**6), max_size=20))
def test_text_that_follows_no_syntax_is_read_in_one_way_only(
    data: st.DataObject, syntax: ToolCallFormat, cuts: list[int]
) -> None:
    text = data.draw(st.composite(lambda draw: nearly(draw, syntax))())
    content, calls = parse(syntax, text)
    assert in_pieces(syntax, text, cuts) == in_pieces(syntax, text, list(range(len(text)))) == (content, calls)
    assert not any(sign in content for sign in syntax.hidden)


@each
def test_text_is_told_as_soon_as_it_can_be_no_call(syntax: ToolCallFormat) -> None:
    parser = CallParser(syntax)
    told = [together(parser.feed(piece))[0] for piece in ("Hello", " ", "you", "!")]
    assert told == (["Hello", "", " you", "!"] if syntax.anywhere else ["Hello", " ", "you", "!"])


def test_arguments_are_told_as_they_come() -> None:
    parser = CallParser(HERMES)
    assert parser.feed('Hi <tool_call>\n{"name": "f", "argum') == [Content("Hi")]
    assert parser.feed('ents": ') == []
    assert parser.feed('{"a') == [Begun("f"), Arguments('{"a')]
    assert parser.feed('": "}"') == [Arguments('": "}"')]
    assert parser.feed("}}\n</tool_call>") == [Arguments("}")]
    assert parser.end() == []


def test_where_the_name_comes_last_the_call_is_told_at_once() -> None:
    parser = CallParser(NAME_LAST)
    assert parser.feed('<call>{"arguments": {"a": 1}, "name": "f') == []
    assert parser.feed('"}</call>') == [Begun("f"), Arguments('{"a": 1}')]


@pytest.mark.parametrize(
    ("syntax", "text", "content", "calls"),
    [
        (HERMES, "", "", []),
        (HERMES, "no call ", "no call ", []),
        (HERMES, 'a <tool_call>\n{"na', 'a <tool_call>\n{"na', []),
        (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": "x', "", [Call("f", '{"a": "x')]),
        (HERMES, '<tool_call>\n{"name": "f", "arguments": 5}', '<tool_call>\n{"name": "f", "arguments": 5}', []),
        (HERMES, '<tool_call>\n{"name": "", "arguments": {}}', '<tool_call>\n{"name": "", "arguments": {}}', []),
        (HERMES, '<tool_call>\n{"name": "f", "arguments": {}}\n</tool', "", [Call("f", "{}")]),
        (HERMES, written(HERMES, ("f", "{}")) + " and so on", " and so on", [Call("f", "{}")]),
        (HERMES, written(HERMES, ("f", "{}")) + "\n<tool_call>\nno", "\n<tool_call>\nno", [Call("f", "{}")]),
        (HERMES, f'<tool_call>\n{{"name": "{"x" * 65}', f'<tool_call>\n{{"name": "{"x" * 65}', []),
        (MISTRAL, '[TOOL_CALLS] [{"nam', ' [{"nam', []),
        (MISTRAL, "[TOOL_CALLS] [TOOL_CALLS] hm", "  hm", []),
        (MARKS, "<|calls|><|call|>func", "func", []),
        (LLAMA, 'a {"name": "f", "parameters": {}}', 'a {"name": "f", "parameters": {}}', []),
        (LLAMA, '{"name": "f", "parameters": {}}', "", [Call("f", "{}")]),
        (LLAMA, '{"name', '{"name', []),
        (NAME_LAST, '<call>{"arguments": \n {"a": 1}, "name": "f"}</call>', "", [Call("f", '{"a": 1}')]),
    ],
)
def test_what_is_no_call_is_content(syntax: ToolCallFormat, text: str, content: str, calls: list[Any]) -> None:
    assert parse(syntax, text) == (content, calls)
