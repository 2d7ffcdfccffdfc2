"""Requests made to harm the service, through both of Ray Serve's proxies: control headers, junk, stalled clients."""

from __future__ import annotations

import asyncio
import random
import socket
import string
import time
from contextlib import ExitStack

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.graph.conftest import Front
from tests.graph.service import PROXIES, Service, http_client, model_config, wait_until_idle
from tests.graph.test_http import connect, received_until, request

# `shared` keeps the toy service until the last test that names it.
pytestmark = pytest.mark.ray

# A header, and whether Ray Serve would act on it: end the request, not notice its end, or fail.
CONTROL = {
    "short time limit": b"x-request-timeout-seconds: 0.001",
    "no time limit": b"x-request-timeout-seconds: nan",
    "time limit not UTF-8": b"x-request-timeout-seconds: \xff",
    "no cancellation": b"x-request-disconnect-disabled: ?1",
    "cancellation not UTF-8": b"x-request-disconnect-disabled: \xff",
    "model": b"serve_multiplexed_model_id: other",
    "model with hyphens": b"Serve-Multiplexed-Model-Id: other",
    "model not UTF-8": b"serve_multiplexed_model_id: \xff",
    "replica": b"x-serve-router-replica: other",
    "session not UTF-8": b"x-session-id: \xff",
    "session with underscores": b"X_Session_Id: \xff",
    "id not UTF-8": b"x-request-id: \xff",
    "trace not UTF-8": b"traceparent: \xff",
    "state of trace not UTF-8": b"tracestate: \xff",
}


@pytest.mark.parametrize("header", CONTROL.values(), ids=CONTROL)
def test_headers_that_control_ray_change_nothing(front: Front, header: bytes) -> None:
    head, body = request("/generate", {"model": front.model, "prompt": "abc", "max_tokens": 3})
    with connect(front) as connection:
        connection.sendall(head.replace(b"Host: x", b"Host: x\r\n" + header) + body)
        answer = received_until(connection, b"}")
    assert answer.startswith(b"HTTP/1.1 200 "), answer
    assert b'"text":"abc"' in answer


def junk(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_letters + string.digits + "-_/", k=rng.randint(1, 40)))


async def send_junk(client: httpx.AsyncClient, count: int, seed: int) -> None:
    """Requests with paths, models, methods, keys and user agents that occur once."""
    rng = random.Random(seed)
    concurrent = asyncio.Semaphore(16)

    async def one() -> None:
        headers = {"authorization": f"Bearer {junk(rng)}", "user-agent": junk(rng), "x-request-id": junk(rng)}
        body = {"model": junk(rng), "prompt": "a", "max_tokens": 1}
        async with concurrent:
            if rng.random() < 0.5:
                answer = await client.request(rng.choice(["GET", "POST", "PURGE"]), f"/x{junk(rng)}", headers=headers)
            else:
                answer = await client.post("/generate", json=body, headers=headers)
        assert answer.status_code in (404, 405), answer.text

    await asyncio.gather(*(one() for _ in range(count)))


async def series(client: httpx.AsyncClient) -> set[tuple[str, ...]]:
    """The name and the labels of each series."""
    families = text_string_to_metric_families((await client.get("/metrics")).text)
    return {(sample.name, *sorted(sample.labels.values())) for family in families for sample in family.samples}


async def check_junk(client: httpx.AsyncClient, count: int) -> None:
    await send_junk(client, 50, seed=1)  # makes the series of the route `other`
    await series(client)  # makes the series of the route /metrics
    before = await series(client)
    await send_junk(client, count, seed=2)
    await asyncio.sleep(2.5)  # two reports of each process
    assert await series(client) - before == set()
    times, size = [], 0
    for _ in range(20):
        began = time.monotonic()
        size = len((await client.get("/metrics")).content)
        times.append(time.monotonic() - began)
    print(f"{count} requests: {len(before)} series, {size} bytes, scrape at most {max(times) * 1000:.0f} ms")
    assert size < 1_000_000


async def test_junk_makes_no_series(client: httpx.AsyncClient) -> None:
    await check_junk(client, 300)


@pytest.mark.long
@pytest.mark.timeout(600)
async def test_20000_requests_of_junk_make_no_series(client: httpx.AsyncClient) -> None:
    await check_junk(client, 20_000)


STALLED = 50
# For each client. Ray Serve's Python proxy keeps what its client does not read without a limit of its own.
SHARE_BYTES = {"haproxy": 1_000_000, "python": 25_000_000}
# The longest answer: 16,000 tokens, and about 4 MB of events.
FAST = model_config(
    "fast",
    "builtin:toy?step_ms=2",
    engine={"max_running": 64, "max_context": 16_384},
    batching={"max_batch_size": 64},
    deployment={"max_ongoing_requests": 64},
)


def resident(service: Service) -> dict[int, int]:
    """The resident bytes of the service's processes."""
    return {process.pid: process.memory_info().rss for process in service.descendants() if process.is_running()}


async def first_tokens(client: httpx.AsyncClient, count: int) -> list[float]:
    """The TTFT of requests that are sent one after the other."""
    times = []
    for _ in range(count):
        began = time.monotonic()
        body = {"model": "fast", "prompt": "abc", "max_tokens": 3}
        async with client.stream("POST", "/generate_stream", json=body) as answer:
            async for _ in answer.aiter_bytes():
                times.append(time.monotonic() - began)
                break
    return times


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("proxy", PROXIES)
async def test_50_clients_that_never_read_hold_little_memory_and_delay_no_one(proxy: str) -> None:
    """For 20 s: longer than `stalled_client_s`."""
    head, body = request("/generate_stream", {"model": "fast", "prompt": "abc", "max_tokens": 16_000})
    with ExitStack() as running:
        service = running.enter_context(Service([FAST], environment=PROXIES[proxy], stalled_client_s=8, heartbeat_s=1))
        service.wait_until_ready()
        async with http_client(service) as client:
            alone, before = await first_tokens(client, 20), resident(service)
            for _ in range(STALLED):
                connection = running.enter_context(socket.socket())
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                connection.connect(("127.0.0.1", service.port))
                connection.sendall(head + body)
            beside, most, end = list[float](), 0, time.monotonic() + 20
            while time.monotonic() < end:
                beside += await first_tokens(client, 2)
                now = resident(service)
                most = max(most, sum(rss - before.get(pid, rss) for pid, rss in now.items()))
            await wait_until_idle(client, "fast")
        p50 = [sorted(times)[len(times) // 2] * 1000 for times in (alone, beside)]
        print(f"{proxy}: {most / STALLED / 1e6:.2f} MB a client, TTFT p50 {p50[0]:.1f} ms alone, {p50[1]:.1f} beside")
    assert most / STALLED < SHARE_BYTES[proxy]
