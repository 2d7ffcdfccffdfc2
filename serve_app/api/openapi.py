"""The OpenAPI document, made from the types that validate the requests and that build the answers."""

from __future__ import annotations

from collections.abc import Sequence
from types import UnionType
from typing import Any, TypeAlias, Union, get_args, get_origin

from pydantic import TypeAdapter
from pydantic.json_schema import JsonSchemaMode, JsonSchemaValue

from serve_app import __version__
from serve_app.api.anthropic.responses import OVERLOADED, AnthropicError
from serve_app.api.auth import POLICIES, PUBLIC, Public
from serve_app.api.context import PLACEHOLDERS
from serve_app.api.openai.responses import OpenAIError
from serve_app.api.operations import OPERATIONS, Operation
from serve_app.api.rate_limits import ANTHROPIC_NAMES, OPENAI_NAMES
from serve_app.core.tenants import Scope

Json: TypeAlias = dict[str, Any]

_JSON, _EVENTS, _FORM = "application/json", "text/event-stream", "multipart/form-data"
_COMPONENTS = "#/components/schemas/"

_ERRORS = {
    408: "The body did not arrive in time.",
    413: "The body is larger than the limit.",
    415: "The body is compressed, but not with gzip or zstd.",
    422: "The body is not JSON, or a field is unknown, wrong, out of range, or contradicts the model or another field.",
    429: "As many requests wait as the model takes, or a limit of the key or its tenant is reached.",
    500: "The service failed. Its log has the cause under the request id.",
    503: "No replica of the model can answer yet, or the limits cannot be checked.",
    504: "The request used up its time.",
}
_NO_KEY = "The API key is missing or not valid."
_NO_SCOPE = "The API key does not have the scope of the path."
_NO_SUCH_MODEL = "The model does not exist."
_NO_SUCH_OBJECT = "The object does not exist."
_NO_DATABASE = "The database cannot be used now."
_WRONG_PARAMETER = "A parameter is wrong, or the object does not allow the operation."
# Their bodies name no model that could be an experiment.
_WITHOUT_MODEL = ("/v1/feedback", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/files", "/v1/batches")
# Their requests compute no tokens, so that no limit a minute is checked.
_WITHOUT_LIMITS = ("/tokenize", "/detokenize", "/v1/messages/count_tokens")
_WITH_RETRY_AFTER = (429, 503, OVERLOADED)


def document(names: Sequence[str]) -> Json:
    """OpenAPI 3.1 of a service with models and adapters of these names. Takes 0.15 s."""
    components = _Components(names)
    paths: Json = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, components)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "serve_app",
            "version": __version__,
            "description": "Text generation with continuous batching. A field that is not described here is refused.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {"schemas": components.schemas, "headers": _HEADERS, "securitySchemes": _SECURITY_SCHEMES},
    }


# A service without keys ignores these headers, therefore a call without them ({}) is described too.
_SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key, or a token of the identity provider."},
    "apiKey": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "An API key."},
}
_SECURITY: list[Json] = [{"bearer": []}, {"apiKey": []}, {}]


def _limit_header(name: str) -> Json:
    """Without a limit a minute, or before it is checked, a response does not have the header."""
    if "reset" in name:
        return {"description": "The time until the whole limit is available again.", "schema": {"type": "string"}}
    what = "What remains of the limit." if "remaining" in name else "The limit of the key a minute."
    return {"description": what, "schema": {"type": "integer", "minimum": 0}}


_HEADERS = {
    "X-Request-Id": {
        "description": "The client's own `x-request-id` if it is safe in a log line, else a new id.",
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._:-]{1,128}$"},
        "required": True,
    },
    "X-Variant": {
        "description": "The variant of an experiment that answers.",
        "schema": {"type": "string"},
    },
    "Retry-After": {
        "description": "The number of seconds after which the request can succeed.",
        "schema": {"type": "integer", "minimum": 1},
    },
    "Retry-After-Ms": {
        "description": "The same time in milliseconds, for OpenAI's clients.",
        "schema": {"type": "integer", "minimum": 1},
    },
    **{name: _limit_header(name) for name in (*OPENAI_NAMES, *ANTHROPIC_NAMES)},
}


