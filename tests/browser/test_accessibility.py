"""The page by keyboard and with a screen reader, in both colour schemes and on a small screen."""

from __future__ import annotations

import json
from typing import Any

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, Page, expect

from serve_app.core.events import TextDelta, ToolCallDelta
from serve_app.errors import QueueFull
from tests.api.scripted import ScriptedEngine, chunk
from tests.browser.playground import Playground
from tests.browser.test_markdown import SAMPLE
from tests.browser.test_tools import CALLS, delta_chunk, offer_tools, sse
from tests.graph.service import Service

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="session")]

PHONE = {"width": 390, "height": 844}
DESK = {"width": 1280, "height": 800}
TOO_WIDE = "document.documentElement.scrollWidth > document.documentElement.clientWidth"


async def violations(page: Page) -> list[Any]:
    found = await Axe().run(page)
    return [
        (violation["id"], [node["html"] for node in violation["nodes"]]) for violation in found.response["violations"]
    ]


@pytest.mark.parametrize(
    ("view", "scheme", "viewport"),
    [
        pytest.param(view, scheme, viewport, id=f"{view}-{scheme}-{name}", marks=[] if usual else pytest.mark.long)
        for view in ("chat", "compare")
        for scheme in ("light", "dark")
        for name, viewport in (("desk", DESK), ("phone", PHONE))
        for usual in [(view, scheme, name) in (("chat", "light", "desk"), ("compare", "dark", "phone"))]
    ],
)
async def test_axe_finds_no_violation(
    chromium: Browser, toy_service: Service, view: str, scheme: Any, viewport: Any
) -> None:
    async with Playground.at(chromium, toy_service.url, color_scheme=scheme, viewport=viewport) as playground:
        await playground.open(view)
        assert await violations(playground.page) == []
        await playground.show_tokens(view)
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
        assert await playground.page.evaluate(TOO_WIDE) is False
        assert playground.errors == []


async def test_axe_finds_no_violation_in_an_error(scripted: Playground, engine: ScriptedEngine) -> None:
    engine.plays(chunk(["so far"], None), QueueFull("as many wait as it takes", retry_after_s=3))
    await scripted.open()
    await scripted.send("hello")
    await expect(scripted.page.locator(".failure")).to_be_visible()
    for scheme in ("light", "dark"):
        await scripted.page.emulate_media(color_scheme=scheme)
        assert await violations(scripted.page) == []


async def check(page: Page) -> None:
    """No violation in either colour scheme, on a desk and on a phone, where nothing is wider than the page."""
    states: Any = [("light", DESK), ("dark", PHONE), ("dark", DESK), ("light", PHONE)]
    for scheme, viewport in states:
        await page.emulate_media(color_scheme=scheme)
        await page.set_viewport_size(viewport)
        assert await violations(page) == []
        assert await page.evaluate(TOO_WIDE) is False


async def test_axe_finds_no_violation_in_formatted_text(scripted: Playground, engine: ScriptedEngine) -> None:
    engine.plays(chunk([SAMPLE, f"\n\n`{'long ' * 40}`\n\n| {'wide ' * 40} | |\n|---|---|\n| {'w' * 200} | |"]))
    await scripted.open()
    await scripted.send("hello")
    await scripted.wait_for_answers()
    await check(scripted.page)


async def test_axe_finds_no_violation_in_reasoning_and_calls(scripted: Playground, engine: ScriptedEngine) -> None:
    engine.plays(delta_chunk([*CALLS, ToolCallDelta(2, name="long" * 16, arguments=json.dumps({"word": "w" * 200}))]))
    await offer_tools(scripted)
    await scripted.send("hello")
    await scripted.wait_for_answers()
    body = sse({"role": "assistant", "reasoning_content": "one " * 100}, {"content": "done"})
    await scripted.page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body)
    )
    await check(scripted.page)
    await scripted.page.locator(".result textarea").first.fill("a result")
    await scripted.page.get_by_role("button", name="Send results").click()
    await scripted.wait_for_answers(2)
    for fold in await scripted.page.locator(".fold:not([hidden]) summary").all():
        await fold.click()
    await scripted.expand_settings()  # it is closed on a phone
    await scripted.set_field("tools", "[")
    await check(scripted.page)


