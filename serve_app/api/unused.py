"""Markers of published fields that a body accepts although the service does not use them.

OpenAI's and vLLM's clients send fields that ask for nothing, hints, and fields of earlier answers. Each such field is
declared in its body with one of these markers, therefore it is in the OpenAPI document. A field without a marker is
used. A field that a body does not declare is an error.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationInfo
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

log = logging.getLogger(__name__)
_noted: set[str] = set()


@dataclass(frozen=True, slots=True)
class Unused:
    """Base class of the markers."""

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {}

    def check(self, value: object, info: ValidationInfo) -> object:
        """The value. Raises PydanticCustomError if it is not accepted."""
        return value


class Replayed(Unused):
    """A field of an answer, which clients send back in the next request. Every value is accepted."""


class Hint(Unused):
    """A field that does not change the answer. Every value is accepted; the first use is written to the log."""

    def check(self, value: object, info: ValidationInfo) -> object:
        name = str(info.field_name)
        if name not in _noted:
            _noted.add(name)
            log.info("a request has the field '%s', which the service accepts and does not use", name)
        return value


@dataclass(frozen=True, slots=True)
class Only(Unused):
    """A field that would change the answer with any other value than null, [], {} and `values`.

    `because` ends the error for another value.
    """

    values: tuple[Any, ...]
    because: str

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"enum": [*self.values, [], {}]}

    def check(self, value: object, info: ValidationInfo) -> object:
        if value in ([], {}) or any(type(value) is type(one) and value == one for one in self.values):
            return value
        listed = " or ".join(["null", *(json.dumps(one) for one in self.values)])
        raise PydanticCustomError("unsupported", "{text}", {"text": f"Input can only be {listed}: {self.because}"})
