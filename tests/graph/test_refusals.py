"""What happens to those who come at the wrong time."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from tests.graph.house import Service, lines, state, until

pytestmark = pytest.mark.ray


async def test_a_full_queue_refuses_and_loses_nobody(client: httpx.AsyncClient) -> None:
    """One at a time, two may wait; also after a pause, when Ray asks a replica before it sends somebody there."""
    body = {"model": "narrow", "prompt": "abc", "max_tokens": 30}
    assert (await client.post("/generate", json=body)).status_code == 200
    await asyncio.sleep(12)
    answers = await asyncio.gather(*(client.post("/generate", json=body) for _ in range(12)))
    statuses = sorted(answer.status_code for answer in answers)
    assert set(statuses) == {200, 429}
    assert 3 <= statuses.count(200) <= 4, "the one being served, the two waiting, and one who came as it ended"
    for answer in answers:
        if answer.status_code == 200:
            assert answer.json()["text"] == "abc" * 10
        else:
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["code"] == "queue_full"


async def test_a_full_queue_refuses_a_stream_before_it_starts(client: httpx.AsyncClient) -> None:
    body = {"model": "narrow", "prompt": "abc", "max_tokens": 60, "stream": True}
    answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(8)))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused
    assert all(answer.json()["error"]["code"] == "queue_full" for answer in refused)
    served = [answer for answer in answers if answer.status_code == 200]
    assert served
    assert all(answer.text.endswith("data: [DONE]\n\n") for answer in served)


async def test_a_waiting_stream_says_so(client: httpx.AsyncClient) -> None:
    body = {"model": "narrow", "prompt": "abc", "max_tokens": 60}
    first = asyncio.create_task(client.post("/generate", json=body))
    await asyncio.sleep(0.3)
    second = await client.post("/generate_stream", json=body)
    assert second.text.startswith(": queued\n\n")
    assert '"finished":true' in second.text
    assert (await first).status_code == 200


async def test_a_model_asleep_is_woken_by_a_burst_that_all_succeeds(client: httpx.AsyncClient) -> None:
    async def asleep() -> bool:
        return await state(client, "sleepy") == "asleep"

    await until(asleep, seconds=60, every_s=0.5)
    assert (await client.get("/ready")).status_code == 200
    body = {"model": "sleepy", "prompt": "good morning", "max_tokens": 12}

    async def stream() -> tuple[str, list[str]]:
        async with client.stream("POST", "/generate_stream", json=body) as response:
            return str(response.status_code), [line async for line in lines(response)]

    async def whole() -> httpx.Response:
        return await client.post("/generate", json=body)

    streams, wholes = await asyncio.gather(
        asyncio.gather(*(stream() for _ in range(4))), asyncio.gather(*(whole() for _ in range(4)))
    )
    for status, said in streams:
        assert status == "200"
        assert said[0] == ": warming"
        assert '"text":"good morning"' in said[-1]
    for answer in wholes:
        assert answer.status_code == 200
        assert answer.json()["text"] == "good morning"
    assert await state(client, "sleepy") == "ready"


async def test_a_lost_replica_is_told_in_band_and_replaced(client: httpx.AsyncClient, toys: Service) -> None:
    body = {"model": "victim", "prompt": "abc", "max_tokens": 1000}
    (victim,) = toys.find("model-victim")
    said = []
    async with client.stream("POST", "/generate_stream", json=body) as response:
        async for line in lines(response):
            said.append(line)
            if len(said) == 5:
                victim.kill()
    assert said[-2] == "event: error"
    assert '"code":"not_ready"' in said[-1]
    assert sum("event: error" in line for line in said) == 1

    async def back() -> bool:
        answer = await client.post("/generate", json={**body, "max_tokens": 3})
        assert answer.status_code in (200, 503)
        if answer.status_code == 503:
            assert int(answer.headers["retry-after"]) >= 1
        return answer.status_code == 200

    await until(back, seconds=40)


async def test_the_service_outlives_its_hub(client: httpx.AsyncClient, toys: Service) -> None:
    (hub,) = toys.find("serve_app:Hub")
    hub.kill()
    body = {"model": "toy", "prompt": "abc", "max_tokens": 3}
    for _ in range(20):
        assert (await client.post("/generate", json=body)).status_code == 200

    async def collected() -> bool:
        answer = await client.get("/metrics")
        return answer.status_code == 200 and 'serve_app_slots{model="toy"' in answer.text

    await until(collected, seconds=40)
