"""Processes of the service that are killed, and clients that stall: what fails, and how soon the service recovers."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import psutil
import pytest

from tests.graph.service import Service, metric_totals, stream_events, stream_lines, wait_until, wait_until_idle

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]


def body(model: str, max_tokens: int = 3) -> dict[str, Any]:
    return {"model": model, "prompt": "abc", "max_tokens": max_tokens}


async def answers(client: httpx.AsyncClient, model: str) -> bool:
    """Whether the model answers. Without a proxy nothing listens."""
    try:
        answer = await client.post("/generate", json=body(model), timeout=5)
    except httpx.TransportError:
        return False
    return answer.status_code == 200 and answer.json()["text"] == "abc"


@asynccontextmanager
async def streams(client: httpx.AsyncClient, model: str, count: int, tokens: int) -> AsyncIterator[list[list[str]]]:
    """Streams that have begun: the lines of each, to which lines are appended until all streams have ended."""
    found: list[list[str]] = [[] for _ in range(count)]

    async def read(lines: list[str]) -> None:
        async with client.stream("POST", "/generate_stream", json=body(model, tokens)) as response:
            assert response.status_code == 200
            async for line in stream_lines(response):
                lines.append(line)  # noqa: PERF401 - others read the list meanwhile

    tasks = [asyncio.create_task(read(lines)) for lines in found]

    async def begun() -> bool:
        return all(any(line.startswith("data: ") for line in lines) for lines in found)

    await wait_until(begun, every_s=0.02)
    yield found
    await asyncio.gather(*tasks)


@pytest.mark.ci
async def test_the_streams_of_a_killed_replica_go_on_at_the_replica_that_replaces_it(
    client: httpx.AsyncClient, toy_service: Service
) -> None:
    """The model has one replica. New requests wait for it too or are refused; the streams of another model go on."""
    (replica,) = toy_service.find("model-victim")
    before = (await metric_totals(client)).get(("resumed_requests_total", "victim"), 0.0)
    async with streams(client, "slow", 2, tokens=60) as others, streams(client, "victim", 8, tokens=1000) as moved:
        replica.kill()
        answer = await client.post("/generate", json=body("victim"))
        assert answer.status_code in (200, 503)
        if answer.status_code == 503:
            assert int(answer.headers["retry-after"]) >= 1
    for lines in [*moved, *others]:
        assert '"finished":true' in lines[-1]
        assert not any("event: error" in line for line in lines)
    for lines in moved:
        tokens = [json.loads(line.removeprefix("data: "))["token"] for line in lines if line.startswith("data: ")]
        assert "".join(tokens) == ("abc" * 334)[:1000]
    resumed = (await metric_totals(client))["resumed_requests_total", "victim"] - before
    assert resumed in (8, 9), "the streams, and the other request if it was sent to the killed replica"


@pytest.mark.ci
async def test_a_connection_that_sends_its_headers_slowly_is_closed_after_10_s(toy_service: Service) -> None:
    """One byte per second. HAProxy's `timeout http-request` counts from the first byte."""

    def send() -> float:
        with socket.create_connection(("127.0.0.1", toy_service.port)) as connection:
            connection.settimeout(1)
            began = time.monotonic()
            for byte in b"GET /health HTTP/1.1\r\nhost: localhost\r\n":
                try:
                    connection.sendall(bytes([byte]))
                    answer = connection.recv(1000)
                except TimeoutError:
                    continue
                except ConnectionError:
                    answer = b""
                assert not answer or answer.startswith(b"HTTP/1.1 408")
                return time.monotonic() - began
        raise AssertionError("the connection stayed open")

    assert 9 <= await asyncio.to_thread(send) <= 15


# Ray replaces HAProxy about 4 s after it was killed on a machine that is idle otherwise.
@pytest.mark.perf
@pytest.mark.parametrize("limit_s", [10, pytest.param(5, marks=pytest.mark.long)])
async def test_haproxy_is_replaced_soon_after_it_is_killed(
    client: httpx.AsyncClient, toy_service: Service, limit_s: float
) -> None:
    haproxy = toy_service.haproxy()
    haproxy.kill()
    psutil.wait_procs([haproxy], timeout=5)
    began = time.monotonic()
    assert not await answers(client, "toy")
    await wait_until(lambda: answers(client, "toy"), seconds=60, every_s=0.05)
    seconds = time.monotonic() - began
    print(f"HAProxy was back after {seconds:.1f} s")
    assert seconds <= limit_s


async def test_a_killed_ingress_is_replaced_and_the_model_replicas_serve_on(
    client: httpx.AsyncClient, toy_service: Service
) -> None:
    """The replicas open new connections for events to the new ingress, and stop the requests of the old one."""
    replicas = toy_service.find(":model-toy") + toy_service.find(":model-slow")
    (ingress,) = toy_service.find(":Ingress")
    # HAProxy may find the new ingress for it: the answer takes 100 s, its client waits for 20 s.
    abandoned = asyncio.create_task(client.post("/generate", json=body("slow", 1000), timeout=20))
    await wait_until(lambda: running(client, "slow"))
    ingress.kill()
    with pytest.raises(httpx.HTTPError):
        (await abandoned).raise_for_status()
    await wait_until(lambda: answers(client, "toy"), seconds=40)
    assert toy_service.find(":Ingress") not in ([ingress], [])
    assert toy_service.find(":model-toy") + toy_service.find(":model-slow") == replicas
    for model in ("toy", "slow"):
        async with client.stream("POST", "/generate_stream", json=body(model, 6)) as response:
            events = [event async for event in stream_events(response)]
        assert events[-1]["text"] == "abcabc"
    await wait_until_idle(client, "slow")


async def running(client: httpx.AsyncClient, model: str) -> float:
    return (await metric_totals(client))["running_sequences", model]
