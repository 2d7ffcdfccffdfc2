"""The playground of a service that demands API keys."""

from __future__ import annotations

import pytest
from playwright.async_api import Browser, expect

from serve_app.core.tenants import ANYONE, CredentialsRefused, Identity
from tests.api.scripted import ScriptedEngine
from tests.browser.conftest import served
from tests.browser.playground import Playground
from tests.graph.service import free_port

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="session")]


class OneKey:
    """An authenticator that knows one key."""

    async def authenticate(self, credentials: str) -> Identity:
        if credentials != "the-key":
            raise CredentialsRefused("invalid", "The API key is not valid.")
        return ANYONE


async def test_the_page_asks_for_a_key_and_works_with_it(chromium: Browser, engine: ScriptedEngine) -> None:
    port = free_port()
    async with (
        served(engine, port, authenticator=OneKey()),
        Playground.at(chromium, f"http://127.0.0.1:{port}") as playground,
    ):
        page = playground.page
        await page.goto(f"{playground.url}/")
        await expect(page.locator("#status")).to_have_text("The service needs an API key")
        field = page.get_by_label("API key")
        for key, status in (("wrong", "The service needs an API key"), ("the-key", "Ready")):
            await field.fill(key)
            await field.press("Enter")
            await expect(page.locator("#status")).to_have_text(status)
        await playground.send("hello")
        await playground.wait_for_answers()
        await page.reload()  # the tab keeps the key
        await expect(page.locator("#status")).to_have_text("Ready")
        stored = await page.evaluate("JSON.stringify(localStorage)")
        assert "the-key" not in stored
        assert playground.errors == []
