"""The reference of the API at /docs in a browser."""

from __future__ import annotations

import pytest
from playwright.async_api import expect

from serve_app.api.operations import OPERATIONS
from tests.browser.playground import Playground

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="session")]


async def test_every_endpoint_is_listed_and_its_example_works(scripted: Playground) -> None:
    page = scripted.page
    await page.goto(scripted.url + "/docs/")  # with a slash, to see that the files of the page are found
    await expect(page.locator(".opblock")).to_have_count(len(OPERATIONS))
    block = page.locator("#operations-Native-post_generate")
    await block.get_by_role("button").first.click()
    await block.get_by_role("button", name="Try it out").click()
    await block.get_by_role("button", name="Execute").click()
    await expect(block.locator(".live-responses-table .response-col_status").last).to_contain_text("200")
