"""Tenants with API keys share a model of a running service."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import httpx
import pytest

from serve_app.database import open_database
from serve_app.database_config import DatabaseOptions
from serve_app.tenants.store import NewKey, TenantStore
from tests.graph.overload import Tally, keep_busy, percentile, send, shown
from tests.graph.service import Service, http_client, model_config

pytestmark = [pytest.mark.ray, pytest.mark.long]

WEIGHTS = {"one": 1.0, "two": 2.0, "four": 4.0, "light": 1.0, "flood": 1.0}
BODY = {"model": "toy", "prompt": "abc", "max_tokens": 40}


@dataclass
class TenantService:
    """A service with a model whose steps take 50 ms and that runs 16 requests together, and a key of each tenant."""

    service: Service
    keys: dict[str, str]

    def headers(self, tenant: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.keys[tenant]}"}


@pytest.fixture(scope="module", params=[1, 2], ids=["1-ingress", "2-ingresses"])
def tenants(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TenantService]:
    url = f"sqlite:///{tmp_path_factory.mktemp('tenants')}/serve_app.db"
    keys = made_keys(url)
    toy = model_config(
        "toy",
        "builtin:toy?step_ms=50",
        engine={"max_running": 16},
        deployment={"max_ongoing_requests": 64, "max_queued_requests": 256},
    )
    with Service([toy], ingress={"num_replicas": request.param}, auth={}, database={"url": url}) as service:
        service.wait_until_ready()
        yield TenantService(service, keys)


def made_keys(url: str) -> dict[str, str]:
    store = TenantStore(open_database(DatabaseOptions(url=url)))
    for name, weight in WEIGHTS.items():
        store.set_tenant(name, weight)
    keys = {name: str(store.create_key(NewKey(name))[0]) for name in WEIGHTS}
    store.close()
    return keys


@pytest.fixture
async def calls(tenants: TenantService) -> AsyncIterator[httpx.AsyncClient]:
    async with http_client(tenants.service) as client:
        yield client


async def test_weights_of_1_2_and_4_give_tokens_in_this_proportion(
    tenants: TenantService, calls: httpx.AsyncClient, request: pytest.FixtureRequest
) -> None:
    """30 requests of each tenant are open for 50 s. The first 5 s do not count."""
    tallies = {name: Tally() for name in ("one", "two", "four")}
    running = asyncio.gather(
        *(keep_busy(calls, BODY, 30, 50, tenants.headers(name), tally) for name, tally in tallies.items())
    )
    await asyncio.sleep(5)
    before = [tally.tokens for tally in tallies.values()]
    await asyncio.sleep(40)
    tokens = [tally.tokens - earlier for tally, earlier in zip(tallies.values(), before, strict=True)]
    await running
    print(f"\ntokens {tokens}")
    tolerance = 0.05 if "1-ingress" in request.node.name else 0.1
    assert tokens[1] / tokens[0] == pytest.approx(2, rel=tolerance)
    assert tokens[2] / tokens[0] == pytest.approx(4, rel=tolerance)
    assert [tally.wrong for tally in tallies.values()] == [[], [], []]


async def test_a_light_tenant_waits_at_most_twice_as_long_while_another_floods_50_to_1(
    tenants: TenantService, calls: httpx.AsyncClient
) -> None:
    draw = random.Random(2)
    short, headers = {**BODY, "max_tokens": 3}, tenants.headers("light")

    async def send_some(count: int) -> list[float]:
        tally = Tally()
        for _ in range(count):
            await send(calls, short, tally, headers)
            await asyncio.sleep(draw.uniform(0.05, 0.15))  # at any time of a step
        assert tally.wrong == []
        return tally.ttft_s

    await send_some(5)
    alone = await send_some(100)
    flood = asyncio.create_task(keep_busy(calls, BODY, 50, 60, tenants.headers("flood")))
    await asyncio.sleep(5)
    await send_some(2)  # from now on, a slot is kept when requests of the flood have ended
    await asyncio.sleep(2)
    began = time.monotonic()
    beside = await send_some(100)
    assert not flood.done(), time.monotonic() - began
    await flood
    print(f"\nTTFT p50 and p99 in ms alone: {shown(alone)}; beside the flood: {shown(beside)}")
    assert percentile(beside, 99) <= 2 * percentile(alone, 99)
