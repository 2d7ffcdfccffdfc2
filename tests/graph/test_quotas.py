"""Limits and usage of keys on two ingresses with one Redis server: nothing overshoots, and the ledger is exact."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from serve_app.core.tenants import Limits, Scope
from serve_app.database import open_database
from serve_app.database_config import DatabaseOptions
from serve_app.tenants.store import NewKey, TenantStore
from tests.graph.service import Service, kill, metric_totals, model_config, stream_lines, wait_until, wait_until_idle
from tests.redis_server import RedisServer

pytestmark = [pytest.mark.ray, pytest.mark.ci]

BUDGET = 20_000
PRICE = {"input_per_million": 1, "cached_input_per_million": 0.5, "output_per_million": 3}


@dataclass
class Limited:
    """The service, and the clients of a key with a budget and of an administrator."""

    service: Service
    redis: RedisServer
    database: str
    key: str
    admin: str

    def client(self, key: str) -> httpx.AsyncClient:
        """A new connection for each request, so that the proxy distributes them over the ingresses."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        headers = {"authorization": f"Bearer {key}"}
        return httpx.AsyncClient(base_url=self.service.url, timeout=60, limits=limits, headers=headers)


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Limited]:
    folder = tmp_path_factory.mktemp("quotas")
    database = f"sqlite:///{folder / 'test.db'}"
    store = TenantStore(open_database(DatabaseOptions(url=database)))
    store.set_tenant("acme", limits={"tokens_per_month": 10 * BUDGET})
    limits = Limits(tokens_per_day=BUDGET, concurrent_requests=1000)
    key, _ = store.create_key(NewKey("acme", limits=limits))
    admin, _ = store.create_key(NewKey(scopes=frozenset(Scope)))
    store.close()
    redis = RedisServer(folder)
    quotas = {"url": redis.url, "timeout_s": 2, "lease_s": 3, "flush_s": 0.2}
    models = [
        model_config("toy", "builtin:toy?step_ms=5", engine={"max_running": 64, "max_context": 2048}, price=PRICE),
        model_config("faulty", "builtin:toy?fails_on=bad&step_ms=5", price=PRICE),
    ]
    try:
        with Service(
            models, auth={}, database={"url": database}, sections={"quotas": quotas}, ingress={"num_replicas": 2}
        ) as service:
            service.wait_until_ready()
            yield Limited(service, redis, database, str(key), str(admin))
    finally:
        redis.kill()


async def one_call(client: httpx.AsyncClient, number: int, draw: random.Random) -> int:
    """A stream that is read to its end or left, a batch, several answers, or a failing one. Returns the status."""
    kind = number % 5
    body: dict[str, Any] = {
        "model": "toy",
        "prompt": "word " * draw.randint(1, 200),
        "max_tokens": draw.randint(1, 120),
    }
    if kind == 3:
        return (await client.post("/v1/completions", json={**body, "n": 3})).status_code
    if kind == 4:
        failing = {"model": "faulty", "prompt": "good words and bad words", "max_tokens": 30, "ignore_eos": True}
        return (await client.post("/v1/completions", json=failing)).status_code
    leaves_after = draw.randint(1, 20) if kind == 2 else 10**9
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        lines = 0
        async for _ in stream_lines(response):
            lines += 1
            if lines >= leaves_after:
                break
        return response.status_code


async def test_64_concurrent_streams_on_two_ingresses_never_exceed_the_budget(limited: Limited) -> None:
    statuses: list[int] = []
    async with limited.client(limited.key) as client, limited.client(limited.admin) as admin:

        async def user(number: int) -> None:
            draw = random.Random(number)
            statuses.extend([await one_call(client, number + turn, draw) for turn in range(12)])

        await asyncio.gather(*map(user, range(64)))
        for model in ("toy", "faulty"):
            await wait_until_idle(admin, model)
        totals = await metric_totals(admin)
        assert {200, 429} <= set(statuses) <= {200, 429, 500}
        computed = {
            model: (totals["prompt_tokens_total", model], totals["generated_tokens_total", model])
            for model in ("toy", "faulty")
        }
        used = sum(map(sum, computed.values()))
        assert BUDGET * 0.9 < used <= BUDGET

        async def usage() -> list[dict[str, Any]]:
            rows = (await admin.get("/v1/usage", params={"group_by": "model,key", "tenant": "acme"})).json()["data"]
            return rows if sum(row["prompt_tokens"] + row["output_tokens"] for row in rows) == used else []

        rows = await wait_until(usage)
        assert {row["model"]: (row["prompt_tokens"], row["output_tokens"]) for row in rows} == computed
        for row in rows:
            fresh = row["prompt_tokens"] - row["cached_tokens"]
            cost = (fresh * 1000 + row["cached_tokens"] * 500 + row["output_tokens"] * 3000) / 1e9
            assert row["cost_dollars"] == pytest.approx(cost, abs=1e-12)
        refused = await client.post("/v1/completions", json={"prompt": "more", "max_tokens": 1000})
        assert refused.json()["error"]["code"] == "insufficient_quota"
        own = (await client.get("/v1/usage", params={"group_by": "tenant"})).json()["data"]
        assert [row["tenant"] for row in own] == ["acme"]
        assert totals["quota_store_errors_total", ""] == 0
        text = (await admin.get("/metrics")).text
        ingresses = {
            line.partition('replica="')[2].partition('"')[0]
            for line in text.splitlines()
            if line.startswith("serve_app_prompt_tokens_total{") and float(line.split()[-1]) > 0
        }
        assert len(ingresses) == 2, "both have served requests"


async def test_a_killed_ingress_gives_its_reservations_back(limited: Limited) -> None:
    store = TenantStore(open_database(DatabaseOptions(url=limited.database)))
    key, _ = store.create_key(NewKey(limits=Limits(concurrent_requests=4)))
    store.close()
    body = {"model": "toy", "prompt": "a long stream", "max_tokens": 2000, "stream": True, "ignore_eos": True}
    async with limited.client(str(key)) as client:

        async def admitted() -> bool:
            response = await client.post("/v1/completions", json={"model": "toy", "prompt": "x", "max_tokens": 1})
            return response.status_code == 200

        async def stream() -> None:
            """Begins once an ingress knows the new key, and while no call of `admitted` has the place."""

            async def begun() -> bool:
                async with client.stream("POST", "/v1/completions", json=body) as response:
                    async for _ in stream_lines(response):
                        pass
                    return response.status_code == 200

            await wait_until(begun)

        streams = [asyncio.create_task(stream()) for _ in range(4)]

        async def refused() -> bool:
            return not await admitted()

        await wait_until(refused)
        kill(limited.service.find("ServeReplica:serve_app:Ingress"))
        await asyncio.gather(*streams, return_exceptions=True)
        await wait_until(admitted, seconds=60)
