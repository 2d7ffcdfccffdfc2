"""64 concurrent streams of one key at two ingresses with one Redis server: the budget is never exceeded."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis

from serve_app.api.app import create_app
from serve_app.config import Price, QuotaOptions
from serve_app.core.requests import GenerationRequest, SamplingParams, TextPrompt
from serve_app.core.tenants import Limits
from serve_app.core.usage import UsageQuery
from serve_app.database import open_database
from serve_app.database_config import DatabaseOptions
from serve_app.errors import InsufficientQuota, RateLimitExceeded
from serve_app.gateway.counters import Counter, Kind
from serve_app.gateway.outcome import Outcome
from serve_app.gateway.quota import Quota
from serve_app.gateway.shared_quotas import SharedQuotas, open_counters
from serve_app.telemetry.meter import IngressMetrics
from serve_app.tenants.ledger import Ledger
from serve_app.tenants.usage_store import UsageStore
from tests.engines.native.helpers import running
from tests.gateway.test_quota import KeptQuotaMeter, ScriptedTenants
from tests.redis_server import RedisServer
from tests.tenants.test_usage import KeptLedgerMeter

from .scripted import ScriptedTelemetry, app_config
from .test_rate_limits import WithKey
from .test_usage import ScriptedReports
from .toy import ToyEngine

pytestmark = pytest.mark.slow

BUDGET = 8_000


@dataclass
class Ingress:
    """One of two ingresses: its application, its own counters and ledger, and its metrics."""

    redis: str
    engine: ToyEngine
    database: DatabaseOptions
    name: str
    meter: KeptQuotaMeter = field(default_factory=KeptQuotaMeter)

    def __post_init__(self) -> None:
        config = app_config()
        (small, *_) = config.models
        self.model = small.name
        price = Price(input_per_million=1, output_per_million=3)
        self.counters = open_counters(QuotaOptions(url=self.redis, timeout_s=5), self.name, {}, self.meter)
        self.ledger = Ledger(lambda: UsageStore(open_database(self.database)), 0.05, KeptLedgerMeter())
        self.ledger.start()
        tenants = ScriptedTenants(Limits(tokens_per_day=BUDGET), Limits(tokens_per_month=5 * BUDGET))
        shared = SharedQuotas(QuotaOptions(), tenants, self.counters, self.ledger, self.meter)
        self.metrics = IngressMetrics(self.name, [self.model], opentelemetry=False)
        quota = Quota(self.engine, small.model_copy(update={"price": price}), shared)
        self.stage = WithKey(Outcome(quota, self.metrics.meter))
        app = create_app(self.stage, ScriptedTelemetry(), config, usage=ScriptedReports())
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")

    def counted(self, name: str) -> int:
        (series,) = self.metrics._series.values()
        return int(getattr(series, name)._value.get())

    async def close(self) -> None:
        await self.client.aclose()
        await self.counters.close()
        await asyncio.to_thread(self.ledger.stop)

    async def one_call(self, kind: int, draw: random.Random) -> bool:
        """A whole answer, three answers, a stream that is left, or one whose time ends. Whether it was let through."""
        prompt, most = "x" * draw.randint(1, 60), draw.randint(1, 60)
        if kind < 2:
            body: dict[str, Any] = {
                "prompt": prompt,
                "max_tokens": most,
                "n": 3 if kind else 1,
                "stream": most % 2 == 0,
            }
            return (await self.client.post("/v1/completions", json=body)).status_code == 200
        now = time.monotonic()
        params = SamplingParams(max_tokens=most, ignore_eos=True)
        timeout_s = 30.0 if kind == 2 else 0.05
        request = GenerationRequest("r", self.model, TextPrompt(prompt), params, now, now + timeout_s)
        if kind == 3:
            request = replace(request, params=replace(params, max_tokens=None))
        try:
            async with aclosing(self.stage.generate(request)) as chunks:
                left_after = draw.randint(1, 10)
                async for _ in chunks:
                    left_after -= 1
                    if kind == 2 and not left_after:
                        break  # the client has left
        except (InsufficientQuota, RateLimitExceeded):
            return False
        except Exception:  # noqa: BLE001 (the deadline of the request)
            return True
        return True


async def test_64_streams_at_two_ingresses_never_exceed_the_budget_and_the_ledger_is_exact(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    database = DatabaseOptions(url=f"sqlite:///{tmp_path / 'test.db'}", timeout_s=30)
    open_database(database).dispose()
    async with AsyncExitStack() as stack:
        stack.callback(server.kill)
        native = stack.enter_context(running(max_context=256, max_running=64))
        ingresses = [Ingress(server.url, ToyEngine(native=native), database, name) for name in ("one", "two")]

        async def user(number: int) -> list[bool]:
            draw = random.Random(number)
            return [await ingresses[number % 2].one_call((number + turn) % 4, draw) for turn in range(5)]

        results = {let_through for each in await asyncio.gather(*map(user, range(64))) for let_through in each}
        used = sum(one.counted("prompt_tokens") + one.counted("tokens") for one in ingresses)
        day = Counter("key:k1", Kind.TOKENS_PER_DAY, BUDGET, time.strftime("%Y-%m-%d", time.gmtime()))
        for one in ingresses:
            await one.close()
        async with Redis.from_url(server.url) as redis:
            reserved = int(await redis.get(f"serve_app:quota::{day.name}") or 0)
        store = UsageStore(open_database(database))
        (row,) = store.report(UsageQuery())
        generated = native.stats().generated_tokens
    assert results == {True, False}
    assert reserved == used, "refunds are exact"
    assert BUDGET / 2 < used <= BUDGET
    expected = (sum(one.counted("prompt_tokens") for one in ingresses), sum(one.counted("tokens") for one in ingresses))
    assert (row["prompt_tokens"], row["output_tokens"]) == expected
    assert row["nanodollars"] == 1000 * expected[0] + 3000 * expected[1]
    assert row["output_tokens"] <= generated, "the engine had computed a token or two more when a client left"
