"""Somebody in front of the page, and everything the browser had to object to meanwhile."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Self

from playwright.async_api import Browser, ConsoleMessage, Locator, Page, Request, Response, expect

KEY = "serve_app.playground"
PATIENCE_MS = 20_000  # a machine with two cores may be busy with other things

expect.set_options(timeout=PATIENCE_MS)


class Visitor:
    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        page.set_default_timeout(PATIENCE_MS)
        self.url = url
        self.complaints: list[str] = []
        self.statuses: dict[str, int] = {}
        page.on("console", self._said)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", self._asked)
        page.on("response", self._answered)

    @classmethod
    @asynccontextmanager
    async def at(cls, browser: Browser, url: str, **options: Any) -> AsyncIterator[Self]:
        """`options` are those of Playwright's contexts."""
        context = await browser.new_context(permissions=["clipboard-read", "clipboard-write"], **options)
        try:
            yield cls(await context.new_page(), url)
        finally:
            await context.close()

    async def open(self, view: str = "chat") -> None:
        """The view, once the page knows which models there are."""
        await self.page.goto(f"{self.url}/#{view}")
        await expect(self.page.locator(f"#{view}-view [name=model] option").first).to_be_attached()

    async def unfold(self, view: str = "chat") -> None:
        """Every setting in sight."""
        for details in await self.page.locator(f"#{view}-view details").all():
            if await details.get_attribute("open") is None:
                await details.locator("summary").click()

    async def choose(self, model: str) -> None:
        await self.page.locator("#chat-view [name=model]").select_option(model)

    async def set(self, name: str, value: str) -> None:
        await self.page.locator(f"#chat-view [name={name}]").fill(value)

    async def say(self, text: str) -> None:
        await self.box.fill(text)
        await self.box.press("Enter")

    async def ended(self, count: int = 1) -> None:
        """Once so many answers are there and none is under way."""
        await expect(self.answers).to_have_count(count)
        await expect(self.page.locator(".answer[aria-busy]")).to_have_count(0)

    async def grown(self, longer_than: int, nth: int = 0) -> str:
        """The text of an answer once it is longer than that."""
        count = "([nth, size]) => (document.querySelectorAll('.answer .text')[nth]?.textContent ?? '').length > size"
        await self.page.wait_for_function(count, arg=[nth, longer_than])
        return await self.texts.nth(nth).text_content() or ""

    @property
    def box(self) -> Locator:
        return self.page.get_by_role("textbox", name="Message", exact=True)

    @property
    def answers(self) -> Locator:
        return self.page.locator(".view:not([hidden]) .answer")

    @property
    def texts(self) -> Locator:
        return self.page.locator(".view:not([hidden]) .answer .text")

    @property
    def stop(self) -> Locator:
        return self.page.get_by_role("button", name="Stop", exact=True)

    @property
    def tip(self) -> Locator:
        return self.page.get_by_role("tooltip")

    def _said(self, message: ConsoleMessage) -> None:
        """A refused request is written to the console too; whether one may be refused is the test's to say."""
        if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
            self.complaints.append(message.text)

    def _asked(self, request: Request) -> None:
        if not request.url.startswith(f"{self.url}/"):
            self.complaints.append(f"a request to {request.url}")

    def _answered(self, response: Response) -> None:
        self.statuses[response.url] = response.status
