"""Tests that measure times use the suite's event loop; all of them share one process of mock servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from perf.loop import new_loop
from tests.perf.mock_host import MockHost, mock_host


def pytest_asyncio_loop_factories(config: Any, item: Any) -> dict[str, Callable[[], Any]]:
    return {"precise": new_loop}


@pytest.fixture(scope="session")
def mock() -> Iterator[MockHost]:
    """`mock(ttft_s=..., itl_s=...)` starts a mock server and returns its URL."""
    with mock_host() as start:
        yield start
