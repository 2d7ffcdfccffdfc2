"""Reasoning and tool calls of an answer, the tools of a request, and the results that the user sends."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from playwright.async_api import expect

from serve_app.core.events import Chunk, Delta, FinishReason, TextDelta, TokenEvent, ToolCallDelta
from serve_app.core.requests import ChatPrompt, GenerationRequest
from tests.api.scripted import ScriptedEngine, Step
from tests.browser.playground import Playground

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="session")]

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALLS: list[Delta] = [
    TextDelta("Let me look."),
    ToolCallDelta(0, name="weather"),
    ToolCallDelta(0, arguments='{"city": "Par'),
    ToolCallDelta(0, arguments='is", "days": [1, 12345678901234567890]}'),
    ToolCallDelta(1, name="weather", arguments="{}"),
]

WRONG_TOOLS = {
    "[": "not JSON",
    "{}": "a list in square brackets",
    '[{"type": "function", "function": {"name": "f"}}, {"name": "g"}]': 'Tool 2 needs "type"',
    '[{"type": "function", "function": {}}]': 'Tool 1 needs a "function" with a "name"',
    "[null]": "Tool 1",
}


def delta_chunk(deltas: Sequence[Delta], finish: FinishReason | None = FinishReason.STOP) -> Chunk:
    last = len(deltas) - 1
    events = (
        TokenEvent(i, "", 0.01 * i, finish_reason=finish if i == last else None, deltas=(delta,))
        for i, delta in enumerate(deltas)
    )
    return Chunk(tuple(events), prompt_tokens=3, queue_s=0)


def calls_then_answer(request: GenerationRequest) -> list[Step]:
    assert isinstance(request.prompt, ChatPrompt)
    roles = [message.role for message in request.prompt.messages]
    return [delta_chunk([TextDelta("It is **warm**.")] if "tool" in roles else CALLS)]


async def offer_tools(playground: Playground, tools: object = (WEATHER,)) -> None:
    await playground.open()
    await playground.expand_settings()
    await playground.set_field("tools", json.dumps(tools))


def sse(*deltas: dict[str, Any], finish: str = "stop") -> str:
    """A recorded stream in OpenAI's form, as other servers send it."""
    choices = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    bodies = [{"choices": [choice]} for choice in [*choices, {"index": 0, "delta": {}, "finish_reason": finish}]]
    return "".join(f"data: {body}\n\n" for body in [*map(json.dumps, bodies), "[DONE]"])


async def test_tool_calls_are_shown_folded_while_they_arrive(scripted: Playground, engine: ScriptedEngine) -> None:
    engine.plays(delta_chunk(CALLS[:3], None), None)
    await offer_tools(scripted)
    await scripted.send("weather in Paris?")
    await expect(scripted.texts).to_have_text("Let me look.")
    assert scripted.bodies[0]["tools"] == [WEATHER]
    call = scripted.page.locator(".call")
    await expect(call.locator("summary")).to_have_text("Tool call: weather")
    await expect(call.locator("pre")).to_be_hidden()
    await call.locator("summary").click()
    await expect(call.locator("pre")).to_have_text('{\n  "city": "Par', use_inner_text=True)
    await expect(call.locator(".result")).to_be_hidden()
    await scripted.stop.click()
    await scripted.wait_for_answers()


