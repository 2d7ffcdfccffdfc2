"""What the page says when the service cannot answer, and that it goes on afterwards."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import pytest
from playwright.async_api import Browser, expect

from serve_app.core.queries import ModelState, ModelStatus
from serve_app.errors import DeadlineExceeded, InternalError, InvalidRequest, NotReady, QueueFull
from tests.api.scripted import BEAT, ScriptedGateway, Step, chunk
from tests.browser.visitor import Visitor
from tests.graph.house import Service, free_port, model, until

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="session")]


async def failed(guest: Visitor) -> str:
    await expect(guest.page.locator(".failure")).to_be_visible()
    await guest.ended()
    return await guest.page.locator(".failure").inner_text()


TROUBLES: list[tuple[Exception, list[str]]] = [
    (NotReady("small is being loaded", retry_after_s=7), ["not ready", "is being loaded", "7 s"]),
    (QueueFull("as many wait as it takes", retry_after_s=3), ["busy", "as many wait", "3 s"]),
    (DeadlineExceeded("not finished after 600 s"), ["too long", "600 s", "Lower max tokens"]),
    (InternalError("quote request abc"), ["failed", "quote request abc"]),
    (InvalidRequest("seed is odd", param="seed"), ["refused a setting", "seed is odd"]),
    (ValueError("a fault of ours"), ["failed", "quote request"]),
]


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(("error", "words"), TROUBLES)
async def test_errors_are_said_in_words_and_trying_again_works(
    guest: Visitor, gateway: ScriptedGateway, error: Exception, words: Sequence[str], begun: bool
) -> None:
    gateway.plays(*([chunk(["so", " far"], None)] if begun else []), error)
    await guest.open()
    await guest.say("hello")
    said = await failed(guest)
    assert [word for word in words if word not in said and not (begun and word.endswith(" s"))] == []
    await expect(guest.page.locator("#announcer")).to_contain_text(said.splitlines()[0])
    await expect(guest.texts).to_have_text("so far" if begun else "")
    if isinstance(error, InvalidRequest):
        await expect(guest.page.locator("#chat-view [name=seed]")).to_have_attribute("aria-invalid", "true")

    gateway.plays(chunk(["well", " done"]))
    await guest.page.get_by_role("button", name="Try again").click()
    await expect(guest.texts).to_have_text("well done")
    await guest.ended()
    await expect(guest.page.locator(".failure")).to_be_hidden()


@pytest.mark.parametrize(("word", "said"), [("warming", "being loaded"), ("queued", "free place")])
async def test_waiting_is_said(guest: Visitor, gateway: ScriptedGateway, word: str, said: str) -> None:
    gateway.word = word
    gateway.plays(None)
    await guest.open()
    await guest.say("hello")
    await expect(guest.page.locator(".waiting")).to_contain_text(said)
    await guest.stop.click()
    await guest.ended()

    async def nobody() -> bool:
        return gateway.running == 0

    # The page lets go before the service has heard that it did.
    await until(nobody, every_s=0.01)


async def test_silence_between_tokens_leaves_the_text_in_sight(guest: Visitor, gateway: ScriptedGateway) -> None:
    steps: list[Step] = [chunk(["first"], None), BEAT, BEAT, None]
    gateway.plays(*steps)
    await guest.open()
    await guest.say("hello")
    await expect(guest.texts).to_have_text("first")
    await gateway.beaten.wait()
    await expect(guest.texts).to_be_visible()
    await expect(guest.page.locator(".waiting")).to_be_hidden()
    await guest.stop.click()


async def test_models_that_load_or_fail_are_named_until_they_are_ready(
    guest: Visitor, gateway: ScriptedGateway
) -> None:
    gateway.states = [
        ModelStatus("small", ModelState.LOADING, "reading weights"),
        ModelStatus("org/large", ModelState.FAILED, "no such file"),
    ]
    await guest.open()
    status = guest.page.locator("#status")
    await expect(status).to_have_text(
        "small is being loaded (reading weights); org/large cannot be loaded (no such file)"
    )
    options = guest.page.locator("#chat-view [name=model] option")
    assert await options.all_text_contents() == ["small (loading)", "org/large (failed)"]
    gateway.states = [ModelStatus("small", ModelState.READY), ModelStatus("org/large", ModelState.ASLEEP)]
    await expect(status).to_have_text("Ready")
    assert await options.all_text_contents() == ["small", "org/large (asleep)"]


async def test_a_stream_that_breaks_off_is_told_from_one_that_ends(guest: Visitor) -> None:
    await guest.open()
    half = 'data: {"choices": [{"delta": {"content": "half"}}]}\n\n'
    await guest.page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(content_type="text/event-stream", body=half),
    )
    await guest.say("hello")
    assert "lost before the answer was whole" in await failed(guest)
    await expect(guest.texts).to_have_text("half")


async def test_an_answer_without_our_envelope_is_survived(guest: Visitor) -> None:
    await guest.open()
    await guest.page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(status=502, content_type="text/html", body="<h1>Bad</h1>")
    )
    await guest.say("hello")
    said = await failed(guest)
    assert "no usable answer" in said
    assert "Status 502" in said


async def test_an_unanswered_turn_is_not_sent_along(guest: Visitor, gateway: ScriptedGateway) -> None:
    gateway.plays(InternalError("once"))
    await guest.open()
    await guest.say("first")
    await failed(guest)
    gateway.plays(chunk(["yes"]))
    async with guest.page.expect_request("**/v1/chat/completions") as asked:
        await guest.say("second")
    body = json.loads((await asked.value).post_data or "")
    assert body["messages"] == [{"role": "user", "content": "second"}]
    await guest.ended(2)


async def test_alternatives_are_listed_with_their_shares(guest: Visitor, gateway: ScriptedGateway) -> None:
    gateway.plays(chunk(["well", " then"]))
    await guest.open()
    await guest.say("hello")
    await guest.ended()
    await guest.page.locator(".token").nth(1).hover()
    await expect(guest.tip.locator("p")).to_have_text([re.compile(r"␣then\s+60\.7 %"), re.compile(r"é\s+0\.0 %")])


@pytest.mark.timeout(300)  # the service is started twice
async def test_a_restart_of_the_service_is_survived(chromium: Browser) -> None:
    port = free_port()
    here = ("--ray-address", "local", "--port", str(port))
    toy = model("toy", "builtin:toy?step_ms=50", engine={"max_context": 4096})
    async with Visitor.at(chromium, f"http://127.0.0.1:{port}") as visitor:
        with Service([toy], *here) as service:
            service.wait_for("answers on")
            await visitor.open()
            await visitor.set("max_tokens", "6")
            await visitor.say("before")
            await visitor.ended(1)
            await visitor.set("max_tokens", "3000")
            await visitor.say("meanwhile")
            await visitor.grown(3, 1)
        failure = visitor.page.locator(".failure:visible")
        await expect(failure).to_contain_text("try again in a moment")
        await expect(visitor.page.locator("#status")).to_have_text("The service does not answer")
        await visitor.page.get_by_role("button", name="Try again").click()
        await expect(failure).to_contain_text("The service does not answer.")

        with Service([toy], *here) as service:
            service.wait_for("answers on")
            await expect(visitor.page.locator("#status")).to_have_text("Ready")
            await visitor.set("max_tokens", "6")
            await visitor.page.get_by_role("button", name="Try again").click()
            await visitor.ended(2)
            assert await visitor.texts.all_text_contents() == ["user: ", "user: "]
            await visitor.page.reload()
            assert await visitor.page.locator(".asked p").all_text_contents() == ["before", "meanwhile"]
        assert visitor.complaints == []
