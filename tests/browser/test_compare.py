"""One prompt on two models or settings, side by side."""

from __future__ import annotations

import pytest
from playwright.async_api import expect

from tests.browser.visitor import Visitor
from tests.graph.house import Service, caller, metrics, until

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="session")]


async def run(visitor: Visitor, prompt: str, max_tokens: int) -> None:
    await visitor.open("compare")
    await visitor.unfold("compare")
    for field in await visitor.page.locator("#compare-view [name=max_tokens]").all():
        await field.fill(str(max_tokens))
    box = visitor.page.get_by_role("textbox", name="Prompt for both")
    await box.fill(prompt)
    await box.press("Enter")


async def test_both_write_at_the_same_time_and_are_kept(visitor: Visitor) -> None:
    await run(visitor, "hello", 66)
    await visitor.grown(2, 0)
    await visitor.grown(2, 1)
    await expect(visitor.page.locator(".answer[aria-busy]")).to_have_count(2)
    assert await visitor.page.locator(".answer h3").all_text_contents() == ["quick", "slow"]
    left, right = await visitor.answers.all()
    a, b = await left.bounding_box(), await right.bounding_box()
    assert a is not None
    assert b is not None
    assert a["x"] + a["width"] <= b["x"], "side by side"

    await visitor.ended(2)
    rates = [float(text) for text in await visitor.page.locator(".figures .rate dd").all_text_contents()]
    assert rates[0] > 2 * rates[1]
    texts = await visitor.texts.all_text_contents()
    assert texts[0] == texts[1] == "user: hello" * 6
    await visitor.page.reload()
    await visitor.open("compare")
    assert await visitor.texts.all_text_contents() == texts
    await expect(visitor.page.get_by_role("textbox", name="Prompt for both")).to_have_value("hello")


async def test_stop_ends_both(visitor: Visitor, service: Service) -> None:
    await run(visitor, "hello", 3000)
    await visitor.grown(2, 0)
    await visitor.grown(2, 1)
    await visitor.stop.click()
    await expect(visitor.page.locator(".figures .end", has_text="stopped by you")).to_have_count(2)
    async with caller(service) as client:

        async def nobody() -> bool:
            found = await metrics(client)
            return found["running_sequences", "quick"] == found["running_sequences", "slow"] == 0

        await until(nobody)


async def test_one_model_with_two_settings_and_one_side_again(visitor: Visitor) -> None:
    await run(visitor, "hello", 5)
    await visitor.ended(2)
    sides = visitor.page.locator("#compare-view .side")
    await sides.nth(1).locator("[name=model]").select_option("quick")
    await sides.nth(1).locator("[name=system]").fill("Be kind.")
    await expect(sides.nth(0).locator("summary")).to_have_text("Settings: max tokens 5")
    await expect(sides.nth(1).locator("summary")).to_have_text("Settings: system prompt, max tokens 5")
    await sides.nth(1).get_by_role("button", name="Regenerate").click()
    await expect(visitor.texts.nth(1)).to_have_text("syste")
    await visitor.ended(2)
    await expect(visitor.texts.nth(0)).to_have_text("user:")
    assert await visitor.page.locator(".answer h3").all_text_contents() == ["quick", "quick"]
