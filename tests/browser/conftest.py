"""Chromium, and two services to point it at: the whole one over toy models, and the front door over a script."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
import uvicorn
from playwright.async_api import Browser, async_playwright

from serve_app.api.app import create_app
from tests.api.scripted import ScriptedGateway, app_config
from tests.browser.visitor import Visitor
from tests.graph.house import Service, free_port, model, until


@pytest.fixture(scope="package")
def service() -> Iterator[Service]:
    """Tokens come slowly enough to be seen one after another."""
    engine = {"max_context": 4096}
    models = [
        model("quick", "builtin:toy?step_ms=15", engine=engine),
        model("slow", "builtin:toy?step_ms=80", engine=engine),
    ]
    with Service(models, heartbeat_s=0.3) as service:
        service.wait_for("answers on")
        yield service


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def chromium() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=shutil.which("chromium"))
        yield browser
        await browser.close()


@pytest_asyncio.fixture(loop_scope="session")
async def visitor(chromium: Browser, service: Service) -> AsyncIterator[Visitor]:
    """Somebody at the whole service, who finds nothing wrong with the page while the test lasts."""
    async with Visitor.at(chromium, service.url) as visitor:
        yield visitor
        assert visitor.complaints == []


@pytest.fixture
def gateway() -> ScriptedGateway:
    return ScriptedGateway()


@pytest_asyncio.fixture(loop_scope="session")
async def door(gateway: ScriptedGateway) -> AsyncIterator[str]:
    """The front door over the script, on a socket. Silence makes a heartbeat after 50 ms."""
    port = free_port()
    app = create_app(gateway, app_config(heartbeat_s=0.05))
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", ws="none", lifespan="off"))
    serving = asyncio.create_task(server.serve())

    async def started() -> bool:
        return server.started

    await until(started, every_s=0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    await serving


@pytest_asyncio.fixture(loop_scope="session")
async def guest(chromium: Browser, door: str) -> AsyncIterator[Visitor]:
    """Somebody at the scripted door."""
    async with Visitor.at(chromium, door) as visitor:
        yield visitor
        assert visitor.complaints == []
