"""What the endpoints say, as types for the OpenAPI document, to which tests/contract holds every answer."""

from __future__ import annotations

from typing import Literal, NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

exact = with_config(ConfigDict(extra="forbid"))

FinishReasonText = Literal["stop", "length"]
ChatFinishReason = Literal["stop", "length", "tool_calls"]
TgiFinishReason = Literal["length", "eos_token", "stop_sequence"]


@exact
class CachedTokens(TypedDict):
    cached_tokens: int


@exact
class Usage(TypedDict):
    """`prompt_tokens_details` says how much of the prompt was computed already."""

    prompt_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens: int
    total_tokens: int


@exact
class Metrics(TypedDict):
    """Times in milliseconds since the request's arrival; null for an instant that did not happen."""

    ttft_ms: float | None
    tpot_ms: float | None
    queue_ms: float
    tokens_generated: int
    tokens_per_second: float
    elapsed_ms: float


@exact
class NativeToken(TypedDict):
    token_id: int
    token: str
    logprob: float


class NativeLogprobs(NativeToken):
    """The chosen token, and the most likely ones in its place."""

    top: list[NativeToken]


@exact
class NativeError(TypedDict):
    """`param` names the field at fault; the log has the rest under `request_id`."""

    code: str
    message: str
    param: str | None
    request_id: str


@exact
class NativeRefusal(TypedDict):
    error: NativeError


@exact
class NativeAnswer(TypedDict):
    id: str
    model: str
    text: str
    finish_reason: FinishReasonText
    usage: Usage
    metrics: Metrics
    logprobs: NotRequired[list[NativeLogprobs]]


@exact
class NativeFrame(TypedDict):
    """One token, and with `text` all text so far. The last frame has `finish_reason` and `usage`."""

    token: str
    text: NotRequired[str]
    finished: bool
    metrics: Metrics
    logprobs: NotRequired[NativeLogprobs | None]
    finish_reason: NotRequired[FinishReasonText]
    usage: NotRequired[Usage]


@exact
class NativeFailure(TypedDict):
    error: NativeError
    finished: Literal[True]


class BatchItem(NativeAnswer):
    index: int


@exact
class BatchRefusal(TypedDict):
    index: int
    error: NativeError


@exact
class BatchMetrics(TypedDict):
    elapsed_ms: float
    tokens_per_second: float


@exact
class BatchAnswer(TypedDict):
    """Each item answered or refused by itself, in the order of the call."""

    results: list[BatchItem | BatchRefusal]
    usage: Usage
    metrics: BatchMetrics


@exact
class OpenAIError(TypedDict):
    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str


@exact
class OpenAIRefusal(TypedDict):
    error: OpenAIError


@exact
class ModelCard(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


@exact
class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelCard]


@exact
class PromptToken(TypedDict):
    """`rank` is 1 for the likeliest token."""

    logprob: float
    rank: int
    decoded_token: str


# For each token of the prompt what it and the likeliest others had for it, by token id; null for the first.
PromptLogprobs = list[dict[str, PromptToken] | None]


@exact
class OfPrompt(TypedDict):
    """What was asked to be told of a prompt."""

    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[PromptLogprobs]


@exact
class CompletionLogprobs(TypedDict):
    """Null for the first token of an echoed prompt, which nothing foretells."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(OfPrompt):
    """`stop_reason` is the stop string or token of the request that ended the answer."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReasonText
    stop_reason: str | int | None
    token_ids: NotRequired[list[int]]


@exact
class Completion(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunkChoice(OfPrompt):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReasonText | None
    stop_reason: NotRequired[str | int | None]
    token_ids: NotRequired[list[int]]


@exact
class CompletionChunk(TypedDict):
    """The last one may have no choices but the usage, which the others then have as null."""

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


class ChatChoiceToken(ChatToken):
    top_logprobs: list[ChatToken]


@exact
class ChatLogprobs(TypedDict):
    content: list[ChatChoiceToken]


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
    """`content` is null where nothing but calls was said."""

    role: Literal["assistant"]
    content: str | None
    tool_calls: NotRequired[list[ToolCall]]


@exact
class ChatChoice(TypedDict):
    """`stop_reason` is the stop string or token of the request that ended the answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason
    stop_reason: str | int | None
    token_ids: NotRequired[list[int]]


class ChatCompletion(OfPrompt):
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
class ToolCallDelta(TypedDict):
    """The first piece of a call has its id, its type and the function's name; the others more of the arguments."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionDelta


@exact
class ChatDelta(TypedDict):
    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallDelta]]


@exact
class ChatChunkChoice(TypedDict):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None
    stop_reason: NotRequired[str | int | None]
    token_ids: NotRequired[list[int]]


class ChatChunk(OfPrompt):
    """The last one may have no choices but the usage, which the others then have as null."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]


@exact
class Embedding(TypedDict):
    """A list of numbers, or their little-endian float32 in base64."""

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


@exact
class Tokens(TypedDict):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


@exact
class Text(TypedDict):
    prompt: str


@exact
class TgiPiece(TypedDict):
    """`start` and `stop` are characters of the text."""

    id: int
    text: str
    start: int
    stop: int


@exact
class TgiToken(TypedDict):
    id: int
    text: str
    logprob: float | None
    special: bool


@exact
class TgiEnding(TypedDict):
    finish_reason: TgiFinishReason
    generated_tokens: int
    seed: int | None
    input_length: int


@exact
class TgiFrame(TypedDict):
    """One token; the last frame has `generated_text`, and `details` if they were asked for."""

    index: int
    token: TgiToken
    top_tokens: NotRequired[list[TgiToken]]
    generated_text: str | None
    details: TgiEnding | None


@exact
class TgiPrefill(TypedDict):
    """A token of the prompt; the first one has no log probability."""

    id: int
    text: str
    logprob: float | None


@exact
class TgiTold(TypedDict):
    """What is told of one answer in detail."""

    finish_reason: TgiFinishReason
    generated_tokens: int
    seed: int | None
    prefill: list[TgiPrefill]
    tokens: list[TgiToken]
    top_tokens: NotRequired[list[list[TgiToken]]]


class TgiSequence(TgiTold):
    generated_text: str


class TgiDetails(TgiTold):
    best_of_sequences: NotRequired[list[TgiSequence]]


@exact
class TgiAnswer(TypedDict):
    generated_text: str
    details: NotRequired[TgiDetails]


@exact
class TgiRefusal(TypedDict):
    error: str
    error_type: str


@exact
class TgiInfo(TypedDict):
    """What only a loaded model knows is null while it sleeps."""

    model_id: str
    model_sha: str | None
    model_dtype: str | None
    model_device_type: str
    model_pipeline_tag: str
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int | None
    max_total_tokens: int | None
    max_client_batch_size: int
    router: str
    version: str
    sha: None
    docker_label: None


@exact
class Health(TypedDict):
    status: Literal["alive"]


@exact
class ModelReadiness(TypedDict):
    name: str
    state: Literal["ready", "loading", "asleep", "failed"]
    detail: str


@exact
class Readiness(TypedDict):
    status: Literal["ready", "not ready"]
    models: list[ModelReadiness]
