"""The settings of a response that are objects: the form of its text, its reasoning, and its stream."""

from __future__ import annotations

import json
from typing import Annotated, ClassVar, Literal

from pydantic import Discriminator, Tag

from serve_app.api.openai.response_format import JsonSchema
from serve_app.api.openai.template_fields import effort_variables
from serve_app.api.openai_responses.objects import (
    PlainFormatObject,
    ReasoningEffort,
    ReasoningSettings,
    ReasoningSummary,
    SchemaFormatObject,
    TextObject,
    Verbosity,
)
from serve_app.api.openai_responses.unused_fields import UnusedByReasoning
from serve_app.api.schema import Body, Nested
from serve_app.api.unused import Hint
from serve_app.core.requests import Grammar

PLAIN, SCHEMA = "<plain>", "<json_schema>"
_FIELD = "text.format"


class PlainFormat(Body):
    type: Literal["text", "json_object"]
    """Free text, or any JSON object."""

    def grammar(self) -> Grammar | None:
        return Grammar("json_object", field=_FIELD) if self.type == "json_object" else None

    def to_object(self) -> PlainFormatObject:
        return {"type": self.type}


class SchemaFormat(JsonSchema):
    type: Literal["json_schema"]
    description: str | None = None
    """Returned in the response. The model does not see it."""

    def grammar(self) -> Grammar | None:
        return Grammar("json_schema", json.dumps(self.definition), _FIELD, strict=self.strict is True)

    def to_object(self) -> SchemaFormatObject:
        return {
            "type": "json_schema",
            "name": self.name,
            "schema": self.definition,
            "description": self.description,
            "strict": self.strict,
        }


def _tag(value: object) -> str:
    return SCHEMA if isinstance(value, dict) and value.get("type") == "json_schema" else PLAIN


TextFormat = Annotated[Annotated[PlainFormat, Tag(PLAIN)] | Annotated[SchemaFormat, Tag(SCHEMA)], Discriminator(_tag)]


class TextSettings(Body):
    format: TextFormat = PlainFormat(type="text")
    """The form of the text: `text`, `json_object`, or `json_schema` with a `name` and a `schema`."""
    verbosity: Verbosity = "medium"
    """Returned in the response. No model has a setting for the length of its answers."""

    nested: ClassVar[Nested] = {"format": PlainFormat}

    def to_object(self) -> TextObject:
        return {"format": self.format.to_object(), "verbosity": self.verbosity}


class ReasoningFields(UnusedByReasoning):
    effort: ReasoningEffort | None = None
    """How much the model reasons, for a chat template that has the variable. It also sets `enable_thinking`."""
    summary: ReasoningSummary | None = None
    """Returned in the response. The response has the whole reasoning, and no summary."""

    def for_template(self) -> str:
        """The variables of the chat template, as the text of a JSON object."""
        return json.dumps(effort_variables(self.effort))

    def to_object(self) -> ReasoningSettings:
        return {"effort": self.effort, "summary": self.summary}


class ResponseStreamOptions(Body):
    include_obfuscation: Annotated[object, Hint()] = None
    """Events have no padding."""
    include_usage: Annotated[object, Hint()] = None
    """The last event always has the usage."""
