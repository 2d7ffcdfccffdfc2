"""The strict base of every HTTP body, and the sentence a caller reads when a field is wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, ValidationError, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from serve_app.errors import InvalidRequest

LONGEST_NAME = 64

# How a field that takes a string or a list, or several of either, tells its forms apart.
TEXT, LIST, TEXTS, LISTS, OBJECT = TAGS = ("<text>", "<list>", "<texts>", "<lists>", "<object>")


Nested: TypeAlias = "Mapping[str, type[Body]]"


class Body(BaseModel):
    """Nothing is converted, nothing is ignored. `nested` gives the body type behind a field that holds objects."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    nested: ClassVar[Nested] = {}

    @classmethod
    def parse(cls, document: object) -> Self:
        """Raises InvalidRequest, which names the first wrong field and counts the others."""
        if not isinstance(document, dict):
            raise InvalidRequest(f"expected a JSON object with the fields {_listed(cls.names())}")
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            faults = error.errors(include_url=False, include_input=False)
            raise cls._refusal(faults) from None

    @classmethod
    def names(cls) -> list[str]:
        """Its fields, as a caller writes them."""
        return [field.alias or name for name, field in cls.model_fields.items()]

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, document: object) -> object:
        """Clients send null for what they leave out, as OpenAI's schema allows."""
        if not isinstance(document, dict):
            return document
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {name: value for name, value in document.items() if value is not None or name not in optional}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """With null for every field that can be left out."""
        reference = handler(core)
        schema = handler.resolve_ref_schema(reference)
        for name, field in schema["properties"].items():
            if name not in schema.get("required", ()):
                schema["properties"][name] = _or_null(field)
        return reference

    @classmethod
    def _refusal(cls, faults: Sequence[Mapping[str, Any]]) -> InvalidRequest:
        first, others = faults[0], len(faults) - 1
        unknown = first["type"] == "extra_forbidden"
        location = _location(first["loc"], unknown)
        param = _path(location)
        sentence = cls._unknown(location) if unknown else _sentence(param, first)
        more = f" (and {others} more {'fault' if others == 1 else 'faults'})" if others else ""
        return InvalidRequest(sentence + more, param=param)

    @classmethod
    def _unknown(cls, location: Sequence[str | int]) -> str:
        owners = [part for part in location[:-1] if isinstance(part, str)]
        body: type[Body] = cls
        for owner in owners:  # one that does not know its own is known to the whole
            body = body.nested.get(owner) or cls.nested[owner]
        fields = body.names()
        near = difflib.get_close_matches(str(location[-1])[:LONGEST_NAME], fields, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"the fields are {_listed(fields)}"
        return f"{_path(location)} is not a field here; {remedy}"


def _or_null(field: JsonSchemaValue) -> JsonSchemaValue:
    """A field's schema with null beside its own values; what is said of the field stays outside."""
    about = {key: value for key, value in field.items() if key in ("title", "default", "description")}
    own = {key: value for key, value in field.items() if key not in about}
    if about.get("default", 0) is None:
        del about["default"]
    members = own["anyOf"] if set(own) == {"anyOf"} else [own]
    nulls = [] if {"type": "null"} in members else [{"type": "null"}]
    return {**about, "anyOf": [*members, *nulls]}


def _sentence(param: str, fault: Mapping[str, Any]) -> str:
    if fault["type"] == "missing":
        return f"{param} is required"
    if fault["type"] == "model_type":
        return f"{param} should be an object"
    message: str = fault["msg"]
    subject, _, rest = message.partition(" ")
    return f"{param} {rest}" if subject == "Input" else f"{param}: {message}"


def _location(parts: Sequence[str | int], unknown: bool) -> list[str | int]:
    """Without the tags that pydantic puts in for the chosen member of a union.

    An unknown field comes last, and a caller may have called it anything, a tag's name too.
    """
    named = len(parts) - 1 if unknown else len(parts)
    return [part for i, part in enumerate(parts) if i == named or part not in TAGS]


def _path(location: Iterable[str | int]) -> str:
    """As a caller would write it: messages[0].content."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part[:LONGEST_NAME]}" for part in location)
    return "".join(parts).removeprefix(".") or '""'


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
