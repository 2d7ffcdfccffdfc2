"""Experiments on a Ray cluster with two ingresses: assignment, live changes, guards, statistics and feedback."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.graph.cluster import Head, node_environment
from tests.graph.service import Config, model_config, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.ci, pytest.mark.timeout(240)]

MODELS = [
    model_config("plain", "builtin:toy?step_ms=1"),
    model_config("broken", "builtin:toy?step_ms=1&fails_on=bad"),
]
CONTROL: Config = {"name": "control", "model": "plain"}
CANDIDATE: Config = {"name": "candidate", "model": "broken", "percent": 50}


def experiment(percent: float = 50, **keys: Any) -> Config:
    return {"name": "chat", "variants": [CONTROL, {**CANDIDATE, "percent": percent}], **keys}


class Cluster:
    """A cluster with two ingresses, whose experiments can be changed."""

    def __init__(self, head: Head) -> None:
        self.head = head

    def deploy(self, *experiments: Config) -> None:
        self.head.deploy(*MODELS, ingress={"num_replicas": 2}, experiments=experiments)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with node_environment("python") as environment:
        # Ray Serve writes each line of its log at once, and not when its buffer is full.
        options = environment | {"RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1"}
        with Head(options, "--num-cpus=4", "--num-gpus=0") as head:
            head.wait_until_started()
            cluster = Cluster(head)
            cluster.deploy(experiment())
            yield cluster


@pytest.fixture
async def client(cluster: Cluster) -> AsyncIterator[httpx.AsyncClient]:
    """A client that opens a new connection for each call, so that both ingresses get calls."""
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=cluster.head.proxy, timeout=60, limits=limits) as client:

        async def ready() -> bool:
            try:
                states = (await client.get("/ready")).json()["models"]
                return all(model["state"] == "ready" for model in states) and len(await ingresses(client)) == 2
            except (httpx.TransportError, ValueError):
                return False

        await wait_until(ready, seconds=90)
        yield client


async def chat(client: httpx.AsyncClient, user: str, text: str = "good", **headers: str) -> httpx.Response:
    body = {"model": "chat", "user": user, "max_tokens": 4, "messages": [{"role": "user", "content": text}]}
    return await client.post("/v1/chat/completions", json=body, headers=headers)


async def complete(client: httpx.AsyncClient, user: str, prompt: str = "good") -> httpx.Response:
    body = {"model": "chat", "user": user, "max_tokens": 4, "prompt": prompt}
    return await client.post("/v1/completions", json=body)


async def variants(client: httpx.AsyncClient, users: range) -> list[str]:
    answers = await asyncio.gather(*(chat(client, f"user-{user}") for user in users))
    assert {(answer.status_code, answer.json()["model"]) for answer in answers} == {(200, "chat")}
    return [answer.headers["x-variant"] for answer in answers]


async def report(client: httpx.AsyncClient) -> dict[str, Any]:
    found: dict[str, Any] = (await client.get("/experiments")).json()
    return found


async def samples(client: httpx.AsyncClient, name: str) -> dict[str, float]:
    """The values of a metric by replica."""
    families = text_string_to_metric_families((await client.get("/metrics")).text)
    found = [sample for family in families for sample in family.samples if sample.name == f"serve_app_{name}"]
    return {sample.labels["replica"]: sample.value for sample in found}


async def ingresses(client: httpx.AsyncClient) -> set[str]:
    return set(await samples(client, "http_open_requests"))


async def test_all_ingresses_assign_a_user_to_the_same_variant_and_count_together(client: httpx.AsyncClient) -> None:
    first = await variants(client, range(40))
    assert [await variants(client, range(40)) for _ in range(2)] == [first, first]
    assert 10 <= first.count("candidate") <= 30
    (found,) = (await report(client))["experiments"]
    counts = {one["name"]: one["outcomes"]["length"] for one in found["variants"]}
    assert counts == {"control": 3 * first.count("control"), "candidate": 3 * first.count("candidate")}
    assert (await chat(client, "user-1", **{"x-variant": "candidate"})).headers["x-variant"] == "candidate"
    assert (await chat(client, "user-1", **{"x-variant": "nobody"})).status_code == 400


async def test_feedback_reaches_the_ingress_that_answered(client: httpx.AsyncClient) -> None:
    for number in range(4):
        answer = await chat(client, f"user-{number}")
        body = {"request_id": answer.headers["x-request-id"], "rating": "up"}
        assert (await client.post("/v1/feedback", json=body)).json()["score"] == 1
    assert (await client.post("/v1/feedback", json={"request_id": "unknown", "score": 0.5})).status_code == 404
    (found,) = (await report(client))["experiments"]
    assert sum(one["metrics"]["feedback"]["count"] for one in found["variants"]) == 4


async def test_a_change_applies_without_a_restart_and_moves_users_to_the_variant_only(
    cluster: Cluster, client: httpx.AsyncClient
) -> None:
    before, processes = await variants(client, range(40)), await ingresses(client)
    cluster.deploy(experiment(percent=80))

    async def changed() -> bool:
        shares = [report_["variants"][1]["percent"] for report_ in (await report(client))["experiments"]]
        return shares == [80]

    await wait_until(lambda: _twice(changed))
    after = await variants(client, range(40))
    moved = {(one, other) for one, other in zip(before, after, strict=True) if one != other}
    assert moved == {("control", "candidate")}
    assert await ingresses(client) == processes


async def test_a_configuration_that_cannot_be_used_is_refused_and_the_earlier_one_stays(
    cluster: Cluster, client: httpx.AsyncClient
) -> None:
    before, processes = await variants(client, range(20)), await ingresses(client)
    cluster.deploy({"name": "chat", "variants": [CONTROL, {**CANDIDATE, "model": "nobody"}]})

    async def refused() -> bool:
        return set((await samples(client, "experiments_config_refused")).values()) == {1}

    await wait_until(refused)
    assert "there is no model nobody; the models are" in (await report(client))["error"]
    assert await variants(client, range(20)) == before
    assert await ingresses(client) == processes
    cluster.deploy(experiment())

    async def accepted() -> bool:
        return set((await samples(client, "experiments_config_refused")).values()) == {0}

    await wait_until(accepted)
    assert (await report(client))["error"] == ""


async def test_a_guard_stops_a_variant_that_fails_in_all_ingresses(cluster: Cluster, client: httpx.AsyncClient) -> None:
    """The engine of the variant fails on prompts that begin with "bad", so that Ray replaces its replica."""
    began = time.monotonic()
    statuses: list[tuple[str, int]] = []
    while set((await samples(client, "experiment_stopped")).values()) != {1}:
        # A guard for errors needs the requests of about 10 units of the variant, which has half of these.
        answers = await asyncio.gather(*(complete(client, f"user-{user}", "bad") for user in range(40)))
        statuses += [(answer.headers["x-variant"], answer.status_code) for answer in answers]
        assert time.monotonic() - began < 60, statuses
    assert {status for variant, status in statuses if variant == "control"} == {200}
    assert {variant for variant, status in statuses if status != 200} == {"candidate"}
    answers = await asyncio.gather(*(complete(client, f"user-{user}", "bad") for user in range(40)))
    assert {(answer.headers["x-variant"], answer.status_code) for answer in answers} == {("control", 200)}
    (found,) = (await report(client))["experiments"]
    assert found["stopped"].startswith("candidate: error_rate is ")
    logs = (cluster.head.folder / "ray/session_latest/logs/serve").glob("replica_*Ingress*.log")
    lines = [line for log in logs for line in log.read_text().splitlines() if "was stopped by a guard" in line]
    assert len(lines) >= 2, "each ingress logs the stop"
    printed = await asyncio.to_thread(_printed_report, cluster.head.proxy)
    assert "verdict: stopped by a guard: candidate: error_rate is " in printed


async def test_statistics_and_stops_remain_when_an_ingress_is_killed(
    cluster: Cluster, client: httpx.AsyncClient
) -> None:
    (before,) = (await report(client))["experiments"]
    processes = await ingresses(client)
    victim, _ = cluster.head.find("ServeReplica:serve_app:Ingress")
    victim.kill()

    async def replaced() -> bool:
        try:
            return len(await ingresses(client) - processes) == 1 and len(await ingresses(client)) == 2
        except httpx.TransportError:
            return False

    await wait_until(replaced, seconds=60)
    for _ in range(4):  # of both ingresses
        (after,) = (await report(client))["experiments"]
        assert (after["stopped"], after["began"]) == (before["stopped"], before["began"])
        assert [one["outcomes"] for one in after["variants"]] == [one["outcomes"] for one in before["variants"]]
    assert set(await variants(client, range(20))) == {"control"}


def _printed_report(url: str) -> str:
    command = [sys.executable, "-m", "serve_app", "experiments", "report", "--url", url]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


async def _twice(condition: Any) -> bool:
    """Whether a condition holds for both ingresses, which answer calls in a random order."""
    return all([await condition() for _ in range(6)])
