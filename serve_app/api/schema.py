"""The strict base class of every HTTP body, and the error message for a wrong field."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, ValidationError, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from serve_app.errors import InvalidRequest

# A field name that a caller made up is cut to this many characters in an error message.
MAX_NAME_LENGTH = 64

# Tags of the members of a union, in angle brackets: of a field that takes a string or a list, or several of either, or
# an object of one of two kinds.
TAGS = ("<text>", "<list>", "<texts>", "<lists>", "<object>", "<allowed>")
TEXT, LIST, TEXTS, LISTS, OBJECT, ALLOWED = TAGS


Nested: TypeAlias = "Mapping[str, type[Body]]"


class Body(BaseModel):
    """A body that converts no value and ignores no field.

    `nested` maps a field that holds objects, or the tag of a union's member that is an object, to their type.
    """

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    nested: ClassVar[Nested] = {}

    @classmethod
    def parse(cls, document: object) -> Self:
        """Raises InvalidRequest, which names the first wrong field and counts the other errors."""
        if not isinstance(document, dict):
            raise InvalidRequest(f"The body should be a JSON object. Known fields: {', '.join(cls.names())}.")
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            raise cls._invalid(error.errors(include_url=False, include_input=False)) from None

    @classmethod
    def names(cls) -> list[str]:
        """The names of the fields in the JSON document."""
        return [field.alias or name for name, field in cls.model_fields.items()]

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, document: object) -> object:
        """Clients send null for a field that they leave out, as OpenAI's schema allows."""
        if not isinstance(document, dict):
            return document
        optional = {field.alias or name for name, field in cls.model_fields.items() if not field.is_required()}
        return {name: value for name, value in document.items() if value is not None or name not in optional}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The schema, with null as a value of every optional field."""
        reference = handler(core)
        schema = handler.resolve_ref_schema(reference)
        for name, field in schema["properties"].items():
            if name not in schema.get("required", ()):
                schema["properties"][name] = _nullable(field)
        return reference

    @classmethod
    def _invalid(cls, errors: Sequence[Mapping[str, Any]]) -> InvalidRequest:
        first, others = errors[0], len(errors) - 1
        unknown = first["type"] == "extra_forbidden"
        location = _location(first["loc"], unknown)
        param = _path(location)
        message = cls._unknown(first["loc"]) if unknown else _message(param, first)
        if others:
            message += f" The body has {others} more {'error' if others == 1 else 'errors'}."
        return InvalidRequest(message, param=param)

    @classmethod
    def _unknown(cls, parts: Sequence[str | int]) -> str:
        """The message for the unknown field at a location with its tags."""
        location = _location(parts, unknown=True)
        body: type[Body] = cls
        for owner in parts[:-1]:  # a body without an entry of its own for the field uses that of the whole body
            if isinstance(owner, str):
                body = body.nested.get(owner) or cls.nested.get(owner) or body
        fields = body.names()
        similar = difflib.get_close_matches(str(location[-1])[:MAX_NAME_LENGTH], fields, n=1)
        remedy = f"Did you mean '{similar[0]}'?" if similar else f"Known fields: {', '.join(fields)}."
        return f"Unknown field '{_path(location)}'. {remedy}"


def _nullable(field: JsonSchemaValue) -> JsonSchemaValue:
    """A field's schema with null beside its own values; title, default and description stay outside of the union."""
    about = {key: value for key, value in field.items() if key in ("title", "default", "description")}
    own = {key: value for key, value in field.items() if key not in about}
    if about.get("default", 0) is None:
        del about["default"]
    members = own["anyOf"] if set(own) == {"anyOf"} else [own]
    nulls = [] if {"type": "null"} in members else [{"type": "null"}]
    return {**about, "anyOf": [*members, *nulls]}


def _message(param: str, error: Mapping[str, Any]) -> str:
    if error["type"] == "missing":
        return f"Field '{param}' is required."
    if error["type"] == "model_type":
        return f"Field '{param}' should be an object."
    message: str = error["msg"].removesuffix(".")
    subject, _, rest = message.partition(" ")
    return f"Field '{param}' {rest}." if subject == "Input" else f"Field '{param}': {message}."


def _location(parts: Sequence[str | int], unknown: bool) -> list[str | int]:
    """The location without the tags, in angle brackets, that pydantic inserts for the chosen member of a union.

    The name of an unknown field is the last part, and it can be any string, also a tag.
    """
    named = len(parts) - 1 if unknown else len(parts)
    return [part for i, part in enumerate(parts) if i == named or not _is_tag(part)]


def _is_tag(part: str | int) -> bool:
    return isinstance(part, str) and part.startswith("<") and part.endswith(">")


def _path(location: Iterable[str | int]) -> str:
    """The location as a path, for example messages[0].content."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part[:MAX_NAME_LENGTH]}" for part in location)
    return "".join(parts).removeprefix(".")


def check_size(items: Sequence[object], limit: int, param: str) -> None:
    """Raises InvalidRequest if a call has no items or too many."""
    if not items:
        raise InvalidRequest(f"Field '{param}' is empty. Send 1 to {limit} items.", param=param)
    if len(items) > limit:
        raise InvalidRequest(f"Field '{param}' has {len(items)} items. Send at most {limit} in one call.", param=param)
