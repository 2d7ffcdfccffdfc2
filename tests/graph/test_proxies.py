"""What both of Ray Serve's HTTP proxies, HAProxy and the one in Python, pass on to clients."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Any

import httpx
import pytest

from tests.graph.conftest import Front
from tests.graph.service import (
    logged_requests,
    stream_events,
    stream_lines,
    tokens_after,
    wait_until_idle,
)

pytestmark = pytest.mark.ray


@pytest.fixture
def client(front_client: httpx.AsyncClient) -> httpx.AsyncClient:
    return front_client


@pytest.mark.parametrize("front", ["haproxy", "python"], indirect=True)
def test_the_environment_selects_the_proxy(front: Front, request: pytest.FixtureRequest) -> None:
    selected = "haproxy" if front.service.find("haproxy.cfg") else "python"
    assert selected == request.node.callspec.params["front"]


async def test_answers_arrive_whole_streamed_and_as_a_batch(client: httpx.AsyncClient, front: Front) -> None:
    body = {"model": front.model, "prompt": "Grüße 🌍", "max_tokens": 12}
    whole = (await client.post("/generate", json=body)).json()
    async with client.stream("POST", "/generate_stream", json=body) as response:
        events = [event async for event in stream_events(response)]
    assert whole["text"] == events[-1]["text"] == "Grüße 🌍"
    assert len(events) == 12
    batch = {"model": front.model, "prompts": ["ab", "x" * 5000], "max_tokens": 2}
    first, second = (await client.post("/generate_batch", json=batch)).json()["results"]
    assert first["text"] == "ab"
    assert second["error"]["code"] == "prompt_too_long"
    ready = await client.get("/ready")
    assert (ready.status_code, ready.json()["models"][0]["state"]) == (200, "ready")


async def test_refusals_arrive_unchanged(client: httpx.AsyncClient) -> None:
    large = await client.post("/generate", json={"prompt": "x" * 70_000}, headers={"x-request-id": "mine"})
    assert large.status_code == 413
    assert large.json()["error"]["request_id"] == large.headers["x-request-id"] == "mine"
    lost = await client.get("/nowhere")
    assert (lost.status_code, lost.json()["error"]["code"]) == (404, "not_found")


@pytest.mark.perf
async def test_a_full_model_delays_neither_health_nor_the_heartbeat_of_a_stream(client: httpx.AsyncClient) -> None:
    body = {"model": "narrow", "prompt": "abc", "max_tokens": 60}
    queued = asyncio.Event()

    async def wait_in_the_queue() -> str:
        text = ""
        async with client.stream("POST", "/generate_stream", json=body) as response:
            async for part in response.aiter_text():
                text += part
                queued.set()
        return text

    async with client.stream("POST", "/generate_stream", json=body) as running:
        events = stream_events(running)
        await anext(events)
        waiting = asyncio.create_task(wait_in_the_queue())
        await queued.wait()
        refused = asyncio.gather(*(client.post("/generate", json=body) for _ in range(20)))
        began = time.monotonic()
        assert (await client.get("/health")).status_code == 200
        assert time.monotonic() - began < 0.5
        async for _ in events:
            pass
    late = await waiting
    assert late.startswith(": queued\n\n")
    assert '"finished":true' in late
    answers = await refused
    statuses = {answer.status_code for answer in answers}
    assert 429 in statuses
    assert statuses <= {200, 429}
    for answer in answers:
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["code"] == "queue_full"


@pytest.mark.perf
async def test_a_client_that_leaves_before_the_end_frees_its_slot(client: httpx.AsyncClient, front: Front) -> None:
    async def leave(path: str) -> tuple[str, float]:
        prompt: dict[str, Any] = {"prompts": ["a"]} if path == "/generate_batch" else {"prompt": "a"}
        name = f"front{path.replace('/', '-')}".replace("_", "-")
        body = {"model": "slow", "max_tokens": 250, **prompt}
        with suppress(TimeoutError):
            async with (
                asyncio.timeout(0.7),
                client.stream("POST", path, json=body, headers={"x-request-id": f"{name}_"}) as response,
            ):
                assert [line async for line in stream_lines(response)] == [], "the answer was complete"
        return name, time.monotonic()

    cuts = dict(await asyncio.gather(*map(leave, ("/generate", "/generate_stream", "/generate_batch"))))
    await wait_until_idle(client, "slow")
    assert set(cuts) <= logged_requests(front.token_log), "all of them ran"
    extra = tokens_after(front.token_log, cuts)
    assert max(extra.values()) <= 2, extra
