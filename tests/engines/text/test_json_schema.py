"""JSON schemas as clients send them: what a grammar enforces of them, what it leaves out, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from serve_app.core.requests import Grammar, Tool, ToolChoice
from serve_app.engines.text.json_schema import prepared_schema
from serve_app.engines.text.protocol import AnswerPlan
from serve_app.engines.text.tokenizer import HFText
from serve_app.errors import InvalidRequest

from .constraints import acceptance
from .sample_tokenizers import byte_text
from .test_tool_use import PARAMS, planned
from .tool_families import family_text

DECIMAL = {"anyOf": [{"type": "number"}, {"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"}]}


def object_of(**properties: object) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


# Schemas of tools from public bug reports, each with an answer that the schema accepts.
LENIENT: list[tuple[dict[str, Any], str]] = [
    (
        object_of(args={"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {}}),
        '{"args": {"a": 1}}',
    ),
    (object_of(ids={"type": "array", "items": {"type": "string"}, "uniqueItems": True}), '{"ids": ["a"]}'),
    (object_of(p={"type": "string", "format": "uri-reference"}), '{"p": "a"}'),
    (object_of(p={"type": "string", "format": "int64"}), '{"p": "1"}'),
    (object_of(p={"type": "string", "format": "path"}), '{"p": "/a"}'),
    (object_of(x={"not": {}}), '{"x": 1}'),
    ({"type": "object", "if": {}, "then": {}}, '{"x": 1}'),
    (object_of(x={"oneOf": [{"type": "string", "format": "uri"}, {"type": "string"}]}), '{"x": "a"}'),
    (object_of(x={"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}), '{"x": -7}'),
    (object_of(amount=DECIMAL), '{"amount": "1.50"}'),
    (object_of(a={"type": "string", "pattern": r"^(?=.*\d).{8,}$"}), '{"a": "x"}'),
    ({"$schema": "https://example.com/none"} | object_of(a={"type": "string"}), '{"a": "x"}'),
    (object_of(a={"$ref": "https://example.com/x.json"}), '{"a": 1}'),
    ({"dependentRequired": {"a": ["b"]}} | object_of(a={"type": "string"}), '{"a": "x"}'),
]
STRICT = [
    (object_of(ids={"type": "array", "uniqueItems": True}), "at properties.ids: ", "uniqueItems"),
    (object_of(p={"type": "string", "format": "decimal"}), "at properties.p: ", "decimal"),
    (object_of(d={"type": "object", "propertyNames": {"enum": ["a"]}}), "at properties.d: ", "propertyNames"),
]


@pytest.fixture(scope="module")
def text() -> HFText:
    return byte_text()


def accepts(text: HFText, schema: dict[str, Any], answer: str, strict: bool = True) -> bool:
    return acceptance(text, Grammar("json_schema", json.dumps(schema), strict=strict), answer) is True


@pytest.mark.model
@pytest.mark.parametrize(("schema", "answer"), LENIENT)
def test_what_is_not_supported_is_left_out_of_a_schema_that_is_not_strict(
    text: HFText, schema: dict[str, Any], answer: str
) -> None:
    assert accepts(text, schema, answer, strict=False)
    assert not accepts(text, schema, "[]", strict=False)


@pytest.mark.model
@pytest.mark.parametrize(("schema", "place", "keyword"), STRICT)
def test_a_strict_schema_is_refused_by_the_place_and_the_keyword(
    text: HFText, schema: dict[str, Any], place: str, keyword: str
) -> None:
    refusal = text.constraint(Grammar("json_schema", json.dumps(schema), "response_format"), False)
    assert isinstance(refusal, InvalidRequest)
    assert refusal.param == "response_format"
    assert place in refusal.message
    assert keyword in refusal.message


@pytest.mark.model
def test_a_pattern_with_look_around_is_left_out_of_a_strict_schema_too(text: HFText) -> None:
    """pydantic writes such a pattern for Decimal."""
    schema = object_of(amount=DECIMAL, ids={"type": "array", "uniqueItems": False})
    assert accepts(text, schema, '{"amount": "1.50", "ids": []}')


@pytest.mark.model
@pytest.mark.parametrize(
    ("schema", "answer", "accepted"),
    [
        (object_of(a={"type": "integer"}), '{"a": 1, "b": 2}', False),
        (object_of(a={"type": "integer"}), '{"a": 1}', True),
        (object_of(a=object_of(b={"type": "integer"})), '{"a": {"c": 1}}', False),
        (object_of(a={"type": "integer"}) | {"additionalProperties": True}, '{"a": 1, "b": 2}', True),
        (object_of(), '{"a": 1}', False),
        ({"type": "object"}, '{"a": 1}', True),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, '{"a": 1}', True),
        ({"properties": {"properties": object_of(a={"type": "integer"})}}, '{"properties": {"b": 1}}', False),
        ({"anyOf": [object_of(a={"type": "integer"}), object_of(b={"type": "integer"})]}, '{"b": 1, "c": 2}', False),
        # Members of allOf describe the same object: a closed one would refuse the members of the others.
        (
            {"allOf": [object_of(a={"type": "integer"}), object_of(b={"type": "integer"}) | {"required": ["b"]}]},
            '{"a": 1, "b": 2}',
            True,
        ),
        (
            {
                "$defs": {"base": object_of(a={"type": "integer"})},
                "allOf": [{"$ref": "#/$defs/base"}, object_of(b={"type": "integer"})],
            },
            '{"a": 1, "b": 2}',
            True,
        ),
        (
            {"$defs": {"one": object_of(a={"type": "integer"})}, "properties": {"x": {"$ref": "#/$defs/one"}}},
            '{"x": {"b": 1}}',
            False,
        ),
        (
            object_of(a={"type": "integer"}) | {"anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
            '{"a": 1}',
            True,
        ),
    ],
)
def test_an_object_has_no_other_members_than_its_properties_unless_its_schema_admits_them(
    text: HFText, schema: dict[str, Any], answer: str, accepted: bool
) -> None:
    assert accepts(text, schema, answer) is accepted


@pytest.mark.parametrize("name", ["pattern", "description", "$ref", "minimum", "uniqueItems"])
def test_a_property_with_the_name_of_a_keyword_is_kept(name: str) -> None:
    schema = object_of(**{name: {"type": "string"}})
    assert json.loads(prepared_schema(json.dumps(schema), False))["properties"] == {name: {"type": "string"}}


@pytest.mark.model
def test_a_tool_whose_schema_cannot_be_compiled_takes_any_object_unless_it_is_strict() -> None:
    """One tool of thirty must not refuse the whole chat."""
    text = family_text("qwen")
    good = Tool("good", json.dumps(object_of(a={"type": "integer"})), "tools[0].function.parameters")
    strange = Tool("strange", '{"properties": {"a": {"type": "strange"}}}', "tools[1].function.parameters")
    plan = planned(text, ToolChoice((good, strange), required=True), PARAMS)
    assert isinstance(plan, AnswerPlan)
    assert plan.params.grammar is not None
    for name, arguments, accepted in (("good", '{"b": 1}', None), ("strange", '{"b": 1}', True)):
        call = f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
        assert acceptance(text, plan.params.grammar, call) is accepted
    strict = Tool("strange", strange.schema, strange.field, strict=True)
    refusal = planned(text, ToolChoice((good, strict)), PARAMS)
    assert isinstance(refusal, InvalidRequest)
    assert refusal.param == strange.field


@pytest.mark.model
@pytest.mark.parametrize("keyword", ["anyOf", "allOf", "enum", "required", "properties", "$defs", "items", "type"])
@pytest.mark.parametrize("value", [5, None, {"b": 1}, [None]])
def test_a_malformed_schema_of_a_tool_is_no_fault_of_the_service(keyword: str, value: object) -> None:
    text = family_text("qwen")
    schema = {"type": "object", "properties": {"a": {"type": "string", keyword: value}}, keyword: value}
    tool = Tool("f", json.dumps(schema), "tools[0].function.parameters")
    assert isinstance(planned(text, ToolChoice((tool,)), PARAMS), AnswerPlan | InvalidRequest)
    strict = planned(text, ToolChoice((replace(tool, strict=True),)), PARAMS)
    assert isinstance(strict, AnswerPlan | InvalidRequest)


@pytest.mark.model
def test_options_of_llguidance_in_a_schema_are_kept(text: HFText) -> None:
    schema = object_of(ids={"type": "array", "uniqueItems": True}) | {"x-guidance": {"lenient": True}}
    assert accepts(text, schema, '{"ids": []}')


@pytest.mark.model
def test_with_tools_and_a_schema_an_answer_is_a_call_or_follows_the_schema() -> None:
    text = family_text("qwen")
    tool = Tool("good", json.dumps(object_of(a={"type": "integer"})), "tools[0].function.parameters")
    content = Grammar("json_schema", json.dumps(object_of(r={"type": "string"}) | {"required": ["r"]}))
    call = '<tool_call>\n{"name": "good", "arguments": {"a": 1}}\n</tool_call>'
    for required, answers in ((False, [call, '{"r": "x"}']), (True, [call])):
        plan = planned(text, ToolChoice((tool,), required=required), replace(PARAMS, grammar=content))
        assert isinstance(plan, AnswerPlan)
        assert plan.params.grammar is not None
        accepted = [
            answer for answer in (call, '{"r": "x"}', "Hello.", "{}") if acceptance(text, plan.params.grammar, answer)
        ]
        assert accepted == answers
