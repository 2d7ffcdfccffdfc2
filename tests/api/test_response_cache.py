"""What a client sees of the response cache, in every dialect."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from serve_app.api.app import create_app
from serve_app.config import AppConfig, CacheOptions
from serve_app.core.cache_status import CacheStatus
from serve_app.core.events import Chunk
from serve_app.errors import QueueFull
from serve_app.gateway.catalog import Catalog
from serve_app.gateway.response_cache import ResponseCache, open_cache

from .scripted import BEAT, Connection, ScriptedEngine, ScriptedTelemetry, app_config, chunk

MESSAGES = [{"role": "user", "content": "hi"}]
# Two words, which the scripted engine repeats in two chunks. Model names are left out: the first one answers.
GREEDY = {"temperature": 0}
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "native": ("/generate", {"prompt": "some words", **GREEDY}),
    "native stream": ("/generate_stream", {"prompt": "some words", **GREEDY}),
    "batch": ("/generate_batch", {"prompts": ["a b", "c d"], **GREEDY}),
    "completion": ("/v1/completions", {"prompt": "some words", **GREEDY}),
    "completion stream": ("/v1/completions", {"prompt": "some words", "stream": True, **GREEDY}),
    "chat": ("/v1/chat/completions", {"messages": MESSAGES, **GREEDY}),
    "chat stream": ("/v1/chat/completions", {"messages": MESSAGES, "stream": True, **GREEDY}),
    "several": ("/v1/chat/completions", {"messages": MESSAGES, "n": 2, "seed": 3}),
    "response": ("/v1/responses", {"input": "hi", **GREEDY}),
    "response stream": ("/v1/responses", {"input": "hi", "stream": True, **GREEDY}),
    "messages": ("/v1/messages", {"messages": MESSAGES, "max_tokens": 9, "model": "small", **GREEDY}),
    "messages stream": (
        "/v1/messages",
        {"messages": MESSAGES, "max_tokens": 9, "model": "small", "stream": True, **GREEDY},
    ),
    "tgi": ("/generate", {"inputs": "some words", "parameters": {"do_sample": False}}),
    "tgi stream": ("/generate_stream", {"inputs": "some words", "parameters": {"do_sample": False}}),
    "embedding": ("/v1/embeddings", {"input": "some words"}),
}


class Meter:
    def looked_up(self, model: str, status: CacheStatus) -> None: ...

    def stored(self, size: int) -> None: ...

    def failed(self) -> None: ...


def config(**limits: Any) -> AppConfig:
    return app_config(**limits).model_copy(update={"response_cache": CacheOptions()})


def cached(engine: ScriptedEngine) -> Catalog:
    shared = open_cache(CacheOptions(), Meter())
    return Catalog({model.name: ResponseCache(engine, model, shared) for model in config().models})


@pytest.fixture
async def client(engine: ScriptedEngine, telemetry: ScriptedTelemetry) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(cached(engine), telemetry, config()))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


def without_ids_and_times(text: str) -> str:
    """An answer without what belongs to the call: ids, timestamps and measured times."""
    text = re.sub(r'"(id|response_id|item_id|created|created_at|completed_at)": ?("[^"]*"|[\d.]+)', '"x":0', text)
    return re.sub(r'"(\w+_ms|tokens_per_second)": ?[\d.]+', r'"\1":0', text)


@pytest.mark.parametrize("name", CALLS)
async def test_a_second_call_gets_the_same_answer_from_the_cache(
    client: httpx.AsyncClient, engine: ScriptedEngine, name: str
) -> None:
    path, body = CALLS[name]
    if name == "embedding":
        engine.plays(Chunk((), 3, 0.1, embedding=(0.5, 0.25)))
    first = await client.post(path, json=body)
    computed = len(engine.requests)
    second = await client.post(path, json=body)
    assert (first.status_code, second.status_code) == (200, 200), first.text
    assert (first.headers["x-cache"], second.headers["x-cache"]) == ("miss", "hit")
    assert without_ids_and_times(second.text) == without_ids_and_times(first.text)
    assert first.headers["content-type"] == second.headers["content-type"]
    assert len(engine.requests) == computed > 0


async def test_ids_are_new_and_times_are_those_of_the_second_call(client: httpx.AsyncClient) -> None:
    path, body = CALLS["native"]
    first, second = [(await client.post(path, json=body)).json() for _ in range(2)]
    assert first["id"] != second["id"]
    assert first["usage"] == second["usage"]
    assert first["metrics"]["ttft_ms"] == 50, "the script's own time"
    assert 0 <= second["metrics"]["queue_ms"] <= second["metrics"]["ttft_ms"] < 50
    assert second["metrics"]["elapsed_ms"] >= second["metrics"]["ttft_ms"]


@pytest.mark.parametrize(
    ("header", "statuses", "computed"),
    [
        ("no-store", ["bypass", "bypass"], 2),
        ("no-cache", ["miss", "miss"], 2),
        ("No-Cache, No-Store", ["bypass", "bypass"], 2),
        ("max-age=0, no-cache", ["miss", "miss"], 2),
        ("max-age=5, no-transform", ["miss", "hit"], 1),
        ("no-storage", ["miss", "hit"], 1),
    ],
)
async def test_a_header_switches_the_cache_off(
    client: httpx.AsyncClient, engine: ScriptedEngine, header: str, statuses: list[str], computed: int
) -> None:
    path, body = CALLS["native"]
    answers = [await client.post(path, json=body, headers={"cache-control": header}) for _ in range(2)]
    assert [answer.headers["x-cache"] for answer in answers] == statuses
    assert len(engine.requests) == computed


async def test_no_cache_stores_the_new_answer_and_no_store_none(client: httpx.AsyncClient) -> None:
    path, body = CALLS["native"]
    headers = [{"cache-control": value} for value in ("no-store", "no-cache", "no-store", "")]
    answers = [await client.post(path, json=body, headers=each) for each in headers]
    assert [answer.headers["x-cache"] for answer in answers] == ["bypass", "miss", "bypass", "hit"]


async def test_a_sampled_request_without_a_seed_is_not_cached(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    for _ in range(2):
        answer = await client.post("/generate", json={"prompt": "some words", "temperature": 1})
        assert answer.headers["x-cache"] == "bypass"
    assert len(engine.requests) == 2


async def test_the_best_of_several_answers_is_not_cached_without_a_seed(client: httpx.AsyncClient) -> None:
    body = {"prompt": "some words", "n": 1, "best_of": 2}
    for given, expected in (({}, ["bypass"] * 2), ({"seed": 1}, ["miss", "hit"])):
        found = [await client.post("/v1/completions", json={**body, **given, "temperature": 1}) for _ in range(2)]
        assert [answer.headers["x-cache"] for answer in found] == expected


async def test_one_new_item_makes_a_batch_a_miss(client: httpx.AsyncClient) -> None:
    seen = []
    for prompts in (["a b"], ["a b", "c d"], ["c d", "a b"]):
        answer = await client.post("/generate_batch", json={"prompts": prompts, **GREEDY})
        seen.append(answer.headers["x-cache"])
    assert seen == ["miss", "miss", "hit"]


async def test_an_error_of_a_computation_has_the_header_and_is_not_stored(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    engine.plays(QueueFull("full", retry_after_s=1))
    for _ in range(2):
        answer = await client.post(*CALLS["native"][:1], json=CALLS["native"][1])
        assert (answer.status_code, answer.headers["x-cache"]) == (429, "miss")


async def test_calls_that_generate_nothing_have_no_header(client: httpx.AsyncClient) -> None:
    for answer in (
        await client.get("/v1/models"),
        await client.post("/tokenize", json={"prompt": "hi"}),
        await client.post("/generate", json={"prompt": 1}),
    ):
        assert "x-cache" not in answer.headers


async def test_without_the_section_no_response_has_the_header(
    engine: ScriptedEngine, telemetry: ScriptedTelemetry
) -> None:
    transport = httpx.ASGITransport(create_app(engine, telemetry, app_config()))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert "x-cache" not in (await client.post("/generate", json={"prompt": "hi", **GREEDY})).headers


async def test_a_heartbeat_before_the_first_token_has_the_header(
    engine: ScriptedEngine, telemetry: ScriptedTelemetry
) -> None:
    engine.plays(BEAT, chunk(["a"]))
    connection = Connection(*CALLS["native stream"])
    app = create_app(cached(engine), telemetry, config(heartbeat_s=0.02))
    async with asyncio.timeout(5):
        await app(connection.scope, connection.receive, connection.send)
    assert dict(connection.sent[0]["headers"])[b"x-cache"] == b"miss"
    assert connection.text.startswith(":")


async def test_clients_of_the_same_request_at_the_same_time_share_one_computation(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    engine.plays(chunk(["a "], None), 0.05, chunk(["b"], start=1))
    path, body = CALLS["chat stream"]
    answers = await asyncio.gather(*(client.post(path, json=body) for _ in range(10)))
    assert sorted(answer.headers["x-cache"] for answer in answers) == ["hit"] * 9 + ["miss"]
    assert len({without_ids_and_times(answer.text) for answer in answers}) == 1
    assert len(engine.requests) == 1


async def test_equal_requests_of_one_call_are_computed_once(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.plays(chunk(["a"], None), 0.05, chunk(["b"], start=1))
    answer = await client.post("/generate_batch", json={"prompts": ["same"] * 20, **GREEDY})
    assert [one["text"] for one in answer.json()["results"]] == ["ab"] * 20
    assert len(engine.requests) == 1


def test_ids_and_times_are_found_in_answers() -> None:
    one, two = ({"id": name, "metrics": {"ttft_ms": at}} for name, at in (("a", 1.5), ("b", 2)))
    assert without_ids_and_times(json.dumps(one)) == without_ids_and_times(json.dumps(two))
