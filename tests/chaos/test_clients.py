"""Clients that never read, read slowly or crash: memory per stream, and what other clients notice."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack

import httpx
import psutil
import pytest

from tests.chaos.clients import RawClient
from tests.chaos.measure import Times, short_calls
from tests.graph.service import Service, http_client, metric_totals, model_config, wait_until, wait_until_idle

pytestmark = pytest.mark.ray

NEVER_READ = 50
STALLED_S = 20


async def test_clients_that_crash_and_read_slowly_leave_nothing_behind(
    client: httpx.AsyncClient, toy_service: Service
) -> None:
    """12 connections are reset at random points, 4 clients read 8 kB/s to the end of their answers."""
    rng = random.Random(5)

    async def crash(seconds: float) -> None:
        async with RawClient(toy_service.port, "/generate_stream", body("toy", 1000)) as raw:
            await asyncio.sleep(seconds)
            raw.crash()

    async def read() -> int:
        headers = {"connection": "close"}
        async with RawClient(toy_service.port, "/generate_stream", body("toy", 60), headers) as raw:
            return await raw.read_slowly(8_000)

    crashes = asyncio.gather(*(crash(rng.random()) for _ in range(12)))
    totals = await asyncio.gather(*(read() for _ in range(4)))
    await crashes
    assert min(totals) > 3_000
    await wait_until_idle(client, "toy")


@pytest.fixture
def wide() -> Iterator[Service]:
    """`wide` computes 1000 tokens per second and stream; `other` serves the clients that read."""
    deployment = {"max_ongoing_requests": 128}
    engine = {"max_running": 128, "max_context": 65_536}
    wide = model_config("wide", "builtin:toy?step_ms=5", deployment, engine=engine)
    models = [wide, model_config("other", "builtin:toy?step_ms=5", engine={"max_running": 16})]
    with Service(models, stalled_client_s=STALLED_S, heartbeat_s=1) as service:
        service.wait_until_ready()
        yield service


@pytest.mark.long
@pytest.mark.timeout(300)
async def test_50_clients_that_never_read_hold_at_most_1_mb_each_and_delay_nobody(wide: Service) -> None:
    """Each asks for 10 MB. All are disconnected after `limits.stalled_client_s`."""
    watched = [*wide.find(":Ingress"), *wide.find(":model-wide"), wide.haproxy()]
    before_s, during_s = Times(), Times()
    async with http_client(wide) as client, AsyncExitStack() as stack:
        await short_calls(client, "other", 50, Times())
        await short_calls(client, "other", 300, before_s)
        before = memory(watched)
        for _ in range(NEVER_READ):
            await stack.enter_async_context(RawClient(wide.port, "/generate_stream", body("wide", 60_000)))
        began = time.monotonic()
        most = before
        measuring = asyncio.create_task(short_calls(client, "other", 300, during_s))

        async def cut() -> bool:
            nonlocal most
            most = [max(pair) for pair in zip(most, memory(watched), strict=True)]
            return not (await metric_totals(client)).get(("active_requests", "wide"), 0)

        await asyncio.sleep(5)
        assert not await cut(), "the streams run"
        await wait_until(cut, seconds=120, every_s=0.5)
        seconds = time.monotonic() - began
        await measuring
        await wait_until_idle(client, "wide")
    per_stream = [(high - low) / NEVER_READ / 1e6 for high, low in zip(most, before, strict=True)]
    print(f"MB per stream in the ingress, the replica and HAProxy: {[round(one, 2) for one in per_stream]}")
    print(f"all were disconnected after {seconds:.1f} s; others before: {before_s.summary}; during: {during_s.summary}")
    assert sum(per_stream) <= 1
    assert not during_s.failures


def memory(processes: list[psutil.Process]) -> list[float]:
    return [process.memory_info().rss for process in processes]


def body(model: str, tokens: int) -> dict[str, object]:
    return {"model": model, "prompt": "abc", "max_tokens": tokens}
