"""Tests of tool calls of the embedded model through the engine, and of configured chat templates."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from serve_app.core.events import FinishReason, TokenEvent
from serve_app.core.requests import ChatMessage, ChatPrompt, GenerationRequest, SamplingParams, ToolCall, ToolChoice
from serve_app.engines.files.model_files import SourceError
from serve_app.engines.native.engine import NativeEngine
from serve_app.engines.native.loader import load
from serve_app.engines.stream import TokenStream
from tests.engines.text.call_formats import HERMES, Call, join_deltas, parse
from tests.engines.text.tool_families import SCHEMAS, SHIPPED_TEMPLATE, SHOWN_TOOLS, choice
from tests.models import tiny
from tests.models.concurrent_load import model_config, running

pytestmark = [pytest.mark.model, pytest.mark.timeout(300)]

WEATHER_QUESTION = ChatMessage("user", "What is the weather in Paris?")


@pytest.fixture(scope="module")
def engine() -> Iterator[NativeEngine]:
    """With the chat template of this package, which writes calls in the format HERMES."""
    config = model_config("builtin:smollm2-135m", max_running=16, max_context=1024, max_step_tokens=96, threads=1)
    with running(config.model_copy(update={"dtype": "bfloat16", "chat_template": SHIPPED_TEMPLATE})) as engine:
        yield engine


async def generate(
    engine: NativeEngine, tool_choice: ToolChoice, *messages: ChatMessage, **params: Any
) -> list[TokenEvent]:
    prompt = ChatPrompt(messages or (WEATHER_QUESTION,), SHOWN_TOOLS)
    sampling = SamplingParams(**{"max_tokens": 200, "temperature": 1.0} | params)
    now = time.monotonic()
    stream = TokenStream(GenerationRequest("id", "m", prompt, sampling, now, now + 900, tool_choice=tool_choice))
    assert await asyncio.to_thread(engine.admit, [stream]) == [None]
    return [event async for chunk in stream.chunks(0.0) for event in chunk.events]


def content_and_calls(events: list[TokenEvent]) -> tuple[str, list[Call]]:
    """What the deltas add up to; asserts that the whole text parses to the same."""
    found = join_deltas(delta for event in events for delta in event.deltas or ())
    assert found == parse(HERMES, "".join(event.text for event in events))
    return found


def assert_valid(calls: list[Call]) -> None:
    for call in calls:
        jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])


async def test_answers_to_a_required_choice_are_valid_calls(engine: NativeEngine) -> None:
    required = choice(required=True, parallel=False)
    answers = await asyncio.gather(*(generate(engine, required, seed=seed) for seed in range(6)))
    found = [content_and_calls(events) for events in answers]
    for content, calls in found:
        assert (content, len(calls)) == ("", 1)
        assert_valid(calls)
    assert len({calls[0] for _, calls in found}) > 1
    assert all(events[-1].finish_reason is FinishReason.STOP for events in answers)


@pytest.mark.parametrize("name", SCHEMAS)
async def test_answer_calls_the_named_tool(engine: NativeEngine, name: str) -> None:
    named = choice(name, required=True, parallel=False)
    content, calls = content_and_calls(await generate(engine, named, temperature=0.0))
    assert (content, [call.name for call in calls]) == ("", [name])
    assert_valid(calls)


async def test_answer_that_may_not_end_continues_with_more_calls(engine: NativeEngine) -> None:
    events = await generate(engine, choice(required=True), ignore_eos=True, max_tokens=120, seed=1)
    _, calls = content_and_calls(events)
    assert len(calls) > 1
    assert_valid(calls[:-1])
    assert events[-1].finish_reason is FinishReason.LENGTH


async def test_answers_to_an_optional_choice_are_text_or_valid_calls(engine: NativeEngine) -> None:
    questions = ("Say hello.", f"Write {HERMES.trigger} and nothing else, please.")
    answers = await asyncio.gather(
        *(
            generate(engine, choice(), ChatMessage("user", question), seed=seed, max_tokens=60)
            for question in questions
            for seed in range(4)
        )
    )
    assert any(not content_and_calls(events)[1] for events in answers), "no answer is text only"
    for events in answers:
        content, calls = content_and_calls(events)
        if events[-1].finish_reason is FinishReason.STOP:
            assert_valid(calls)
            assert HERMES.trigger not in content


async def test_answer_follows_the_result_of_a_tool(engine: NativeEngine) -> None:
    call = ToolCall("call_abcdef", "weather", '{"city": "Łódź"}')
    messages = (
        ChatMessage("user", "How is it?"),
        ChatMessage("assistant", "", (call,)),
        ChatMessage("tool", "Sunny, 25 degrees.", tool_call_id=call.id, name="weather"),
    )
    content, calls = content_and_calls(await generate(engine, choice(), *messages, temperature=0.0, max_tokens=40))
    assert content or calls


# Configured chat templates


def test_configured_template_replaces_the_models_template(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path / "model")
    path = tmp_path / "my.jinja"
    path.write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    config = model_config(tmp_path / "model").model_copy(update={"chat_template": str(path)})
    text = load(config, lambda stage: None).text
    (ids,) = text.encode([ChatPrompt((ChatMessage("user", "How is it?"),))])
    assert isinstance(ids, list)
    assert text.detokenize(ids, skip_special_tokens=False) == "<How is it?>"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "my.jinja cannot be read"),
        (b"\xff", "my.jinja cannot be read"),
        (b"{% if %}", "my.jinja, line 1: Expected an expression"),
    ],
)
def test_invalid_template_is_refused_by_its_path(tmp_path: Path, content: bytes | None, message: str) -> None:
    tiny.save("llama", tmp_path / "model")
    path = tmp_path / "my.jinja"
    if content is not None:
        path.write_bytes(content)
    config = model_config(tmp_path / "model").model_copy(update={"chat_template": str(path)})
    with pytest.raises(SourceError) as refused:
        load(config, lambda stage: None)
    assert message in str(refused.value)
