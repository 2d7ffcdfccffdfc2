"""The OpenAPI document, as far as no live service is needed to judge it; tests/contract does the rest."""

from __future__ import annotations

import httpx
import pytest
from starlette.routing import Route

from serve_app.api.app import create_app
from serve_app.api.openapi import OPERATIONS, Operation, document

from .scripted import ScriptedGateway, app_config

PAGES = {"/docs", "/docs/{file}", "/openapi.json", "/playground/{file}"}
# A script has no vectors to give.
SERVED = {o.id: o for o in OPERATIONS if o.body is not None and o.path != "/v1/embeddings"}


def test_every_endpoint_is_described() -> None:
    routes = [route for route in create_app(ScriptedGateway(), app_config()).routes if isinstance(route, Route)]
    served = {(method, route.path.replace(":path", "")) for route in routes for method in route.methods or ()}
    described = {(operation.method.upper(), operation.path) for operation in OPERATIONS}
    pages = {("GET", path) for path in PAGES}
    assert {(method, path) for method, path in served if method != "HEAD"} == described | pages


async def test_it_is_served_with_the_models_of_this_service(client: httpx.AsyncClient) -> None:
    answer = await client.get("/openapi.json")
    assert answer.headers["content-type"] == "application/json"
    told = answer.json()
    assert told == document(("small", "org/large"))
    assert told["openapi"] == "3.1.0"
    model = told["components"]["schemas"]["ChatBody"]["properties"]["model"]
    assert {"type": "string", "enum": ["small", "org/large"]} in model["anyOf"]


@pytest.mark.parametrize("operation", SERVED.values(), ids=SERVED)
async def test_its_examples_work(client: httpx.AsyncClient, operation: Operation) -> None:
    answer = await client.request(operation.method, operation.path, json=operation.example)
    assert answer.status_code == 200


async def test_five_point_zero_is_five(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    """A whole number is an integer in JSON Schema, however it is written."""
    for number, status in (("5.0", 200), ("5e0", 200), ("5.5", 422), ("1e300", 422)):
        answer = await client.post("/generate", content=f'{{"prompt": "hi", "max_tokens": {number}}}')
        assert answer.status_code == status, number
    assert [request.params.max_tokens for request in gateway.requests] == [5, 5]


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
async def test_the_address_may_name_the_model_too(
    client: httpx.AsyncClient, gateway: ScriptedGateway, path: str
) -> None:
    for named in ({}, {"model": "org/large"}, {"model": "small"}):
        answer = await client.post(path + "?model=org/large", json={"prompt": "hi", **named})
        assert answer.status_code == 200
    assert [request.model for request in gateway.requests] == ["org/large", "org/large", "small"]
    assert (await client.post(path + "?model=other", json={"prompt": "hi"})).status_code == 404
