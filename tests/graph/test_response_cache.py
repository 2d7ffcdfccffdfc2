"""The response cache behind real HTTP: hits, metrics, clients that leave, a sleeping model, and a Redis server."""

from __future__ import annotations

import asyncio
import signal
import statistics
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.graph.service import (
    Service,
    http_client,
    metric_totals,
    model_config,
    model_state,
    stream_events,
    tokens_after,
    wait_until,
)
from tests.redis_server import RedisServer

pytestmark = pytest.mark.ray

GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}


async def cache_requests(client: httpx.AsyncClient) -> dict[str, float]:
    """The requests to the cache of all models by status."""
    lines = (await client.get("/metrics")).text.splitlines()
    found: dict[str, float] = {}
    for line in lines:
        if line.startswith("serve_app_response_cache_requests_total{"):
            status = line.partition('status="')[2].partition('"')[0]
            found[status] = found.get(status, 0) + float(line.split()[-1])
    return found


async def test_a_stream_is_replayed_and_only_computed_tokens_are_counted(client: httpx.AsyncClient) -> None:
    body = {"model": "toy", "prompt": "a story that is told twice", "max_tokens": 20, **GREEDY}
    before, counted = await metric_totals(client), await cache_requests(client)
    found = []
    for header in ({}, {}, {"cache-control": "no-store"}):
        began = time.monotonic()
        async with client.stream("POST", "/generate_stream", json=body, headers=header) as response:
            events = [event async for event in stream_events(response)]
        found.append((response.headers["x-cache"], [event["token"] for event in events], time.monotonic() - began))
        usage, metrics = events[-1]["usage"], events[-1]["metrics"]
        assert (usage["completion_tokens"], metrics["tokens_generated"]) == (20, 20)
        assert metrics["elapsed_ms"] / 1000 <= found[-1][2], "the times are those of this request"
    assert [status for status, _, _ in found] == ["miss", "hit", "bypass"]
    assert found[0][1] == found[1][1] == found[2][1]
    assert found[1][2] < found[0][2] / 2
    after, counted_after = await metric_totals(client), await cache_requests(client)

    def grown(name: str) -> float:
        return after[name, "toy"] - before[name, "toy"]

    assert grown("requests_total") == 3
    assert grown("generated_tokens_total") == 40
    assert grown("time_to_first_token_seconds_count") == grown("request_seconds_count") == 2
    assert {status: counted_after[status] - counted[status] for status in counted_after} == {
        "hit": 1,
        "miss": 1,
        "bypass": 1,
    }
    assert after["response_cache_bytes", ""] > 0


async def test_the_first_client_leaves_and_the_second_gets_the_whole_answer(
    client: httpx.AsyncClient, token_log: Path
) -> None:
    body = {"model": "slow", "prompt": "a long answer for two clients", "max_tokens": 15, **GREEDY}
    async with client.stream("POST", "/generate_stream", json=body, headers={"x-request-id": "one-flight"}) as leader:
        await anext(stream_events(leader))
        second = client.stream("POST", "/generate_stream", json=body)
        follower = await second.__aenter__()
    events = [event async for event in stream_events(follower)]
    await second.__aexit__(None, None, None)
    assert (leader.headers["x-cache"], follower.headers["x-cache"]) == ("miss", "hit")
    assert events[-1]["usage"]["completion_tokens"] == 15
    times = [event["metrics"]["elapsed_ms"] for event in events]
    assert times[0] < times[-1], "the first tokens at once, the others as they come"
    assert sum(name.startswith("one-flight") for name in await computed(token_log)) == 15, "once, to the end"


async def computed(token_log: Path) -> list[str]:
    """The name of the request of each token that the model has computed."""
    return [line.split()[1] for line in (await asyncio.to_thread(token_log.read_text)).splitlines()]


@pytest.mark.perf
async def test_the_computation_stops_when_all_clients_have_left(client: httpx.AsyncClient, token_log: Path) -> None:
    body = {"model": "slow", "prompt": "nobody waits for this", "max_tokens": 200, **GREEDY}
    name = {"x-request-id": "all-have-left"}
    tasks = [asyncio.create_task(client.post("/generate", json=body, headers=name)) for _ in range(3)]

    async def names() -> set[str]:
        return {one.split("_")[0] for one in await computed(token_log) if one.startswith("all-have-left")}

    assert len(await wait_until(names)) == 1, "one computation"
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    left = time.time()
    await asyncio.sleep(1)
    assert len(found := await names()) == 1
    assert sum(tokens_after(token_log, dict.fromkeys(found, left)).values()) <= 3


@pytest.mark.long  # Ray takes 25 s to scale the model to zero
async def test_a_hit_wakes_no_sleeping_model(client: httpx.AsyncClient) -> None:
    body = {"model": "sleepy", "prompt": "an answer before the sleep", "max_tokens": 4, **GREEDY}
    first = await client.post("/generate", json=body, timeout=60)
    assert first.headers["x-cache"] == "miss", first.text

    async def sleeps() -> bool:
        return await model_state(client, "sleepy") == "asleep"

    await wait_until(sleeps, seconds=60)
    second = await client.post("/generate", json=body)
    assert (second.headers["x-cache"], second.json()["text"]) == ("hit", first.json()["text"])
    assert await model_state(client, "sleepy") == "asleep"


@pytest.mark.perf
async def test_the_first_token_of_a_hit_takes_2_ms(client: httpx.AsyncClient) -> None:
    """Within the service, as its own metrics have it; and through HTTP well below the time of a step."""
    body = {"model": "toy", "prompt": "measured " * 20, "max_tokens": 50, **GREEDY}
    await client.post("/generate", json=body)
    inside = []
    for _ in range(50):
        answer = await client.post("/generate", json=body)
        assert answer.headers["x-cache"] == "hit"
        inside.append(answer.json()["metrics"]["ttft_ms"])
    assert statistics.median(inside) <= 2


@pytest.mark.ci
async def test_two_ingresses_share_a_redis_server_and_need_none(tmp_path: Path) -> None:
    redis = RedisServer(tmp_path)
    models = [model_config("toy", "builtin:toy?step_ms=10", engine={"max_running": 16})]
    service = Service(models, response_cache={"url": redis.url, "timeout_s": 0.2}, ingress={"num_replicas": 2})
    body = {"model": "toy", "prompt": "once for both", "max_tokens": 8, **GREEDY}
    try:
        with service:
            await asyncio.to_thread(service.wait_until_ready)
            async with http_client(service) as client:
                seen = [(await client.post("/generate", json=body)).headers["x-cache"] for _ in range(30)]
                assert seen == ["miss", *["hit"] * 29]
                assert (await metric_totals(client))["response_cache_errors_total", ""] == 0
                redis.send(signal.SIGSTOP)
                began = time.monotonic()
                answers = await asyncio.gather(*(client.post("/generate", json=body) for _ in range(20)))
                assert {answer.status_code for answer in answers} == {200}
                assert time.monotonic() - began < 3
                redis.kill()
                assert (await client.post("/generate", json=body)).json()["usage"]["completion_tokens"] == 8

                async def failing() -> bool:
                    return (await metric_totals(client))["response_cache_errors_total", ""] >= 4

                await wait_until(failing)
                redis.start()

                async def hits() -> bool:
                    return (await client.post("/generate", json=body)).headers["x-cache"] == "hit"

                await wait_until(hits)
    finally:
        redis.kill()
