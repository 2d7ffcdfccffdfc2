"""The chat in a browser in front of the whole service."""

from __future__ import annotations

import json
import re

import pytest
from playwright.async_api import expect

from tests.browser.playground import KEY, Playground
from tests.graph.service import Service, http_client, metric_totals, wait_until

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="session")]

MARKUP = "<img src=x onerror=\"window.executed = 1\"><script>window.executed = 1</script><b onclick='x'>"


async def shown_models(service: Service) -> list[str]:
    """The options of the list of models: the name, and the state unless the model is ready."""
    async with http_client(service) as client:
        models = (await client.get("/ready")).json()["models"]
    states = {"ready": ""}
    return [model["name"] + states.get(model["state"], f" ({model['state']})") for model in models]


async def test_the_page_loads_completely_and_lists_the_models(playground: Playground, toy_service: Service) -> None:
    await playground.open()
    await expect(playground.page).to_have_title("Chat · serve_app playground")
    await expect(playground.page.locator("#status")).to_have_text("Ready")
    options = playground.page.locator("#chat-view [name=model] option")
    assert await options.all_text_contents() == await shown_models(toy_service)
    assert set(playground.statuses.values()) == {200}


async def test_tokens_appear_one_after_another(playground: Playground) -> None:
    await playground.open()
    await playground.select_model("slow")
    await playground.set_field("max_tokens", "45")
    await playground.send("hello")
    seen = [""]
    for _ in range(4):
        seen.append(await playground.wait_for_text(len(seen[-1])))
    assert await playground.answers.get_attribute("aria-busy") == "true"
    await playground.wait_for_answers()
    whole = ("user: hello" * 5)[:45]
    assert await playground.texts.text_content() == whole
    assert all(whole.startswith(text) for text in seen)


async def test_figures_are_updated_while_tokens_arrive(playground: Playground) -> None:
    await playground.open()
    await playground.select_model("slow")
    await playground.set_field("max_tokens", "20")
    await playground.send("hello")
    await playground.wait_for_text(4)
    for name, pattern in {"ttft": r"^\d+ ms$", "rate": r"^\d+\.\d$", "count": r"^\d+$"}.items():
        await expect(playground.page.locator(f".figures .{name} dd")).to_have_text(re.compile(pattern))
    assert await playground.answers.get_attribute("aria-busy") == "true"
    await playground.wait_for_answers()
    await expect(playground.page.locator(".figures .count dd")).to_have_text("20")
    await expect(playground.page.locator(".figures .prompt dd")).to_have_text(str(len("user: hello")))
    await expect(playground.page.locator(".figures .end")).to_contain_text("cut at max tokens")
    rate = float(await playground.page.locator(".figures .rate dd").inner_text())
    assert 4 < rate < 1000 / 100 * 1.3, "steps of 100 ms"


@pytest.mark.parametrize("how", ["click", "Escape"])
async def test_stop_frees_the_slot_of_the_model(playground: Playground, toy_service: Service, how: str) -> None:
    await playground.open()
    await playground.select_model("slow")
    await playground.set_field("max_tokens", "3000")
    await playground.send("count")
    await playground.wait_for_text(2)
    async with http_client(toy_service) as client:

        async def running() -> float:
            return (await metric_totals(client))["running_sequences", "slow"]

        async def idle() -> bool:
            return await running() == 0

        assert await wait_until(running) == 1
        if how == "click":
            await playground.stop.click()
        else:
            await playground.message_box.press("Escape")
        await expect(playground.page.locator(".figures .end")).to_contain_text("stopped by you")
        await wait_until(idle)
    await expect(playground.stop).to_be_hidden()
    await expect(playground.message_box).to_be_focused()


