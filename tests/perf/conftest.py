"""Tests that measure times use the suite's event loop; all of them share one process of mock servers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from perf import loop
from perf.loop import new_loop
from perf.records import Record
from tests.perf.mock_host import MockHost, mock_host
from tests.perf.simulation import client, workload


def pytest_asyncio_loop_factories(config: Any, item: Any) -> dict[str, Callable[[], Any]]:
    return {"precise": new_loop}


@pytest.fixture(scope="session")
def mock() -> Iterator[MockHost]:
    """`mock(ttft_s=..., itl_s=...)` starts a mock server and returns its URL."""
    with mock_host() as start:
        yield start


@pytest.fixture
def awake(mock: MockHost) -> Iterator[None]:
    """Sends one request after the other from a second thread of this process to a mock server without delays.

    A virtual machine that was idle for 10 ms runs its next 10 ms two to five times slower. Tests of times that are
    exact to a few ms would measure that instead of the client.
    """
    url, done = mock(ttft_s=0.0, itl_s=0.0), threading.Event()

    async def send() -> None:
        requests = workload(max_tokens=2).requests("awake")
        async with client(url) as one:
            while not done.is_set():
                await one.send(Record(0.0), next(requests))

    thread = threading.Thread(target=loop.run, args=(send(),))
    thread.start()
    yield
    done.set()
    thread.join()
