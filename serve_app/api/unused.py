"""Markers of fields that a body accepts although the service does not use them.

Clients of OpenAI, Anthropic and vLLM send many such fields, often with the value that has no effect. A body declares
each of them with one of four markers, so that the OpenAPI document describes it:

- `Only`: a client that sends another value would rely on something that the service does not do;
- `Hint`: to ignore it does no harm;
- `UserName`: only experiments use it;
- `Replayed`: a field of an answer, which clients send back in the next request.

A field that a body does not declare is an error. `Body` removes null before a marker sees it.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationInfo
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

log = logging.getLogger(__name__)
# The names of hints that this process has logged. Bodies declare about 30 names.
_logged: set[str] = set()


class Unused:
    """Base class of the markers. Accepts every value."""

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {}

    def check(self, value: object, info: ValidationInfo) -> object:
        """The value. Raises PydanticCustomError if it is not accepted."""
        return value


class Replayed(Unused):
    """A field of an answer, of this or another service, that a client sends back."""


class Hint(Unused):
    """A field that can be ignored. The first use in each process is logged."""

    def check(self, value: object, info: ValidationInfo) -> object:
        name = str(info.field_name)
        if value not in ([], {}) and name not in _logged:
            _logged.add(name)
            log.info("a request has the field '%s', which the service does not use", name)
        return value


class UserName(Unused):
    """A field that names the user of a call. Experiments use its value if it is a string, and nothing else does."""


class Only(Unused):
    """A field that can only have one of `values`, or be empty: [] or {}. `reason` ends the error for another value."""

    def __init__(self, *values: object, reason: str) -> None:
        self.values = values
        self.reason = reason

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"enum": [*self.values, [], {}]}

    def check(self, value: Any, info: ValidationInfo) -> object:
        # The types are compared too, because True == 1. A body's 1.0 arrives as 1 (see parse_document).
        if value in ([], {}) or any(type(value) is type(one) and value == one for one in self.values):
            return value
        allowed = " or ".join(["null", *(json.dumps(one) for one in self.values)])
        # A message is a template of pydantic, and the braces of JSON would be placeholders in it.
        raise PydanticCustomError("unsupported", "{text}", {"text": f"Input can only be {allowed}: {self.reason}"})
