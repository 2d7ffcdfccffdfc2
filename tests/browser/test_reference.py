"""The API's reference at /docs, in a browser."""

from __future__ import annotations

import pytest
from playwright.async_api import expect

from serve_app.api.openapi import OPERATIONS
from tests.browser.visitor import Visitor

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="session")]


async def test_every_endpoint_stands_there_and_its_example_can_be_tried(guest: Visitor) -> None:
    page = guest.page
    await page.goto(guest.url + "/docs")
    await expect(page.locator(".opblock")).to_have_count(len(OPERATIONS))
    block = page.locator("#operations-Native-post_generate")
    await block.get_by_role("button").first.click()
    await block.get_by_role("button", name="Try it out").click()
    await block.get_by_role("button", name="Execute").click()
    await expect(block.locator(".live-responses-table .response-col_status").last).to_contain_text("200")
