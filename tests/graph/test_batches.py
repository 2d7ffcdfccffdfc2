"""Batches in the whole service, whose processes are killed with `kill -9` while lines run."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import psutil
import pytest

from tests.graph.service import Service, http_client, model_config, wait_until
from tests.postgres_server import PostgresServer

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    server = PostgresServer()
    yield server
    server.close()


def line(number: int, model: str, tokens: int) -> str:
    body = {"model": model, "prompt": f"{number},", "max_tokens": tokens, "temperature": 0}
    return json.dumps({"custom_id": f"{number}", "method": "POST", "url": "/v1/completions", "body": body}) + "\n"


async def submit(client: httpx.AsyncClient, model: str, lines: int, tokens: int = 12) -> str:
    content = "".join(line(number, model, tokens) for number in range(lines))
    form = {"files": {"file": ("in.jsonl", content.encode())}, "data": {"purpose": "batch"}}
    file = (await client.post("/v1/files", **form)).raise_for_status().json()  # type: ignore[arg-type]
    body = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    batch = (await client.post("/v1/batches", json=body)).raise_for_status().json()
    return str(batch["id"])


async def look(client: httpx.AsyncClient, batch_id: str) -> Any:
    """The batch; None while no ingress or proxy answers."""
    try:
        answer = await client.get(f"/v1/batches/{batch_id}", timeout=5)
    except httpx.TransportError:
        return None
    return answer.json() if answer.status_code == 200 else None


async def until(client: httpx.AsyncClient, batch_id: str, done: Callable[[Any], bool], seconds: float) -> Any:
    async def ask() -> Any:
        batch = await look(client, batch_id)
        return batch if batch is not None and done(batch) else None

    return await wait_until(ask, seconds=seconds, every_s=0.1)


def answered(share: float) -> Callable[[Any], bool]:
    """Whether a share of the lines is answered, but not all are."""

    def done(batch: Any) -> bool:
        counts = batch["request_counts"]
        assert batch["status"] in ("validating", "in_progress"), "the batch ended too soon"
        return bool(counts["total"]) and counts["completed"] + counts["failed"] >= share * counts["total"]

    return done


async def check(client: httpx.AsyncClient, batch_id: str, lines: int, tokens: int = 12, seconds: float = 90) -> None:
    """Every line has one answer, and it is the right one: the toy model repeats its prompt."""
    batch = await until(client, batch_id, lambda batch: batch["status"] == "completed", seconds)
    assert batch["request_counts"] == {"total": lines, "completed": lines, "failed": 0}
    assert batch["error_file_id"] is None
    content = (await client.get(f"/v1/files/{batch['output_file_id']}/content")).raise_for_status().text
    found = [json.loads(one) for one in content.splitlines()]
    assert Counter(one["custom_id"] for one in found) == Counter(str(number) for number in range(lines))
    for one in found:
        text = one["response"]["body"]["choices"][0]["text"]
        assert text == (f"{one['custom_id']}," * tokens)[:tokens]


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        process.kill()
    psutil.wait_procs(processes, timeout=10)


@pytest.mark.ci
async def test_no_line_is_lost_or_repeated_when_a_replica_and_the_ingress_are_killed(
    client: httpx.AsyncClient, toy_service: Service
) -> None:
    batch_id = await submit(client, "victim", 200)
    await until(client, batch_id, answered(0.1), 30)
    kill(toy_service.find(":model-victim"))
    await until(client, batch_id, answered(0.4), 60)
    kill(toy_service.find(":Ingress"))
    await check(client, batch_id, 200)


async def test_equal_requests_run_once_also_after_the_ingress_is_replaced(
    client: httpx.AsyncClient, toy_service: Service
) -> None:
    """The ingress keeps answers in the database."""

    async def ask() -> httpx.Response:
        body = {"model": "toy", "prompt": "abc", "max_tokens": 5}
        return await client.post("/v1/completions", json=body, headers={"idempotency-key": "once"})

    first, *others = await asyncio.gather(*(ask() for _ in range(8)))
    assert {answer.content for answer in others} == {first.content}
    assert (await ask()).headers["idempotent-replayed"] == "true"


@asynccontextmanager
async def large_service(database: dict[str, Any]) -> AsyncIterator[tuple[httpx.AsyncClient, Service]]:
    """HAProxy, two ingresses and a model with two replicas."""
    model = model_config(
        "toy",
        "builtin:toy?step_ms=10",
        deployment={"num_replicas": 2},
        engine={"max_running": 32},
        batching={"max_batch_size": 16},
    )
    sections = {"batches": {"lines_in_flight": 16}, "database": database}
    with Service([model], ingress={"num_replicas": 2}, sections=sections, max_body_bytes=65_536) as service:
        service.wait_until_ready()
        async with http_client(service) as client:
            yield client, service


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_10000_lines_while_each_process_is_killed_in_turn(kind: str, request: pytest.FixtureRequest) -> None:
    lines, tokens = 10_000, 24
    database = {} if kind == "sqlite" else {"url": request.getfixturevalue("postgres").create_database()}
    async with large_service(database) as (client, service):
        began = time.monotonic()
        batch_id = await submit(client, "toy", lines, tokens)
        kills: list[tuple[float, str, Callable[[], list[psutil.Process]]]] = [
            (0.1, "replica", lambda: service.find(":model-toy")[:1]),
            (0.3, "ingress", lambda: service.find(":Ingress")[:1]),
            (0.5, "controller", lambda: service.find("ServeController")),
            (0.7, "HAProxy", lambda: [service.haproxy()]),
            (0.8, "both ingresses", lambda: service.find(":Ingress")),
            (0.9, "both replicas", lambda: service.find(":model-toy")),
        ]
        for share, name, find in kills:
            await until(client, batch_id, answered(share), 300)
            processes = find()
            assert processes, name
            kill(processes)
            print(f"{time.monotonic() - began:6.1f} s: killed {name} ({len(processes)})")
        await check(client, batch_id, lines, tokens, seconds=300)
        seconds = time.monotonic() - began
        print(f"{lines} lines in {seconds:.1f} s: {lines / seconds:.0f} lines/s, 0 lost, 0 repeated")
