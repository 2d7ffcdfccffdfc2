"""The bodies of the OpenAI endpoints: the fields this service honours, and vLLM's names for the extra ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from serve_app.api.native.schema import SamplingFields, Text, TokenCount, TokenId
from serve_app.api.openai.tools import CallId, ChosenTool, EarlierCall, Name, OfferedTool, ToolFields, with_names
from serve_app.api.schema import LIST, LISTS, TEXT, TEXTS, Body, Nested
from serve_app.config import SamplingDefaults
from serve_app.core.requests import ChatMessage, ChatPrompt, Grammar, Prompt, SamplingParams, TextPrompt, TokenPrompt
from serve_app.errors import InvalidRequest

# Answers to one prompt; each takes a slot.
MOST_ANSWERS = 16


def _text_or_list(value: object) -> str | None:
    """Choose by the JSON type, so that a fault is reported for the member the caller meant."""
    return TEXT if isinstance(value, str) else LIST if isinstance(value, list) else None


def _kind_of_prompts(value: object) -> str | None:
    """By the first one: several texts, several lists of token ids, or one of either."""
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        return TEXTS if isinstance(value[0], str) else LISTS
    return _text_or_list(value)


@dataclass(frozen=True, slots=True)
class Show:
    """What answers show beside their text. `prompt_logprobs` is how many alternatives to each token of the prompt."""

    echo: bool = False
    token_ids: bool = False
    prompt_logprobs: int | None = None


class StreamOptions(Body):
    include_usage: bool = False
    """Whether a last chunk tells the usage."""


class JsonSchema(Body):
    """`strict` is always so here: what the schema does not allow cannot be said."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    definition: Annotated[dict[str, object], Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Body):
    model_config = ConfigDict(
        json_schema_extra={
            "if": {"properties": {"type": {"const": "json_schema"}}},
            "then": {"required": ["json_schema"], "properties": {"json_schema": {"type": "object"}}},
            "else": {"properties": {"json_schema": {"type": "null"}}},
        }
    )

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    nested: ClassVar[Nested] = {"json_schema": JsonSchema}

    @model_validator(mode="after")
    def _schema_goes_with_its_type(self) -> Self:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise PydanticCustomError(
                "schema_type", "Input should have json_schema exactly when its type is json_schema"
            )
        return self

    def grammar(self) -> Grammar | None:
        if self.json_schema is not None:
            return Grammar("json_schema", json.dumps(self.json_schema.definition), "response_format")
        return Grammar("json_object", field="response_format") if self.type == "json_object" else None


# Whom a call is made for, which is only written to the log.
User = Annotated[str, Field(max_length=128)]


