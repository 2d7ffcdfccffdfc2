"""The same file on a Ray that somebody else started: joined, deployed to, with (fake) GPUs, rolled out anew."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from serve_app.deployments import haproxy
from tests.graph.house import (
    FRONTS,
    Config,
    Program,
    Service,
    frames_of,
    free_port,
    model,
    serve_file,
    state,
    until,
)

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

PATIENT: Config = {"graceful_shutdown_timeout_s": 60}


class Head(Program):
    """`ray start --head` with two GPUs that do not exist, one of them an A10G by its label."""

    def __init__(self, **environment: str) -> None:
        self.dashboard, self.port = free_port(), free_port()
        super().__init__(
            [
                *("ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=4", "--num-gpus=2"),
                *("--node-ip-address=127.0.0.1", f"--port={free_port()}", f"--dashboard-port={self.dashboard}"),
                *('--resources={"accelerator_type:A10G": 1}', "--object-store-memory=100000000"),
            ],
            RAY_USAGE_STATS_ENABLED="0",
            **environment,
        )
        self.url = f"http://127.0.0.1:{self.port}"

    def serve(self, *command: str) -> subprocess.CompletedProcess[str]:
        """The `serve` tool, against this cluster."""
        return subprocess.run(
            [sys.executable, "-m", "ray.serve.scripts", *command, f"--address=http://127.0.0.1:{self.dashboard}"],
            capture_output=True, text=True, timeout=60, check=False, env=self.environment,
        )  # fmt: skip

    def deploy(self, *models: Config, **options: Any) -> None:
        file = self.folder / "serve_config.yaml"
        file.write_text(yaml.safe_dump(serve_file(models, port=self.port, **options)))
        done = self.serve("deploy", str(file))
        assert done.returncode == 0, done.stderr

    async def actors(self) -> dict[str, dict[str, float]]:
        """What each live replica reserves of the cluster, by deployment."""
        headers = {"authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        params = {"detail": "true", "filter_keys": "state", "filter_predicates": "=", "filter_values": "ALIVE"}
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.dashboard}", headers=headers) as client:
            answer = (await client.get("/api/v0/actors", params=params, timeout=30)).json()
        rows: list[dict[str, Any]] = answer["data"]["result"]["result"]
        return {row["name"].split("#")[1]: row["required_resources"] for row in rows if "#model-" in row["name"]}


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with Head() as head:
        head.wait_for("Ray runtime started")
        yield head


@pytest.fixture
async def client(head: Head) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=head.url, timeout=60) as client:
        yield client


async def answers(client: httpx.AsyncClient, name: str) -> bool:
    """Whether this model gives the toy's answer. Before the proxy is there, nobody answers."""
    try:
        answer = await client.post("/generate", json={"model": name, "prompt": "abc", "max_tokens": 6})
    except httpx.TransportError:
        return False
    return answer.status_code == 200 and answer.json()["text"] == "abcabc"


def test_a_running_ray_is_joined_and_outlives_the_service(head: Head) -> None:
    environment = {name: head.environment[name] for name in ("RAY_TMPDIR", "RAY_AUTH_TOKEN")}
    with Service([model("toy")], "--ray-address", "auto", environment=environment) as service:
        service.wait_for("answers on")
        assert httpx.post(service.url + "/generate", json={"prompt": "ab", "max_tokens": 2}).json()["text"] == "ab"
        with Service([model("other")], "--ray-address", "auto", environment=environment) as second:
            assert second.process.wait(timeout=60) == 1
            assert "Ray Serve runs on the cluster" in second.said()
            assert "serve deploy" in second.said()
        assert service.interrupt() == 0
    assert head.process.poll() is None
    assert not head.find("ServeReplica")