async def test_axe_finds_no_violation_in_the_code_of_a_request(scripted: Playground) -> None:
    await scripted.open()
    await scripted.message_box.fill("word " * 50)
    await scripted.page.locator("#chat-view .as-code").click()
    await check(scripted.page)


async def test_the_keyboard_reaches_code_calls_and_results(scripted: Playground, engine: ScriptedEngine) -> None:
    engine.plays(delta_chunk([TextDelta("```\ncode\n```"), *CALLS[1:4]]))
    await offer_tools(scripted)
    await scripted.send("hello")
    await scripted.wait_for_answers()
    page = scripted.page
    stops = [
        page.get_by_role("button", name="Regenerate"),
        page.get_by_role("button", name="Copy answer"),
        page.get_by_role("button", name="Send results"),
        page.get_by_role("textbox", name="Result"),
        page.locator(".call summary"),
        page.get_by_role("group", name="Code: text"),
        page.get_by_role("button", name="Copy code"),
    ]
    for stop in stops:
        await page.keyboard.press("Shift+Tab")
        await expect(stop).to_be_focused()
    await page.locator(".call summary").focus()
    await page.keyboard.press("Enter")
    await page.keyboard.press("Tab")
    await expect(page.get_by_role("group", name="Arguments")).to_be_focused()
    await page.keyboard.press("Tab")
    await page.keyboard.type("18")
    await page.keyboard.press("Tab")
    await page.keyboard.press("Enter")
    await scripted.wait_for_answers(2)
    await expect(scripted.message_box).to_be_focused()
    await expect(page.get_by_role("textbox", name="Result").first).to_have_value("18")


async def test_the_keyboard_opens_and_closes_the_code_of_a_request(scripted: Playground) -> None:
    await scripted.open()
    page = scripted.page
    button = page.locator("#chat-view .as-code")
    await button.focus()
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("button", name="Close")).to_be_focused()
    await page.keyboard.press("Tab")
    await expect(page.locator(".program .copy").first).to_be_focused()
    await page.keyboard.press("Tab")
    await expect(page.get_by_role("group", name="Code: curl")).to_be_focused()
    await page.keyboard.press("Escape")
    await expect(button).to_be_focused()


async def test_nothing_moves_with_reduced_motion(scripted: Playground, engine: ScriptedEngine) -> None:
    engine.plays(delta_chunk(CALLS[:3], None), None)
    await scripted.page.emulate_media(reduced_motion="reduce")
    await offer_tools(scripted)
    await scripted.send("hello")
    await scripted.wait_for_text(3)
    assert await scripted.page.evaluate("document.getAnimations().length") == 0
    await scripted.page.emulate_media(reduced_motion="no-preference")
    assert await scripted.page.evaluate("document.getAnimations().length") == 1
    await scripted.stop.click()
    await scripted.wait_for_answers()


async def test_the_keyboard_reaches_every_control(playground: Playground) -> None:
    await playground.open()
    page = playground.page
    await page.keyboard.press("Tab")
    await expect(page.get_by_role("link", name="Skip to the message box")).to_be_focused()
    await page.keyboard.press("Enter")
    await expect(playground.message_box).to_be_focused()
    await playground.show_tokens()
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
    await expect(page.get_by_role("button", name="Show formatted")).to_be_focused()
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
    await playground.show_tokens()
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
    await playground.page.set_viewport_size({"width": 390, "height": 300})
    await playground.open()
    await playground.page.locator("#chat-view .settings summary").click()
    await playground.set_field("max_tokens", "1500")
    await playground.page.locator("#chat-view .settings summary").click()
    away = "document.documentElement.scrollHeight - innerHeight - scrollY"
    await playground.send("a long line of words that fills the window soon")
    await playground.wait_for_text(300)
    assert await playground.page.evaluate("scrollY") > 0
    assert await playground.page.evaluate(away) < 60
    await playground.page.evaluate("scrollTo(0, 0)")
    await playground.wait_for_text(450)
    assert await playground.page.evaluate("scrollY") == 0
    await playground.stop.click()
