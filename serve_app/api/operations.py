"""The endpoints of the OpenAPI document: the bodies that each takes, and the answers that it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from serve_app.api.anthropic.responses import AnthropicError, AnthropicMessage, MessageEvent, TokenCounts
from serve_app.api.anthropic.schema import CountTokensBody, MessagesBody
from serve_app.api.experiments import FeedbackBody, FeedbackTaken
from serve_app.api.native.responses import BatchAnswers, NativeAnswer, NativeError, NativeErrorEvent, NativeEvent
from serve_app.api.native.schema import BatchBody, GenerateBody, StreamBody
from serve_app.api.openai.embeddings import EmbeddingsBody
from serve_app.api.openai.lora import LoadAdapterBody, UnloadAdapterBody
from serve_app.api.openai.responses import (
    ChatChunk,
    ChatCompletion,
    Completion,
    CompletionChunk,
    Embeddings,
    ModelCard,
    ModelList,
    OpenAIError,
)
from serve_app.api.openai.schema import ChatBody, CompletionBody
from serve_app.api.openai_batches.objects import (
    BatchList,
    BatchObject,
    DeletedFile,
    FileList,
    FileObject,
    SubmitBody,
    UploadForm,
)
from serve_app.api.openai_responses.events import StreamEvent
from serve_app.api.openai_responses.objects import DeletedResponse, InputItemList, ResponseObject
from serve_app.api.openai_responses.page import DEFAULT_LIMIT, MAX_LIMIT
from serve_app.api.openai_responses.schema import ResponsesBody
from serve_app.api.operator import Health, Load, Readiness, Version
from serve_app.api.tgi.responses import TgiAnswer, TgiError, TgiEvent, TgiInfo
from serve_app.api.tgi.schema import TgiBody
from serve_app.api.tokens.responses import DetokenizedText, TgiTextToken, TokenizerFacts, Tokens
from serve_app.api.tokens.schema import DetokenizeBody, TokenizeBody, TokenizeInputsBody
from serve_app.api.usage import UsageReport
from serve_app.core.experiments import Reports

NATIVE, OPENAI, ANTHROPIC = "Native", "OpenAI", "Anthropic"
TGI, OPERATION = "Text Generation Inference", "Operation"


@dataclass(frozen=True, slots=True)
class Operation:
    """One endpoint. Types are classes or unions of them.

    `body` is the type of the request body, with an `example`. `answer` is the type of a JSON answer, `events` that of
    the data of its events, `done` whether the event [DONE] ends them, `text` the content type of an answer that is no
    JSON. `model_in` is the place beside the body where a model can be named: "query" or "path". `parameters` are the
    other parameters of the path and of the query, as in the document. `form` is whether the body is a form with files,
    `stored` whether the operation needs the database. `error` is the type of an error, `not_ready` that
    of a 503.
    """

    method: str
    path: str
    tag: str
    summary: str
    body: Any = None
    example: dict[str, Any] | None = None
    answer: Any = None
    events: Any = None
    done: bool = False
    text: str | None = None
    model_in: str | None = None
    parameters: tuple[dict[str, Any], ...] = ()
    form: bool = False
    stored: bool = False
    error: Any = NativeError
    not_ready: Any = None

    @property
    def id(self) -> str:
        words = self.path.replace("{", "").replace("}", "").strip("/").split("/")
        return "_".join([self.method, *([word for word in words if word] or ["root"])])


_PROMPT = {"prompt": "The future of artificial intelligence is", "max_tokens": 32}
_INPUTS = {"inputs": "The future of artificial intelligence is", "parameters": {"max_new_tokens": 32}}
_CHAT = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 32}
_BATCH = {"prompts": ["The sea is", "The sky is"], "max_tokens": 16}
_COUNT = {"messages": [{"role": "user", "content": "What is the capital of France?"}]}
_RESPONSE = {"input": "What is the capital of France?", "max_output_tokens": 32}
_EMBED = {"input": ["The sea is", "The sky is"]}

_RESPONSE_ID = {
    "name": "id",
    "in": "path",
    "required": True,
    "description": "The id of a stored response.",
    "schema": {"type": "string"},
}
_PAGE = (
    {
        "name": "limit",
        "in": "query",
        "description": "The maximum number of items.",
        "schema": {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT},
    },
    {
        "name": "order",
        "in": "query",
        "description": "The oldest or the newest item first.",
        "schema": {"type": "string", "enum": ["asc", "desc"], "default": "desc"},
    },
    {
        "name": "after",
        "in": "query",
        "description": "The id of the item before the first one of the page.",
        "schema": {"type": "string"},
    },
)
_FILE_ID = {**_RESPONSE_ID, "description": "The id of a file."}
_BATCH_ID = {**_RESPONSE_ID, "description": "The id of a batch."}


def _listed(longest: int, default: int) -> dict[str, Any]:
    schema = {"type": "integer", "minimum": 1, "maximum": longest, "default": default}
    return {"name": "limit", "in": "query", "description": "The maximum number of objects.", "schema": schema}


_PURPOSE = {
    "name": "purpose",
    "in": "query",
    "description": "Only files with this purpose.",
    "schema": {"type": "string"},
}
_SUBMIT = {"input_file_id": "file-1", "endpoint": "/v1/chat/completions", "completion_window": "24h"}
_NOT_STREAMED = {
    "name": "stream",
    "in": "query",
    "description": "A stored response cannot be streamed.",
    "schema": {"type": "boolean", "const": False},
}

_INSTANT: dict[str, Any] = {"type": "string", "examples": ["2026-11-30", "2026-11-30T12:00:00Z", "1796040000"]}
_USAGE: tuple[dict[str, Any], ...] = (
    {
        "name": "from",
        "in": "query",
        "description": "The first instant, by whole hours: a date, or seconds since 1970. The default is this month.",
        "schema": _INSTANT,
    },
    {"name": "to", "in": "query", "description": "The instant after the last one.", "schema": _INSTANT},
    {
        "name": "group_by",
        "in": "query",
        "description": "A list with commas of hour, day, month, tenant, key and model.",
        "schema": {"type": "string", "default": "day"},
    },
    *(
        {"name": name, "in": "query", "description": f"Only this {name}.", "schema": {"type": "string"}}
        for name in ("tenant", "key", "model")
    ),
    {
        "name": "format",
        "in": "query",
        "description": "The form of the answer. Without it the header `accept` decides.",
        "schema": {"type": "string", "enum": ["json", "csv"], "default": "json"},
    },
)

OPERATIONS = (
    Operation(
        "post", "/generate", NATIVE, "Generate the whole answer to one prompt", GenerateBody | TgiBody, _PROMPT,
        NativeAnswer | TgiAnswer, model_in="query", error=NativeError | TgiError,
    ),
    Operation(
        "post", "/generate_stream", NATIVE, "Stream the answer to one prompt, an event for each token",
        StreamBody | TgiBody, _PROMPT, events=NativeEvent | NativeErrorEvent | TgiEvent | TgiError, model_in="query",
        error=NativeError | TgiError,
    ),
    Operation(
        "post", "/generate_batch", NATIVE, "Generate the answers to several prompts", BatchBody, _BATCH, BatchAnswers,
    ),
    Operation(
        "post", "/v1/completions", OPENAI, "Continue a text", CompletionBody, _PROMPT, Completion,
        CompletionChunk | OpenAIError, done=True, error=OpenAIError,
    ),
    Operation(
        "post", "/v1/chat/completions", OPENAI, "Answer a conversation", ChatBody, _CHAT, ChatCompletion,
        ChatChunk | OpenAIError, done=True, error=OpenAIError,
    ),
    Operation(
        "post", "/v1/responses", OPENAI, "Answer a conversation of items", ResponsesBody, _RESPONSE, ResponseObject,
        StreamEvent, error=OpenAIError,
    ),
    Operation(
        "get", "/v1/responses/{id}", OPENAI, "Get a stored response", answer=ResponseObject,
        parameters=(_RESPONSE_ID, _NOT_STREAMED), error=OpenAIError,
    ),
    Operation(
        "delete", "/v1/responses/{id}", OPENAI, "Delete a stored response", answer=DeletedResponse,
        parameters=(_RESPONSE_ID,), error=OpenAIError,
    ),
    Operation(
        "post", "/v1/responses/{id}/cancel", OPENAI, "Refuse to cancel a response: none runs in the background",
        parameters=(_RESPONSE_ID,), error=OpenAIError,
    ),
    Operation(
        "get", "/v1/responses/{id}/input_items", OPENAI, "List the items that a stored response answers",
        answer=InputItemList, parameters=(_RESPONSE_ID, *_PAGE), error=OpenAIError,
    ),
    Operation(
        "post", "/v1/embeddings", OPENAI, "Compute the embeddings of texts", EmbeddingsBody, _EMBED, Embeddings,
        error=OpenAIError,
    ),
    Operation(
        "post", "/v1/files", OPENAI, "Upload a file of requests", UploadForm, answer=FileObject, form=True, stored=True,
        error=OpenAIError,
    ),
    Operation(
        "get", "/v1/files", OPENAI, "List the files", answer=FileList, stored=True,
        parameters=(_listed(10_000, 10_000), *_PAGE[1:], _PURPOSE), error=OpenAIError,
    ),
    Operation(
        "get", "/v1/files/{id}", OPENAI, "Describe a file", answer=FileObject, parameters=(_FILE_ID,), stored=True,
        error=OpenAIError,
    ),
    Operation(
        "delete", "/v1/files/{id}", OPENAI, "Delete a file", answer=DeletedFile, parameters=(_FILE_ID,), stored=True,
        error=OpenAIError,
    ),
    Operation(
        "get", "/v1/files/{id}/content", OPENAI, "Get the content of a file", text="application/octet-stream",
        parameters=(_FILE_ID,), stored=True, error=OpenAIError,
    ),
    Operation(
        "post", "/v1/batches", OPENAI, "Submit a batch of requests", SubmitBody, _SUBMIT, BatchObject, stored=True,
        error=OpenAIError,
    ),
    Operation(
        "get", "/v1/batches", OPENAI, "List the batches, the newest first", answer=BatchList, stored=True,
        parameters=(_listed(100, 20), _PAGE[2]), error=OpenAIError,
    ),
    Operation(
        "get", "/v1/batches/{id}", OPENAI, "Describe a batch", answer=BatchObject, parameters=(_BATCH_ID,), stored=True,
        error=OpenAIError,
    ),
    Operation(
        "post", "/v1/batches/{id}/cancel", OPENAI, "Cancel a batch", answer=BatchObject, parameters=(_BATCH_ID,),
        stored=True, error=OpenAIError,
    ),
    Operation(
        "post", "/v1/messages", ANTHROPIC, "Answer a conversation", MessagesBody, _CHAT, AnthropicMessage,
        MessageEvent, error=AnthropicError,
    ),
    Operation(
        "post", "/v1/messages/count_tokens", ANTHROPIC, "Count the tokens of a conversation", CountTokensBody, _COUNT,
        TokenCounts, error=AnthropicError,
    ),
    Operation(
        "post", "/v1/load_lora_adapter", OPENAI, "Load a LoRA adapter, or replace it", LoadAdapterBody,
        {"lora_name": "legal", "lora_path": "/adapters/legal"}, text="text/plain", error=OpenAIError,
    ),
    Operation(
        "post", "/v1/unload_lora_adapter", OPENAI, "Unload a LoRA adapter", UnloadAdapterBody,
        {"lora_name": "support"}, text="text/plain", error=OpenAIError,
    ),
    Operation(
        "post", "/v1/feedback", NATIVE, "Rate the answer to an earlier request", FeedbackBody,
        {"request_id": "5f0c", "rating": "up"}, FeedbackTaken, error=OpenAIError,
    ),
    Operation(
        "get", "/experiments", OPERATION, "The reports of the experiments: the variants compared with their control",
        answer=Reports,
    ),
    Operation(
        "get", "/v1/usage", OPERATION, "The tokens and the cost of the caller's tenant, or with the scope admin of all",
        answer=UsageReport, text="text/csv", parameters=_USAGE, error=OpenAIError,
    ),
    Operation("get", "/v1/models", OPENAI, "List the models", answer=ModelList, error=OpenAIError),
    Operation("get", "/v1/models/{id}", OPENAI, "Get one model", answer=ModelCard, model_in="path", error=OpenAIError),
    Operation(
        "post", "/tokenize", NATIVE, "Split a text or a conversation into tokens", TokenizeBody | TokenizeInputsBody,
        {"prompt": "The sea is"}, Tokens | list[TgiTextToken],
    ),
    Operation(
        "post", "/detokenize", NATIVE, "Join tokens to a text", DetokenizeBody, {"tokens": [504, 4837, 314]},
        DetokenizedText,
    ),
    Operation(
        "get", "/tokenizer_info", NATIVE, "Describe the tokenizer and the chat template of a model",
        answer=TokenizerFacts, model_in="query",
    ),
    Operation(
        "post", "/", TGI, "Generate the answer to one prompt, whole or as events", TgiBody, _INPUTS, list[TgiAnswer],
        TgiEvent | TgiError, model_in="query", error=TgiError,
    ),
    Operation("get", "/info", TGI, "Describe a model and its limits", answer=TgiInfo, model_in="query"),
    Operation("get", "/health", OPERATION, "Whether the process runs", answer=Health),
    Operation(
        "get", "/ready", OPERATION, "Whether any model, or the named one, can answer", answer=Readiness,
        model_in="query", not_ready=Readiness,
    ),
    Operation(
        "get", "/ping", OPERATION, "As `/ready`, at the path that SageMaker and vLLM have", answer=Readiness,
        model_in="query", not_ready=Readiness,
    ),
    Operation("get", "/version", OPERATION, "The version of the service", answer=Version),
    Operation("get", "/load", OPERATION, "The number of requests that run or wait", answer=Load),
    Operation("get", "/metrics", OPERATION, "The metrics of the service for Prometheus", text="text/plain"),
    Operation("get", "/", OPERATION, "The playground: a web page to chat with the models", text="text/html"),
)  # fmt: skip
