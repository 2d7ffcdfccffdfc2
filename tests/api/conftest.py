from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest

from serve_app.api.app import create_app

from .scripted import ScriptedEngine, ScriptedTelemetry, app_config


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def telemetry() -> ScriptedTelemetry:
    return ScriptedTelemetry()


@pytest.fixture
def heartbeat_s() -> float:
    """The heartbeat of a silent stream. It is longer than a test, unless the test is marked `with_heartbeats`."""
    return 10.0


@pytest.fixture
async def client(
    engine: ScriptedEngine, telemetry: ScriptedTelemetry, heartbeat_s: float
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application."""
    config = app_config(warm_wait_s=30, heartbeat_s=heartbeat_s, max_body_bytes=20_000, max_batch_items=50)
    transport = httpx.ASGITransport(create_app(engine, telemetry, config))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client
