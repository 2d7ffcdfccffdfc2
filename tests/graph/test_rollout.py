"""New versions of the configuration under load: a good one replaces the old one, a bad one is taken back."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from tests.graph.cluster import Head, node_environment
from tests.graph.service import Config, model_config, wait_until
from tests.graph.streams import ShortCalls, running, toy_calls

pytestmark = [pytest.mark.ray, pytest.mark.ci, pytest.mark.timeout(300)]

PATIENT: Config = {"num_replicas": 2, "graceful_shutdown_timeout_s": 60}


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with node_environment("haproxy") as environment, Head(environment, "--num-cpus=4") as head:
        head.wait_until_started()
        yield head


@pytest.fixture
async def client(head: Head) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=head.proxy, timeout=60, limits=limits) as client:
        yield client


def toy(source: str = "builtin:toy?step_ms=20&load_s=1", max_running: int = 64) -> Config:
    return model_config("toy", source, PATIENT, engine={"max_running": max_running})


def file_of(head: Head, *models: Config) -> Path:
    return head.write(*models, model_config("quick"), ingress={**PATIENT, "num_replicas": 1})


async def deploy(head: Head, file: Path) -> subprocess.CompletedProcess[str]:
    """`python -m serve_app deploy`."""
    command = ("serve_app", "deploy", "--config", str(file), "--address", head.dashboard)
    return await asyncio.to_thread(head.tool, *command)


def replicas(head: Head) -> set[psutil.Process]:
    return {*head.find(":Ingress"), *head.find(":model-toy")}


async def test_a_rolling_update_under_2000_requests_fails_none_and_cuts_no_stream(
    head: Head, client: httpx.AsyncClient
) -> None:
    """Other weights and another setting of the engine: every model replica and the ingress is replaced."""
    first = await deploy(head, file_of(head, toy()))
    assert first.returncode == 0, first.stderr
    old = replicas(head)
    assert len(old) == 3
    streams = [call for _ in range(6) for call in toy_calls(600)]
    expected = await asyncio.gather(*(call.run(client) for call in toy_calls(600, "quick")))
    async with ShortCalls(client, parallel=16) as short:
        early = await running(client, streams[:12], events=3)
        began = time.monotonic()
        rollout = asyncio.create_task(deploy(head, file_of(head, toy("builtin:toy?step_ms=21&load_s=1", 63))))
        await wait_until(lambda: started(head, old), seconds=60)
        late = await running(client, streams[12:], events=1)
        done = await rollout
        seconds = time.monotonic() - began

        async def finished() -> bool:
            return short.answered >= 2000 and not any(process.is_running() for process in old)

        await wait_until(finished, seconds=90)
        found = await asyncio.gather(*early, *late)
    print(f"{short.summary}; {len(streams)} streams; `deploy` took {seconds:.1f} s")
    assert done.returncode == 0, done.stderr
    assert not short.failures
    assert found == expected * 6
    # The processes of all new replicas start on the cores of the old ones.
    assert max(call.longest_gap for call in streams) <= 10
    assert not replicas(head) & old


async def started(head: Head, old: set[psutil.Process]) -> bool:
    return bool(replicas(head) - old)


async def test_a_bad_version_is_refused_and_the_old_one_restored(head: Head, client: httpx.AsyncClient) -> None:
    good = file_of(head, toy())
    first = await deploy(head, good)
    assert first.returncode == 0, first.stderr
    old = set(head.find(":model-toy"))
    calls = [call for _ in range(2) for call in toy_calls(1000)]
    expected = await asyncio.gather(*(call.run(client) for call in toy_calls(1000, "quick")))
    tasks = await running(client, calls, events=3)
    async with ShortCalls(client) as short:
        began = time.monotonic()
        invalid = await deploy(head, file_of(head, {**toy(), "sauce": 1}))
        assert (invalid.returncode, old) == (1, set(head.find(":model-toy")))
        assert "applications.0.args.models.0.sauce: unknown key" in invalid.stderr
        print(f"an invalid file was refused after {time.monotonic() - began:.1f} s")
        began = time.monotonic()
        bad = await deploy(head, file_of(head, toy("builtin:toy?load_s=never")))
        print(f"a model that cannot be loaded was taken back after {time.monotonic() - began:.1f} s")
        found = await asyncio.gather(*tasks)
    assert bad.returncode == 1
    assert "ValueError: could not convert string to float: 'never'" in bad.stderr
    assert "Traceback" not in bad.stderr
    assert bad.stderr.strip().endswith("The previous configuration was restored.")
    print(short.summary)
    assert not short.failures
    assert found == expected * 2
    assert set(head.find(":model-toy")) >= old, "the old replicas served throughout"
    # A replica that is lost later is replaced by one that can start.
    lost = old.pop()
    lost.kill()

    async def replaced() -> bool:
        now = head.find(":model-toy")
        return len(now) == 2 and lost not in now

    await wait_until(replaced, seconds=60)
    assert (await client.post("/generate", json={"model": "toy", "prompt": "ab", "max_tokens": 2})).json()[
        "text"
    ] == "ab"


async def test_another_number_of_replicas_under_deployments_restarts_nothing(
    head: Head, client: httpx.AsyncClient
) -> None:
    """Ray gives all deployments of an application a new version when `args` change, but not for `deployments`."""
    file = file_of(head, toy())
    assert (await deploy(head, file)).returncode == 0
    old = replicas(head)
    document = yaml.safe_load(file.read_text())
    document["applications"][0]["deployments"] = [{"name": "model-toy", "num_replicas": 3}]
    file.write_text(yaml.safe_dump(document))
    done = await deploy(head, file)
    assert done.returncode == 0, done.stderr
    assert len(head.find(":model-toy")) == 3
    assert replicas(head) > old
