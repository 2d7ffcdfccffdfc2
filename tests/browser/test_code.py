"""The programs of "Show as code", which are run against the service."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.async_api import expect

from serve_app.core.requests import GenerationRequest
from tests.api.scripted import ScriptedEngine, chunk
from tests.browser.playground import Playground

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="session")]

HARD = 'It\'s "quoted" \\n \\ $HOME `id` !x %s ${y}\n\ttab\n\né🌍\u2028\x7f</script>'
TOOL = {
    "type": "function",
    "function": {
        "name": "find",
        "description": HARD,
        "parameters": {
            "type": "object",
            "properties": {"__proto__": {"enum": [None, True, False, 1.5e300, -7, [], {}, "it's"]}, "a b": {}},
        },
    },
}
SETTINGS = {
    "system": HARD,
    "temperature": "0.5",
    "top_p": "0.9",
    "top_k": "40",
    "seed": "7",
    "max_tokens": "9",
    "stop": "END'\"\n\\n\\n",
    "presence_penalty": "0.1",
    "frequency_penalty": "-0.2",
    "repetition_penalty": "1.1",
    "tools": json.dumps([TOOL]),
}
NAMES = ["curl", "Python", "JavaScript"]


async def programs(playground: Playground, view: str = "chat") -> dict[str, str]:
    """The programs of the dialog, which is closed again."""
    await playground.page.locator(f"#{view}-view .as-code").first.click()
    dialog = playground.page.get_by_role("dialog", name="This request as code")
    await expect(dialog.locator(".head span")).to_have_text(NAMES)
    texts = await dialog.locator("code").all_text_contents()
    await playground.page.keyboard.press("Escape")
    await expect(dialog).to_be_hidden()
    return dict(zip(NAMES, texts, strict=True))


async def output(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, error = await process.communicate()
    assert process.returncode == 0, error.decode()
    return out.decode()


def content(request: GenerationRequest) -> GenerationRequest:
    """The request without its id and its times."""
    return replace(request, id="", group="", arrived=0, deadline=0)


@pytest.fixture
def finished(engine: ScriptedEngine) -> ScriptedEngine:
    engine.plays(chunk(["so", " far: é"]))
    return engine


async def test_programs_with_every_setting_send_the_request_of_the_page(
    scripted: Playground, finished: ScriptedEngine
) -> None:
    await scripted.open()
    await scripted.show_tokens()
    for name, value in SETTINGS.items():
        await scripted.set_field(name, value)
    await scripted.message_box.fill(HARD)
    found = await programs(scripted)
    await scripted.message_box.press("Enter")
    await scripted.wait_for_answers()
    await output("sh", "-c", found["curl"])
    await output(sys.executable, "-c", found["Python"])
    page, by_curl, by_python = [content(request) for request in finished.requests]
    assert page.params.top_k == 40
    assert page.tool_choice is not None
    assert by_curl == page
    assert by_python == page


async def test_programs_print_the_answer(scripted: Playground, finished: ScriptedEngine) -> None:
    await scripted.open()
    await scripted.send("one")
    await scripted.wait_for_answers()
    found = await programs(scripted)
    assert await output(sys.executable, "-X", "utf8", "-c", found["Python"]) == "so far: é"
    assert "far: é" in await output("sh", "-c", found["curl"])
    first, by_python, by_curl = [content(request) for request in finished.requests]
    assert by_python == by_curl == first


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
async def test_the_program_in_javascript_is_read_by_node(
    scripted: Playground, finished: ScriptedEngine, tmp_path: Path
) -> None:
    await scripted.open()
    for name, value in SETTINGS.items():
        await scripted.set_field(name, value)
    program = (await programs(scripted))["JavaScript"]
    await scripted.send("Hello")
    await scripted.wait_for_answers()
    file = tmp_path / "program.mjs"
    file.write_text(program)
    await output("node", "--check", str(file))
    argument = program.partition("completions.create(")[2].partition(");\nfor await")[0]
    file.write_text(f"console.log(JSON.stringify({argument}))")
    sent = json.loads(await output("node", str(file)))
    assert {**sent, "stream_options": {"include_usage": True}} == scripted.bodies[0]


async def test_every_program_is_copied(scripted: Playground) -> None:
    await scripted.open()
    found = await programs(scripted)
    await scripted.page.locator("#chat-view .as-code").click()
    for i, name in enumerate(NAMES):
        await scripted.page.locator(".program .copy").nth(i).click()
        await expect(scripted.page.locator(".program .copy").nth(i)).to_have_text("Copied")
        assert await scripted.page.evaluate("navigator.clipboard.readText()") == found[name]


async def test_copy_in_the_dialog_works_without_the_clipboard_interface(scripted: Playground) -> None:
    await scripted.page.add_init_script("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    await scripted.open()
    found = await programs(scripted)
    await scripted.page.locator("#chat-view .as-code").click()
    await scripted.page.locator(".program .copy").first.click()
    await expect(scripted.page.locator(".program .copy").first).to_have_text("Copied")
    await scripted.page.keyboard.press("Escape")
    await scripted.message_box.focus()
    await scripted.page.keyboard.press("Control+v")
    await expect(scripted.message_box).to_have_value(found["curl"])


async def test_the_code_is_of_the_text_in_the_box_or_of_the_last_request(
    scripted: Playground, finished: ScriptedEngine
) -> None:
    await scripted.open()
    assert '"content": "Hello"' in (await programs(scripted))["curl"]
    await scripted.send("first")
    await scripted.wait_for_answers()
    assert '"content": "first"' in (await programs(scripted))["curl"]
    await scripted.message_box.fill("second")
    curl = (await programs(scripted))["curl"]
    assert curl.index('"first"') < curl.index('"so far: é"') < curl.index('"second"')


async def test_the_code_of_a_side_has_its_model(scripted: Playground) -> None:
    await scripted.open("compare")
    await scripted.page.get_by_role("textbox", name="Prompt for both").fill("both")
    curl = (await programs(scripted, "compare"))["curl"]
    assert '"model": "small"' in curl
    assert '"content": "both"' in curl


async def test_a_wrong_setting_is_shown_in_place_of_code(scripted: Playground) -> None:
    await scripted.open()
    await scripted.set_field("temperature", "3")
    await scripted.page.locator("#chat-view .as-code").click()
    await expect(scripted.page.locator("#chat-view [name=temperature]")).to_be_focused()
    await expect(scripted.page.get_by_role("dialog")).to_be_hidden()
