"""The page by keyboard, by screen reader, in both schemes and on a phone."""

from __future__ import annotations

from typing import Any

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, Page, expect

from serve_app.errors import QueueFull
from tests.api.scripted import ScriptedGateway, chunk
from tests.browser.visitor import Visitor
from tests.graph.house import Service

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="session")]

PHONE = {"width": 390, "height": 844}
DESK = {"width": 1280, "height": 800}


async def violations(page: Page) -> list[Any]:
    found = await Axe().run(page)
    return [
        (violation["id"], [node["html"] for node in violation["nodes"]]) for violation in found.response["violations"]
    ]


@pytest.mark.parametrize("view", ["chat", "compare"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESK, PHONE], ids=["desk", "phone"])
async def test_axe_finds_nothing(chromium: Browser, service: Service, view: str, scheme: Any, viewport: Any) -> None:
    async with Visitor.at(chromium, service.url, color_scheme=scheme, viewport=viewport) as visitor:
        await visitor.open(view)
        assert await violations(visitor.page) == []
        await visitor.unfold(view)
        for field in await visitor.page.locator(f"#{view}-view [name=max_tokens]").all():
            await field.fill("30")
        box = visitor.page.locator(f"#{view}-view .composer textarea")
        await box.fill("hello")
        await box.press("Enter")
        await visitor.grown(2)
        assert await violations(visitor.page) == []
        await visitor.ended(1 if view == "chat" else 2)
        await visitor.page.locator(".token").first.focus()
        await expect(visitor.tip).to_be_visible()
        assert await violations(visitor.page) == []
        too_wide = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
        assert await visitor.page.evaluate(too_wide) is False
        assert visitor.complaints == []


async def test_axe_finds_nothing_in_an_error(guest: Visitor, gateway: ScriptedGateway) -> None:
    gateway.plays(chunk(["so far"], None), QueueFull("as many wait as it takes", retry_after_s=3))
    await guest.open()
    await guest.say("hello")
    await expect(guest.page.locator(".failure")).to_be_visible()
    for scheme in ("light", "dark"):
        await guest.page.emulate_media(color_scheme=scheme)
        assert await violations(guest.page) == []


async def test_the_keyboard_reaches_everything(visitor: Visitor) -> None:
    await visitor.open()
    page = visitor.page
    await page.keyboard.press("Tab")
    await expect(page.get_by_role("link", name="Skip to the message box")).to_be_focused()
    await page.keyboard.press("Enter")
    await expect(visitor.box).to_be_focused()
    await visitor.set("max_tokens", "8")
    await visitor.box.focus()
    await page.keyboard.type("hello")
    await page.keyboard.press("Shift+Enter")
    await page.keyboard.type("you")
    await page.keyboard.press("Enter")
    await visitor.ended()
    await expect(page.locator(".asked p")).to_have_text("hello\nyou")
    await expect(visitor.box).to_be_focused()

    await page.keyboard.press("Shift+Tab")
    await expect(page.get_by_role("button", name="Regenerate")).to_be_focused()
    await page.keyboard.press("Shift+Tab")
    await expect(page.get_by_role("button", name="Copy")).to_be_focused()
    await page.keyboard.press("Shift+Tab")
    first = page.locator(".token").first
    await expect(first).to_be_focused()
    await expect(visitor.tip).to_contain_text("u 100.0 %")
    await expect(first).to_have_accessible_description("u 100.0 %")
    await page.keyboard.press("ArrowRight")
    await expect(page.locator(".token").nth(1)).to_be_focused()
    await expect(visitor.tip).to_contain_text("s 100.0 %")
    await page.keyboard.press("End")
    await expect(page.locator(".token").last).to_be_focused()
    await page.keyboard.press("Escape")
    await expect(visitor.tip).to_be_hidden()
    await page.keyboard.press("Home")
    await expect(first).to_be_focused()
    await expect(page.locator(".token[tabindex]")).to_have_count(1)


async def test_a_pointer_sees_the_probability_of_what_is_under_it(visitor: Visitor) -> None:
    await visitor.open()
    await visitor.set("max_tokens", "8")
    await visitor.say("hello")
    await visitor.ended()
    await visitor.page.locator(".token").nth(2).hover()
    await expect(visitor.tip).to_contain_text("e 100.0 %")
    await visitor.page.locator(".brand").hover()
    await expect(visitor.tip).to_be_hidden()


async def test_a_screen_reader_is_told_twice_an_answer(visitor: Visitor) -> None:
    await visitor.open()
    await visitor.page.evaluate(
        """() => {
            window.told = [];
            const note = ([{ target }]) => window.told.push(target.textContent);
            new MutationObserver(note).observe(document.getElementById("announcer"), { childList: true });
        }"""
    )
    await visitor.set("max_tokens", "40")
    await visitor.say("hello")
    await visitor.ended()
    told = await visitor.page.evaluate("window.told")
    assert told == ["quick is answering.", f"quick says: {('user: hello' * 4)[:40]}"]
    assert await visitor.page.locator(".answer :is([aria-live], [role=log], [role=status], [role=alert])").count() == 0


async def test_the_scheme_follows_the_system_until_one_is_chosen(visitor: Visitor) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    await visitor.page.emulate_media(color_scheme="light")
    await visitor.open()
    light = await visitor.page.evaluate(ground)
    await visitor.page.emulate_media(color_scheme="dark")
    dark = await visitor.page.evaluate(ground)
    assert light != dark
    scheme = visitor.page.get_by_role("combobox", name="Colour scheme")
    await scheme.select_option("Light theme")
    assert await visitor.page.evaluate(ground) == light
    await visitor.page.reload()
    assert await visitor.page.evaluate(ground) == light
    await expect(scheme).to_have_value("light")
    await scheme.select_option("System theme")
    assert await visitor.page.evaluate(ground) == dark


async def test_an_answer_is_followed_until_the_reader_scrolls_away(visitor: Visitor) -> None:
    await visitor.page.set_viewport_size({"width": 390, "height": 500})
    await visitor.open()
    await visitor.page.locator("#chat-view summary").click()
    await visitor.set("max_tokens", "1500")
    await visitor.page.locator("#chat-view summary").click()
    away = "document.documentElement.scrollHeight - innerHeight - scrollY"
    await visitor.say("a long line of words that fills the window soon")
    await visitor.grown(600)
    assert await visitor.page.evaluate(away) < 60
    await visitor.page.evaluate("scrollTo(0, 0)")
    await visitor.grown(900)
    assert await visitor.page.evaluate("scrollY") == 0
    await visitor.stop.click()
