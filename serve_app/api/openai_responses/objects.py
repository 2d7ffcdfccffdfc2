"""The objects of OpenAI's Responses API that the service sends, as typed dictionaries."""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict

from serve_app.api.openai.responses import ChatChosenToken
from serve_app.api.responses import ReasoningTokens, exact

ItemStatus = Literal["in_progress", "completed", "incomplete"]
ResponseStatus = Literal["in_progress", "completed", "incomplete", "failed"]
Truncation = Literal["auto", "disabled"]
Verbosity = Literal["low", "medium", "high"]
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
ReasoningSummary = Literal["auto", "concise", "detailed"]
ToolChoiceMode = Literal["none", "auto", "required"]


@exact
class InputText(TypedDict):
    type: Literal["input_text"]
    text: str


@exact
class OutputText(TypedDict):
    type: Literal["output_text"]
    text: str
    annotations: list[str]
    logprobs: list[ChatChosenToken]


@exact
class ReasoningText(TypedDict):
    type: Literal["reasoning_text"]
    text: str


@exact
class SummaryText(TypedDict):
    type: Literal["summary_text"]
    text: str


@exact
class InputMessageObject(TypedDict):
    id: str
    type: Literal["message"]
    role: Literal["system", "developer", "user"]
    status: ItemStatus
    content: list[InputText]


@exact
class OutputMessageObject(TypedDict):
    """`content` is empty while the message is in progress, else it has one part."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: ItemStatus
    content: list[OutputText]


@exact
class ReasoningObject(TypedDict):
    """The model's reasoning. The service writes no summaries; those of a client are kept."""

    id: str
    type: Literal["reasoning"]
    status: ItemStatus
    summary: list[SummaryText]
    content: list[ReasoningText]


@exact
class FunctionCallObject(TypedDict):
    """`arguments` is the text of a JSON object, which is incomplete if the call is."""

    id: str
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    status: ItemStatus


@exact
class FunctionCallOutputObject(TypedDict):
    id: str
    type: Literal["function_call_output"]
    call_id: str
    output: str
    status: ItemStatus


OutputItem = ReasoningObject | OutputMessageObject | FunctionCallObject
InputItemObject = InputMessageObject | FunctionCallOutputObject | OutputItem


@exact
class InputTokensDetails(TypedDict):
    """`cached_tokens` were in the prefix cache. Tokens that are written to it are not counted."""

    cached_tokens: int
    cache_write_tokens: int


@exact
class ResponseUsage(TypedDict):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


@exact
class ResponseError(TypedDict):
    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str


@exact
class IncompleteDetails(TypedDict):
    reason: Literal["max_output_tokens"]


@exact
class FunctionToolObject(TypedDict):
    type: Literal["function"]
    name: str
    description: str | None
    parameters: dict[str, object] | None
    strict: bool | None


@exact
class FunctionName(TypedDict):
    type: Literal["function"]
    name: str


@exact
class AllowedToolsObject(TypedDict):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[FunctionName]


@exact
class PlainFormatObject(TypedDict):
    type: Literal["text", "json_object"]


@exact
class SchemaFormatObject(TypedDict):
    type: Literal["json_schema"]
    name: str
    schema: dict[str, object]
    description: str | None
    strict: bool | None


@exact
class TextObject(TypedDict):
    format: PlainFormatObject | SchemaFormatObject
    verbosity: Verbosity


@exact
class ReasoningSettings(TypedDict):
    effort: ReasoningEffort | None
    summary: ReasoningSummary | None


class RequestEcho(TypedDict):
    """The fields of the request that its response repeats, with their defaults.

    `store` is whether the response is stored when it is complete.
    """

    background: bool
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: ReasoningSettings
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: bool
    temperature: float
    text: TextObject
    tool_choice: ToolChoiceMode | FunctionName | AllowedToolsObject
    tools: list[FunctionToolObject]
    top_logprobs: int
    top_p: float
    truncation: Truncation
    user: str | None


@exact
class ResponseObject(RequestEcho):
    """A response. `created_at` and `completed_at` are in seconds since 1970; only a completed response has both."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: ResponseStatus
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[OutputItem]
    usage: ResponseUsage | None


@exact
class DeletedResponse(TypedDict):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


@exact
class InputItemList(TypedDict):
    """A page of the items of the conversation that a response answers. An empty page has no ids."""

    object: Literal["list"]
    data: list[InputItemObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
