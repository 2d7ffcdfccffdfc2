"""The answers of the OpenAI endpoints, as typed dictionaries."""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict

from serve_app.api.responses import ErrorFormat, Usage, exact
from serve_app.core.events import FinishReason
from serve_app.errors import IdempotencyKeyReused, InsufficientQuota, PromptTooLong, ServeAppError

ErrorType = Literal[
    "invalid_request_error",
    "authentication_error",
    "permission_error",
    "rate_limit_error",
    "insufficient_quota",
    "server_error",
]
_ERROR_TYPES: dict[int, ErrorType] = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
ChatFinishReason = Literal["stop", "length", "tool_calls", "function_call"]
# The stop string or the stop token id of the request that ended the answer.
StopReason = str | int | None


@exact
class OpenAIErrorDetails(TypedDict):
    """`param` is the path of the wrong field."""

    message: str
    type: ErrorType
    param: str | None
    code: str


@exact
class OpenAIError(TypedDict):
    error: OpenAIErrorDetails


@exact
class ModelCard(TypedDict):
    """As in vLLM: `root` is the model itself, or the path of an adapter, whose `parent` is the model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None


@exact
class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelCard]


@exact
class PromptToken(TypedDict):
    """`rank` is 1 for the most likely token."""

    logprob: float
    rank: int
    decoded_token: str


@exact
class PromptFields(TypedDict):
    """vLLM's fields about the prompt, if the request wants them.

    `prompt_logprobs` has an entry for each token of the prompt: by token id, the token itself and the most likely ones.
    The entry of the first token is null, because it has no prediction.
    """

    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[list[dict[str, PromptToken] | None]]


@exact
class CompletionLogprobs(TypedDict):
    """The first token of an echoed prompt has null, because it has no prediction."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(PromptFields):
    """`stop_reason` is the stop string or the stop token id of the request that ended the answer."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    stop_reason: StopReason
    token_ids: NotRequired[list[int]]


@exact
class Completion(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunkChoice(PromptFields):
    """`stop_reason` comes with the finish reason."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: NotRequired[StopReason]
    token_ids: NotRequired[list[int]]


@exact
class CompletionChunk(TypedDict):
    """With `include_usage` the last chunk has the usage and no choice.

    The other chunks have `usage: null`, or the usage so far with `continuous_usage_stats`.
    """

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChunkChoice]
    usage: NotRequired[Usage | None]


@exact
class ChatToken(TypedDict):
    token: str
    bytes: list[int]
    logprob: float


class ChatChosenToken(ChatToken):
    """The chosen token, and the most likely tokens at its place."""

    top_logprobs: list[ChatToken]


@exact
class ChatLogprobs(TypedDict):
    content: list[ChatChosenToken]


@exact
class FunctionCall(TypedDict):
    """`arguments` is the text of a JSON object."""

    name: str
    arguments: str


@exact
class ToolCall(TypedDict):
    id: str
    type: Literal["function"]
    function: FunctionCall


@exact
class AssistantMessage(TypedDict):
    """`content` is null if the answer consists of tool calls only.

    `reasoning_content` and `reasoning` are two names of the model's reasoning; clients know one or the other.
    """

    role: Literal["assistant"]
    content: str | None
    reasoning_content: NotRequired[str]
    reasoning: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]
    function_call: NotRequired[FunctionCall]


@exact
class ChatChoice(TypedDict):
    """`stop_reason` is the stop string or the stop token id of the request that ended the answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason
    stop_reason: StopReason
    token_ids: NotRequired[list[int]]


class ChatCompletion(PromptFields):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


@exact
class FunctionDelta(TypedDict):
    name: NotRequired[str]
    arguments: str


@exact
class ToolCallPart(TypedDict):
    """The first part of a call has its id, its type and the function's name; later parts have more arguments."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionDelta


@exact
class ChatDelta(TypedDict):
    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    reasoning_content: NotRequired[str]
    reasoning: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallPart]]
    function_call: NotRequired[FunctionDelta]


@exact
class ChatChunkChoice(TypedDict):
    """`stop_reason` comes with the finish reason."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None
    stop_reason: NotRequired[StopReason]
    token_ids: NotRequired[list[int]]


class ChatChunk(PromptFields):
    """With `include_usage` the last chunk has the usage and no choice.

    The other chunks have `usage: null`, or the usage so far with `continuous_usage_stats`.
    """

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]


@exact
class Embedding(TypedDict):
    """A list of numbers, or their little-endian float32 values in base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


@exact
class EmbeddingUsage(TypedDict):
    prompt_tokens: int
    total_tokens: int


@exact
class Embeddings(TypedDict):
    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


def openai_status(error: ServeAppError) -> int:
    """OpenAI's clients know 400 as the status of a wrong request."""
    return 400 if error.status == 422 and not isinstance(error, IdempotencyKeyReused) else error.status


def openai_error(error: ServeAppError) -> OpenAIError:
    """A prompt that is too long has OpenAI's code, by which agents know that they must shorten a conversation."""
    code = "context_length_exceeded" if isinstance(error, PromptTooLong) else error.code
    default: ErrorType = "server_error" if error.status >= 500 else "invalid_request_error"
    kind = _ERROR_TYPES.get(error.status, default)
    if isinstance(error, InsufficientQuota):
        kind = "insufficient_quota"
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": code}}


OPENAI_ERRORS = ErrorFormat(lambda error, request_id: openai_error(error), openai_status)
