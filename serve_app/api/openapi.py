"""The OpenAPI document: what every endpoint takes and says, from the very types that judge and write it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Any, TypeAlias, Union, get_args, get_origin

from pydantic import TypeAdapter
from pydantic.json_schema import JsonSchemaMode, JsonSchemaValue

from serve_app import __version__
from serve_app.api import shapes
from serve_app.api.native.schema import BatchBody, GenerateBody, StreamBody
from serve_app.api.native.tokens_schema import DetokenizeBody, TokenizeBody, TokenizeInputsBody
from serve_app.api.openai.embeddings import EmbeddingsBody
from serve_app.api.openai.schema import ChatBody, CompletionBody
from serve_app.api.tgi.schema import TgiBody

Json: TypeAlias = dict[str, Any]

JSON, EVENTS, TEXT, PAGE = "application/json", "text/event-stream", "text/plain", "text/html"
_COMPONENTS = "#/components/schemas/"

_FAULTS = {
    413: "The body is over the limit.",
    422: "The body is not JSON, or a field is unknown, wrong, out of range or at odds with the model or another field.",
    429: "As many requests wait as the model takes.",
    500: "A fault of the service; its log has more under the request id.",
    503: "No replica can answer yet.",
    504: "The request used up its time.",
}
_MODEL = "There is no such model."
_LATER = (429, 503)


@dataclass(frozen=True, slots=True)
class Operation:
    """One endpoint. `body` is what it takes, with an `example`; `says` its JSON answer, `events` what the data of its
    events is: types, or unions of them. `text` is the kind of text it answers with, if it is no JSON. `model` is where
    else than in the body a model may be named, in a query or a path. `not_ready` is what it says in place of a refusal
    while no model can answer.
    """

    method: str
    path: str
    tag: str
    summary: str
    body: Any = None
    example: Json | None = None
    says: Any = None
    events: Any = None
    text: str | None = None
    model: str | None = None
    refusal: Any = shapes.NativeRefusal
    not_ready: Any = None

    @property
    def id(self) -> str:
        words = self.path.replace("{", "").replace("}", "").strip("/").split("/")
        return "_".join([self.method, *([word for word in words if word] or ["root"])])


_PROMPT = {"prompt": "The future of artificial intelligence is", "max_tokens": 32}
_INPUTS = {"inputs": "The future of artificial intelligence is", "parameters": {"max_new_tokens": 32}}
_CHAT = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 32}
_BATCH = {"prompts": ["The sea is", "The sky is"], "max_tokens": 16}
_BOTH = shapes.NativeRefusal | shapes.TgiRefusal
_OURS, _OPENAI, _TGI, _OPERATION = "Native", "OpenAI", "Text Generation Inference", "Operation"

OPERATIONS = (
    Operation(
        "post", "/generate", _OURS, "One prompt, the whole answer", GenerateBody | TgiBody, _PROMPT,
        shapes.NativeAnswer | shapes.TgiAnswer, model="query", refusal=_BOTH,
    ),
    Operation(
        "post", "/generate_stream", _OURS, "One prompt, an event for every token", StreamBody | TgiBody, _PROMPT,
        events=shapes.NativeFrame | shapes.NativeFailure | shapes.TgiFrame | shapes.TgiRefusal, model="query",
        refusal=_BOTH,
    ),
    Operation(
        "post", "/generate_batch", _OURS, "Many prompts in one call", BatchBody, _BATCH, shapes.BatchAnswer,
    ),
    Operation(
        "post", "/v1/completions", _OPENAI, "Go on with a text", CompletionBody, _PROMPT, shapes.Completion,
        shapes.CompletionChunk | shapes.OpenAIRefusal, refusal=shapes.OpenAIRefusal,
    ),
    Operation(
        "post", "/v1/chat/completions", _OPENAI, "Answer a conversation", ChatBody, _CHAT, shapes.ChatCompletion,
        shapes.ChatChunk | shapes.OpenAIRefusal, refusal=shapes.OpenAIRefusal,
    ),
    Operation(
        "post", "/v1/embeddings", _OPENAI, "Vectors of texts, from a model that is switched on for it", EmbeddingsBody,
        {"input": ["The sea is", "The sky is"]}, shapes.Embeddings, refusal=shapes.OpenAIRefusal,
    ),
    Operation("get", "/v1/models", _OPENAI, "The models here", says=shapes.ModelList, refusal=shapes.OpenAIRefusal),
    Operation(
        "get", "/v1/models/{id}", _OPENAI, "One model", says=shapes.ModelCard, model="path",
        refusal=shapes.OpenAIRefusal,
    ),
    Operation(
        "post", "/tokenize", _OURS, "The tokens of a text or a conversation", TokenizeBody | TokenizeInputsBody,
        {"prompt": "The sea is"}, shapes.Tokens | list[shapes.TgiPiece],
    ),
    Operation(
        "post", "/detokenize", _OURS, "The text of tokens", DetokenizeBody, {"tokens": [504, 4837, 314]}, shapes.Text
    ),
    Operation(
        "post", "/", _TGI, "One prompt, the answer whole or in events", TgiBody, _INPUTS, list[shapes.TgiAnswer],
        shapes.TgiFrame | shapes.TgiRefusal, model="query", refusal=shapes.TgiRefusal,
    ),
    Operation("get", "/info", _TGI, "What a model is and takes", says=shapes.TgiInfo, model="query"),
    Operation("get", "/health", _OPERATION, "Whether the process lives", says=shapes.Health),
    Operation(
        "get", "/ready", _OPERATION, "Whether any model can answer, or one", says=shapes.Readiness, model="query",
        not_ready=shapes.Readiness,
    ),
    Operation("get", "/metrics", _OPERATION, "The whole service's metrics for Prometheus", text=TEXT),
    Operation("get", "/", _OPERATION, "The playground: a page to chat with the models", text=PAGE),
)  # fmt: skip


@cache
def document(models: tuple[str, ...]) -> Json:
    """OpenAPI 3.1 of a service with these models. Takes 0.15 s, once."""
    components = _Components(models)
    paths: Json = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, components)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "serve_app",
            "version": __version__,
            "description": "Text generation with continuous batching. What is not described here is refused by name.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {"schemas": components.schemas, "headers": _HEADERS},
    }


_HEADERS = {
    "X-Request-Id": {
        "description": "The caller's own `x-request-id` if it is harmless in a log line, else a new one.",
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._:-]{1,128}$"},
        "required": True,
    },
    "Retry-After": {
        "description": "In how many seconds trying again may help.",
        "schema": {"type": "integer", "minimum": 1},
    },
}


class _Components:
    """The schemas that operations refer to, each once."""

    def __init__(self, models: Sequence[str]) -> None:
        self.schemas: Json = {}
        self.model_names: Json = {"type": "string", "enum": list(models)}

    def any_of(self, types: Any, mode: JsonSchemaMode) -> JsonSchemaValue:
        """The schema of a type or of a union, by references."""
        members = get_args(types) if isinstance(types, UnionType) or get_origin(types) is Union else [types]
        schemas = [self._refer(member, mode) for member in members]
        return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}

    def _refer(self, type_: Any, mode: JsonSchemaMode) -> JsonSchemaValue:
        schema = TypeAdapter(type_).json_schema(mode=mode, ref_template=_COMPONENTS + "{model}")
        for name, definition in schema.pop("$defs", {}).items():
            self._keep(name, definition)
        if "title" not in schema:  # a reference, or a list of one
            return schema
        self._keep(schema["title"], schema)
        return {"$ref": _COMPONENTS + schema["title"]}

    def _keep(self, name: str, schema: JsonSchemaValue) -> None:
        properties = schema.get("properties", {})
        if name_or_null := properties.get("model", {}).get("anyOf"):
            properties["model"] = {**properties["model"], "anyOf": [self.model_names, *name_or_null[1:]]}
        known = self.schemas.setdefault(name, schema)
        assert known == schema, f"two schemas are called {name}"


def _operation(operation: Operation, components: _Components) -> Json:
    described: Json = {
        "operationId": operation.id,
        "tags": [operation.tag],
        "summary": operation.summary,
        "parameters": _parameters(operation, components),
        "responses": _responses(operation, components),
    }
    if operation.body is not None:
        content = {"schema": components.any_of(operation.body, "validation"), "example": operation.example}
        described["requestBody"] = {"required": True, "content": {JSON: content}}
    return described


def _parameters(operation: Operation, components: _Components) -> list[Json]:
    match operation.model:
        case "path":
            return [{"name": "id", "in": "path", "required": True, "schema": components.model_names}]
        case "query":
            return [{"name": "model", "in": "query", "schema": components.model_names}]
        case _:
            return []


def _responses(operation: Operation, components: _Components) -> Json:
    good: Json = {}
    if operation.says is not None:
        good[JSON] = {"schema": components.any_of(operation.says, "serialization")}
    if operation.events is not None:
        good[EVENTS] = {"schema": _events(operation, components)}
    if operation.text is not None:
        good[operation.text] = {"schema": {"type": "string"}}
    refusal = {JSON: {"schema": components.any_of(operation.refusal, "serialization")}}
    responses = {"200": _response("The answer.", good)}
    for status, sentence in _faults(operation).items():
        responses[str(status)] = _response(sentence, refusal, later=status in _LATER)
    if operation.not_ready is not None:
        schema = {JSON: {"schema": components.any_of(operation.not_ready, "serialization")}}
        responses["503"] = _response(_FAULTS[503], schema, later=True)
    return responses


def _events(operation: Operation, components: _Components) -> Json:
    """Of one event, which OpenAPI 3.1 has no word for: the whole body is a text, of which this says nothing."""
    told: Json = {"contentMediaType": JSON, "contentSchema": components.any_of(operation.events, "serialization")}
    data = {"anyOf": [{"const": "[DONE]"}, told]} if operation.path.startswith("/v1") else told
    return {
        "description": "Server-sent events, each of which is like this. An error ends the stream.",
        "properties": {"event": {"type": "string"}, "data": data},
    }


def _faults(operation: Operation) -> dict[int, str]:
    faults = dict(_FAULTS) if operation.body is not None else {500: _FAULTS[500]}
    if operation.body is not None or operation.model:
        faults[404] = _MODEL
    return dict(sorted(faults.items()))


def _response(description: str, content: Json, later: bool = False) -> Json:
    names = ["X-Request-Id", *(["Retry-After"] if later else [])]
    headers = {name: {"$ref": f"#/components/headers/{name}"} for name in names}
    return {"description": description, "headers": headers, "content": content}
