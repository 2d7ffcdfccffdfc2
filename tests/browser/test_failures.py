"""The texts of the page when the service cannot answer, and that the page works afterwards."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest
from playwright.async_api import Browser, expect

from serve_app.core.queries import ModelState, ModelStatus
from serve_app.core.requests import GenerationRequest
from serve_app.errors import (
    DeadlineExceeded,
    InsufficientQuota,
    InternalError,
    InvalidRequest,
    NotReady,
    QueueFull,
    RateLimitExceeded,
)
from tests.api.scripted import BEAT, ScriptedEngine, Step, chunk
from tests.browser.conftest import served
from tests.browser.playground import Playground
from tests.graph.service import Service, free_port, model_config, wait_until

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="session")]


async def failed(scripted: Playground) -> str:
    await expect(scripted.page.locator(".failure")).to_be_visible()
    await scripted.wait_for_answers()
    return await scripted.page.locator(".failure").inner_text()


FAILURES: list[tuple[Exception, list[str]]] = [
    (NotReady("small is being loaded", retry_after_s=7), ["not ready", "is being loaded", "7 s"]),
    (QueueFull("as many wait as it takes", retry_after_s=3), ["busy", "as many wait", "3 s"]),
    (RateLimitExceeded("60 requests per minute", retry_after_s=9), ["limit of this key", "60 requests", "9 s"]),
    (InsufficientQuota("dollars per month"), ["budget of this key", "dollars per month"]),
    (DeadlineExceeded("not finished after 600 s"), ["too long", "600 s", "Lower max tokens"]),
    (InternalError("quote request abc"), ["failed", "quote request abc"]),
    (InvalidRequest("seed is odd", param="seed"), ["refused a setting", "seed is odd"]),
    (ValueError("an unexpected exception"), ["failed", "Quote request"]),
]


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(("error", "words"), FAILURES)
async def test_every_error_has_a_text_and_try_again_works(
    scripted: Playground, engine: ScriptedEngine, error: Exception, words: Sequence[str], begun: bool
) -> None:
    engine.plays(*([chunk(["so", " far"], None)] if begun else []), error)
    await scripted.open()
    await scripted.send("hello")
    text = await failed(scripted)
    assert [word for word in words if word not in text and not (begun and word.endswith(" s"))] == []
    await expect(scripted.page.locator("#announcer")).to_contain_text(text.splitlines()[0])
    await expect(scripted.texts).to_have_text("so far" if begun else "")
    if isinstance(error, InvalidRequest):
        await expect(scripted.page.locator("#chat-view [name=seed]")).to_have_attribute("aria-invalid", "true")

    engine.plays(chunk(["well", " done"]))
    await scripted.page.get_by_role("button", name="Try again").click()
    await expect(scripted.texts).to_have_text("well done")
    await scripted.wait_for_answers()
    await expect(scripted.page.locator(".failure")).to_be_hidden()


@pytest.mark.parametrize(("state", "text"), [(ModelState.ASLEEP, "being loaded"), (ModelState.READY, "free slot")])
async def test_the_reason_for_waiting_is_shown(
    scripted: Playground, engine: ScriptedEngine, state: ModelState, text: str
) -> None:
    engine.statuses["small"] = ModelStatus("small", state)
    engine.plays(None)
    await scripted.open()
    await scripted.send("hello")
    await expect(scripted.page.locator(".waiting")).to_contain_text(text)
    await scripted.stop.click()
    await scripted.wait_for_answers()

    async def idle() -> bool:
        return engine.running == 0

    # The service notices a moment later that the page has cancelled the request.
    await wait_until(idle, every_s=0.01)


async def test_heartbeats_between_tokens_leave_the_text_visible(scripted: Playground, engine: ScriptedEngine) -> None:
    steps: list[Step] = [chunk(["first"], None), BEAT, BEAT, None]
    engine.plays(*steps)
    await scripted.open()
    await scripted.send("hello")
    await expect(scripted.texts).to_have_text("first")
    await engine.heartbeat.wait()
    await expect(scripted.texts).to_be_visible()
    await expect(scripted.page.locator(".waiting")).to_be_hidden()
    await scripted.stop.click()


async def test_the_status_names_the_models_that_load_or_failed(scripted: Playground, engine: ScriptedEngine) -> None:
    engine.statuses = {
        "small": ModelStatus("small", ModelState.LOADING, "reading weights"),
        "org/large": ModelStatus("org/large", ModelState.FAILED, "no such file"),
    }
    await scripted.open()
    status = scripted.page.locator("#status")
    await expect(status).to_have_text(
        "small is being loaded (reading weights); org/large cannot be loaded (no such file)"
    )
    options = scripted.page.locator("#chat-view [name=model] option")
    assert await options.all_text_contents() == ["small (loading)", "org/large (failed)", "support (loading)"]
    engine.statuses = {"org/large": ModelStatus("org/large", ModelState.ASLEEP)}
    await expect(status).to_have_text("Ready")
    assert await options.all_text_contents() == ["small", "org/large (asleep)", "support"]


async def test_a_stream_without_its_end_mark_is_a_failure(scripted: Playground) -> None:
    await scripted.open()
    half = 'data: {"choices": [{"delta": {"content": "half"}}]}\n\n'
    await scripted.page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(content_type="text/event-stream", body=half),
    )
    await scripted.send("hello")
    assert "lost before the answer was complete" in await failed(scripted)
    await expect(scripted.texts).to_have_text("half")


async def test_an_error_without_an_error_object_is_shown(scripted: Playground) -> None:
    await scripted.open()
    await scripted.page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(status=502, content_type="text/html", body="<h1>Bad</h1>")
    )
    await scripted.send("hello")
    text = await failed(scripted)
    assert "cannot read" in text
    assert "Status 502" in text


async def test_the_request_leaves_out_turns_without_an_answer(scripted: Playground, engine: ScriptedEngine) -> None:
    engine.plays(InternalError("once"))
    await scripted.open()
    await scripted.send("first")
    await failed(scripted)
    engine.plays(chunk(["yes"]))
    async with scripted.page.expect_request("**/v1/chat/completions") as asked:
        await scripted.send("second")
    body = json.loads((await asked.value).post_data or "")
    assert body["messages"] == [{"role": "user", "content": "second"}]
    await scripted.wait_for_answers(2)


async def test_the_tooltip_lists_the_alternatives_with_their_probabilities(
    scripted: Playground, engine: ScriptedEngine
) -> None:
    engine.plays(chunk(["well", " then"]))
    await scripted.open()
    await scripted.show_tokens()
    await scripted.send("hello")
    await scripted.wait_for_answers()
    await scripted.page.locator(".token").nth(1).hover()
    await expect(scripted.tooltip.locator("p")).to_have_text(
        [re.compile(r"␣then\s+60\.7 %"), re.compile(r"é\s+0\.0 %")]
    )


async def check_restart(
    playground: Playground, restart: Callable[[], AbstractAsyncContextManager[None]], answer: str
) -> None:
    """The page before, between and during two runs of the service."""
    async with restart():
        await playground.open()
        await playground.set_field("max_tokens", "6")
        await playground.send("before it")
        await playground.wait_for_answers(1)
        await playground.set_field("max_tokens", "3000")
        await playground.send("during it")
        await playground.wait_for_text(1, 1)
    failure = playground.page.locator(".failure:visible")
    await expect(failure).to_contain_text("Try again in a moment")
    await expect(playground.page.locator("#status")).to_have_text("The service does not answer")
    await playground.page.get_by_role("button", name="Try again").click()
    await expect(failure).to_contain_text("The service does not answer.")

    async with restart():
        await expect(playground.page.locator("#status")).to_have_text("Ready")
        await playground.set_field("max_tokens", "6")
        await playground.page.get_by_role("button", name="Try again").click()
        await playground.wait_for_answers(2)
        assert await playground.texts.all_text_contents() == [answer, answer]
        await playground.page.reload()
        assert await playground.page.locator(".asked p").all_text_contents() == ["before it", "during it"]
    assert playground.errors == []


async def test_the_page_survives_a_restart(chromium: Browser, engine: ScriptedEngine) -> None:
    """The HTTP application is stopped and started again; a restart of the whole service takes 30 s longer."""
    port = free_port()

    def script(request: GenerationRequest) -> list[Step]:
        return [chunk(["user", ":"], None), None] if request.params.max_tokens == 3000 else [chunk(["user", ":"])]

    engine.script = script
    async with Playground.at(chromium, f"http://127.0.0.1:{port}") as playground:
        await check_restart(playground, lambda: served(engine, port), "user:")


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.timeout(300)  # the service is started twice
async def test_the_page_survives_a_restart_of_the_whole_service(chromium: Browser) -> None:
    port = free_port()
    toy = model_config("toy", "builtin:toy?step_ms=50", engine={"max_context": 4096})

    @asynccontextmanager
    async def run() -> AsyncIterator[None]:
        with Service([toy], "--ray-address", "local", "--no-dashboard", "--port", str(port)) as service:
            service.wait_until_ready()
            yield

    async with Playground.at(chromium, f"http://127.0.0.1:{port}") as playground:
        await check_restart(playground, run, "user: ")
