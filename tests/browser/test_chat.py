"""The chat, in a real browser in front of the whole service."""

from __future__ import annotations

import json
import re

import pytest
from playwright.async_api import expect

from tests.browser.visitor import KEY, Visitor
from tests.graph.house import Service, caller, metrics, until

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="session")]

HARM = "<img src=x onerror=\"window.harmed = 1\"><script>window.harmed = 1</script><b onclick='x'>"


async def test_the_page_loads_whole_and_names_the_models(visitor: Visitor) -> None:
    await visitor.open()
    await expect(visitor.page).to_have_title("Chat · serve_app playground")
    await expect(visitor.page.locator("#status")).to_have_text("Ready")
    options = visitor.page.locator("#chat-view [name=model] option")
    assert await options.all_text_contents() == ["quick", "slow"]
    assert set(visitor.statuses.values()) == {200}


async def test_tokens_arrive_one_after_another(visitor: Visitor) -> None:
    await visitor.open()
    await visitor.choose("slow")
    await visitor.set("max_tokens", "12")
    await visitor.say("hello")
    seen = [""]
    for _ in range(4):
        seen.append(await visitor.grown(len(seen[-1])))
    assert await visitor.answers.get_attribute("aria-busy") == "true"
    await visitor.ended()
    assert await visitor.texts.text_content() == "user: hellou"
    assert all("user: hellou".startswith(text) for text in seen)


async def test_figures_are_live_and_right_in_the_end(visitor: Visitor) -> None:
    await visitor.open()
    await visitor.choose("slow")
    await visitor.set("max_tokens", "20")
    await visitor.say("hello")
    await visitor.grown(4)
    for name, pattern in {"ttft": r"^\d+ ms$", "rate": r"^\d+\.\d$", "count": r"^\d+$"}.items():
        await expect(visitor.page.locator(f".figures .{name} dd")).to_have_text(re.compile(pattern))
    assert await visitor.answers.get_attribute("aria-busy") == "true"
    await visitor.ended()
    await expect(visitor.page.locator(".figures .count dd")).to_have_text("20")
    await expect(visitor.page.locator(".figures .prompt dd")).to_have_text(str(len("user: hello")))
    await expect(visitor.page.locator(".figures .end")).to_contain_text("cut at max tokens")
    rate = float(await visitor.page.locator(".figures .rate dd").inner_text())
    assert 4 < rate < 1000 / 80 * 1.3, "steps of 80 ms"


@pytest.mark.parametrize("how", ["click", "Escape"])
async def test_stop_frees_the_slot_in_the_model(visitor: Visitor, service: Service, how: str) -> None:
    await visitor.open()
    await visitor.choose("slow")
    await visitor.set("max_tokens", "3000")
    await visitor.say("count")
    await visitor.grown(2)
    async with caller(service) as client:

        async def running() -> float:
            return (await metrics(client))["running_sequences", "slow"]

        async def nobody() -> bool:
            return await running() == 0

        assert await until(running) == 1
        if how == "click":
            await visitor.stop.click()
        else:
            await visitor.box.press("Escape")
        await expect(visitor.page.locator(".figures .end")).to_contain_text("stopped by you")
        await until(nobody)
    await expect(visitor.stop).to_be_hidden()
    await expect(visitor.box).to_be_focused()


