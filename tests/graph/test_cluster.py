"""The service on a Ray cluster that runs already: joined, deployed to with `serve deploy`, rolled out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from tests.graph.cluster import Head, node_environment
from tests.graph.service import (
    Config,
    Service,
    metric_totals,
    model_config,
    model_state,
    model_status,
    serve_config,
    stream_events,
    wait_until,
)

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

PATIENT: Config = {"graceful_shutdown_timeout_s": 60}


@pytest.fixture(
    scope="module",
    params=[pytest.param("haproxy", marks=pytest.mark.ci), pytest.param("python", marks=pytest.mark.long)],
)
def head(request: pytest.FixtureRequest) -> Iterator[Head]:
    """A node with two GPUs that do not exist; one of them has the label A10G. The two heads differ in their proxy."""
    options = ("--num-cpus=4", "--num-gpus=2", '--resources={"accelerator_type:A10G": 1}')
    with node_environment(request.param) as environment, Head(environment, *options) as head:
        head.wait_until_started()
        yield head


@pytest.fixture
async def client(head: Head) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=head.proxy, timeout=60) as client:
        yield client


async def answers(client: httpx.AsyncClient, name: str) -> bool:
    """Whether this model answers. Before the proxy runs, nothing listens."""
    try:
        answer = await client.post("/generate", json={"model": name, "prompt": "abc", "max_tokens": 6})
    except httpx.TransportError:
        return False
    return answer.status_code == 200 and answer.json()["text"] == "abcabc"


OTHER_APPLICATION = """
from ray import init, serve

@serve.deployment(ray_actor_options={"num_cpus": 0.01})
class Other:
    async def __call__(self, request):
        return "other"

