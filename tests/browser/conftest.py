"""Chromium, and two services for it: the toy service, and the HTTP application over a scripted engine."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import pytest_asyncio
import uvicorn
from playwright.async_api import Browser, async_playwright

from serve_app.api.app import create_app
from serve_app.config import Cors
from serve_app.core.tenants import Authenticator
from tests.api.scripted import ScriptedEngine, ScriptedTelemetry, app_config
from tests.browser.playground import Playground
from tests.graph.service import Service, free_port, wait_until


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.import_plugin("tests.shared_services")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the toy service need Ray; the others need the browser only."""
    for item in items:
        if "toy_service" in getattr(item, "fixturenames", ()):
            item.add_marker("ray")


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def chromium() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=shutil.which("chromium"))
        yield browser
        await browser.close()


@pytest_asyncio.fixture(loop_scope="session")
async def playground(chromium: Browser, toy_service: Service) -> AsyncIterator[Playground]:
    """The page of the toy service. The test fails if the browser reports an error."""
    async with Playground.at(chromium, toy_service.url) as playground:
        yield playground
        assert playground.errors == []


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@asynccontextmanager
async def served(
    engine: ScriptedEngine, port: int, cors: Cors | None = None, authenticator: Authenticator | None = None
) -> AsyncIterator[None]:
    """The HTTP application over the engine at a port. It sends a heartbeat after 50 ms without a token."""
    settings = app_config(heartbeat_s=0.05).model_copy(update={"cors": cors or Cors()})
    app = create_app(engine, ScriptedTelemetry(), settings, authenticator=authenticator)
    config = uvicorn.Config(
        app, port=port, log_level="critical", ws="none", lifespan="off", timeout_graceful_shutdown=0
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())

    async def started() -> bool:
        return server.started

    await wait_until(started, every_s=0.01)
    try:
        yield
    finally:
        server.should_exit = True
        await task


@pytest_asyncio.fixture(loop_scope="session")
async def scripted(chromium: Browser, engine: ScriptedEngine) -> AsyncIterator[Playground]:
    """The page of the application over the scripted engine. The test fails if the browser reports an error."""
    port = free_port()
    async with served(engine, port), Playground.at(chromium, f"http://127.0.0.1:{port}") as playground:
        yield playground
        assert playground.errors == []
