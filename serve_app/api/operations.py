"""The endpoints of the OpenAPI document: the bodies that each takes, and the answers that it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from serve_app.api.anthropic.responses import AnthropicError, AnthropicMessage, MessageEvent, TokenCounts
from serve_app.api.anthropic.schema import CountTokensBody, MessagesBody
from serve_app.api.native.responses import BatchAnswers, NativeAnswer, NativeError, NativeErrorEvent, NativeEvent
from serve_app.api.native.schema import BatchBody, GenerateBody, StreamBody
from serve_app.api.openai.embeddings import EmbeddingsBody
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
from serve_app.api.operator import Health, Load, Readiness, Version
from serve_app.api.tgi.responses import TgiAnswer, TgiError, TgiEvent, TgiInfo
from serve_app.api.tgi.schema import TgiBody
from serve_app.api.tokens.responses import DetokenizedText, TgiTextToken, Tokens
from serve_app.api.tokens.schema import DetokenizeBody, TokenizeBody, TokenizeInputsBody

NATIVE, OPENAI, ANTHROPIC = "Native", "OpenAI", "Anthropic"
TGI, OPERATION = "Text Generation Inference", "Operation"


@dataclass(frozen=True, slots=True)
class Operation:
    """One endpoint. Types are classes or unions of them.

    `body` is the type of the request body, with an `example`. `answer` is the type of a JSON answer, `events` that of
    the data of its events, `text` the content type of an answer that is no JSON. `model_in` is the place beside the
    body where a model can be named: "query" or "path". `error` is the type of an error, `not_ready` that of a 503.
    """

    method: str
    path: str
    tag: str
    summary: str
    body: Any = None
    example: dict[str, Any] | None = None
    answer: Any = None
    events: Any = None
    text: str | None = None
    model_in: str | None = None
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
_EMBED = {"input": ["The sea is", "The sky is"]}

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
        CompletionChunk | OpenAIError, error=OpenAIError,
    ),
    Operation(
        "post", "/v1/chat/completions", OPENAI, "Answer a conversation", ChatBody, _CHAT, ChatCompletion,
        ChatChunk | OpenAIError, error=OpenAIError,
    ),
    Operation(
        "post", "/v1/embeddings", OPENAI, "Compute the embeddings of texts", EmbeddingsBody, _EMBED, Embeddings,
        error=OpenAIError,
    ),
    Operation(
        "post", "/v1/messages", ANTHROPIC, "Answer a conversation", MessagesBody, _CHAT, AnthropicMessage,
        MessageEvent, error=AnthropicError,
    ),
    Operation(
        "post", "/v1/messages/count_tokens", ANTHROPIC, "Count the tokens of a conversation", CountTokensBody, _COUNT,
        TokenCounts, error=AnthropicError,
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
