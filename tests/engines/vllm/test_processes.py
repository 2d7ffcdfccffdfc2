"""What happens to the requests of vLLM's engine when one of its processes is killed or hangs."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from serve_app.engines.protocol import EngineStalled, ReplicaEngine
from serve_app.errors import NotReady
from tests.engines.subjects import MAX_RUNNING, Subject, make_engine
from tests.models.concurrent_load import read

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600), pytest.mark.vllm, pytest.mark.long]


def shared_memory() -> set[Path]:
    return set(Path("/dev/shm").iterdir())


@pytest_asyncio.fixture(loop_scope="module")
async def engine() -> AsyncIterator[ReplicaEngine]:
    engine = make_engine("vllm")
    await asyncio.to_thread(engine.start)
    yield engine
    await asyncio.to_thread(engine.stop)


@pytest.mark.parametrize("victim", ["VLLM::EngineCore", "VLLM::Worker"])
async def test_a_killed_process_ends_all_requests_within_5_s(engine: ReplicaEngine, victim: str) -> None:
    segments = shared_memory()
    subject = Subject("vllm", engine)
    streams = [subject.stream(max_tokens=400, ignore_eos=True) for _ in range(MAX_RUNNING + 2)]
    assert await subject.admit(*streams) == [None] * len(streams)
    await anext(streams[0].chunks(0.0))
    own = psutil.Process().children(recursive=True)
    (process,) = [child for child in own if victim in " ".join(child.cmdline())]
    process.send_signal(signal.SIGKILL)
    began = time.monotonic()
    for error in await asyncio.gather(*map(read, streams), return_exceptions=True):
        assert isinstance(error, NotReady), error
    assert time.monotonic() - began <= 5
    with pytest.raises(EngineStalled):
        engine.check()
    assert isinstance(await subject.refusal(), NotReady)
    await asyncio.to_thread(engine.stop)
    _, alive = psutil.wait_procs(own, timeout=5)
    assert [child for child in alive if "VLLM" in " ".join(child.cmdline())] == []
    assert shared_memory() - segments == set()


async def test_a_hanging_engine_is_noticed(engine: ReplicaEngine) -> None:
    subject = Subject("vllm", engine)
    stream = subject.stream(max_tokens=400, ignore_eos=True)
    assert await subject.admit(stream) == [None]
    await anext(stream.chunks(0.0))
    own = psutil.Process().children(recursive=True)
    (core,) = [child for child in own if "VLLM::EngineCore" in " ".join(child.cmdline())]
    core.suspend()
    try:
        engine.step_age()
        await asyncio.sleep(2)
        assert engine.step_age() >= 1
    finally:
        core.resume()
    stream.close()
    async with asyncio.timeout(10):
        while engine.step_age() > 0:  # noqa: ASYNC110 - another process's state
            await asyncio.sleep(0.05)
