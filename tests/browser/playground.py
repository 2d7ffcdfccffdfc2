"""The playground in a browser, and the errors that the browser reports."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Self

from playwright.async_api import Browser, ConsoleMessage, Locator, Page, Request, Response, expect

KEY = "serve_app.playground"
TIMEOUT_MS = 20_000  # a machine with two cores may be busy

expect.set_options(timeout=TIMEOUT_MS)


class Playground:
    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        page.set_default_timeout(TIMEOUT_MS)
        self.url = url
        self.errors: list[str] = []
        self.statuses: dict[str, int] = {}
        self.bodies: list[Any] = []  # of the requests for answers
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", self._request)
        page.on("response", self._response)

    @classmethod
    @asynccontextmanager
    async def at(cls, browser: Browser, url: str, **options: Any) -> AsyncIterator[Self]:
        """A new page. `options` are those of Playwright's contexts."""
        context = await browser.new_context(permissions=["clipboard-read", "clipboard-write"], **options)
        try:
            yield cls(await context.new_page(), url)
        finally:
            await context.close()

    async def open(self, view: str = "chat") -> None:
        """Open a view and wait until the page has the list of models."""
        await self.page.goto(f"{self.url}/#{view}")
        await expect(self.page.locator(f"#{view}-view [name=model] option").first).to_be_attached()

    async def expand_settings(self, view: str = "chat") -> None:
        """Make every setting visible."""
        for details in await self.page.locator(f"#{view}-view .settings details").all():
            if await details.get_attribute("open") is None:
                await details.locator("summary").click()

    async def show_tokens(self, view: str = "chat") -> None:
        """Switch token probabilities on, with which answers are shown as tokens."""
        await self.expand_settings(view)
        for box in await self.page.locator(f"#{view}-view [name=odds]").all():
            await box.check()

    async def select_model(self, model: str) -> None:
        await self.page.locator("#chat-view [name=model]").select_option(model)

    async def set_field(self, name: str, value: str) -> None:
        await self.page.locator(f"#chat-view [name={name}]").fill(value)

    async def send(self, text: str) -> None:
        await self.message_box.fill(text)
        await self.message_box.press("Enter")

    async def wait_for_answers(self, count: int = 1) -> None:
        """Wait until there are `count` answers and all of them are complete."""
        await expect(self.answers).to_have_count(count)
        await expect(self.page.locator(".answer[aria-busy]")).to_have_count(0)

    async def wait_for_text(self, longer_than: int, nth: int = 0) -> str:
        """The text of the answer `nth` once it is longer than `longer_than` characters."""
        count = "([nth, size]) => (document.querySelectorAll('.answer .text')[nth]?.textContent ?? '').length > size"
        await self.page.wait_for_function(count, arg=[nth, longer_than])
        return await self.texts.nth(nth).text_content() or ""

    async def wait_for_two_growing_texts(self, longer_than: int) -> None:
        """Wait for a moment at which two incomplete answers have more text. The page looks at every frame."""
        both = "(size) => [...document.querySelectorAll('.answer[aria-busy] .text')]"
        await self.page.wait_for_function(
            f"{both}.filter(({{ textContent }}) => textContent.length > size).length === 2", arg=longer_than
        )

    @property
    def message_box(self) -> Locator:
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
    def tooltip(self) -> Locator:
        return self.page.get_by_role("tooltip")

    def _console(self, message: ConsoleMessage) -> None:
        """The console also reports responses with an error status, which a test may expect."""
        if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
            self.errors.append(message.text)

    def _request(self, request: Request) -> None:
        if not request.url.startswith(f"{self.url}/"):
            self.errors.append(f"a request to {request.url}")
        if request.method == "POST":
            self.bodies.append(request.post_data_json)

    def _response(self, response: Response) -> None:
        self.statuses[response.url] = response.status