class OpenAIFields(SamplingFields):
    model: str | None = None
    """Left out, the first of the configuration."""
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] = 1
    """Answers to each prompt, which is computed once."""
    response_format: ResponseFormat | None = None
    """What the answer looks like; `guided_json` and the like say it in vLLM's way."""
    stream: bool = False
    """Whether the answer comes in events."""
    stream_options: StreamOptions | None = None
    """Goes with `stream`."""
    user: User | None = None
    """Written to the log with the request's id."""
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """As `logprobs`, for each token of the prompt."""
    return_token_ids: bool = False
    """Whether the ids of the prompt's and the answer's tokens are told."""

    nested: ClassVar[Nested] = {
        "stream_options": StreamOptions,
        "response_format": ResponseFormat,
        "json_schema": JsonSchema,
    }

    def grammars(self) -> list[Grammar]:
        formatted = self.response_format.grammar() if self.response_format is not None else None
        return [*([formatted] if formatted is not None else []), *super().grammars()]

    @property
    def drawn(self) -> int:
        """How many answers are made to one prompt; n of them are told."""
        return self.n

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def show(self) -> Show:
        return Show(False, self.return_token_ids, self.prompt_logprobs)

    def checked(self, defaults: SamplingDefaults, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """Raises InvalidRequest."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest(
                "stream_options goes with stream: true; leave it out or stream", param="stream_options"
            )
        params = self.sampling(defaults, max_tokens, logprobs)
        return params if self.prompt_logprobs is None else replace(params, prompt_logprobs=self.prompt_logprobs)


TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
CompletionPrompt = Annotated[
    Annotated[Text, Tag(TEXT)]
    | Annotated[TokenIds, Tag(LIST)]
    | Annotated[list[Text], Field(min_length=1, fail_fast=True), Tag(TEXTS)]
    | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True), Tag(LISTS)],
    Discriminator(
        _kind_of_prompts,
        custom_error_type="prompt_type",
        custom_error_message="Input should be a string or a list of token ids, or a list of either",
    ),
]


def prompts(given: CompletionPrompt) -> list[Prompt]:
    several = isinstance(given, list) and isinstance(given[0], str | list)
    return [
        TextPrompt(one) if isinstance(one, str) else TokenPrompt(tuple(one))  # type: ignore[arg-type]
        for one in (given if several else [given])
    ]


class CompletionBody(OpenAIFields):
    prompt: CompletionPrompt
    """A text or token ids, or several of either."""
    max_tokens: TokenCount = 16
    """The answer ends with so many tokens."""
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    """How many of the likeliest tokens to tell beside each one, with their log probabilities."""
    best_of: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] | None = None
    """Draw so many answers, and tell the n whose tokens were the likeliest on average."""
    echo: bool = False
    """Whether the prompt stands before its answer, with `logprobs` also its tokens."""

    @property
    def drawn(self) -> int:
        return self.n if self.best_of is None else self.best_of

    @property
    def show(self) -> Show:
        return replace(super().show, echo=self.echo)

    def asked(self) -> list[Prompt]:
        return prompts(self.prompt)

    def params(self, defaults: SamplingDefaults) -> SamplingParams:
        if self.drawn < self.n:
            raise InvalidRequest(f"best_of {self.drawn} is below n {self.n}; raise it or lower n", param="best_of")
        if self.drawn > self.n and self.stream:
            raise InvalidRequest(
                f"best_of {self.drawn} above n {self.n} is known when all answers have ended; do not stream, or leave "
                "it out",
                param="best_of",
            )
        params = self.checked(defaults, self.max_tokens, self.logprobs)
        if not self.echo or self.logprobs is None:
            return params
        return replace(params, prompt_logprobs=max(self.logprobs, params.prompt_logprobs or 0))


class TextPart(Body):
    type: Literal["text"]
    text: str


Content = Annotated[
    Annotated[str, Tag(TEXT)] | Annotated[list[TextPart], Field(min_length=1, fail_fast=True), Tag(LIST)],
    Discriminator(
        _text_or_list,
        custom_error_type="content_type",
        custom_error_message="Input should be a string or a list of text parts",
    ),
]


_NULL, _GIVEN = {"type": "null"}, {"not": {"type": "null"}}
# What Message judges, as a JSON schema.
_ROLES: Any = {
    "oneOf": [
        {
            "properties": {
                "role": {"enum": ["system", "user"]},
                "content": _GIVEN,
                **dict.fromkeys(("name", "tool_call_id", "tool_calls"), _NULL),
            },
            "required": ["content"],
        },
        {
            "properties": {"role": {"const": "assistant"}, "name": _NULL, "tool_call_id": _NULL},
            "anyOf": [
                {"required": ["content"], "properties": {"content": _GIVEN}},
                {"required": ["tool_calls"], "properties": {"tool_calls": _GIVEN}},
            ],
        },
        {
            "properties": {
                "role": {"const": "tool"}, "content": _GIVEN, "tool_call_id": _GIVEN, "tool_calls": _NULL
            },
            "required": ["content", "tool_call_id"],
        },
    ]
}  # fmt: skip


class Message(Body):
    """Only an assistant may call tools, and only then say nothing besides; only a tool answers a call."""

    model_config = ConfigDict(json_schema_extra=_ROLES)

    role: Literal["system", "user", "assistant", "tool"]
    name: Name | None = None
    tool_call_id: Annotated[CallId | None, Field(validate_default=True)] = None
    tool_calls: Annotated[list[EarlierCall], Field(min_length=1, max_length=128, fail_fast=True)] | None = None
    content: Annotated[Content | None, Field(validate_default=True)] = None

    nested: ClassVar[Nested] = {"tool_calls": EarlierCall, "content": TextPart}

    @field_validator("name", "tool_call_id")
    @classmethod
    def _goes_with_a_tool(cls, value: str | None, info: ValidationInfo) -> str | None:
        role = info.data.get("role")
        if value is None and role == "tool" and info.field_name == "tool_call_id":
            raise PydanticCustomError("no_call", "Input is required in a message of role tool")
        if value is not None and role not in ("tool", None):
            raise PydanticCustomError("no_tool", "Input goes with role: tool only")
        return value

    @field_validator("tool_calls")
    @classmethod
    def _goes_with_an_assistant(cls, value: list[EarlierCall] | None, info: ValidationInfo) -> list[EarlierCall] | None:
        if info.data.get("role") not in ("assistant", None):
            raise PydanticCustomError("no_assistant", "Input goes with role: assistant only")
        return value

    @field_validator("content")
    @classmethod
    def _something_is_said(cls, value: Content | None, info: ValidationInfo) -> Content | None:
        if value is None and info.data.get("tool_calls", "") is None:
            raise PydanticCustomError("missing", "Input is required")
        return value

    def plain(self) -> ChatMessage:
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        calls = tuple(call.plain() for call in self.tool_calls or ())
        return ChatMessage(self.role, text, calls, self.tool_call_id or "", self.name or "")


def conversation(messages: Sequence[Message], tools: tuple[str, ...] = ()) -> ChatPrompt:
    """Raises InvalidRequest when messages of tools do not fit those before them."""
    return ChatPrompt(with_names([message.plain() for message in messages]), tools)


class ChatBody(ToolFields, OpenAIFields):
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    """The conversation so far, for the model's own chat template."""
    max_tokens: TokenCount | None = None
    """The answer ends with so many tokens, or at the model's context."""
    max_completion_tokens: TokenCount | None = None
    """The newer name of `max_tokens`."""
    logprobs: bool = False
    """Whether the log probability of each token is told."""
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """How many of the likeliest tokens to tell beside each one."""

    nested: ClassVar[Nested] = {
        **OpenAIFields.nested,
        "messages": Message,
        "tools": OfferedTool,
        "tool_choice": ChosenTool,
    }

    def asked(self) -> list[Prompt]:
        return [conversation(self.messages, self.offered())]

    def params(self, defaults: SamplingDefaults) -> SamplingParams:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest(
                "top_logprobs goes with logprobs: true; set it or leave both out", param="top_logprobs"
            )
        self.check_tools()
        shapes = self.grammars()
        if self.may_call and shapes:
            raise InvalidRequest(
                f"{shapes[0].field} and tools each say what the answer looks like; send one, or tool_choice: none",
                param=shapes[0].field,
            )
        return self.checked(defaults, self._limit(), (self.top_logprobs or 0) if self.logprobs else None)

    def _limit(self) -> int | None:
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            raise InvalidRequest(
                f"max_completion_tokens {new} and max_tokens {old} differ; send one of them",
                param="max_completion_tokens",
            )
        return new if old is None else old
