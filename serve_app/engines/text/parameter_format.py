"""Tool calls whose arguments are a list of parameters in tags, as Qwen3-Coder and GLM write them: form and grammar."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from serve_app.core.requests import Tool
from serve_app.engines.text.json_schema import listed, prepared_schema
from serve_app.engines.text.overlap import common_prefix

Schema = dict[str, Any]
_ANY_KEY = "/[^<>\\n]{1,128}/"


@dataclass(frozen=True, slots=True)
class ParameterFormat:
    """A parameter is `before`, its name, `middle`, its value, `after`. Strings are written as they are, not as JSON."""

    before: str
    middle: str
    after: str


def detect_parameters(
    one: str, two: str, keys: tuple[str, str], values: tuple[str, str]
) -> tuple[ParameterFormat, int] | None:
    """The form in the texts of a call with one and with two parameters, and the end of the parameters in the first.

    The parameters begin after the name of the tool: `one` and `two` are the texts after it.
    """
    if one.count(keys[0]) != 1 or one.count(values[0]) != 1 or any(two.count(text) != 1 for text in (*keys, *values)):
        return None
    opening, rest = one.split(keys[0])
    middle, _, closing = rest.partition(values[0])
    head, _, tail = two.partition(values[0])
    between, _, last = tail.partition(keys[1])
    if head != opening + keys[0] + middle or last != middle + values[1] + closing:
        return None
    before = common_prefix(opening[::-1], between[::-1])[::-1]
    after = common_prefix(between.removesuffix(before), closing)
    if not (before and middle and after) or between != after + before or opening != before:
        return None
    return ParameterFormat(before, middle, after), len(opening + keys[0] + middle + values[0] + after)


def parameters_of(tool: Tool) -> Mapping[str, Schema]:
    """The schemas of a tool's parameters by name. Raises ValueError if the schema of the tool is not a JSON object."""
    schema = json.loads(tool.schema)
    properties = schema.get("properties") if isinstance(schema, dict) else None
    if not isinstance(properties, dict):
        return {}
    shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    return {name: one | shared for name, one in properties.items() if isinstance(one, dict)}


def is_text(schema: Schema) -> bool:
    """Whether the value of a parameter is written as it is: a string, or one of several types with a string."""
    types = schema.get("type")
    members = [one for key in ("anyOf", "oneOf") for one in listed(schema, key) if isinstance(one, dict)]
    if isinstance(types, str | list):
        return "string" in types
    choices = _choices(schema)
    return any(map(is_text, members)) or any(isinstance(choice, str) for choice in choices)


def _choices(schema: Schema) -> list[Any]:
    return [schema["const"]] if "const" in schema else listed(schema, "enum")


def parameter_rules(
    form: ParameterFormat, tool: Tool, name: str, literal: Callable[[str], str], ends_in_token: bool
) -> list[str]:
    """Rules for the parameters of a tool, in the order of its schema; the rule `name` stands for all of them.

    `literal` writes a text as terms of a grammar. `ends_in_token`: the text after a value begins with a token that is
    no text to a grammar. Raises ValueError, TypeError or RecursionError for a schema that cannot be read.
    """
    text = f"{name}_text{'' if ends_in_token else '[lazy]'}: /(?s:.*)/ {literal(form.after)}"
    required = listed(json.loads(tool.schema), "required")
    parameters = parameters_of(tool)
    if not parameters and "properties" not in json.loads(tool.schema):
        return [f"{name}: ({literal(form.before)} {_ANY_KEY} {literal(form.middle)} {name}_text)*", text]
    rules, terms = [text], []
    for number, (key, schema) in enumerate(parameters.items()):
        rule = f"{name}_{number}"
        rules.append(f"{rule}: {literal(form.before + key + form.middle)} {_value(form, schema, name, literal, tool)}")
        terms.append(rule if key in required else f"{rule}?")
    return [f"{name}: {' '.join(terms)}" if terms else f'{name}: ""', *rules]


def _value(form: ParameterFormat, schema: Schema, name: str, literal: Callable[[str], str], tool: Tool) -> str:
    choices = _choices(schema)
    if choices and all(isinstance(choice, str) for choice in choices):
        return f"({' | '.join(literal(choice) for choice in choices)}) {literal(form.after)}"
    if is_text(schema):
        return f"{name}_text"
    return f"%json {prepared_schema(json.dumps(schema), tool.strict)} {literal(form.after)}"
