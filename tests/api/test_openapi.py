"""The OpenAPI document, without a running service; tests/contract checks a service against it."""

from __future__ import annotations

import httpx
import pytest
from starlette.routing import Route

from serve_app.api.app import create_app
from serve_app.api.openapi import document
from serve_app.api.operations import OPERATIONS, Operation

from .scripted import ScriptedEngine, ScriptedTelemetry, app_config

PAGES = {"/docs", "/docs/{file}", "/openapi.json", "/playground/{file}"}
# The scripted engine has no embeddings, and knows no earlier request.
SERVED = {o.id: o for o in OPERATIONS if o.body is not None and o.path not in ("/v1/embeddings", "/v1/feedback")}


def test_every_endpoint_is_described() -> None:
    routes = [
        route
        for route in create_app(ScriptedEngine(), ScriptedTelemetry(), app_config()).routes
        if isinstance(route, Route)
    ]
    paths = {(method, route.path.replace(":path", "")) for route in routes for method in route.methods or ()}
    described = {(operation.method.upper(), operation.path) for operation in OPERATIONS}
    pages = {("GET", path) for path in PAGES}
    assert {(method, path) for method, path in paths if method != "HEAD"} == described | pages


def references(part: object) -> set[str]:
    """All references in a part of the document."""
    if isinstance(part, list):
        return set().union(*map(references, part))
    if not isinstance(part, dict):
        return set()
    own = {part["$ref"]} if isinstance(part.get("$ref"), str) else set()
    return own.union(*map(references, part.values()))


async def test_every_schema_is_referenced_and_every_reference_has_a_schema(client: httpx.AsyncClient) -> None:
    found = (await client.get("/openapi.json")).json()
    schemes = found["components"].pop("securitySchemes")
    components = {f"#/components/{kind}/{name}" for kind, parts in found["components"].items() for name in parts}
    assert references(found) == components
    operations = [one for path in found["paths"].values() for one in path.values()]
    assert {name for one in operations for demand in one["security"] for name in demand} == set(schemes)


async def test_the_document_lists_the_models_and_adapters(client: httpx.AsyncClient) -> None:
    answer = await client.get("/openapi.json")
    assert answer.headers["content-type"] == "application/json"
    served = answer.json()
    assert served == document(("small", "org/large", "support"))
    assert served["openapi"] == "3.1.0"
    model = served["components"]["schemas"]["ChatBody"]["properties"]["model"]
    assert {"type": "string", "enum": ["small", "org/large", "support", "", "tgi", "dummy"]} in model["anyOf"]


@pytest.mark.parametrize("operation", SERVED.values(), ids=SERVED)
async def test_the_examples_of_the_document_work(client: httpx.AsyncClient, operation: Operation) -> None:
    answer = await client.request(operation.method, operation.path, json=operation.example)
    assert answer.status_code == 200


async def test_a_whole_number_is_an_integer_in_any_notation(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    for number, status in (("5.0", 200), ("5e0", 200), ("5.5", 422), ("1e300", 422)):
        answer = await client.post("/generate", content=f'{{"prompt": "hi", "max_tokens": {number}}}')
        assert answer.status_code == status, number
    assert [request.params.max_tokens for request in engine.requests] == [5, 5]


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
async def test_the_query_can_name_the_model(client: httpx.AsyncClient, engine: ScriptedEngine, path: str) -> None:
    for named in ({}, {"model": "org/large"}, {"model": "small"}):
        answer = await client.post(path + "?model=org/large", json={"prompt": "hi", **named})
        assert answer.status_code == 200
    assert [request.model for request in engine.requests] == ["org/large", "org/large", "small"]
    assert (await client.post(path + "?model=other", json={"prompt": "hi"})).status_code == 404
