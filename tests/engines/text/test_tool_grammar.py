"""Tests of the answers that the grammar of a tool choice allows."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import jsonschema
import pytest

from serve_app.core.requests import Tool, ToolChoice
from serve_app.engines.text.tokenizer import HFText
from serve_app.engines.text.tool_format import ToolCallFormat
from serve_app.engines.text.tool_grammar import tool_grammar
from serve_app.errors import InvalidRequest

from .call_formats import FORMATS, HERMES, parse, write_calls
from .constraints import acceptance, allowed_ids, new_constraint, random_answer, token_ids
from .json_schemas import random_schema
from .sample_tokenizers import byte_text
from .tool_families import NO_ARGUMENTS, PLACE, call_format_of, choice, each_family, family_text, tool

WEATHER = ("weather", '{"city": "Rome", "days": 2}')
WEATHER_NOW = ("weather_now", "{}")


# Text of the grammar


@pytest.mark.parametrize("required", [False, True])
@pytest.mark.parametrize("parallel", [False, True])
def test_grammar_has_the_field_tools_and_a_part_for_each_schema(required: bool, parallel: bool) -> None:
    grammar = tool_grammar(HERMES, choice(required=required, parallel=parallel))
    assert (grammar.kind, grammar.field) == ("lark", "tools")
    assert grammar.text.startswith('start: "<tool_call>' if required else "start: TEXT |")
    assert ("more:" in grammar.text) is parallel
    assert [(part.kind, json.loads(part.text), part.field) for part in grammar.parts] == [
        ("json_schema", PLACE, "tools[0].function.parameters"),
        ("json_schema", NO_ARGUMENTS, "tools[1].function.parameters"),
    ]


@pytest.mark.parametrize("schema", ["", "{", "[]", "[" * 100_000])
def test_schema_that_is_not_a_json_object_is_refused(schema: str) -> None:
    with pytest.raises(InvalidRequest, match="the schema of the tool f is not") as refused:
        tool_grammar(HERMES, ToolChoice((Tool("f", schema, "tools[3].function.parameters"),)))
    assert refused.value.param == "tools[3].function.parameters"


# Answers


def acceptance_of(text: HFText, tool_choice: ToolChoice, answer: str) -> bool | None:
    """Whether an answer with this choice may end here; None if it is not allowed."""
    return acceptance(text, tool_grammar(call_format_of(text), tool_choice), answer)


@pytest.mark.model
@each_family
def test_required_choice_allows_calls_only(name: str) -> None:
    text = family_text(name)
    call_format, required = call_format_of(text), choice(required=True)
    several = write_calls(call_format, WEATHER, WEATHER_NOW, WEATHER)
    incomplete = write_calls(call_format, WEATHER).removesuffix(call_format.after)
    assert acceptance_of(text, required, write_calls(call_format, WEATHER))
    assert acceptance_of(text, required, write_calls(call_format, WEATHER_NOW))
    assert acceptance_of(text, required, several) is (True if call_format.between else None)
    assert acceptance_of(text, required, incomplete) is False
    assert acceptance_of(text, required, "It is warm.") is None
    for wrong in (("clock", "{}"), ("weather", '{"city": 5}'), ("weather", "{}"), ("weather_now", '{"a": 1}')):
        assert acceptance_of(text, required, write_calls(call_format, wrong)) is None


@pytest.mark.model
@each_family
def test_optional_choice_allows_text_and_then_calls(name: str) -> None:
    text = family_text(name)
    call_format, optional = call_format_of(text), choice()
    content = "Let me look.\n" if call_format.anywhere else ""
    several = content + write_calls(call_format, WEATHER, WEATHER_NOW)
    assert acceptance_of(text, optional, "It is warm, < 30 {°C}\n")
    assert acceptance_of(text, optional, "")
    assert acceptance_of(text, optional, content + write_calls(call_format, WEATHER))
    assert acceptance_of(text, optional, several) is (True if call_format.between else None)
    assert acceptance_of(text, optional, content + call_format.trigger) is False
    assert acceptance_of(text, optional, write_calls(call_format, WEATHER) + " Done.") is None
    for wrong in (("clock", "{}"), ("weather", '{"city": 5}')):
        assert acceptance_of(text, optional, write_calls(call_format, wrong)) is None


@pytest.mark.model
@each_family
def test_choice_without_parallel_calls_allows_one_call(name: str) -> None:
    text = family_text(name)
    call_format, named = call_format_of(text), choice("weather", required=True, parallel=False)
    for one_call in (choice(required=True, parallel=False), choice(parallel=False), named):
        assert acceptance_of(text, one_call, write_calls(call_format, WEATHER))
        assert acceptance_of(text, one_call, write_calls(call_format, WEATHER, WEATHER)) is None
    assert acceptance_of(text, named, write_calls(call_format, WEATHER_NOW)) is None


@pytest.mark.model
def test_reasoning_tokens_are_allowed_before_a_call() -> None:
    text = family_text("qwen 3")
    call = write_calls(call_format_of(text), WEATHER)
    assert acceptance_of(text, choice(), "<think>\nHm.\n</think>\n\n" + call)
    assert acceptance_of(text, choice(), "<think>\nHm.\n</think>\n\nWarm.")


@pytest.mark.model
def test_trigger_in_ordinary_tokens_starts_calls_too() -> None:
    """The trigger is one token of its own, and the answer writes the same text in other tokens."""
    text = family_text("qwen")
    constraint = new_constraint(text, tool_grammar(call_format_of(text), choice()))
    for token in token_ids(family_text("shipped"), "Now <tool_call>"):
        assert not constraint.accept(token)
    allowed = allowed_ids(constraint)
    assert allowed
    assert all('\n{"name": "'.startswith(text.token_text(token)) for token in allowed)


@pytest.mark.model
@pytest.mark.parametrize(
    ("schemas", "field", "message"),
    [
        ([PLACE, {"properties": {"a": {"type": "strange"}}}], "tools[1].function.parameters", "strange"),
        ([{"not": {"type": "string"}}, PLACE], "tools[0].function.parameters", "does not compile"),
        ([{"const": "x" * 70_000}], "tools[0].function.parameters", "at most 65536"),
        ([{"const": "x" * 30_000}, {"const": "x" * 40_000}], "tools", "at most 65536"),
    ],
)
def test_refusal_names_the_tool_whose_schema_cannot_be_followed(
    schemas: list[dict[str, object]], field: str, message: str
) -> None:
    text = family_text("shipped")
    tools = tuple(replace(tool(f"f{number}", schema, number), strict=True) for number, schema in enumerate(schemas))
    refusal = text.constraint(tool_grammar(HERMES, ToolChoice(tools, required=True)), False)
    assert isinstance(refusal, InvalidRequest)
    assert refusal.param == field
    assert message in str(refusal)


@pytest.mark.model
@pytest.mark.parametrize("number", range(8))
@pytest.mark.parametrize("call_format", FORMATS.values(), ids=FORMATS)
def test_every_answer_to_a_required_choice_is_calls_with_valid_arguments(
    call_format: ToolCallFormat, number: int
) -> None:
    """The tokens are bytes, so that the random answers contain every escape and character."""
    call_format = replace(call_format, markers=(), special_markers=())
    count = random.Random(number).randint(1, 3)
    schemas = {f"tool-{n}": random_schema(2000 + 10 * number + n) for n in range(count)}
    tools = tuple(tool(name, schema) for name, schema in schemas.items())
    answer = random_answer(byte_text(), tool_grammar(call_format, ToolChoice(tools, required=True)), seed=number)
    content, calls = parse(call_format, answer)
    assert content == ""
    assert calls
    for call in calls:
        jsonschema.validate(json.loads(call.arguments), schemas[call.name], jsonschema.Draft202012Validator)
