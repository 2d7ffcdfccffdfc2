"""Tool calls whose arguments are parameters in tags: the detected form, the grammar and the parser."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from serve_app.core.events import TextDelta, ToolCallDelta
from serve_app.core.requests import ChatMessage, ChatPrompt, Tool, ToolCall, ToolChoice
from serve_app.engines.text.parameter_format import ParameterFormat
from serve_app.engines.text.protocol import AnswerPlan
from serve_app.engines.text.tokenizer import HFText
from serve_app.errors import InvalidRequest

from .call_formats import Call, join_deltas
from .chat_templates import GLM, GLM_TOKENS, QWEN_CODER
from .constraints import acceptance, random_answer
from .test_tool_use import PARAMS, planned
from .tool_families import call_format_of, text_with_tokens

TAGS = ("<tool_call>", "</tool_call>", "<think>", "</think>")
FAMILIES = {"qwen coder": (QWEN_CODER, TAGS), "qwen coder without tokens": (QWEN_CODER, ()), "glm": (GLM, GLM_TOKENS)}
each_family = pytest.mark.parametrize("family", FAMILIES)
SCHEMA: dict[str, Any] = {
    "type": "object",
    "$defs": {"unit": {"enum": ["celsius", "kelvin"]}},
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "unit": {"$ref": "#/$defs/unit"},
        "style": {"type": "string", "enum": ["short", "long"]},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 2},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = Tool("weather", json.dumps(SCHEMA), "tools[0].function.parameters")
CLOCK = Tool("clock", '{"type": "object", "properties": {}}', "tools[1].function.parameters")
ANY = Tool("any", '{"type": "object"}', "tools[2].function.parameters")
REQUIRED = ToolChoice((WEATHER, CLOCK, ANY), required=True)
ARGUMENTS: dict[str, Any] = {"city": 'New "York"\n<b>', "days": 3, "style": "short", "tags": ["a"]}

pytestmark = pytest.mark.model


@cache
def text_of(family: str) -> HFText:
    template, tokens = FAMILIES[family]
    return text_with_tokens(template, tokens)


def plan_of(text: HFText, choice: ToolChoice = REQUIRED) -> AnswerPlan:
    plan = planned(text, choice, PARAMS)
    assert isinstance(plan, AnswerPlan), plan
    return plan


def written(text: HFText, *calls: tuple[str, dict[str, Any]]) -> str:
    """The calls as the template writes them."""
    made = tuple(ToolCall(f"c{i}", name, json.dumps(arguments)) for i, (name, arguments) in enumerate(calls))
    turn = ChatPrompt((ChatMessage("user", "a"), ChatMessage("assistant", "", made)), begins_answer=False)
    (ids,) = text.encode([turn])
    assert isinstance(ids, list), ids
    whole = text.detokenize(ids, skip_special_tokens=False)
    assert isinstance(whole, str)
    return whole.split("<|im_start|>assistant\n")[1].split("<|im_end|>")[0].strip()


def parsed(text: HFText, *pieces: str) -> tuple[str, list[Call]]:
    parser = plan_of(text).parser
    assert parser is not None
    return join_deltas([*(delta for piece in pieces for delta in parser.feed(piece)), *parser.end()])


@each_family
def test_the_form_is_detected(family: str) -> None:
    found = call_format_of(text_of(family)).parameters
    expected = {
        "glm": ParameterFormat("\n<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>"),
    }.get(family, ParameterFormat(">\n<parameter=", ">\n", "\n</parameter"))
    assert found == expected


@each_family
@pytest.mark.parametrize(
    "calls",
    [
        [("weather", ARGUMENTS)],
        [("weather", {"city": ""})],
        [("clock", {})],
        [("weather", ARGUMENTS), ("clock", {}), ("weather", {"city": "Łódź", "note": "so"})],
        [("any", {"a": "text", "b": 1, "c": {"d": [None]}})],
    ],
)
def test_calls_as_the_template_writes_them_are_allowed_and_parsed(
    family: str, calls: list[tuple[str, dict[str, Any]]]
) -> None:
    text = text_of(family)
    answer = written(text, *calls)
    grammar = plan_of(text).params.grammar
    assert grammar is not None
    assert acceptance(text, grammar, answer)
    for pieces in ([answer], list(answer)):
        content, found = parsed(text, *pieces)
        assert content == ""
        assert [(call.name, json.loads(call.arguments)) for call in found] == calls


@each_family
@pytest.mark.parametrize(
    "arguments",
    [
        {"days": 3},
        {"city": "Rome", "days": 12},
        {"city": "Rome", "style": "wide"},
        {"city": "Rome", "unit": "rankine"},
        {"city": "Rome", "tags": [1]},
        {"city": "Rome", "speed": 1},
    ],
)
def test_arguments_that_break_the_schema_are_not_allowed(family: str, arguments: dict[str, Any]) -> None:
    text = text_of(family)
    grammar = plan_of(text).params.grammar
    assert grammar is not None
    assert acceptance(text, grammar, written(text, ("weather", arguments))) is None


@each_family
@pytest.mark.parametrize("seed", range(3))
def test_every_answer_is_a_call_with_valid_arguments(family: str, seed: int) -> None:
    text = text_of(family)
    numbers = {"type": "object", "properties": {"n": {"type": "integer"}, "b": {"type": "boolean"}}, "required": ["n"]}
    plan = plan_of(text, ToolChoice((Tool("f", json.dumps(numbers), "tools[0]"),), required=True, parallel=False))
    assert plan.params.grammar is not None
    assert plan.parser is not None
    answer = random_answer(text, plan.params.grammar, seed)
    content, (call,) = join_deltas([*plan.parser.feed(answer), *plan.parser.end()])
    assert (content, call.name) == ("", "f")
    arguments = json.loads(call.arguments)
    assert isinstance(arguments["n"], int)
    assert set(arguments) <= {"n", "b"}


@pytest.mark.parametrize("keyword", ["anyOf", "enum", "required", "properties", "type"])
@pytest.mark.parametrize("value", [5, None, [None]])
def test_a_malformed_schema_is_no_fault_of_the_service(keyword: str, value: object) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", keyword: value}}, keyword: value}
    tool = Tool("f", json.dumps(schema), "tools[0].function.parameters")
    for strict in (False, True):
        plan = planned(text_of("glm"), ToolChoice((replace(tool, strict=strict),)), PARAMS)
        assert isinstance(plan, AnswerPlan | InvalidRequest)


def test_a_text_is_emitted_while_it_is_generated() -> None:
    text = text_of("qwen coder")
    parser = plan_of(text, ToolChoice((WEATHER,))).parser
    assert parser is not None
    assert parser.feed("Now\n<tool_call>\n<function=weather>\n<parameter=ci") == [TextDelta("Now")]
    assert parser.feed("ty>\nNew ") == [ToolCallDelta(0, "weather"), ToolCallDelta(0, "", '{"city": "New ')]
    assert parser.feed('"York"\n') == [ToolCallDelta(0, "", '\\"York\\"')]
    assert parser.feed("</parameter>\n</function>\n</tool_call>") == [ToolCallDelta(0, "", '"}')]
    assert parser.end() == []


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(list(FAMILIES)), st.lists(st.integers(0, 10**6), max_size=8), st.integers(0, 10**6))
def test_the_pieces_of_a_truncated_answer_do_not_matter(family: str, cuts: list[int], length: int) -> None:
    text = text_of(family)
    answer = written(text, ("weather", ARGUMENTS), ("clock", {}))
    answer = answer[: length % (len(answer) + 1)]
    places = sorted({0, len(answer), *(cut % (len(answer) + 1) for cut in cuts)})
    pieces = [answer[start:end] for start, end in pairwise(places)]
    assert parsed(text, *pieces) == parsed(text, answer) == parsed(text, *answer)