class _Components:
    """The schemas that operations refer to, each once."""

    def __init__(self, names: Sequence[str]) -> None:
        self.schemas: Json = {}
        # A caller without a key gets no names.
        self.model_names: Json = {"type": "string", "enum": list(names)} if names else {"type": "string"}
        # Each name once: a model of the configuration can have the name of a placeholder.
        names_of_bodies = list(dict.fromkeys([*names, *PLACEHOLDERS]))
        self._names_of_bodies: Json = {**self.model_names, "enum": names_of_bodies} if names else {"type": "string"}

    def any_of(self, types: Any, mode: JsonSchemaMode) -> JsonSchemaValue:
        """The schema of a type or of a union, as references."""
        members = get_args(types) if isinstance(types, UnionType) or get_origin(types) is Union else [types]
        schemas = [self._refer(member, mode) for member in members]
        return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}

    def _refer(self, type_: Any, mode: JsonSchemaMode) -> JsonSchemaValue:
        schema = TypeAdapter(type_).json_schema(mode=mode, ref_template=_COMPONENTS + "{model}")
        for name, definition in schema.pop("$defs", {}).items():
            self._keep(name, definition)
        if "title" not in schema:  # a reference, or a list with one item
            return schema
        self._keep(schema["title"], schema)
        return {"$ref": _COMPONENTS + schema["title"]}

    def _keep(self, name: str, schema: JsonSchemaValue) -> None:
        properties = schema.get("properties", {})
        if members := properties.get("model", {}).get("anyOf"):
            properties["model"] = {**properties["model"], "anyOf": [self._names_of_bodies, *members[1:]]}
        known = self.schemas.setdefault(name, schema)
        assert known == schema, f"two schemas have the name {name}"


def _operation(operation: Operation, components: _Components) -> Json:
    described: Json = {
        "operationId": operation.id,
        "tags": [operation.tag],
        "summary": operation.summary,
        "security": [{}] if _needed(operation) is PUBLIC else _SECURITY,
        "parameters": _parameters(operation, components),
        "responses": _responses(operation, components),
    }
    if operation.body is not None:
        content = {"schema": components.any_of(operation.body, "validation")}
        content |= {} if operation.example is None else {"example": operation.example}
        described["requestBody"] = {"required": True, "content": {_FORM if operation.form else _JSON: content}}
    return described


def _needed(operation: Operation) -> Scope | Public | None:
    path = operation.path.replace("/v1/models/{id}", "/v1/models/{id:path}")
    return POLICIES[f"{operation.method.upper()} {path}"]


def _parameters(operation: Operation, components: _Components) -> list[Json]:
    match operation.model_in:
        case "path":
            return [{"name": "id", "in": "path", "required": True, "schema": components.model_names}]
        case "query":
            return [{"name": "model", "in": "query", "schema": components.model_names}]
        case _:
            return list(operation.parameters)


def _responses(operation: Operation, components: _Components) -> Json:
    content: Json = {}
    if operation.answer is not None:
        content[_JSON] = {"schema": components.any_of(operation.answer, "serialization")}
    if operation.events is not None:
        content[_EVENTS] = {"schema": _events(operation, components)}
    if operation.text is not None:
        content[operation.text] = {"schema": {"type": "string"}}
    error = {_JSON: {"schema": components.any_of(operation.error, "serialization")}}
    responses = {"200": _response("The answer.", content)}
    for status, description in _errors(operation).items():
        responses[str(status)] = _response(description, error, retry_after=status in _WITH_RETRY_AFTER)
    if operation.body is not None and operation.path not in _WITHOUT_MODEL:
        for response in responses.values():
            response["headers"] |= _references(["X-Variant"])
        if operation.path not in _WITHOUT_LIMITS:
            names = ANTHROPIC_NAMES if operation.error is AnthropicError else OPENAI_NAMES
            for limited in ("200", "429"):
                responses[limited]["headers"] |= _references(names)
    if operation.not_ready is not None:
        schema = {_JSON: {"schema": components.any_of(operation.not_ready, "serialization")}}
        responses["503"] = _response(_ERRORS[503], schema, retry_after=True)
    return responses


def _events(operation: Operation, components: _Components) -> Json:
    """The schema of one event. OpenAPI 3.1 cannot describe a stream: for it, the whole body is a string."""
    json: Json = {"contentMediaType": _JSON, "contentSchema": components.any_of(operation.events, "serialization")}
    data = {"anyOf": [{"const": "[DONE]"}, json]} if operation.done else json
    return {
        "description": "Server-sent events. Each has this form. An error ends the stream.",
        "properties": {"event": {"type": "string"}, "data": data},
    }


def _errors(operation: Operation) -> dict[int, str]:
    errors = dict(_ERRORS) if operation.body is not None else {500: _ERRORS[500]}
    if operation.error in (OpenAIError, AnthropicError) and 422 in errors:
        errors[400] = errors.pop(422)
    if operation.error is AnthropicError:
        errors[OVERLOADED] = errors.pop(503)
    if operation.body is not None or operation.model_in:
        errors[404] = _NO_SUCH_OBJECT if operation.path in _WITHOUT_MODEL else _NO_SUCH_MODEL
    if _needed(operation) is not PUBLIC:
        errors |= {401: _NO_KEY, 403: _NO_SCOPE}
    if operation.parameters:
        errors |= {400: _WRONG_PARAMETER, 404: _NO_SUCH_OBJECT}
    if operation.stored:
        errors |= {404: _NO_SUCH_OBJECT, 503: _NO_DATABASE}
    return dict(sorted(errors.items()))


def _response(description: str, content: Json, retry_after: bool = False) -> Json:
    names = ["X-Request-Id", *(["Retry-After", "Retry-After-Ms"] if retry_after else [])]
    return {"description": description, "headers": _references(names), "content": content}


def _references(headers: Sequence[str]) -> Json:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in headers}
