"""Tests that measure times have the event loop that the suite has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from perf.loop import new_loop


def pytest_asyncio_loop_factories(config: Any, item: Any) -> dict[str, Callable[[], Any]]:
    return {"fine": new_loop}