async def test_the_file_deploys_with_the_tool_and_gpus_go_where_it_says(head: Head, client: httpx.AsyncClient) -> None:
    head.deploy(
        model("whole", resources={"num_gpus": 1, "accelerator_type": "A10G"}),
        model("half", resources={"num_gpus": 0.5}),
        model("other-half", resources={"num_gpus": 0.5}),
        model("none"),
        model("too-many", resources={"num_gpus": 1}),
    )

    async def all_answer() -> bool:
        return all([await answers(client, name) for name in ("whole", "half", "other-half", "none")])

    await until(all_answer, seconds=90, every_s=0.5)
    placed = await head.actors()
    assert {name: needs.get("GPU", 0) for name, needs in placed.items()} == {
        "model-whole": 1,
        "model-half": 0.5,
        "model-other-half": 0.5,
        "model-none": 0,
    }
    assert "accelerator_type:A10G" in placed["model-whole"]
    # No GPU is left for the last one: the others serve, and its callers learn that it is not there.
    assert await state(client, "too-many") == "loading"
    refused = await client.post("/generate", json={"model": "too-many", "prompt": "abc"})
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1


async def test_a_rollout_cuts_no_stream(head: Head, client: httpx.AsyncClient) -> None:
    """The second deployment changes the model's engine: its replica and the ingress are replaced, and none is away."""
    await roll_out(head, client, ingress=PATIENT)


@pytest.mark.parametrize("front", FRONTS)
async def test_a_rollout_of_a_fused_model_cuts_no_stream(front: str) -> None:
    """On a cluster whose operator puts HAProxy in front, and on one as Ray comes."""
    binary = haproxy.find()
    assert binary is not None
    with tempfile.TemporaryDirectory(prefix="sa") as folder:
        environment = haproxy.environment(binary, Path(folder), 60) if front == "haproxy" else {}
        with Head(**environment) as head:
            head.wait_for("Ray runtime started")
            async with httpx.AsyncClient(base_url=head.url, timeout=60) as client:
                await roll_out(head, client, fused=True)
                assert bool(head.find("haproxy.cfg")) == (front == "haproxy")


async def roll_out(head: Head, client: httpx.AsyncClient, **options: Any) -> None:
    """Streams of 8 s begin all the while, so that many are under way whenever it is that the replicas change."""

    def deploy(max_running: int) -> None:
        source = "builtin:toy?step_ms=100&load_s=2"
        head.deploy(model("rolling", source, PATIENT, engine={"max_running": max_running}), **options)

    def replicas() -> set[psutil.Process]:
        return {*head.find(":Ingress"), *head.find(":model-rolling")}

    async def stream() -> list[dict[str, Any]]:
        body = {"model": "rolling", "prompt": "abc", "max_tokens": 81}
        async with client.stream("POST", "/generate_stream", json=body) as response:
            return [frame async for frame in frames_of(response)]

    async def call() -> float:
        began = time.monotonic()
        answer = await client.post("/generate", json={"model": "rolling", "prompt": "abc", "max_tokens": 6})
        assert answer.status_code == 200, answer.text
        assert answer.json()["text"] == "abcabc"
        return time.monotonic() - began

    await asyncio.to_thread(deploy, 32)
    await until(lambda: answers(client, "rolling"), seconds=90, every_s=0.5)
    old = replicas()
    assert old
    streams = [asyncio.create_task(stream())]
    await asyncio.sleep(1)
    deployed = asyncio.create_task(asyncio.to_thread(deploy, 33))
    took, came = [], False
    end = time.monotonic() + 150
    while any(process.is_running() for process in old):
        assert time.monotonic() < end, f"still there: {old}"
        came = came or bool(replicas() - old)
        took.append(await call())
        streams.append(asyncio.create_task(stream()))
    await deployed
    for frames in await asyncio.gather(*streams):
        assert frames[-1]["finished"] is True
        assert frames[-1]["text"] == "abc" * 27
    assert came, "the new replica came while the old one was still answering"
    assert max(took) < 5, "somebody had to wait for the old one to end"


async def test_a_faulty_file_is_refused_by_the_tool_with_every_fault(head: Head, tmp_path: Path) -> None:
    document = serve_file([{**model("toy"), "sauce": 1}], port=head.port)
    document["applications"][0]["args"]["limits"] = {"warm_wait_s": -1}
    file = tmp_path / "faulty.yaml"
    file.write_text(yaml.safe_dump(document))
    head.serve("deploy", str(file))

    async def said() -> str:
        status = await asyncio.to_thread(head.serve, "status")
        return status.stdout if "DEPLOY_FAILED" in status.stdout else ""

    text = await until(said, seconds=60, every_s=0.5)
    assert "sauce" in text
    assert "warm_wait_s" in text