async def test_every_control_reaches_the_request(visitor: Visitor) -> None:
    await visitor.open()
    given = {
        "system": "Be brief.",
        "temperature": "0.5",
        "top_p": "0.9",
        "top_k": "40",
        "seed": "7",
        "max_tokens": "9",
        "stop": "END\n\\n\\n",
        "presence_penalty": "0.1",
        "frequency_penalty": "-0.2",
        "repetition_penalty": "1.1",
    }
    for name, value in given.items():
        await visitor.set(name, value)
    async with visitor.page.expect_request("**/v1/chat/completions") as asked:
        await visitor.say("hello")
    assert (await asked.value).post_data_json == {
        "model": "quick",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}],
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "seed": 7,
        "max_tokens": 9,
        "stop": ["END", "\n\n"],
        "presence_penalty": 0.1,
        "frequency_penalty": -0.2,
        "repetition_penalty": 1.1,
        "logprobs": True,
        "top_logprobs": 5,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    await visitor.ended()
    await expect(visitor.texts).to_have_text("system: B")

    await visitor.page.get_by_role("button", name="Reset settings").click()
    await visitor.page.get_by_role("checkbox", name="Token probabilities").uncheck()
    async with visitor.page.expect_request("**/v1/chat/completions") as asked:
        await visitor.say("again")
    body = json.loads((await asked.value).post_data or "")
    assert set(body) == {"model", "messages", "max_tokens", "stream", "stream_options"}
    assert [message["role"] for message in body["messages"]] == ["user", "assistant", "user"]
    await visitor.stop.click()


async def test_a_field_out_of_range_is_pointed_at_and_nothing_is_sent(visitor: Visitor) -> None:
    await visitor.open()
    await visitor.set("temperature", "3")
    await visitor.say("hello")
    await expect(visitor.page.locator("#chat-view [name=temperature]")).to_be_focused()
    await expect(visitor.answers).to_have_count(0)
    await expect(visitor.box).to_have_value("hello")


async def test_regenerate_asks_anew_with_what_is_chosen_now(visitor: Visitor) -> None:
    await visitor.open()
    await visitor.set("max_tokens", "4")
    await visitor.say("one")
    await visitor.ended()
    await visitor.say("two")
    await visitor.ended(2)
    await visitor.set("max_tokens", "8")
    again = visitor.page.get_by_role("button", name="Regenerate")
    await expect(again).to_have_count(1)
    await again.click()
    await expect(visitor.texts.nth(1)).to_have_text("user: on")
    await visitor.ended(2)
    await expect(visitor.texts.nth(0)).to_have_text("user")


async def test_copy_takes_the_answer_as_it_is(visitor: Visitor) -> None:
    await visitor.open()
    await visitor.set("max_tokens", "20")
    await visitor.say("a\nb  c")
    await visitor.ended()
    await visitor.page.get_by_role("button", name="Copy").click()
    await expect(visitor.page.get_by_role("button", name="Copied")).to_be_visible()
    copied = await visitor.page.evaluate("navigator.clipboard.readText()")
    assert copied == await visitor.texts.text_content() == "user: a\nb  cuser: a\n"


