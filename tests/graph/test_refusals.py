"""Requests that arrive while a model is full, asleep or still loading."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from tests.graph.service import Service, metric_totals, model_state, stream_events, stream_lines, wait_until

pytestmark = pytest.mark.ray

# Ray Serve's router asks a replica for its load again when it has not heard from it for 10 s.
PAUSE_S = 12


@pytest.fixture(scope="session")
def narrow_used(toy_service: Service) -> float:
    """The monotonic instant at which the model `narrow` had answered one request."""
    answer = httpx.post(toy_service.url + "/generate", json={"model": "narrow", "prompt": "a", "max_tokens": 1})
    assert answer.status_code == 200
    return time.monotonic()


@asynccontextmanager
async def occupied(client: httpx.AsyncClient, tokens: int) -> AsyncIterator[None]:
    """While a stream of the model `narrow`, which runs one request at a time, is under way."""
    body = {"model": "narrow", "prompt": "abc", "max_tokens": tokens}
    async with client.stream("POST", "/generate_stream", json=body) as response:
        events = stream_events(response)
        await anext(events)
        yield
        assert len([event async for event in events]) == tokens - 1


async def waiting(client: httpx.AsyncClient, count: int) -> bool:
    """Whether that many requests of the model `narrow` wait behind the one that runs."""
    return (await metric_totals(client))["active_requests", "narrow"] == 1 + count


async def asleep(client: httpx.AsyncClient, model: str) -> bool:
    return await model_state(client, model) == "asleep"


async def test_a_sleeping_model_is_woken_by_a_burst_that_all_succeeds(
    client: httpx.AsyncClient, narrow_used: float
) -> None:
    await wait_until(lambda: asleep(client, "sleepy"), seconds=60, every_s=0.5)
    assert (await client.get("/ready")).status_code == 200
    body = {"model": "sleepy", "prompt": "good morning", "max_tokens": 12}

    async def stream() -> tuple[int, list[str]]:
        async with client.stream("POST", "/generate_stream", json=body) as response:
            return response.status_code, [line async for line in stream_lines(response)]

    async def whole() -> httpx.Response:
        return await client.post("/generate", json=body)

    streams, wholes = await asyncio.gather(
        asyncio.gather(*(stream() for _ in range(4))), asyncio.gather(*(whole() for _ in range(4)))
    )
    for status, lines in streams:
        assert status == 200
        assert lines[0] == ": warming"
        assert '"text":"good morning"' in lines[-1]
    for answer in wholes:
        assert answer.status_code == 200
        assert answer.json()["text"] == "good morning"
    assert await model_state(client, "sleepy") == "ready"


async def test_info_leaves_a_model_asleep_and_tokenize_wakes_it(client: httpx.AsyncClient) -> None:
    await wait_until(lambda: asleep(client, "undisturbed"), seconds=60)
    for _ in range(3):
        info = (await client.get("/info", params={"model": "undisturbed"})).json()
        assert info["model_id"] == "undisturbed"
        await asyncio.sleep(1)
        assert await asleep(client, "undisturbed")
    answer = await client.post("/tokenize", json={"model": "undisturbed", "prompt": "ab"})
    assert answer.json()["tokens"] == [97, 98]


@pytest.mark.perf
async def test_a_full_queue_refuses_requests_also_after_a_pause(client: httpx.AsyncClient, narrow_used: float) -> None:
    """One request runs and three wait."""
    await asyncio.sleep(max(0.0, narrow_used + PAUSE_S - time.monotonic()))
    body = {"model": "narrow", "prompt": "abc", "max_tokens": 30}
    answers = await asyncio.gather(*(client.post("/generate", json=body) for _ in range(12)))
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429}
    assert 4 <= statuses.count(200) <= 5, "one runs, three wait, and one may arrive when the first has ended"
    for answer in answers:
        if answer.status_code == 200:
            assert answer.json()["text"] == "abc" * 10
        else:
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["code"] == "queue_full"


async def test_a_full_queue_refuses_a_stream_before_it_starts(client: httpx.AsyncClient) -> None:
    body = {"model": "narrow", "prompt": "abc", "max_tokens": 30, "stream": True}
    answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(8)))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused
    assert all(answer.json()["error"]["code"] == "queue_full" for answer in refused)
    served = [answer for answer in answers if answer.status_code == 200]
    assert served
    assert all(answer.text.endswith("data: [DONE]\n\n") for answer in served)


async def first_token(client: httpx.AsyncClient, priority: int) -> float:
    """The instant at which the first token of a stream of the model `narrow` arrives; reads it to its end."""
    body = {"model": "narrow", "prompt": "abc", "max_tokens": 20, "priority": priority}
    arrived = 0.0
    async with client.stream("POST", "/generate_stream", json=body) as response:
        assert response.status_code == 200
        async for line in stream_lines(response):
            if line.startswith("data: "):
                arrived = arrived or time.monotonic()
    return arrived


async def test_a_waiting_request_with_a_lower_priority_value_runs_before_earlier_ones(
    client: httpx.AsyncClient,
) -> None:
    """`max_ongoing_requests` is 1: while one request runs, three wait. The last of them has priority -9."""
    async with occupied(client, 60):
        tasks = []
        for priority in (0, 0, -9):
            tasks.append(asyncio.create_task(first_token(client, priority)))
            await wait_until(lambda: waiting(client, len(tasks)), every_s=0.02)
    *earlier, urgent = await asyncio.gather(*tasks)
    assert urgent < min(earlier)


async def test_tokenize_answers_while_all_places_of_generations_are_taken(client: httpx.AsyncClient) -> None:
    async with occupied(client, 100):
        tasks = [asyncio.create_task(first_token(client, 0)) for _ in range(3)]
        await wait_until(lambda: waiting(client, 3), every_s=0.02)
        refused = await client.post("/generate", json={"model": "narrow", "prompt": "abc"})
        assert refused.status_code == 429
        answers = await asyncio.gather(
            *(client.post("/tokenize", json={"model": "narrow", "prompt": "ab"}) for _ in range(20))
        )
        assert [answer.status_code for answer in answers] == [200] * 20
        assert all(answer.json()["tokens"] == [97, 98] for answer in answers)
        assert not any(task.done() for task in tasks), "the generations still waited"
    await asyncio.gather(*tasks)
