"""Prepares JSON schemas of callers for llguidance, which supports a part of JSON Schema."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import version
from typing import Any

Schema = dict[str, Any]

# Whitespace between the parts of a JSON document. It is bounded because a model may otherwise generate spaces until
# its answer reaches max_tokens.
JSON_WHITESPACE = r" |\r?\n[ \t]{0,24}"
# llguidance before 1.8, which vLLM 0.32 needs, repeats the pattern without a bound. There JSON is written as json.dumps
# of Python writes it.
_REPEATS_WHITESPACE = tuple(map(int, version("llguidance").split(".")[:2])) < (1, 8)
_WHITESPACE: dict[str, object] = (
    {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}
    if _REPEATS_WHITESPACE
    else {"whitespace_pattern": JSON_WHITESPACE}
)

# The keywords of JSON Schema 2020-12 and of earlier drafts that hold schemas: by name, in a list, or one.
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTED = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_SINGLE = (
    *("items", "additionalItems", "additionalProperties", "unevaluatedItems", "unevaluatedProperties"),
    *("contains", "propertyNames", "not", "if", "then", "else"),
)
_COMBINING = ("allOf", "anyOf", "oneOf", "$ref", "if")
# Regular expressions of JSON Schema (ECMA 262) that Rust's syntax does not have.
_LOOK_AROUND = re.compile(r"\(\?<?[=!]|\\[1-9]")
# A double represents every whole number up to this one exactly. llguidance fails on the bounds of int64.
_MAX_BOUND = 2**53
_ANNOTATIONS = ("$comment", "default", "description", "examples", "title")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_MISSING_KEYS = re.compile(r"Unimplemented keys: (\[.*?\])")
_MISSING_FORMAT = re.compile(r"Unknown format: (\S+)")


@lru_cache(maxsize=512)
def prepared_schema(text: str, strict: bool) -> str:
    """The schema as llguidance takes it, as the text of a JSON object. Its options in `x-guidance` are kept.

    An object admits no further members if its schema lists `properties` and says nothing about others; otherwise models
    add members that were not asked for. `pattern` is left out if it has look-around or a back reference. If not
    `strict`, what llguidance does not support is left out too. Raises ValueError, TypeError or RecursionError if the
    text is not a JSON object.
    """
    schema = json.loads(text)
    if not isinstance(schema, dict):
        raise TypeError("a JSON schema must be an object")
    guidance: Schema = dict(_WHITESPACE)
    if not strict:
        guidance |= {"lenient": True, "coerce_one_of": True}
    schema.pop("$schema", None)  # a draft is not retrieved
    options = schema.get("x-guidance")
    guidance |= options if isinstance(options, dict) else {}
    open_definitions = {reference for part, _ in _schemas(schema) for reference in _combined_references(part)}
    return json.dumps(_prepared(schema, strict, open_definitions, "#", True) | {"x-guidance": guidance})


def location_of(text: str, error: str) -> str:
    """The place in the schema that an error of llguidance is about, like "at properties.ids: "; "" if unknown."""
    keys = _MISSING_KEYS.search(error)
    form = _MISSING_FORMAT.search(error)
    for part, path in _schemas(json.loads(text)):
        missing_key = keys is not None and any(key in part for key in json.loads(keys[1]))
        missing_format = form is not None and part.get("format") == form[1]
        if (missing_key or missing_format) and path != "#":
            return f"at {path.removeprefix('#/').replace('/', '.')}: "
    return ""


def _schemas(schema: object, path: str = "#") -> Iterator[tuple[Schema, str]]:
    """The schema and all schemas in it, each with its path."""
    if isinstance(schema, dict):
        yield schema, path
        for child, where in _children(schema):
            yield from _schemas(child, f"{path}/{where}")


def listed(schema: Schema, keyword: str) -> list[Any]:
    """The value of a keyword that should be a list; empty if it is none."""
    value = schema.get(keyword)
    return value if isinstance(value, list) else []


def _children(schema: Schema) -> Iterator[tuple[object, str]]:
    for keyword in _NAMED:
        if isinstance(schema.get(keyword), dict):
            yield from ((child, f"{keyword}/{name}") for name, child in schema[keyword].items())
    for keyword in _LISTED:
        if isinstance(schema.get(keyword), list):
            yield from ((child, f"{keyword}/{number}") for number, child in enumerate(schema[keyword]))
    for keyword in _SINGLE:
        if isinstance(schema.get(keyword), dict):
            yield schema[keyword], keyword


def _combined_references(schema: Schema) -> Iterator[str]:
    """The references in a place where several schemas describe the same object, so that none of them may be closed."""
    if _is_combined(schema):
        members = [schema, *(one for keyword in ("allOf", "anyOf", "oneOf") for one in listed(schema, keyword))]
        yield from (one["$ref"] for one in members if isinstance(one, dict) and isinstance(one.get("$ref"), str))


def _is_combined(schema: Schema) -> bool:
    several = isinstance(schema.get("allOf"), list) and len(schema["allOf"]) > 1
    return several or ("properties" in schema and any(keyword in schema for keyword in _COMBINING))


def _prepared(schema: Any, strict: bool, open_definitions: set[str], path: str, closes: bool) -> Any:
    """A copy of the schema. `closes`: no other schema describes the same object."""
    if not isinstance(schema, dict):
        return schema
    combined = _is_combined(schema)
    result = dict(schema)
    for keyword in _NAMED:
        if isinstance(schema.get(keyword), dict):
            result[keyword] = {
                name: _prepared(
                    child, strict, open_definitions, f"{path}/{keyword}/{name}",
                    f"{path}/{keyword}/{name}" not in open_definitions,
                )
                for name, child in schema[keyword].items()
            }  # fmt: skip
    for keyword in _LISTED:
        if isinstance(schema.get(keyword), list):
            result[keyword] = [
                _prepared(child, strict, open_definitions, f"{path}/{keyword}/{number}", closes and not combined)
                for number, child in enumerate(schema[keyword])
            ]
    for keyword in _SINGLE:
        if isinstance(schema.get(keyword), dict):
            result[keyword] = _prepared(schema[keyword], strict, open_definitions, f"{path}/{keyword}", True)
    _drop_unsupported(result, strict)
    if closes and not combined and "properties" in result and "unevaluatedProperties" not in result:
        result.setdefault("additionalProperties", False)
    return result


def _drop_unsupported(schema: Schema, strict: bool) -> None:
    for annotation in _ANNOTATIONS:  # they mean nothing to a grammar, and are most of the text of some schemas
        schema.pop(annotation, None)
    if schema.get("uniqueItems") is False:
        del schema["uniqueItems"]
    pattern = schema.get("pattern")
    if isinstance(pattern, str) and _LOOK_AROUND.search(pattern):
        del schema["pattern"]
    if strict:
        return
    for bound in _BOUNDS:
        if isinstance(schema.get(bound), int | float) and abs(schema[bound]) > _MAX_BOUND:
            del schema[bound]
    reference = schema.get("$ref")
    if isinstance(reference, str) and not reference.startswith("#"):
        del schema["$ref"]