async def test_copy_works_where_there_is_no_clipboard(visitor: Visitor) -> None:
    await visitor.page.add_init_script("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    await visitor.open()
    await visitor.set("max_tokens", "11")
    await visitor.say("hello")
    await visitor.ended()
    await visitor.page.get_by_role("button", name="Copy").click()
    await expect(visitor.page.get_by_role("button", name="Copied")).to_be_focused()
    await visitor.box.focus()
    await visitor.page.keyboard.press("Control+v")
    await expect(visitor.box).to_have_value("user: hello")


async def test_a_reload_keeps_conversation_settings_and_probabilities(visitor: Visitor) -> None:
    await visitor.open()
    await visitor.choose("slow")
    await visitor.set("max_tokens", "6")
    await visitor.set("system", "Be kind.")
    await visitor.say("hello")
    await visitor.ended()
    figures = await visitor.page.locator(".figures").inner_text()
    await visitor.page.reload()
    await visitor.open()
    await expect(visitor.page.locator(".asked p")).to_have_text("hello")
    await expect(visitor.texts).to_have_text("system")
    assert await visitor.page.locator(".figures").inner_text() == figures
    await expect(visitor.page.locator("#chat-view [name=model]")).to_have_value("slow")
    await expect(visitor.page.locator("#chat-view [name=system]")).to_have_value("Be kind.")
    await visitor.page.locator(".token").first.hover()
    await expect(visitor.tip).to_contain_text("100.0 %")


async def test_a_reload_in_the_middle_keeps_what_was_there(visitor: Visitor) -> None:
    await visitor.open()
    await visitor.choose("slow")
    await visitor.say("hello")
    before = await visitor.grown(3)
    await visitor.page.reload()
    await visitor.ended()
    assert (await visitor.texts.text_content() or "").startswith(before)
    await expect(visitor.page.locator(".failure")).to_be_hidden()
    await expect(visitor.page.get_by_role("button", name="Regenerate")).to_be_visible()


async def test_a_new_conversation_ends_the_answer_and_forgets_the_old_one(visitor: Visitor) -> None:
    await visitor.open()
    await visitor.choose("slow")
    await visitor.say("hello")
    await visitor.grown(1)
    await visitor.page.get_by_role("button", name="New conversation").click()
    await expect(visitor.answers).to_have_count(0)
    await expect(visitor.box).to_be_focused()
    await visitor.page.get_by_role("button", name="What is the capital of France?").click()
    await visitor.grown(1)
    await visitor.stop.click()
    await visitor.page.reload()
    await visitor.ended(1)


async def test_markup_from_the_model_is_text_and_runs_nothing(visitor: Visitor) -> None:
    await visitor.open()
    await visitor.set("max_tokens", str(len("user: " + HARM)))
    await visitor.set("system", "")
    await visitor.say(HARM)
    await visitor.ended()
    await visitor.page.reload()
    await visitor.ended()
    assert await visitor.texts.text_content() == f"user: {HARM}"
    assert await visitor.page.locator(".turns :is(img, script, b)").count() == 0
    assert await visitor.page.evaluate("'harmed' in window") is False
    assert f"{visitor.url}/x" not in visitor.statuses


async def test_characters_of_several_tokens_come_whole_with_all_their_probabilities(visitor: Visitor) -> None:
    await visitor.open()
    await visitor.set("max_tokens", str(len("user: 🌍é".encode())))
    await visitor.say("🌍é")
    await visitor.ended()
    assert await visitor.texts.text_content() == "user: 🌍é"
    await visitor.page.locator(".token", has_text="🌍").hover()
    await expect(visitor.tip.locator(".chosen")).to_have_count(4)


DAMAGED = [
    "{",
    "null",
    "7",
    "[]",
    '"text"',
    '{"chat": null, "compare": []}',
    '{"chat": {"turns": [null, 3, [], {}, {"prompt": {}, "answer": []}]}}',
    '{"chat": {"turns": [{"prompt": "x", "answer": {"tokens": [0, {"text": 1, "odds": [{"top": 3}]}], "end": {}}}]}}',
    '{"chat": {"settings": {"model": 1, "temperature": "hot", "odds": "yes", "max_tokens": "5"}}}',
    '{"chat": {"settings": {"constructor": "x", "model": "gone"}}, "compare": {"sides": [{"answer": {"failure": 1}}]}}',
]


@pytest.mark.parametrize("kept", DAMAGED)
async def test_damaged_memory_is_survived(visitor: Visitor, kept: str) -> None:
    await visitor.page.goto(f"{visitor.url}/health")
    await visitor.page.evaluate("([key, kept]) => localStorage.setItem(key, kept)", [KEY, kept])
    await visitor.open()
    notice = visitor.page.locator("#notice")
    if isinstance(_json(kept), dict):
        await expect(notice).to_be_hidden()
    else:
        await expect(notice).to_contain_text("could not be read")
    before = await visitor.answers.count()
    await visitor.set("max_tokens", "5")
    await visitor.say("hello")
    await visitor.ended(before + 1)
    await expect(visitor.texts.last).to_have_text("user:")


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


async def test_memory_that_is_full_or_off_costs_only_the_memory(visitor: Visitor) -> None:
    await visitor.page.add_init_script("Storage.prototype.setItem = () => { throw new DOMException('full') }")
    await visitor.open()
    await visitor.set("max_tokens", "5")
    await visitor.say("hello")
    await visitor.ended()
    await expect(visitor.texts).to_have_text("user:")
    await expect(visitor.page.locator("#notice")).to_contain_text("does not keep the conversation")
