"""The whole service with vLLM: answers, metrics, and what happens when one of its processes is killed.

These tests need an environment that has vLLM: `make test-long` runs them there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.graph.service import (
    Config,
    Service,
    http_client,
    metric_totals,
    model_config,
    stream_events,
    wait_until,
    wait_until_idle,
)

pytestmark = [pytest.mark.vllm, pytest.mark.long, pytest.mark.timeout(900)]

START_S = 400
STORY: Config = {"prompt": "Once upon a time", "max_tokens": 500, "ignore_eos": True, "temperature": 0}


def shared_memory() -> set[str]:
    """The segments of Python's and of vLLM's processes."""
    return {file.name for file in Path("/dev/shm").iterdir() if file.name.startswith("psm_")}


@pytest.fixture(scope="module")
def before() -> set[str]:
    return shared_memory()


@pytest.fixture(scope="module")
def service(before: set[str]) -> Iterator[Service]:
    options = {"enforce_eager": True, "max_running": 8, "max_context": 1024, "kv_memory_bytes": 2**29}
    config = model_config("m", "builtin:smollm2-135m", batching={"max_batch_size": 8})
    config["engine"] = {"kind": "vllm", **options}
    with Service([config], heartbeat_s=0.5) as service:
        service.wait_for_output("answers on", seconds=START_S)
        yield service
    assert service.find("VLLM::") == []
    assert shared_memory() - before == set()


async def test_answers_and_metrics(service: Service) -> None:
    async with http_client(service) as client:
        whole = (await client.post("/generate", json={**STORY, "max_tokens": 20})).json()
        async with client.stream("POST", "/generate_stream", json={**STORY, "max_tokens": 20}) as response:
            events = [event async for event in stream_events(response)]
        assert events[-1]["text"] == whole["text"]
        assert whole["usage"]["completion_tokens"] == 20
        await wait_until_idle(client, "m")
        totals = await metric_totals(client)
        assert totals["vllm:generation_tokens_total", "m"] >= 40
        assert totals["engine_steps_total", "m"] > 0
        assert 'kind="vllm"' in (await client.get("/metrics")).text


@pytest.mark.parametrize("victim", [":model-m", "VLLM::EngineCore", "VLLM::Worker"])
async def test_a_killed_process_loses_no_request_or_ends_it_and_the_replica_is_replaced(
    service: Service, before: set[str], victim: str
) -> None:
    """The requests of a killed replica go on at the next one. A replica whose engine has ended ends them soon."""
    async with http_client(service) as client:
        await wait_until(lambda: answers(client), seconds=START_S, every_s=1)
        streams = [asyncio.create_task(last_event(client)) for _ in range(4)]
        await wait_until(lambda: running(client, 4))
        old = service.find("VLLM::") + service.find(":model-m")
        (process,) = service.find(victim)
        process.kill()
        began = time.monotonic()
        for last in await asyncio.gather(*streams):
            if victim == ":model-m":
                assert last["finished"], last
                assert "error" not in last
            else:
                assert last["error"]["code"] in ("not_ready", "internal_error"), last
        if victim != ":model-m":
            assert time.monotonic() - began <= 5
        await asyncio.to_thread(psutil.wait_procs, old, 60)
        assert [one for one in old if one in service.running()] == []
        await wait_until(lambda: answers(client), seconds=START_S, every_s=1)
        assert len(shared_memory() - before) <= 2, "the segments of one engine"


async def last_event(client: httpx.AsyncClient) -> dict[str, Any]:
    """The event with which a long stream ends."""
    async with client.stream("POST", "/generate_stream", json=STORY) as response:
        assert response.status_code == 200
        events = [event async for event in stream_events(response)]
    return events[-1]


async def running(client: httpx.AsyncClient, count: int) -> bool:
    return (await metric_totals(client))["running_sequences", "m"] == count


async def answers(client: httpx.AsyncClient) -> bool:
    response = await client.post("/generate", json={**STORY, "max_tokens": 1})
    return response.status_code == 200
