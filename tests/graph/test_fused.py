"""The fused shape: one model whose replicas answer HTTP themselves, behind HAProxy and behind Ray's own proxy."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from tests.graph.house import FRONTS, Service, caller, frames_of, idle, lines, made_after, metrics, model, until

pytestmark = pytest.mark.ray

ONGOING, QUEUED, SECONDS = 4, 4, 6


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fused") / "tokens"
    path.touch()
    return path


@pytest.fixture(scope="module", params=FRONTS)
def service(request: pytest.FixtureRequest, log: Path) -> Iterator[Service]:
    only = model(
        "only",
        f"builtin:toy?step_ms=20&log={log}",
        deployment={"max_ongoing_requests": ONGOING, "max_queued_requests": QUEUED},
        batching={"max_batch_size": 4},
    )
    limits = {"request_timeout_s": SECONDS, "heartbeat_s": 0.3, "max_body_bytes": 65_536}
    with Service([only], environment=FRONTS[request.param], fused=True, **limits) as service:
        service.wait_for("answers on")
        assert bool(service.find("haproxy.cfg")) == (request.param == "haproxy")
        yield service


@pytest.fixture
async def client(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    async with caller(service) as client:
        yield client


async def test_there_is_no_ingress_apart(service: Service) -> None:
    replicas = {process.cmdline()[0].split("ServeReplica:serve_app:")[1] for process in service.find("ServeReplica")}
    assert {name.split(".")[0] for name in replicas} == {"Hub", "model-only"}


async def test_it_answers_in_every_way(client: httpx.AsyncClient) -> None:
    body = {"prompt": "Grüße 🌍", "max_tokens": 12}
    whole = (await client.post("/generate", json=body)).json()
    async with client.stream("POST", "/generate_stream", json=body) as response:
        frames = [frame async for frame in frames_of(response)]
    assert whole["text"] == frames[-1]["text"] == "Grüße 🌍"
    assert len(frames) == 12
    batch = await client.post("/generate_batch", json={"prompts": ["ab", "x" * 5000], "max_tokens": 2})
    first, second = batch.json()["results"]
    assert first["text"] == "ab"
    assert second["error"]["code"] == "prompt_too_long"
    ready = await client.get("/ready")
    assert (ready.status_code, ready.json()["models"][0]["state"]) == (200, "ready")


async def test_what_ours_refuse_arrives_unchanged(client: httpx.AsyncClient) -> None:
    large = await client.post("/generate", json={"prompt": "x" * 70_000}, headers={"x-request-id": "mine"})
    assert large.status_code == 413
    assert large.json()["error"]["request_id"] == large.headers["x-request-id"] == "mine"
    lost = await client.get("/nowhere")
    assert (lost.status_code, lost.json()["error"]["code"]) == (404, "not_found")


async def test_more_than_the_model_takes_are_refused_and_health_checks_wait_for_nobody(
    client: httpx.AsyncClient,
) -> None:
    body = {"prompt": "abc", "max_tokens": 60}
    asked = asyncio.gather(*(client.post("/generate", json=body) for _ in range(40)))
    await asyncio.sleep(0.5)
    began = time.monotonic()
    assert (await client.get("/health")).status_code == 200
    assert time.monotonic() - began < 0.5
    answers = await asked
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) == ONGOING + QUEUED
    for answer in answers:
        if answer.status_code == 200:
            assert answer.json()["text"] == "abc" * 20
        else:
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["code"] == "queue_full"


async def test_no_more_than_the_model_takes_are_under_way_and_those_who_wait_are_told(
    client: httpx.AsyncClient,
) -> None:
    body = {"prompt": "abc", "max_tokens": 60}
    first = asyncio.gather(*(client.post("/generate", json=body) for _ in range(ONGOING)))
    await asyncio.sleep(0.2)
    late = await client.post("/generate_stream", json=body)
    assert late.text.startswith(": queued\n\n")
    assert '"finished":true' in late.text
    assert all(answer.status_code == 200 for answer in await first)


async def test_a_request_ends_when_its_time_is_over(client: httpx.AsyncClient) -> None:
    body = {"prompt": "abc", "max_tokens": 1000}
    whole, stream = await asyncio.gather(
        client.post("/generate", json=body), client.post("/generate_stream", json=body)
    )
    assert (whole.status_code, whole.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert stream.status_code == 200
    assert "event: error" in stream.text
    assert '"code":"deadline_exceeded"' in stream.text


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/generate_batch"])
async def test_one_who_leaves_frees_the_slot(client: httpx.AsyncClient, service: Service, log: Path, path: str) -> None:
    prompt = {"prompts": ["a"]} if path == "/generate_batch" else {"prompt": "a"}
    name = f"{service.port}{path.replace('/', '-')}".replace("_", "-")
    body, headers = {"max_tokens": 250, **prompt}, {"x-request-id": f"{name}_"}
    with suppress(TimeoutError):
        async with asyncio.timeout(0.7), client.stream("POST", path, json=body, headers=headers) as response:
            assert len([line async for line in lines(response)]) == 0, "it came to its end"
    left = time.monotonic()
    await idle(client, "only")
    (extra,) = made_after(log, {name: left})
    assert extra <= 4, "steps take 20 ms"


async def test_both_halves_are_counted(client: httpx.AsyncClient) -> None:
    before = await idle(client, "only")
    await asyncio.gather(*(client.post("/generate", json={"prompt": "count", "max_tokens": 7}) for _ in range(5)))

    async def counted() -> bool:
        after = await metrics(client)
        names = {"requests_total": 5, "generated_tokens_total": 35, "engine_generated_tokens_total": 35}
        return all(after[name, "only"] - before[name, "only"] == number for name, number in names.items())

    await until(counted, seconds=5)


def test_loading_is_told_before_anybody_answers() -> None:
    with Service([model("loading", "builtin:toy?load_s=1000")], fused=True) as service:
        service.wait_for("loading: starting")
        assert service.interrupt() in (0, 130)


def test_a_model_that_cannot_be_loaded_ends_the_program_with_its_reason() -> None:
    with Service([model("lost", "/nowhere/at/all")], fused=True) as service:
        assert service.process.wait(timeout=90) == 1
        last = service.said().rstrip().splitlines()[-1]
        assert last.startswith("serve_app: the deployment failed: lost: SourceError: /nowhere/at/all: nothing there")