init(log_to_driver=False)
serve.run(Other.bind(), name="other", route_prefix="/other")
"""


def test_ctrl_c_on_a_joined_cluster_deletes_this_application_only(head: Head) -> None:
    """The cluster and an application that others have deployed go on."""
    environment = {name: head.environment[name] for name in ("RAY_TMPDIR", "RAY_AUTH_TOKEN")}
    with Service([model_config("toy")], "--ray-address", "auto", environment=environment) as service:
        service.wait_until_ready()
        answer = httpx.post(service.url + "/generate", json={"prompt": "ab", "max_tokens": 2})
        assert answer.json()["text"] == "ab"
        with Service([model_config("other")], "--ray-address", "auto", environment=environment) as second:
            head.python(OTHER_APPLICATION)
            assert second.process.wait(timeout=60) == 1
            assert "Ray Serve runs on the cluster" in second.output()
            assert "serve deploy" in second.output()
        assert httpx.get(service.url + "/other").text == "other"
        assert service.interrupt() == 0
        assert httpx.get(service.url + "/other").text == "other"
        assert httpx.get(service.url + "/health").status_code == 404
    assert head.process.poll() is None
    (replica,) = head.find("ServeReplica")
    assert "ServeReplica:other" in " ".join(replica.cmdline())
    done = head.serve("shutdown", "-y")
    assert done.returncode == 0, done.stderr


def test_ctrl_c_on_a_joined_cluster_shuts_serve_down_if_no_application_is_left(head: Head) -> None:
    environment = {name: head.environment[name] for name in ("RAY_TMPDIR", "RAY_AUTH_TOKEN")}
    with Service([model_config("toy")], "--ray-address", "auto", environment=environment) as service:
        service.wait_until_ready()
        assert service.interrupt() == 0
    assert head.process.poll() is None
    assert not head.find("ServeReplica")
    assert not head.find("ServeController")


async def test_serve_deploy_places_the_models_on_gpus(head: Head, client: httpx.AsyncClient) -> None:
    head.deploy(
        model_config("whole", resources={"num_gpus": 1, "accelerator_type": "A10G"}),
        model_config("half", resources={"num_gpus": 0.5}),
        model_config("other-half", resources={"num_gpus": 0.5}),
        model_config("none"),
        model_config("too-many", resources={"num_gpus": 1}),
    )

    async def all_answer() -> bool:
        return all([await answers(client, name) for name in ("whole", "half", "other-half", "none")])

    await wait_until(all_answer, seconds=90, every_s=0.5)
    placed = await head.actors()
    assert {name: needs.get("GPU", 0) for name, needs in placed.items()} == {
        "model-whole": 1,
        "model-half": 0.5,
        "model-other-half": 0.5,
        "model-none": 0,
    }
    assert "accelerator_type:A10G" in placed["model-whole"]
    # No GPU is left for the last model. The others serve, and requests to the last one get 503.
    assert await model_state(client, "too-many") == "loading"
    refused = await client.post("/generate", json={"model": "too-many", "prompt": "abc"})
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1


async def test_a_rollout_cuts_no_stream_and_counts_only_routed_replicas_as_ready(
    head: Head, client: httpx.AsyncClient
) -> None:
    """The second deployment changes the engine of the model and so replaces its replica and the ingress.

    Streams of 6 s begin throughout, so that many are under way whenever replicas change. The old model replica, which
    finishes its streams, is not ready any more.
    """

    def deploy(max_running: int) -> None:
        source = "builtin:toy?step_ms=100&load_s=2"
        head.deploy(model_config("rolling", source, PATIENT, engine={"max_running": max_running}), ingress=PATIENT)

    def replicas() -> set[psutil.Process]:
        return {*head.find(":Ingress"), *head.find(":model-rolling")}

    async def stream() -> list[dict[str, Any]]:
        body = {"model": "rolling", "prompt": "abc", "max_tokens": 60}
        async with client.stream("POST", "/generate_stream", json=body) as response:
            return [event async for event in stream_events(response)]

    async def call() -> float:
        began = time.monotonic()
        answer = await client.post("/generate", json={"model": "rolling", "prompt": "abc", "max_tokens": 6})
        assert answer.status_code == 200, answer.text
        assert answer.json()["text"] == "abcabc"
        return time.monotonic() - began

    await asyncio.to_thread(deploy, 32)
    await wait_until(lambda: answers(client, "rolling"), seconds=90, every_s=0.5)
    old = replicas()
    assert len(head.find(":model-rolling")) == 1
    streams = [asyncio.create_task(stream())]
    await asyncio.sleep(1)
    deployed = asyncio.create_task(asyncio.to_thread(deploy, 33))
    seconds, ready, both = [], list[tuple[float, float]](), False
    end = time.monotonic() + 150
    while any(process.is_running() for process in old):
        assert time.monotonic() < end, f"still running: {old}"
        both = both or bool(replicas() - old)
        seconds.append(await call())
        totals = await metric_totals(client)
        ready.append((len(head.find(":model-rolling")), totals["ready_replicas", "rolling"]))
        streams.append(asyncio.create_task(stream()))
    await deployed
    for events in await asyncio.gather(*streams):
        assert events[-1]["finished"] is True
        assert events[-1]["text"] == "abc" * 20
    assert both, "the new replicas start while the old ones still run"
    assert max(seconds) < 5, "no request waits for the end of the old replicas"
    assert (2, 1) in ready, "both replicas run, and one of them is ready"
    assert {count for _, count in ready} <= {0, 1}, ready
    assert (await model_status(client, "rolling"))["state"] == "ready"


async def test_serve_status_states_every_fault_of_a_faulty_file(head: Head, tmp_path: Path) -> None:
    document = serve_config([{**model_config("toy"), "sauce": 1}], port=head.ports.http)
    document["applications"][0]["args"]["limits"] = {"warm_wait_s": -1}
    file = tmp_path / "faulty.yaml"
    file.write_text(yaml.safe_dump(document))
    head.serve("deploy", str(file))

    async def failure() -> str:
        status = await asyncio.to_thread(head.serve, "status")
        return status.stdout if "DEPLOY_FAILED" in status.stdout else ""

    text = await wait_until(failure, seconds=60, every_s=0.5)
    assert "sauce" in text
    assert "warm_wait_s" in text
