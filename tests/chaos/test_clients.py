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
STALLED_S = 10
CALLS = 200
# The medians of two rounds without a fault differ by as much on a machine that other programs use.
NOISE = 0.15


async def test_clients_that_crash_and_read_slowly_leave_nothing_behind(
    client: httpx.AsyncClient, toy_service: Service
) -> None:
    """12 connections are reset at random points, 4 clients read 8 kB/s to the end of their answers."""
    rng = random.Random(5)

    async def crash(seconds: float) -> None:
        async with RawClient(toy_service.port, "/generate_stream", body("toy", 1000)) as raw:
            await asyncio.sleep(seconds)
            raw.crash()

    async def read() -> bytes:
        headers = {"connection": "close"}
        async with RawClient(toy_service.port, "/generate_stream", body("toy", 60), headers) as raw:
            return await raw.read_slowly(8_000)

    crashes = asyncio.gather(*(crash(rng.random()) for _ in range(12)))
    answers = await asyncio.gather(*(read() for _ in range(4)))
    await crashes
    assert all(answer.count(b'"finished":true') == 1 for answer in answers)
    await wait_until_idle(client, "toy")


@pytest.fixture(scope="module")
def wide() -> Iterator[Service]:
    """`wide` serves the clients that never read, `other` those that read, and `fast` computes as fast as it can."""
    engine = {"max_running": 128, "max_context": 65_536}
    wide = model_config("wide", "builtin:toy?step_ms=5", {"max_ongoing_requests": 128}, engine=engine)
    fast = model_config("fast", "builtin:toy", engine=engine)
    with Service([wide, fast, model_config("other", "builtin:toy?step_ms=5")], stalled_client_s=STALLED_S) as service:
        service.wait_until_ready()
        yield service


@pytest.mark.long
@pytest.mark.timeout(400)
async def test_50_clients_that_never_read_hold_at_most_1_mb_each_and_delay_nobody(wide: Service) -> None:
    """Each has asked for 200 kB. The others are measured when all answers are computed, and none is read."""
    watched = [*wide.find(":Ingress"), *wide.find(":model-wide"), wide.haproxy()]
    alone, during = Times(), Times()
    async with http_client(wide) as client:
        await short_calls(client, "other", 50, Times())
        await short_calls(client, "other", CALLS, alone)
        before = memory(watched)
        async with AsyncExitStack() as stack:
            for _ in range(NEVER_READ):
                raw = RawClient(wide.port, "/generate_stream", body("wide", 1500))
                await stack.enter_async_context(raw)
            most = before

            async def computed() -> bool:
                nonlocal most
                most = [max(pair) for pair in zip(most, memory(watched), strict=True)]
                totals = await metric_totals(client)
                return not totals["running_sequences", "wide"] and totals["engine_generated_tokens_total", "wide"] > 0

            await wait_until(computed, seconds=200, every_s=1)
            await short_calls(client, "other", CALLS, during)
        await wait_until_idle(client, "wide")
    per_stream = [(high - low) / NEVER_READ / 1e6 for high, low in zip(most, before, strict=True)]
    print(f"MB per stream in the ingress, the replica and HAProxy: {[round(one, 2) for one in per_stream]}")
    print(f"others alone: {alone.summary}; during: {during.summary}")
    assert sum(per_stream) <= 1
    assert not during.failures
    assert during.percentile_ms(50) <= alone.percentile_ms(50) * (1.1 + NOISE)


@pytest.mark.long
@pytest.mark.timeout(400)
async def test_an_unread_answer_costs_at_most_300_bytes_per_token(wide: Service) -> None:
    """60,000 tokens, which this model computes before `limits.stalled_client_s` is over."""
    watched = [*wide.find(":Ingress"), *wide.find(":model-fast"), wide.haproxy()]
    async with http_client(wide) as client:
        await short_calls(client, "fast", 50, Times())
        before, most, began = memory(watched), memory(watched), time.monotonic()
        async with RawClient(wide.port, "/generate_stream", body("fast", 60_000)):

            async def ended() -> bool:
                nonlocal most
                most = [max(pair) for pair in zip(most, memory(watched), strict=True)]
                totals = await metric_totals(client)
                tokens = totals.get(("engine_generated_tokens_total", "fast"), 0)
                return tokens > 1000 and not totals["running_sequences", "fast"]

            await wait_until(ended, seconds=200, every_s=0.5)
            seconds = time.monotonic() - began
        totals = await wait_until_idle(client, "fast")
    grown = [(high - low) / 1e6 for high, low in zip(most, before, strict=True)]
    tokens = totals["engine_generated_tokens_total", "fast"]
    print(f"{tokens:.0f} tokens in {seconds:.1f} s")
    print(f"MB in the ingress, the replica and HAProxy: {[round(one, 2) for one in grown]}")
    assert sum(grown) <= 300e-6 * tokens


def memory(processes: list[psutil.Process]) -> list[float]:
    return [process.memory_info().rss for process in processes]


def body(model: str, tokens: int) -> dict[str, object]:
    return {"model": model, "prompt": "abc", "max_tokens": tokens}
