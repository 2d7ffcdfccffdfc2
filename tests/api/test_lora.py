"""LoRA adapters by the name of the model, and the endpoints that load and unload them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from serve_app.api.app import create_app
from serve_app.api.context import configured_adapters
from serve_app.config import AppConfig, Lora
from serve_app.core.adapters import AdapterDirectory
from serve_app.core.queries import LoadAdapter
from serve_app.core.requests import Adapter
from serve_app.errors import InvalidRequest, NotFound

from .scripted import ScriptedEngine, ScriptedTelemetry, app_config, error_of, events_of

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
SUPPORT = Adapter("support", "/adapters/support")
USER = [{"role": "user", "content": "hi"}]


@asynccontextmanager
async def client_of(engine: ScriptedEngine, config: AppConfig, **more: Any) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(engine, ScriptedTelemetry(), config, **more))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


def with_lora(*loras: Lora | None) -> AppConfig:
    config = app_config()
    models = [model.model_copy(update={"lora": lora}) for model, lora in zip(config.models, loras, strict=True)]
    return config.model_copy(update={"models": tuple(models)})


async def names(client: httpx.AsyncClient) -> list[str]:
    return [card["id"] for card in (await client.get("/v1/models")).json()["data"]]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"prompt": "hi"}),
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/chat/completions", {"messages": USER}),
        ("/v1/responses", {"input": "hi"}),
        ("/v1/messages", {"messages": USER, "max_tokens": 5}),
    ],
)
async def test_a_request_for_an_adapter_goes_to_its_model_and_is_answered_in_its_name(
    client: httpx.AsyncClient, engine: ScriptedEngine, path: str, body: dict[str, Any]
) -> None:
    answer = await client.post(path, json={**body, "model": "support"})
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == "support"
    (request,) = engine.requests
    assert (request.model, request.adapter, request.params.temperature) == ("small", SUPPORT, 0.2)


async def test_a_stream_and_the_items_of_a_batch_use_the_adapter(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    answer = await client.post("/v1/completions", json={"prompt": "hi", "model": "support", "stream": True})
    assert {event["model"] for event in events_of(answer.text) if event != "[DONE]"} == {"support"}
    await client.post("/generate_batch", json={"requests": [{"prompt": "a", "model": "support"}, {"prompt": "b"}]})
    await client.post("/generate?model=support", json={"inputs": "hi"})
    adapters = [request.adapter for request in engine.requests]
    assert adapters == [SUPPORT, SUPPORT, None, SUPPORT]


async def test_queries_and_readiness_of_an_adapter_are_those_of_its_model(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    await client.post("/tokenize", json={"prompt": "hi", "model": "support"})
    assert {model for model, _ in engine.queries} == {"small"}
    assert (await client.get("/ready?model=support")).json()["models"][0]["name"] == "small"
    assert (await client.get("/info?model=support")).json()["model_id"] == "support"


async def test_an_unknown_model_is_refused_with_the_place_where_adapters_are_listed(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/completions", json={"prompt": "hi", "model": "other"})
    assert answer.status_code == 404
    assert "GET /v1/models lists the LoRA adapters." in error_of(answer)["message"]


async def test_an_adapter_is_loaded_listed_used_and_unloaded(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    answer = await client.post(LOAD, json={"lora_name": "legal", "lora_path": "/adapters/legal"})
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'legal' added successfully.")
    assert engine.queries == [("small", LoadAdapter(Adapter("legal", "/adapters/legal")))]
    card = (await client.get("/v1/models/legal")).json()
    assert (card["id"], card["root"], card["parent"]) == ("legal", "/adapters/legal", "small")
    schemas = (await client.get("/openapi.json")).json()["components"]["schemas"]
    assert "legal" in schemas["ChatBody"]["properties"]["model"]["anyOf"][0]["enum"]
    await client.post("/v1/completions", json={"prompt": "hi", "model": "legal"})
    assert engine.requests[0].adapter == Adapter("legal", "/adapters/legal", digest="0" * 32)
    for name in ("legal", "support"):
        answer = await client.post(UNLOAD, json={"lora_name": name})
        assert (answer.status_code, answer.text) == (200, f"Success: LoRA adapter '{name}' removed successfully.")
        assert (await client.post("/v1/completions", json={"prompt": "hi", "model": name})).status_code == 404
    assert await names(client) == ["small", "org/large"]


async def test_an_adapter_is_replaced_only_in_place(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    body = {"lora_name": "support", "lora_path": "/adapters/new"}
    refused = await client.post(LOAD, json=body)
    assert refused.status_code == 400
    assert "has already been loaded. If you want to load the adapter in place" in error_of(refused)["message"]
    assert (await client.post(LOAD, json=body | {"load_inplace": True})).status_code == 200
    await client.post("/v1/completions", json={"prompt": "hi", "model": "support"})
    assert engine.requests[0].adapter == Adapter("support", "/adapters/new", digest="0" * 32)


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        (LOAD, {"lora_name": "", "lora_path": "/a"}, 400, "Both 'lora_name' and 'lora_path' must be provided"),
        (LOAD, {"lora_name": "a", "lora_path": ""}, 400, "Both 'lora_name' and 'lora_path' must be provided"),
        (LOAD, {"lora_name": "a"}, 400, "Field 'lora_path' is required"),
        (LOAD, {"lora_name": "small", "lora_path": "/a"}, 400, "conflicts with a served base model"),
        (LOAD, {"lora_name": "a b", "lora_path": "/a"}, 400, "A name has letters"),
        (LOAD, {"lora_name": "a", "lora_path": "/a", "base_model_name": "org/large"}, 400, "Name the model"),
        (UNLOAD, {"lora_name": "absent"}, 404, "The lora adapter 'absent' cannot be found"),
        (UNLOAD, {}, 400, "Field 'lora_name' is required"),
    ],
)
async def test_a_wrong_request_is_refused(
    client: httpx.AsyncClient, engine: ScriptedEngine, path: str, body: dict[str, Any], status: int, message: str
) -> None:
    answer = await client.post(path, json=body)
    assert answer.status_code == status
    assert message in error_of(answer)["message"]
    assert engine.queries == []
    assert await names(client) == ["small", "org/large", "support"]


@pytest.mark.parametrize(("error", "status"), [(InvalidRequest("bad"), 400), (NotFound("absent"), 404)])
async def test_what_a_replica_cannot_load_is_not_listed(
    client: httpx.AsyncClient, engine: ScriptedEngine, error: Exception, status: int
) -> None:
    engine.results[LoadAdapter] = error
    answer = await client.post(LOAD, json={"lora_name": "legal", "lora_path": "/adapters/legal"})
    assert (answer.status_code, error_of(answer)["message"]) == (status, str(error))
    assert "legal" not in await names(client)


async def test_without_allowed_sources_the_endpoints_do_not_exist(engine: ScriptedEngine) -> None:
    async with client_of(engine, with_lora(Lora(), None)) as client:
        for path in (LOAD, UNLOAD):
            answer = await client.post(path, json={"lora_name": "a", "lora_path": "/a"})
            assert answer.status_code == 404
            assert "Set lora.allow" in error_of(answer)["message"]


async def test_among_several_models_the_call_names_the_one_of_the_adapter(engine: ScriptedEngine) -> None:
    body = {"lora_name": "a", "lora_path": "owner/name"}
    async with client_of(engine, with_lora(Lora(allow=("/a",)), Lora(allow=("owner/name@v1",)))) as client:
        refused = await client.post(LOAD, json=body)
        assert error_of(refused)["message"].endswith("Models that take adapters: small, org/large.")
        assert (await client.post(LOAD, json=body | {"base_model_name": "org/large"})).status_code == 200
        again = body | {"load_inplace": True, "lora_path": "owner/name@v2"}
        assert (await client.post(LOAD, json=again)).status_code == 200
    versions = [("org/large", LoadAdapter(Adapter("a", "owner/name", version))) for version in ("v1", "v2")]
    assert engine.queries == versions


async def test_a_change_is_published_before_the_answer(engine: ScriptedEngine) -> None:
    config = app_config()
    here, there = configured_adapters(config), configured_adapters(config)
    published = asyncio.Event()

    async def publish() -> None:
        there.merge(here.changes)
        published.set()

    async with client_of(engine, config, adapters=here, publish=publish) as client:
        await client.post(LOAD, json={"lora_name": "legal", "lora_path": "/adapters/legal"})
        assert published.is_set()
    async with client_of(engine, config, adapters=there) as client:
        assert await names(client) == ["small", "org/large", "support", "legal"]


def test_of_two_changes_the_later_counts_in_every_order() -> None:
    now = [1000]
    first, second = (AdapterDirectory({"m": [SUPPORT]}, lambda: now[0]) for _ in range(2))
    first.load("m", Adapter("a", "/a", digest="1"))
    first.unload("support")
    second.merge(first.changes)
    now[0] -= 500  # the clock of another machine
    second.load("m", Adapter("a", "/a", digest="2"))
    old = first.changes
    for directory in (first, second):
        directory.merge(second.changes)
        directory.merge(old)
        found = directory.find("a")
        assert found is not None
        assert found.adapter.digest == "2"
        assert directory.find("support") is None


def test_an_unloaded_adapter_is_forgotten_after_a_while_unless_the_configuration_has_it() -> None:
    now = [0]
    directory = AdapterDirectory({"m": [SUPPORT]}, lambda: now[0])
    directory.load("m", Adapter("a", "/a"))
    for name in ("a", "support"):
        directory.unload(name)
    assert len(directory.changes) == 2
    now[0] = 10**13
    assert [change.name for change in directory.changes] == ["support"]


async def test_adapters_of_a_model_without_a_list_cannot_be_changed() -> None:
    """The second model takes adapters at run time, the first one does not."""
    adapter = {"name": "support", "source": "/adapters/support"}
    fixed, open_ = Lora.model_validate({"adapters": [adapter]}), Lora.model_validate({"allow": ["/adapters"]})
    engine = ScriptedEngine()
    async with client_of(engine, with_lora(fixed, open_)) as client:
        second = app_config().models[1].name
        replace = {"lora_name": "support", "lora_path": "/adapters/x", "load_inplace": True, "base_model_name": second}
        for path, body in ((UNLOAD, {"lora_name": "support"}), (LOAD, replace)):
            answer = await client.post(path, json=body)
            assert answer.status_code == 400
            assert "has no lora.allow" in answer.text
        assert "support" in await names(client)
