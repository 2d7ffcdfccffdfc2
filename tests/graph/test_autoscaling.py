"""Replicas by work, on a real Ray: the whole backlog in one decision, also from zero, and back to zero."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest

from tests.graph.service import Config, Service, model_config, model_state, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.ci, pytest.mark.timeout(180)]

SLOTS, LOAD_S, IDLE_S = 8, 1.0, 2.0
# The processes of three replicas start on two cores.
START_S = 15.0


def scaled(name: str, minimum: int, **options: float) -> Config:
    """A model whose replicas take a second to load and compute 8 requests together, 100 tokens per second each."""
    scaling = {"min_replicas": minimum, "max_replicas": 4, "downscale_delay_s": 1, "downscale_to_zero_delay_s": IDLE_S}
    return model_config(
        name,
        f"builtin:toy?load_s={LOAD_S}&step_ms=10",
        deployment={"num_replicas": None, "autoscaling": scaling | options},
        engine={"max_running": SLOTS},
    )


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    """Two ingresses, each of which knows its own requests only."""
    ingress = {"num_replicas": 2}
    models = [scaled("sleepy", 0), scaled("warm", 0, min_idle=1)]
    with Service(models, ingress=ingress, heartbeat_s=0.3) as service:
        service.wait_until_ready()
        yield service


@pytest.fixture
async def client(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=service.url, timeout=60) as client:
        yield client


async def replicas(client: httpx.AsyncClient, model: str) -> int:
    """The number of ready replicas by the metrics; -1 while they are not complete."""
    page = (await client.get("/metrics")).text
    lines = [line for line in page.splitlines() if line.startswith(f'serve_app_ready_replicas{{model="{model}"}}')]
    return int(float(lines[0].split()[-1])) if lines else -1


async def stream(client: httpx.AsyncClient, model: str, tokens: int = 100) -> tuple[int, float, int]:
    """The number of tokens, the seconds until the first one, and the number of heartbeats before it."""
    body = {"model": model, "prompt": "x" * 100, "max_tokens": tokens, "ignore_eos": True}
    began, first, beats, count = time.monotonic(), 0.0, 0, 0
    async with client.stream("POST", "/generate_stream", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith(":") and not first:
                beats += 1
            if line.startswith("data: "):
                first = first or time.monotonic() - began
                count += line.count('"text"')
    return count, first, beats


async def test_a_burst_at_zero_starts_the_replicas_for_all_of_it_and_an_idle_model_has_none(
    client: httpx.AsyncClient,
) -> None:
    await wait_until(lambda: is_asleep(client, "sleepy"), seconds=60)
    answers = await asyncio.gather(*(stream(client, "sleepy") for _ in range(20)))
    assert all(count >= 1 for count, _, _ in answers)
    assert max(first for _, first, _ in answers) < LOAD_S + START_S
    assert all(beats for _, _, beats in answers), "clients see that the service is alive"
    await wait_until(lambda: has(client, "sleepy", 3), seconds=20)  # 20 requests in slots of 8
    idle = time.monotonic()
    await wait_until(lambda: is_asleep(client, "sleepy"), seconds=60)
    assert time.monotonic() - idle < 1 + IDLE_S + 20, "the rate of the last half minute is forgotten first"


async def test_a_model_with_an_idle_replica_answers_a_burst_at_once(client: httpx.AsyncClient) -> None:
    await wait_until(lambda: has(client, "warm", 1), seconds=60)
    answers = await asyncio.gather(*(stream(client, "warm", tokens=300) for _ in range(4)))
    assert max(first for _, first, _ in answers) < 1
    await wait_until(lambda: has(client, "warm", 1), seconds=60)


async def is_asleep(client: httpx.AsyncClient, model: str) -> bool:
    return await model_state(client, model) == "asleep"


async def has(client: httpx.AsyncClient, model: str, count: int) -> bool:
    return await replicas(client, model) == count
