"""One prompt on two models or settings, side by side."""

from __future__ import annotations

import pytest
from playwright.async_api import expect

from tests.browser.playground import Playground
from tests.graph.service import Service, http_client, metric_totals, wait_until

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="session")]


async def run(playground: Playground, prompt: str, max_tokens: int) -> None:
    await playground.open("compare")
    await playground.expand_settings("compare")
    for field in await playground.page.locator("#compare-view [name=max_tokens]").all():
        await field.fill(str(max_tokens))
    box = playground.page.get_by_role("textbox", name="Prompt for both")
    await box.fill(prompt)
    await box.press("Enter")


async def test_both_answers_are_streamed_at_the_same_time_and_stored(playground: Playground) -> None:
    await run(playground, "hello", 77)
    await playground.wait_for_two_growing_texts(longer_than=2)
    assert await playground.page.locator(".answer h3").all_text_contents() == ["toy", "slow"]
    left, right = await playground.answers.all()
    a, b = await left.bounding_box(), await right.bounding_box()
    assert a is not None
    assert b is not None
    assert a["x"] + a["width"] <= b["x"], "side by side"

    await playground.wait_for_answers(2)
    rates = [float(text) for text in await playground.page.locator(".figures .rate dd").all_text_contents()]
    assert rates[0] > 2 * rates[1]
    texts = await playground.texts.all_text_contents()
    assert texts[0] == texts[1] == "user: hello" * 7
    await playground.page.reload()
    await playground.open("compare")
    assert await playground.texts.all_text_contents() == texts
    await expect(playground.page.get_by_role("textbox", name="Prompt for both")).to_have_value("hello")


async def test_stop_ends_both(playground: Playground, toy_service: Service) -> None:
    await run(playground, "hello", 3000)
    await playground.wait_for_text(2, 0)
    await playground.wait_for_text(2, 1)
    await playground.stop.click()
    await expect(playground.page.locator(".figures .end", has_text="stopped by you")).to_have_count(2)
    async with http_client(toy_service) as client:

        async def idle() -> bool:
            found = await metric_totals(client)
            return found["running_sequences", "toy"] == found["running_sequences", "slow"] == 0

        await wait_until(idle)


async def test_one_model_with_two_settings_and_one_side_regenerated(playground: Playground) -> None:
    await run(playground, "hello", 5)
    await playground.wait_for_answers(2)
    sides = playground.page.locator("#compare-view .side")
    await sides.nth(1).locator("[name=model]").select_option("toy")
    await sides.nth(1).locator("[name=system]").fill("Be kind.")
    await expect(sides.nth(0).locator(".settings summary")).to_have_text("Settings: max tokens 5")
    await expect(sides.nth(1).locator(".settings summary")).to_have_text("Settings: system prompt, max tokens 5")
    await sides.nth(1).get_by_role("button", name="Regenerate").click()
    await expect(playground.texts.nth(1)).to_have_text("syste")
    await playground.wait_for_answers(2)
    await expect(playground.texts.nth(0)).to_have_text("user:")
    assert await playground.page.locator(".answer h3").all_text_contents() == ["toy", "toy"]