async def test_the_request_has_the_value_of_every_control(playground: Playground) -> None:
    await playground.open()
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
        await playground.set_field(name, value)
    await playground.show_tokens()
    async with playground.page.expect_request("**/v1/chat/completions") as asked:
        await playground.send("hello")
    assert (await asked.value).post_data_json == {
        "model": "toy",
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
    await playground.wait_for_answers()
    await expect(playground.texts).to_have_text("system: B")

    await playground.page.get_by_role("button", name="Reset settings").click()
    async with playground.page.expect_request("**/v1/chat/completions") as asked:
        await playground.send("again")
    body = json.loads((await asked.value).post_data or "")
    assert set(body) == {"model", "messages", "max_tokens", "stream", "stream_options"}
    assert [message["role"] for message in body["messages"]] == ["user", "assistant", "user"]
    await playground.stop.click()


async def test_a_field_out_of_range_gets_the_focus_and_nothing_is_sent(playground: Playground) -> None:
    await playground.open()
    await playground.set_field("temperature", "3")
    await playground.send("hello")
    await expect(playground.page.locator("#chat-view [name=temperature]")).to_be_focused()
    await expect(playground.answers).to_have_count(0)
    await expect(playground.message_box).to_have_value("hello")


async def test_regenerate_uses_the_current_settings(playground: Playground) -> None:
    await playground.open()
    await playground.set_field("max_tokens", "4")
    await playground.send("one")
    await playground.wait_for_answers()
    await playground.send("two")
    await playground.wait_for_answers(2)
    await playground.set_field("max_tokens", "8")
    again = playground.page.get_by_role("button", name="Regenerate")
    await expect(again).to_have_count(1)
    await again.click()
    await expect(playground.texts.nth(1)).to_have_text("user: on")
    await playground.wait_for_answers(2)
    await expect(playground.texts.nth(0)).to_have_text("user")


async def test_copy_copies_the_text_of_the_answer(playground: Playground) -> None:
    await playground.open()
    await playground.set_field("max_tokens", "20")
    await playground.send("a\nb  c")
    await playground.wait_for_answers()
    await playground.page.get_by_role("button", name="Copy").click()
    await expect(playground.page.get_by_role("button", name="Copied")).to_be_visible()
    copied = await playground.page.evaluate("navigator.clipboard.readText()")
    assert copied == "user: a\nb  cuser: a\n"


async def test_copy_works_without_the_clipboard_interface(playground: Playground) -> None:
    await playground.page.add_init_script("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    await playground.open()
    await playground.set_field("max_tokens", "11")
    await playground.send("hello")
    await playground.wait_for_answers()
    await playground.page.get_by_role("button", name="Copy").click()
    await expect(playground.page.get_by_role("button", name="Copied")).to_be_focused()
    await playground.message_box.focus()
    await playground.page.keyboard.press("Control+v")
    await expect(playground.message_box).to_have_value("user: hello")


async def test_a_reload_keeps_conversation_settings_and_probabilities(playground: Playground) -> None:
    await playground.open()
    await playground.show_tokens()
    await playground.select_model("slow")
    await playground.set_field("max_tokens", "6")
    await playground.set_field("system", "Be kind.")
    await playground.send("hello")
    await playground.wait_for_answers()
    figures = await playground.page.locator(".figures").inner_text()
    await playground.page.reload()
    await playground.open()
    await expect(playground.page.locator(".asked p")).to_have_text("hello")
    await expect(playground.texts).to_have_text("system")
    assert await playground.page.locator(".figures").inner_text() == figures
    await expect(playground.page.locator("#chat-view [name=model]")).to_have_value("slow")
    await expect(playground.page.locator("#chat-view [name=system]")).to_have_value("Be kind.")
    await playground.page.locator(".token").first.hover()
    await expect(playground.tooltip).to_contain_text("100.0 %")


async def test_a_reload_during_an_answer_keeps_its_text(playground: Playground) -> None:
    await playground.open()
    await playground.select_model("slow")
    await playground.send("hello")
    before = await playground.wait_for_text(3)
    await playground.page.reload()
    await playground.wait_for_answers()
    assert (await playground.texts.text_content() or "").startswith(before)
    await expect(playground.page.locator(".failure")).to_be_hidden()
    await expect(playground.page.get_by_role("button", name="Regenerate")).to_be_visible()


async def test_a_new_conversation_stops_the_answer_and_deletes_the_old_one(playground: Playground) -> None:
    await playground.open()
    await playground.select_model("slow")
    await playground.send("hello")
    await playground.wait_for_text(1)
    await playground.page.get_by_role("button", name="New conversation").click()
    await expect(playground.answers).to_have_count(0)
    await expect(playground.message_box).to_be_focused()
    await playground.page.get_by_role("button", name="What is the capital of France?").click()
    await playground.wait_for_text(1)
    await playground.stop.click()
    await playground.page.reload()
    await playground.wait_for_answers(1)


async def test_markup_in_an_answer_is_shown_as_text(playground: Playground) -> None:
    await playground.open()
    await playground.set_field("max_tokens", str(len("user: " + MARKUP)))
    await playground.set_field("system", "")
    await playground.send(MARKUP)
    await playground.wait_for_answers()
    await playground.page.reload()
    await playground.wait_for_answers()
    assert await playground.texts.text_content() == f"user: {MARKUP}"
    assert await playground.page.locator(".turns :is(img, script, b)").count() == 0
    assert await playground.page.evaluate("'executed' in window") is False
    assert f"{playground.url}/x" not in playground.statuses


async def test_a_character_of_several_tokens_has_the_probabilities_of_all(playground: Playground) -> None:
    await playground.open()
    await playground.show_tokens()
    await playground.set_field("max_tokens", str(len("user: 🌍é".encode())))
    await playground.send("🌍é")
    await playground.wait_for_answers()
    assert await playground.texts.text_content() == "user: 🌍é"
    await playground.page.locator(".token", has_text="🌍").hover()
    await expect(playground.tooltip.locator(".chosen")).to_have_count(4)


DAMAGED = [
    "{",
    "null",
    "7",
    "[]",
    '"text"',
    '{"chat": null, "compare": []}',
    '{"chat": {"turns": [null, 3, [], {}, {"prompt": {}, "answer": []}]}}',
    '{"chat": {"turns": [{"prompt": "x", "answer": {"tokens": [0, {"text": 1, "odds": [{"top": 3}]}], "end": {}}}]}}',
    '{"chat": {"turns": [{"prompt": "x", "answer": {"reasoning": 1, "calls": [0, {"id": "a"}, {"index": {}}]}}]}}',
    '{"chat": {"settings": {"model": 1, "temperature": "hot", "odds": "yes", "max_tokens": "5"}}}',
    '{"chat": {"settings": {"constructor": "x", "model": "gone"}}, "compare": {"sides": [{"answer": {"failure": 1}}]}}',
]


@pytest.mark.parametrize("stored", DAMAGED)
async def test_the_page_works_with_a_damaged_storage(playground: Playground, stored: str) -> None:
    await playground.page.goto(f"{playground.url}/health")
    await playground.page.evaluate("([key, stored]) => localStorage.setItem(key, stored)", [KEY, stored])
    await playground.open()
    notice = playground.page.locator("#notice")
    if isinstance(_json(stored), dict):
        await expect(notice).to_be_hidden()
    else:
        await expect(notice).to_contain_text("could not be read")
    before = await playground.answers.count()
    await playground.set_field("max_tokens", "5")
    await playground.send("hello")
    await playground.wait_for_answers(before + 1)
    await expect(playground.texts.last).to_have_text("user:")


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


async def test_the_page_works_with_a_full_storage(playground: Playground) -> None:
    await playground.page.add_init_script("Storage.prototype.setItem = () => { throw new DOMException('full') }")
    await playground.open()
    await playground.set_field("max_tokens", "5")
    await playground.send("hello")
    await playground.wait_for_answers()
    await expect(playground.texts).to_have_text("user:")
    await expect(playground.page.locator("#notice")).to_contain_text("cannot store the conversation")