async def test_the_results_of_calls_continue_the_conversation(scripted: Playground, engine: ScriptedEngine) -> None:
    engine.script = calls_then_answer
    await offer_tools(scripted)
    await scripted.send("weather in Paris?")
    await scripted.wait_for_answers()
    page = scripted.page
    await expect(page.locator("#announcer")).to_contain_text("It calls weather. It calls weather.")
    await page.locator(".call summary").first.click()
    pretty = '{\n  "city": "Paris",\n  "days": [\n    1,\n    12345678901234567890\n  ]\n}'
    assert await page.locator(".call pre").first.inner_text() == pretty
    await page.get_by_role("textbox", name="Result").nth(0).fill('{"celsius": 18}')
    await page.reload()
    await page.get_by_role("textbox", name="Result").nth(1).fill("unknown")
    await page.get_by_role("button", name="Send results").click()
    await scripted.wait_for_answers(2)
    _, assistant, *results = scripted.bodies[1]["messages"]
    assert assistant["content"] == "Let me look."
    ids = [call["id"] for call in assistant["tool_calls"]]
    assert assistant["tool_calls"][0]["function"] == {
        "name": "weather",
        "arguments": '{"city": "Paris", "days": [1, 12345678901234567890]}',
    }
    contents = ['{"celsius": 18}', "unknown"]
    assert results == [
        {"role": "tool", "tool_call_id": call, "content": content} for call, content in zip(ids, contents, strict=True)
    ]
    await expect(scripted.texts.nth(1).locator("strong")).to_have_text("warm")
    await expect(page.get_by_role("button", name="Send results")).to_be_hidden()
    await expect(page.get_by_role("textbox", name="Result").first).not_to_be_editable()

    await scripted.send("thanks")
    await scripted.wait_for_answers(3)
    roles = [message["role"] for message in scripted.bodies[2]["messages"]]
    assert roles == ["user", "assistant", "tool", "tool", "assistant", "user"]
    await page.reload()
    await expect(page.locator(".call")).to_have_count(2)
    await expect(page.get_by_role("button", name="Send results")).to_be_hidden()


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
async def test_reasoning_is_shown_folded_and_stored(scripted: Playground, name: str) -> None:
    body = sse({"role": "assistant", name: "First "}, {name: "<b>think</b>"}, {"content": "done", name: None})
    await scripted.page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body)
    )
    await scripted.open()
    await scripted.send("hello")
    await scripted.wait_for_answers()
    for _ in range(2):
        await expect(scripted.texts).to_have_text("done")
        reasoning = scripted.page.locator(".reasoning")
        await expect(reasoning.locator("p")).to_be_hidden()
        await reasoning.locator("summary").click()
        await expect(reasoning.locator("p")).to_have_text("First <b>think</b>")
        await scripted.page.reload()
    await scripted.send("again")
    await scripted.wait_for_answers(2)
    assert scripted.bodies[1]["messages"][1] == {"role": "assistant", "content": "done"}


async def test_calls_with_whole_arguments_and_without_ids_can_be_answered(scripted: Playground) -> None:
    calls = [{"index": i, "function": {"name": f"f{i}", "arguments": '{"a": 1}'}} for i in range(2)]
    body = sse({"role": "assistant", "content": None, "tool_calls": calls}, finish="tool_calls")
    await scripted.page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body)
    )
    await scripted.open()
    await scripted.send("hello")
    await scripted.wait_for_answers()
    await expect(scripted.texts).to_be_hidden()
    await expect(scripted.page.locator(".call summary")).to_have_text(["Tool call: f0", "Tool call: f1"])
    await scripted.page.get_by_role("button", name="Send results").click()
    await scripted.wait_for_answers(2)
    messages = scripted.bodies[1]["messages"]
    assert [call["id"] for call in messages[1]["tool_calls"]] == [one["tool_call_id"] for one in messages[2:]]
    assert messages[1]["content"] is None


async def test_wrong_tools_are_reported_and_nothing_is_sent(scripted: Playground) -> None:
    await scripted.open()
    field = scripted.page.locator("#chat-view [name=tools]")
    wrong = scripted.page.locator("#chat-view .wrong")
    for tools, words in WRONG_TOOLS.items():
        await field.fill(tools)
        await expect(wrong).to_contain_text(words)
        await expect(field).to_have_accessible_description(await wrong.inner_text())
        await expect(field).to_have_attribute("aria-invalid", "true")
    await scripted.page.locator("#chat-view .settings summary").click()
    await scripted.send("hello")
    await expect(field).to_be_focused()
    await expect(scripted.answers).to_have_count(0)
    await field.fill("")
    await expect(field).to_have_attribute("aria-invalid", "false")
    await expect(wrong).to_be_empty()


async def test_a_tool_that_the_service_refuses_is_marked(scripted: Playground) -> None:
    await offer_tools(scripted, [{"type": "function", "function": {"name": "two words"}}])
    await scripted.send("hello")
    await expect(scripted.page.locator(".failure")).to_contain_text("tools")
    await expect(scripted.page.locator("#chat-view [name=tools]")).to_have_attribute("aria-invalid", "true")
