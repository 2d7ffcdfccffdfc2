"""A service under more load than it can compute: what it accepts runs at full speed, and the rest is refused soon."""

from __future__ import annotations

import asyncio
import time

import httpx
import psutil
import pytest

from tests.graph.overload import keep_busy, offer, percentile
from tests.graph.service import Service, metric_totals, wait_until_idle

pytestmark = pytest.mark.ray

# The model `busy` computes 8 requests together and takes 0.5 s for each: 16 a second, of which 5 times as many come.
TOKENS = 25
BODY = {"model": "busy", "prompt": "abc", "max_tokens": TOKENS}
TIMES = 5


@pytest.mark.parametrize(
    "seconds", [pytest.param(6, id="short", marks=pytest.mark.ci), pytest.param(60, id="long", marks=pytest.mark.long)]
)
async def test_overload_keeps_the_throughput_and_refuses_the_rest_at_once(
    client: httpx.AsyncClient, toy_service: Service, seconds: float
) -> None:
    await keep_busy(client, BODY, 16, 1)
    began = time.monotonic()
    full = await keep_busy(client, BODY, 16, 3)
    capacity = full.tokens / (time.monotonic() - began)
    memory = resident(toy_service)
    began = time.monotonic()
    tally = await offer(client, BODY, TIMES * capacity / TOKENS, seconds)
    goodput = tally.tokens / (time.monotonic() - began)
    grown = resident(toy_service) - memory
    print(f"\ncapacity {capacity:.0f} tok/s, goodput {goodput:.0f} tok/s, {grown / 2**20:.1f} MiB more; {tally}")
    assert set(tally.statuses) == {200, 429}
    assert tally.wrong == []
    assert goodput >= 0.9 * capacity
    assert percentile(tally.refusal_s, 50) <= percentile(tally.ttft_s, 50) / 4
    if seconds > 10:  # other tests of `make test` use the processors at the same time
        assert percentile(tally.refusal_s, 99) <= 0.05
    assert grown <= 50 * 2**20
    await wait_until_idle(client, "busy")


@pytest.mark.ci
async def test_with_a_time_for_the_first_token_the_excess_is_refused_so_that_the_rest_keeps_it(
    client: httpx.AsyncClient,
) -> None:
    """The model `toy` queues 128 requests, for 0.8 s more each 16: without the time, most would wait for seconds.

    Answers of different lengths, because those of equal length end all at the same time.
    """
    body, target_s = {"model": "toy", "prompt": "abc", "max_tokens": range(20, 141)}, 1.5
    await keep_busy(client, body, 20, 2)
    headers = {"x-first-token-timeout-ms": f"{target_s * 1000:.0f}"}
    tally = await offer(client, body, TIMES * 16 / 0.9, 4, headers)
    print(f"\n{tally}")
    assert set(tally.statuses) <= {200, 429, 504}
    accepted = tally.statuses.total() - tally.statuses[429]
    expired = tally.statuses.pop(504, 0) + tally.wrong.count("deadline_exceeded")
    assert len(tally.wrong) <= expired
    assert expired <= 0.05 * accepted
    assert percentile(tally.service_ttft_s, 99) <= 1.25 * target_s
    assert tally.statuses[200] >= 16 / 0.9 * 4 * 0.8


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("header", ["x-request-timeout-ms", "x-first-token-timeout-ms"])
async def test_a_request_ends_a_quarter_of_a_second_after_its_deadline_at_the_latest(
    client: httpx.AsyncClient, header: str, stream: bool
) -> None:
    """In the queue and in the model, whose steps take 20 ms; `single` runs one request at a time.

    Where the wait is known to be too long, the request is refused at once.
    """
    body = {"model": "single", "prompt": "abc", "max_tokens": 400, "stream": stream}

    async def call(milliseconds: int) -> tuple[float, int, str]:
        began = time.monotonic()
        answer = await client.post("/v1/completions", json=body, headers={header: str(milliseconds)})
        return time.monotonic() - began - milliseconds / 1e3, answer.status_code, answer.text

    occupied = {"model": "single", "prompt": "abc", "max_tokens": 150}
    async with client.stream("POST", "/generate_stream", json=occupied) as response:
        lines = response.aiter_lines()
        await anext(lines)
        found = await asyncio.gather(*map(call, (300, 500, 700, 900)))
    if header == "x-request-timeout-ms":  # in the model
        await wait_until_idle(client, "single")
        found.append(await call(800))
    for late_s, status, text in found:
        assert late_s <= 0.25, found
        assert status in (429, 504) or (stream and status == 200), text
        assert ("queue_full" if status == 429 else "deadline_exceeded") in text
    totals = await wait_until_idle(client, "single")
    assert not totals.get(("kv_usage_ratio", "single"), 0)
    assert await metric_totals(client)


def resident(service: Service) -> int:
    """The memory of all processes of the service, in bytes."""
    total = 0
    for process in service.descendants():
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total
