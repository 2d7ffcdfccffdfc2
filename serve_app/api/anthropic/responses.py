"""The answers, events and errors of Anthropic's endpoints, as typed dictionaries."""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict

from serve_app.api.responses import ErrorFormat, exact
from serve_app.errors import (
    BodyTooLarge,
    DeadlineExceeded,
    IdempotencyKeyReused,
    InsufficientQuota,
    InvalidApiKey,
    ModelNotFound,
    NotFound,
    NotReady,
    PermissionDenied,
    PromptTooLong,
    QueueFull,
    RateLimitExceeded,
    RequestTimeout,
    ServeAppError,
)

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]
AnthropicErrorType = Literal[
    "invalid_request_error",
    "authentication_error",
    "permission_error",
    "not_found_error",
    "request_too_large",
    "rate_limit_error",
    "timeout_error",
    "overloaded_error",
    "api_error",
]
# Anthropic's status of an overloaded service. HTTP does not define it.
OVERLOADED = 529


@exact
class AnthropicErrorDetails(TypedDict):
    type: AnthropicErrorType
    message: str


@exact
class AnthropicError(TypedDict):
    type: Literal["error"]
    error: AnthropicErrorDetails
    request_id: str


@exact
class ThinkingTokens(TypedDict):
    thinking_tokens: int


@exact
class AnthropicUsage(TypedDict):
    """Counts of tokens. The prompt consists of `input_tokens` and of the cached `cache_read_input_tokens`.

    `output_tokens_details` is there if the answer has reasoning, whose tokens are among the `output_tokens`.
    """

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: NotRequired[ThinkingTokens]


@exact
class TokenCounts(TypedDict):
    input_tokens: int


@exact
class TextAnswer(TypedDict):
    type: Literal["text"]
    text: str


@exact
class ThinkingAnswer(TypedDict):
    """`signature` has no meaning; clients send it back."""

    type: Literal["thinking"]
    thinking: str
    signature: str


@exact
class ToolUseAnswer(TypedDict):
    """If `max_tokens` cut the call off, `input` has what could be parsed."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, object]


AnswerBlock = TextAnswer | ThinkingAnswer | ToolUseAnswer


@exact
class AnthropicMessage(TypedDict):
    """`stop_reason` is null at the beginning of a stream. `stop_sequence` is the one that ended the answer."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[AnswerBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: AnthropicUsage


@exact
class MessageStart(TypedDict):
    type: Literal["message_start"]
    message: AnthropicMessage


@exact
class BlockStart(TypedDict):
    """`content_block` is empty, apart from the id and the name of a call."""

    type: Literal["content_block_start"]
    index: int
    content_block: AnswerBlock


@exact
class TextPiece(TypedDict):
    type: Literal["text_delta"]
    text: str


@exact
class ThinkingPiece(TypedDict):
    type: Literal["thinking_delta"]
    thinking: str


@exact
class SignaturePiece(TypedDict):
    type: Literal["signature_delta"]
    signature: str


@exact
class InputPiece(TypedDict):
    """The pieces of a call join to the text of a JSON object."""

    type: Literal["input_json_delta"]
    partial_json: str


BlockPiece = TextPiece | ThinkingPiece | SignaturePiece | InputPiece


@exact
class BlockDelta(TypedDict):
    type: Literal["content_block_delta"]
    index: int
    delta: BlockPiece


@exact
class BlockStop(TypedDict):
    type: Literal["content_block_stop"]
    index: int


@exact
class MessageEnd(TypedDict):
    stop_reason: StopReason
    stop_sequence: str | None


@exact
class MessageDelta(TypedDict):
    """The usage is that of the whole answer."""

    type: Literal["message_delta"]
    delta: MessageEnd
    usage: AnthropicUsage


@exact
class MessageStop(TypedDict):
    type: Literal["message_stop"]


@exact
class Ping(TypedDict):
    type: Literal["ping"]


MessageEvent = MessageStart | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop | Ping | AnthropicError

_ERROR_TYPES: dict[type[ServeAppError], AnthropicErrorType] = {
    InvalidApiKey: "authentication_error",
    PermissionDenied: "permission_error",
    ModelNotFound: "not_found_error",
    NotFound: "not_found_error",
    RequestTimeout: "timeout_error",
    BodyTooLarge: "request_too_large",
    QueueFull: "rate_limit_error",
    RateLimitExceeded: "rate_limit_error",
    InsufficientQuota: "rate_limit_error",
    NotReady: "overloaded_error",
    DeadlineExceeded: "timeout_error",
}


def anthropic_status(error: ServeAppError) -> int:
    """Anthropic's clients know 400 as the status of a wrong request, and 529 as that of an overloaded service."""
    if isinstance(error, IdempotencyKeyReused):
        return error.status
    return {422: 400, 503: OVERLOADED}.get(error.status, error.status)


def anthropic_error(error: ServeAppError, request_id: str) -> AnthropicError:
    default: AnthropicErrorType = "api_error" if error.status >= 500 else "invalid_request_error"
    details: AnthropicErrorDetails = {"type": _ERROR_TYPES.get(type(error), default), "message": _message(error)}
    return {"type": "error", "error": details, "request_id": request_id}


def _message(error: ServeAppError) -> str:
    """A prompt that is too long has Anthropic's words, by which agents know that they must shorten a conversation."""
    if not isinstance(error, PromptTooLong):
        return error.message
    if error.tokens is None:
        return f"prompt is too long. {error.message}"
    return f"prompt is too long: {error.tokens} tokens > {error.maximum} maximum. {error.message}"


ANTHROPIC_ERRORS = ErrorFormat(anthropic_error, anthropic_status)
