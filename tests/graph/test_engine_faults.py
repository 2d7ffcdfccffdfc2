"""Engines that fail or hang: only the requests that cause it end with an error, and the service recovers."""

from __future__ import annotations

import asyncio
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from shutil import disk_usage

import httpx
import pytest

from tests.graph.service import Service, http_client, metric_totals, model_config, wait_until
from tests.graph.streams import Call, Json, native, running
from tests.small_disk import fill, small_disk

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


def body(model: str, prompt: str, tokens: int) -> Json:
    return {"model": model, "prompt": prompt, "max_tokens": tokens}


async def test_requests_that_the_model_cannot_compute_fail_alone(client: httpx.AsyncClient) -> None:
    healthy = [Call("/generate_stream", body("victim", prompt, 60), native) for prompt in "abcdef"]
    tasks = await running(client, healthy, events=3)
    failing = await asyncio.gather(
        *(client.post("/generate", json=body("victim", prompt, 9)) for prompt in ("bad", "nan", "nancy"))
    )
    for answer in failing:
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "internal_error"
    assert "NaN" in failing[1].text
    for call, (text, reason, _) in zip(healthy, await asyncio.gather(*tasks), strict=True):
        assert (text, reason) == (call.body["prompt"] * 60, "length")

    async def counted() -> bool:
        totals = await metric_totals(client)
        return totals["engine_failed_sequences_total", "victim"] >= 3

    await wait_until(counted)
    assert (await metric_totals(client))["engine_failed_steps_total", "victim"] >= 2


async def test_a_replica_whose_engine_hangs_is_replaced_and_its_stream_goes_on(
    client: httpx.AsyncClient, toy_service: Service, hang_file: Path
) -> None:
    """The limit of a step is 3 s here."""
    (replica,) = toy_service.find("model-victim")
    streams = [Call("/generate_stream", body("victim", "ab", 100), native)]
    (task,) = await running(client, streams, events=3)
    await asyncio.to_thread(hang_file.touch)
    text, reason, _ = await task
    assert (text, reason) == ("ab" * 50, "length")
    assert not replica.is_running()
    assert (await metric_totals(client))["engine_hangs_total", "victim"] == 1
    print(f"longest gap {streams[0].longest_gap:.1f} s")
    assert streams[0].longest_gap <= 45


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, Path]]:
    """Two replicas, and the file that lets one hang. Health checks take a third of the shipped limit at most."""
    file = tmp_path_factory.mktemp("pair") / "hang"
    two = {"num_replicas": 2, "max_ongoing_requests": 32, "health_check_period_s": 5, "health_check_timeout_s": 10}
    with Service([model_config("toy", f"builtin:toy?step_ms=20&hangs_if={file}", two)]) as service:
        service.wait_until_ready()
        yield service, file


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param("step waits", marks=pytest.mark.ci),
        pytest.param("step holds the lock", marks=pytest.mark.ci),
        pytest.param("process stopped", marks=pytest.mark.long),
    ],
)
async def test_the_streams_of_a_hanging_replica_go_on_within_15_s_and_it_is_replaced_within_45_s(
    pair: tuple[Service, Path], fault: str
) -> None:
    service, file = pair
    async with http_client(service) as client:
        before = service.find("model-toy")
        calls = [Call("/generate_stream", body("toy", prompt, 400), native) for prompt in "abcdefghijklmnop"]
        tasks = await running(client, calls, events=3)
        began = time.monotonic()
        if fault == "process stopped":
            before[0].send_signal(signal.SIGSTOP)
        else:
            file.write_text("lock" if fault == "step holds the lock" else "")
        for call, (text, reason, _) in zip(calls, await asyncio.gather(*tasks), strict=True):
            assert (text, reason) == (call.body["prompt"] * 400, "length")
        gap = max(call.longest_gap for call in calls)

        async def replaced() -> bool:
            now = [one for one in service.find("model-toy") if one.is_running()]
            ready = (await metric_totals(client))["ready_replicas", "toy"]
            return len(now) == 2 and now != before and ready == 2

        await wait_until(replaced, seconds=60)
        seconds = time.monotonic() - began
        print(f"{fault}: longest gap {gap:.1f} s, replaced after {seconds:.1f} s")
        assert gap <= 15
        assert seconds <= 45


@pytest.mark.long
async def test_a_full_disk_interrupts_no_request() -> None:
    """Ray's folder, with the logs and sockets of all processes, is on a file system without space."""
    with (
        tempfile.TemporaryDirectory(prefix="fd") as parent,  # a short path, because it is a part of those of sockets
        small_disk(Path(parent) / "d", "256m") as disk,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(tempfile, "tempdir", str(disk))
        models = [model_config("toy", "builtin:toy?step_ms=20&fails_on=bad")]
        with Service(models, telemetry={"log_format": "json"}) as service:
            service.wait_until_ready()
            async with http_client(service) as client:
                calls = [Call("/generate_stream", body("toy", prompt, 200), native) for prompt in "abcdefgh"]
                tasks = await running(client, calls, events=3)
                filler = await asyncio.to_thread(fill, disk)
                for call, (text, reason, _) in zip(calls, await asyncio.gather(*tasks), strict=True):
                    assert (text, reason) == (call.body["prompt"] * 200, "length")
                for number in range(40):
                    failing = number % 4 == 0  # its stack is logged
                    answer = await client.post("/generate", json=body("toy", "bad" if failing else "abc", 3))
                    assert answer.status_code == (500 if failing else 200), answer.text
                assert disk_usage(disk).free == 0
                await asyncio.to_thread(filler.unlink)
                answer = await client.post("/generate", json=body("toy", "abc", 3))
                assert answer.json()["text"] == "abc"
