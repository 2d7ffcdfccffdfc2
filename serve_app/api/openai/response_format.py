"""The fields of OpenAI, TGI and vLLM that set the form of an answer, as grammars."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from serve_app.api.sampling import Text
from serve_app.api.schema import Body, Nested
from serve_app.api.unused import Hint, Only
from serve_app.core.requests import Grammar, GrammarKind

JsonObject = dict[str, object]


class JsonSchema(Body):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] = "answer"
    """The name of the schema."""
    definition: Annotated[JsonObject, Field(alias="schema")]
    """The JSON schema that the answer follows."""
    description: Annotated[object, Hint()] = None
    """The model does not see it."""
    strict: bool | None = None
    """Whether a schema with a rule that the service does not support is refused. Otherwise such a rule is left out."""


# The fields that each type can have beside it, of which it has one. The types of the second line can have none.
_ONE_OF = {"json_schema": ("json_schema",), "json": ("value",), "regex": ("value",)}
_AT_MOST_ONE_OF = {"text": (), "json_object": ("schema", "value")}
_FIELDS = _ONE_OF | _AT_MOST_ONE_OF
_NAMES = ("json_schema", "schema", "value")
_VALUES: dict[str, Any] = {"regex": {"type": "string", "minLength": 1}}


def _rules(type_: str) -> dict[str, Any]:
    """The rules of ResponseFormat's validator for one type as a JSON schema."""
    names, none = _FIELDS[type_], {"type": "null"}
    value = _VALUES.get(type_, {"type": "object"})
    shapes = [
        {name: (value if name == "value" else {"type": "object"}) if name == one else none for name in _NAMES}
        for one in names
    ]
    choices: list[dict[str, Any]] = [
        {"properties": shape, "required": [one]} for one, shape in zip(names, shapes, strict=True)
    ]
    if type_ in _AT_MOST_ONE_OF:
        choices.append({"properties": dict.fromkeys(_NAMES, none)})
    return {"properties": {"type": {"const": type_}}, "oneOf": choices}


class ResponseFormat(Body):
    """OpenAI's forms, and those of TGI and llama.cpp, which have the schema in `value` or `schema`."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [_rules(type_) for type_ in _FIELDS]})

    type: Literal["text", "json_object", "json_schema", "json", "regex"]
    """Free text, a JSON object, JSON that follows a schema (two names), or a text that matches a regular expression."""
    json_schema: JsonSchema | None = None
    """Type `json_schema`: the schema."""
    definition: Annotated[JsonObject | None, Field(alias="schema")] = None
    """Type `json_object`: a schema for the object, as in llama.cpp."""
    value: JsonObject | str | None = None
    """Types `json` and `json_object`: a schema, type `regex`: a regular expression, as in TGI."""

    nested: ClassVar[Nested] = {"json_schema": JsonSchema}

    @model_validator(mode="after")
    def _check(self) -> Self:
        values = (self.json_schema, self.definition, self.value)
        names = [name for name, value in zip(_NAMES, values, strict=True) if value is not None]
        allowed = _FIELDS[self.type]
        wrong = next((name for name in names if name not in allowed), None)
        if wrong is not None:
            raise _fault(f"Input does not take '{wrong}' when its type is '{self.type}'")
        if len(names) > 1 or (not names and self.type in _ONE_OF):
            raise _fault(f"Input should have {' or '.join(map(repr, allowed))} when its type is '{self.type}'")
        if self.value is not None and (self.value == "" or isinstance(self.value, str) != (self.type == "regex")):
            expected = "a regular expression" if self.type == "regex" else "a JSON schema"
            raise _fault(f"Input should have {expected} as its value when its type is '{self.type}'")
        return self

    def grammar(self) -> Grammar | None:
        """The grammar of the answer; None for free text."""
        if self.json_schema is not None:
            return _schema_grammar(self.json_schema.definition, strict=self.json_schema.strict is True)
        if isinstance(self.value, str):
            return Grammar("regex", self.value, "response_format")
        schema = self.definition if self.value is None else self.value
        if schema is not None:
            return _schema_grammar(schema, strict=False)
        return None if self.type == "text" else Grammar("json_object", field="response_format")


def _schema_grammar(schema: JsonObject, strict: bool) -> Grammar:
    return Grammar("json_schema", json.dumps(schema), "response_format", strict=strict)


def _fault(message: str) -> PydanticCustomError:
    return PydanticCustomError("response_format", "{message}", {"message": message})


class StructuredOutputs(Body):
    """vLLM's object: one of five forms of the answer."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": [name], "properties": {name: {"not": {"type": "null"}}}}
                for name in ("json", "regex", "choice", "grammar", "json_object")
            ]
        }
    )

    json_schema: Annotated[JsonObject | Text | None, Field(alias="json")] = None
    """A JSON schema, or its text."""
    regex: Text | None = None
    """A regular expression (Rust's syntax, without look-around) that the whole answer matches."""
    choice: Annotated[list[Text], Field(min_length=1, max_length=1024, fail_fast=True)] | None = None
    """The answer is one of these strings."""
    grammar: Text | None = None
    """A grammar in llguidance's dialect of Lark."""
    json_object: Literal[True] | None = None
    """The answer is any JSON object."""
    disable_any_whitespace: Annotated[object, Only(False, reason="the service bounds whitespace itself")] = None
    """The service bounds the whitespace of JSON itself."""
    disable_additional_properties: Annotated[object, Hint()] = None
    """An object has no further members unless its schema says so."""
    whitespace_pattern: Annotated[object, Only(reason="the service bounds whitespace itself")] = None
    """The service bounds the whitespace of JSON itself."""
    structural_tag: Annotated[object, Only(reason="use 'grammar'")] = None
    """The service has no structural tags."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self._given()) != 1:
            raise _fault("Input should have one of 'json', 'regex', 'choice', 'grammar' and 'json_object'")
        return self

    def _given(self) -> dict[str, object]:
        forms = {
            "json": self.json_schema,
            "regex": self.regex,
            "choice": self.choice,
            "grammar": self.grammar,
            "json_object": self.json_object,
        }
        return {name: value for name, value in forms.items() if value is not None}

    def to_grammar(self) -> Grammar:
        ((name, value),) = self._given().items()
        text = value if isinstance(value, str) else "" if value is True else json.dumps(value)
        return Grammar(_KINDS[name], text, f"structured_outputs.{name}")


_KINDS: dict[str, GrammarKind] = {
    "json": "json_schema",
    "regex": "regex",
    "choice": "choice",
    "grammar": "lark",
    "json_object": "json_object",
}
