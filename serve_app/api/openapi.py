"""The OpenAPI document: what every endpoint takes and says, from the very types that judge and write it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, get_args

from pydantic import TypeAdapter
from pydantic.json_schema import JsonSchemaMode, JsonSchemaValue

from serve_app import __version__
from serve_app.api import shapes
from serve_app.api.schema import BatchBody, GenerateBody, StreamBody
from serve_app.api.schema_body import Body
from serve_app.api.schema_openai import ChatBody, CompletionBody

Json: TypeAlias = dict[str, Any]

JSON, EVENTS, TEXT = "application/json", "text/event-stream", "text/plain"
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
    events is, `text` if it answers in plain text. `model` is where else than in the body a model may be named: in a
    query or a path. `not_ready` is what it says in place of a refusal while no model can answer.
    """

    method: str
    path: str
    tag: str
    summary: str
    body: tuple[type[Body], ...] = ()
    example: Json | None = None
    says: Any = None
    events: Any = None
    text: bool = False
    model: str | None = None
    refusal: Any = shapes.NativeRefusal
    not_ready: Any = None

    @property
    def id(self) -> str:
        words = self.path.replace("{", "").replace("}", "").strip("/").split("/")
        return "_".join([self.method, *words])


_PROMPT = {"prompt": "The future of artificial intelligence is", "max_tokens": 32}

OPERATIONS = (
    Operation(
        "post", "/generate", "Native", "One prompt, the whole answer", (GenerateBody,), _PROMPT, shapes.NativeAnswer,
    ),
    Operation(
        "post", "/generate_stream", "Native", "One prompt, an event for every token", (StreamBody,), _PROMPT,
        events=shapes.NativeFrame | shapes.NativeFailure,
    ),
    Operation(
        "post", "/generate_batch", "Native", "Many prompts in one call", (BatchBody,),
        {"prompts": ["The sea is", "The sky is"], "max_tokens": 16}, shapes.BatchAnswer,
    ),
    Operation(
        "post", "/v1/completions", "OpenAI", "Go on with a text", (CompletionBody,), _PROMPT, shapes.Completion,
        events=shapes.CompletionChunk | shapes.OpenAIRefusal, refusal=shapes.OpenAIRefusal,
    ),
    Operation(
        "post", "/v1/chat/completions", "OpenAI", "Answer a conversation", (ChatBody,),
        {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 32},
        shapes.ChatCompletion, events=shapes.ChatChunk | shapes.OpenAIRefusal, refusal=shapes.OpenAIRefusal,
    ),
    Operation(
        "get", "/v1/models", "OpenAI", "The models here", says=shapes.ModelList, refusal=shapes.OpenAIRefusal
    ),
    Operation(
        "get", "/v1/models/{id}", "OpenAI", "One model", says=shapes.ModelCard, model="path",
        refusal=shapes.OpenAIRefusal,
    ),
    Operation("get", "/health", "Operation", "Whether the process lives", says=shapes.Health),
    Operation(
        "get", "/ready", "Operation", "Whether any model can answer, or one", says=shapes.Readiness, model="query",
        not_ready=shapes.Readiness,
    ),
    Operation("get", "/metrics", "Operation", "The whole service's metrics for Prometheus", text=True),
)  # fmt: skip


def document(models: Sequence[str]) -> Json:
    """OpenAPI 3.1 of a service with these models."""
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

    def refer(self, type_: Any, mode: JsonSchemaMode) -> JsonSchemaValue:
        """A reference to the type's schema."""
        schema = TypeAdapter(type_).json_schema(mode=mode, ref_template=_COMPONENTS + "{model}")
        for name, definition in schema.pop("$defs", {}).items():
            self._keep(name, definition)
        if "$ref" in schema:
            return schema
        self._keep(schema["title"], schema)
        return {"$ref": _COMPONENTS + schema["title"]}

    def _keep(self, name: str, schema: JsonSchemaValue) -> None:
        properties = schema.get("properties", {})
        if mode_of_model := properties.get("model", {}).get("anyOf"):
            properties["model"] = {**properties["model"], "anyOf": [self.model_names, *mode_of_model[1:]]}
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
    if operation.body:
        content = {"schema": _any(operation.body, components), "example": operation.example}
        described["requestBody"] = {"required": True, "content": {JSON: content}}
    return described


def _any(bodies: Iterable[type[Body]], components: _Components) -> Json:
    schemas = [components.refer(body, "validation") for body in bodies]
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


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
        good[JSON] = {"schema": components.refer(operation.says, "serialization")}
    if operation.events is not None:
        good[EVENTS] = {"schema": _events(operation, components)}
    if operation.text:
        good[TEXT] = {"schema": {"type": "string"}}
    refusal = {JSON: {"schema": components.refer(operation.refusal, "serialization")}}
    responses = {"200": _response("The answer.", good)}
    for status, sentence in _faults(operation).items():
        responses[str(status)] = _response(sentence, refusal, later=status in _LATER)
    if operation.not_ready is not None:
        schema = {JSON: {"schema": components.refer(operation.not_ready, "serialization")}}
        responses["503"] = _response(_FAULTS[503], schema, later=True)
    return responses


def _events(operation: Operation, components: _Components) -> Json:
    """OpenAPI 3.1 has no word for the data of one event; JSON Schema has one for what a text contains."""
    end = ", and `[DONE]` at the end" if operation.path.startswith("/v1") else ""
    return {
        "description": f"Server-sent events; the data of each is this{end}. An error ends the stream.",
        "contentMediaType": JSON,
        "contentSchema": {"anyOf": [components.refer(one, "serialization") for one in get_args(operation.events)]},
    }


def _faults(operation: Operation) -> dict[int, str]:
    faults = dict(_FAULTS) if operation.body else {500: _FAULTS[500]}
    if operation.body or operation.model:
        faults[404] = _MODEL
    return dict(sorted(faults.items()))


def _response(description: str, content: Json, later: bool = False) -> Json:
    names = ["X-Request-Id", *(["Retry-After"] if later else [])]
    headers = {name: {"$ref": f"#/components/headers/{name}"} for name in names}
    return {"description": description, "headers": headers, "content": content}
