"""The HTML report in an offline browser: layout, colour schemes, print and accessibility."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, Page

from perf.html_report import render
from perf.simulate import report
from tests.perf import simulated_runs
from tests.perf.service_simulation import simulation_run

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="session")]

DESKTOP = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}
RUNS: dict[str, dict[str, Any]] = {
    "full": {"open_loop": True, "batch_profile": True, "find_max": True, "cost": True, "errors": True},
    "limited": {"client_limited": True, "scenarios": ("streaming",)},
    "bare": {"bare": True, "streaming": False},
    "hostile": {"hostile": True, "open_loop": True, "find_max": True, "cost": True},
}
# For every chart: texts that extend beyond it, and pairs of texts that overlap by more than 1 px.
TEXT_OVERLAPS = """() => [...document.querySelectorAll("svg.chart")].flatMap(svg => {
    const title = svg.querySelector("title").textContent;
    const edge = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].map(text => [text.textContent, text.getBoundingClientRect()]);
    const out = texts.filter(([, box]) => box.left < edge.left - 1 || box.right > edge.right + 1
        || box.top < edge.top - 2 || box.bottom > edge.bottom + 2).map(([text]) => `${title}: ${text} is cut off`);
    const overlapping = texts.flatMap(([one, a], index) => texts.slice(index + 1)
        .filter(([, b]) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
            && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4)
        .map(([other]) => `${title}: ${one} overlaps ${other}`));
    return [...out, ...overlapping];
})"""
SCROLLS_SIDEWAYS = "document.documentElement.scrollWidth > document.documentElement.clientWidth"


@asynccontextmanager
async def opened(chromium: Browser, folder: Path, kind: str, **options: Any) -> AsyncIterator[tuple[Page, list[str]]]:
    """The page, and its console messages, errors, dialogs and requests for other resources."""
    path = folder / "report.html"
    if kind == "simulation":
        path.write_text(report.render(simulation_run()))
    else:
        path.write_text(render(simulated_runs.run(**RUNS[kind])))
    context = await chromium.new_context(offline=True, **options)
    try:
        page, problems = await context.new_page(), list[str]()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append(f"a dialog: {dialog.message}"))
        page.on("request", lambda request: problems.append(request.url) if request.url != path.as_uri() else None)
        await page.goto(path.as_uri())
        yield page, problems
    finally:
        await context.close()


@pytest.mark.parametrize(
    ("kind", "scheme", "viewport"),
    [
        ("full", "light", DESKTOP),
        pytest.param("full", "dark", PHONE, marks=pytest.mark.long),
        ("limited", "dark", DESKTOP),
        pytest.param("limited", "light", PHONE, marks=pytest.mark.long),
        ("bare", "light", DESKTOP),
        pytest.param("bare", "dark", PHONE, marks=pytest.mark.long),
        pytest.param("hostile", "dark", DESKTOP, marks=pytest.mark.long),
        ("hostile", "light", PHONE),
        ("simulation", "light", DESKTOP),
        pytest.param("simulation", "dark", PHONE, marks=pytest.mark.long),
    ],
)
async def test_report_renders_offline_without_accessibility_violations(
    chromium: Browser, tmp_path: Path, kind: str, scheme: Any, viewport: Any
) -> None:
    async with opened(chromium, tmp_path, kind, color_scheme=scheme, viewport=viewport) as (page, problems):
        assert await page.evaluate(SCROLLS_SIDEWAYS) is False
        assert await page.evaluate(TEXT_OVERLAPS) == []
        for summary in await page.locator("summary").all():
            await summary.click()
        assert await page.evaluate(SCROLLS_SIDEWAYS) is False
        assert [problem for problem in problems if not problem.startswith("data:")] == []
        found = await Axe().run(page)
        assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found.response["violations"]] == []


async def test_colours_follow_the_scheme_and_print_is_white(chromium: Browser, tmp_path: Path) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    async with opened(chromium, tmp_path, "full", color_scheme="dark") as (page, _):
        dark = await page.evaluate(background)
        await page.emulate_media(color_scheme="light")
        light = await page.evaluate(background)
        await page.emulate_media(color_scheme="dark", media="print")
        assert len({dark, light, await page.evaluate(background)}) == 3
        assert await page.evaluate(background) == "rgb(255, 255, 255)"


async def test_print_shows_every_table_and_chart(chromium: Browser, tmp_path: Path) -> None:
    """The width is that of A4 within its margins; details must be open."""
    paper = {"width": 703, "height": 1000}
    async with opened(chromium, tmp_path, "full", viewport=paper) as (page, _):
        await page.emulate_media(media="print")
        assert await page.evaluate(SCROLLS_SIDEWAYS) is False
        assert await page.evaluate(TEXT_OVERLAPS) == []
        cells = "[...document.querySelectorAll('td')].filter(cell => !cell.checkVisibility()).length"
        assert await page.evaluate(cells) == 0
        assert len(await page.pdf(format="A4")) > 50_000


async def test_charts_have_accessible_names_and_descriptions(chromium: Browser, tmp_path: Path) -> None:
    async with opened(chromium, tmp_path, "full", viewport=DESKTOP) as (page, _):
        image = page.get_by_role("img", name="Time to first token against load", exact=True).first
        assert "p95: " in await image.evaluate("svg => svg.querySelector('desc').textContent")
        assert await page.get_by_role("img").count() == await page.locator("svg.chart").count()
        assert await page.get_by_role("region", name="Table: All stages").count() == 1
