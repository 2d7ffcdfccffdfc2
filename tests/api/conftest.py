from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest

from serve_app.api.app import create_app

from .scripted import ScriptedGateway, app_config


@pytest.fixture
def gateway() -> ScriptedGateway:
    return ScriptedGateway()


@pytest.fixture
async def client(gateway: ScriptedGateway) -> AsyncIterator[httpx.AsyncClient]:
    """Silence makes a heartbeat after 20 ms."""
    app = create_app(gateway, app_config(warm_wait_s=30, heartbeat_s=0.02, max_body_bytes=20_000, max_batch_items=50))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client
