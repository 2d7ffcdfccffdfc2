"""LoRA adapters that are loaded at run time, in a service with two ingresses and two replicas of the model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.graph.service import Service, http_client, model_config, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.ci, pytest.mark.timeout(180)]

# So many requests, each by a connection of its own, reach both ingresses and both replicas.
MANY = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[Service]:
    model = model_config("toy", deployment={"num_replicas": 2}, lora={"allow": [str(folder)], "max_loaded": 2})
    with Service([model], ingress={"num_replicas": 2}, heartbeat_s=0.3) as service:
        service.wait_until_ready()
        yield service


@pytest.fixture
async def client(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    async with http_client(service) as client:
        yield client


async def test_a_loaded_adapter_is_known_everywhere_and_survives_ingresses_and_replicas(
    client: httpx.AsyncClient, service: Service, folder: Path
) -> None:
    await load(client, make_adapter(folder / "one", 1))
    assert await texts(client, "adapter") == {"bcd"}
    assert await texts(client, "toy") == {"abc"}
    await load(client, make_adapter(folder / "two", 2), load_inplace=True)
    assert await texts(client, "adapter") == {"cde"}, "no answer of the adapter that was replaced"

    for part, count in ((":Ingress", 2), (":model-toy", 2)):
        replicas = {process.pid for process in service.find(part)}
        assert len(replicas) == count
        service.find(part)[0].kill()
        await wait_until(partial(replaced, service, part, replicas))
        await wait_until(lambda: all_answer(client), seconds=40)
        assert await texts(client, "adapter") == {"cde"}, part

    answer = await client.post("/v1/unload_lora_adapter", json={"lora_name": "adapter"})
    assert answer.status_code == 200, answer.text
    assert {answer.status_code for answer in await many(client, "adapter")} == {404}


async def test_a_replica_refuses_files_that_changed_after_they_were_loaded(
    client: httpx.AsyncClient, folder: Path
) -> None:
    """Two replicas never answer one name with different weights."""
    source = make_adapter(folder / "changing", 1)
    await load(client, source)
    make_adapter(source, 3)
    found = await many(client, "adapter")
    assert {answer.json()["text"] for answer in found if answer.status_code == 200} <= {"bcd"}
    refused = [answer for answer in found if answer.status_code != 200]
    assert {answer.status_code for answer in refused} <= {503}
    assert all("load it again with /v1/load_lora_adapter" in answer.text for answer in refused)
    await load(client, source, load_inplace=True)
    assert await texts(client, "adapter") == {"def"}


def make_adapter(folder: Path, shift: int) -> Path:
    """An adapter of the toy model, which adds `shift` to each token, here a byte."""
    folder.mkdir(exist_ok=True)
    (folder / "shift").write_text(str(shift))
    return folder


async def load(client: httpx.AsyncClient, source: Path, **more: Any) -> None:
    body = {"lora_name": "adapter", "lora_path": str(source), **more}
    answer = await client.post("/v1/load_lora_adapter", json=body)
    assert answer.status_code == 200, answer.text


async def many(client: httpx.AsyncClient, model: str) -> list[httpx.Response]:
    body = {"model": model, "prompt": "abc", "max_tokens": 3}
    return await asyncio.gather(*(client.post("/generate", json=body) for _ in range(MANY)))


async def texts(client: httpx.AsyncClient, model: str) -> set[str]:
    found = await many(client, model)
    assert {answer.status_code for answer in found} == {200}, {answer.text for answer in found}
    return {answer.json()["text"] for answer in found}


async def all_answer(client: httpx.AsyncClient) -> bool:
    try:
        return {answer.status_code for answer in await many(client, "adapter")} == {200}
    except httpx.TransportError:
        return False


async def replaced(service: Service, part: str, old: set[int]) -> bool:
    """Whether two processes run again, of which one is new."""
    now = {process.pid for process in service.find(part)}
    return len(now) == len(old) and now != old
