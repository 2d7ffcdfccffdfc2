"""The page by keyboard and with a screen reader, in both colour schemes and on a small screen."""

from __future__ import annotations

from typing import Any

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, Page, expect

from serve_app.errors import QueueFull
from tests.api.scripted import ScriptedEngine, chunk
from tests.browser.playground import Playground
from tests.graph.service import Service

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="session")]

PHONE = {"width": 390, "height": 844}
DESK = {"width": 1280, "height": 800}


async def violations(page: Page) -> list[Any]:
    found = await Axe().run(page)
    return [
        (violation["id"], [node["html"] for node in violation["nodes"]]) for violation in found.response["violations"]
    ]


@pytest.mark.parametrize("view", ["chat", "compare"])
@pytest.mark.parametrize(
    ("scheme", "viewport"),
    [
        pytest.param("light", DESK, id="desk-light"),
        pytest.param("dark", PHONE, id="phone-dark"),
        pytest.param("dark", DESK, id="desk-dark", marks=pytest.mark.long),
        pytest.param("light", PHONE, id="phone-light", marks=pytest.mark.long),
    ],
)
async def test_axe_finds_no_violation(
    chromium: Browser, toy_service: Service, view: str, scheme: Any, viewport: Any
) -> None:
    async with Playground.at(chromium, toy_service.url, color_scheme=scheme, viewport=viewport) as playground:
        await playground.open(view)
        assert await violations(playground.page) == []
        await playground.expand_settings(view)
        for field in await playground.page.locator(f"#{view}-view [name=max_tokens]").all():
            await field.fill("20")
        box = playground.page.locator(f"#{view}-view .composer textarea")
        await box.fill("hello")
        await box.press("Enter")
        await playground.wait_for_text(2)
        assert await violations(playground.page) == []
        await playground.wait_for_answers(1 if view == "chat" else 2)
        await playground.page.locator(".token").first.focus()
        await expect(playground.tooltip).to_be_visible()
        assert await violations(playground.page) == []
        too_wide = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
        assert await playground.page.evaluate(too_wide) is False
        assert playground.errors == []


async def test_axe_finds_no_violation_in_an_error(scripted: Playground, engine: ScriptedEngine) -> None:
    engine.plays(chunk(["so far"], None), QueueFull("as many wait as it takes", retry_after_s=3))
    await scripted.open()
    await scripted.send("hello")
    await expect(scripted.page.locator(".failure")).to_be_visible()
    for scheme in ("light", "dark"):
        await scripted.page.emulate_media(color_scheme=scheme)
        assert await violations(scripted.page) == []


async def test_the_keyboard_reaches_every_control(playground: Playground) -> None:
    await playground.open()
    page = playground.page
    await page.keyboard.press("Tab")
    await expect(page.get_by_role("link", name="Skip to the message box")).to_be_focused()
    await page.keyboard.press("Enter")
    await expect(playground.message_box).to_be_focused()
    await playground.set_field("max_tokens", "8")
    await playground.message_box.focus()
    await page.keyboard.type("hello")
    await page.keyboard.press("Shift+Enter")
    await page.keyboard.type("you")
    await page.keyboard.press("Enter")
    await playground.wait_for_answers()
    await expect(page.locator(".asked p")).to_have_text("hello\nyou")
    await expect(playground.message_box).to_be_focused()

    await page.keyboard.press("Shift+Tab")
    await expect(page.get_by_role("button", name="Regenerate")).to_be_focused()
    await page.keyboard.press("Shift+Tab")
    await expect(page.get_by_role("button", name="Copy")).to_be_focused()
    await page.keyboard.press("Shift+Tab")
    first = page.locator(".token").first
    await expect(first).to_be_focused()
    await expect(playground.tooltip).to_contain_text("u 100.0 %")
    await expect(first).to_have_accessible_description("u 100.0 %")
    await page.keyboard.press("ArrowRight")
    await expect(page.locator(".token").nth(1)).to_be_focused()
    await expect(playground.tooltip).to_contain_text("s 100.0 %")
    await page.keyboard.press("End")
    await expect(page.locator(".token").last).to_be_focused()
    await page.keyboard.press("Escape")
    await expect(playground.tooltip).to_be_hidden()
    await page.keyboard.press("Home")
    await expect(first).to_be_focused()
    await expect(page.locator(".token[tabindex]")).to_have_count(1)


async def test_the_pointer_opens_a_tooltip_with_the_probability(playground: Playground) -> None:
    await playground.open()
    await playground.set_field("max_tokens", "8")
    await playground.send("hello")
    await playground.wait_for_answers()
    await playground.page.locator(".token").nth(2).hover()
    await expect(playground.tooltip).to_contain_text("e 100.0 %")
    await playground.page.locator(".brand").hover()
    await expect(playground.tooltip).to_be_hidden()


async def test_a_screen_reader_gets_two_announcements_per_answer(playground: Playground) -> None:
    await playground.open()
    await playground.page.evaluate(
        """() => {
            window.announced = [];
            const note = ([{ target }]) => window.announced.push(target.textContent);
            new MutationObserver(note).observe(document.getElementById("announcer"), { childList: true });
        }"""
    )
    await playground.set_field("max_tokens", "40")
    await playground.send("hello")
    await playground.wait_for_answers()
    announced = await playground.page.evaluate("window.announced")
    assert announced == ["toy is answering.", f"toy answered: {('user: hello' * 4)[:40]}"]
    assert (
        await playground.page.locator(".answer :is([aria-live], [role=log], [role=status], [role=alert])").count() == 0
    )


async def test_the_colour_scheme_follows_the_system_until_the_user_selects_one(playground: Playground) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    await playground.page.emulate_media(color_scheme="light")
    await playground.open()
    light = await playground.page.evaluate(ground)
    await playground.page.emulate_media(color_scheme="dark")
    dark = await playground.page.evaluate(ground)
    assert light != dark
    scheme = playground.page.get_by_role("combobox", name="Colour scheme")
    await scheme.select_option("Light theme")
    assert await playground.page.evaluate(ground) == light
    await playground.page.reload()
    assert await playground.page.evaluate(ground) == light
    await expect(scheme).to_have_value("light")
    await scheme.select_option("System theme")
    assert await playground.page.evaluate(ground) == dark


async def test_the_page_scrolls_with_an_answer_until_the_user_scrolls_up(playground: Playground) -> None:
    await playground.page.set_viewport_size({"width": 390, "height": 500})
    await playground.open()
    await playground.page.locator("#chat-view summary").click()
    await playground.set_field("max_tokens", "1500")
    await playground.page.locator("#chat-view summary").click()
    away = "document.documentElement.scrollHeight - innerHeight - scrollY"
    await playground.send("a long line of words that fills the window soon")
    await playground.wait_for_text(600)
    assert await playground.page.evaluate(away) < 60
    await playground.page.evaluate("scrollTo(0, 0)")
    await playground.wait_for_text(900)
    assert await playground.page.evaluate("scrollY") == 0
    await playground.stop.click()
