"""Anthropic's client against the embedded model through the whole service."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest
from anthropic.types import TextBlock, ToolUseBlock

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

MODEL = "smollm2-135m"
QUESTION: Any = {"role": "user", "content": "What is the capital of France?"}
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 40}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: Any = {"name": "weather", "description": "The weather now.", "input_schema": CITY}


@pytest.fixture
def client(url: str) -> Iterator[anthropic.Anthropic]:
    """Refuses an answer that is not as the types of the library say."""
    with anthropic.Anthropic(base_url=url, api_key="any", max_retries=0, _strict_response_validation=True) as client:
        yield client


def create(client: anthropic.Anthropic, **fields: Any) -> anthropic.types.Message:
    given: dict[str, Any] = {"model": MODEL, "max_tokens": 24, "messages": [QUESTION], "extra_body": {"temperature": 0}}
    message: anthropic.types.Message = client.messages.create(**given | fields)
    return message


def test_a_whole_answer(client: anthropic.Anthropic) -> None:
    message = create(client)
    (block,) = message.content
    assert isinstance(block, TextBlock)
    assert "Paris" in block.text
    assert message.stop_reason in ("end_turn", "max_tokens")
    assert message._request_id
    count = client.messages.count_tokens(model=MODEL, messages=[QUESTION]).input_tokens
    usage = message.usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == count
    assert 0 < usage.output_tokens <= 24


def test_a_stream_joins_to_the_whole_answer(client: anthropic.Anthropic) -> None:
    fields: Any = {"model": MODEL, "max_tokens": 24, "messages": [QUESTION], "extra_body": {"temperature": 0}}
    with client.messages.stream(**fields) as stream:
        text = "".join(stream.text_stream)
        last = stream.get_final_message()
    whole = create(client)
    assert [block.model_dump() for block in last.content] == [block.model_dump() for block in whole.content]
    assert text == whole.content[0].text  # type: ignore[union-attr]
    assert (last.stop_reason, last.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)


def test_the_answer_is_that_of_a_chat(client: anthropic.Anthropic, url: str) -> None:
    body = {"model": MODEL, "max_tokens": 24, "messages": [QUESTION], "temperature": 0}
    chat = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
    assert create(client).content[0].text == chat["choices"][0]["message"]["content"]  # type: ignore[union-attr]


def test_a_stop_sequence(client: anthropic.Anthropic) -> None:
    message = create(client, stop_sequences=["Paris"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "Paris")
    assert "Paris" not in message.content[0].text  # type: ignore[union-attr]


@pytest.mark.long
def test_the_end_of_the_context(client: anthropic.Anthropic) -> None:
    """The prompt leaves less than 20 tokens of the context of 8,192, and the schema wants a longer answer."""
    schema = {"type": "object", "properties": {"text": {"type": "string", "minLength": 300}}, "required": ["text"]}
    words = 8_175 - client.messages.count_tokens(model=MODEL, messages=[QUESTION]).input_tokens
    messages: Any = [{"role": "user", "content": "word " * words + QUESTION["content"]}]
    output_config: Any = {"format": {"type": "json_schema", "schema": schema}}
    message = create(client, max_tokens=1_000, messages=messages, output_config=output_config)
    assert message.stop_reason == "model_context_window_exceeded"
    assert message.usage.output_tokens < 20


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_loop(client: anthropic.Anthropic, stream: bool) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    fields: Any = {
        "model": MODEL, "max_tokens": 100, "tools": [WEATHER], "tool_choice": {"type": "tool", "name": "weather"},
        "extra_body": {"temperature": 0},
    }  # fmt: skip
    if stream:
        with client.messages.stream(messages=messages, **fields) as events:
            first = events.get_final_message()
    else:
        first = client.messages.create(messages=messages, **fields)
    assert first.stop_reason == "tool_use"
    use = first.content[-1]
    assert isinstance(use, ToolUseBlock)
    assert use.name == "weather"
    assert set(use.input) == {"city"}
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "sunny, 25 degrees"}
    messages += [first.to_param(), {"role": "user", "content": [result]}]
    last = client.messages.create(messages=messages, **fields | {"tool_choice": {"type": "none"}})
    assert last.stop_reason in ("end_turn", "max_tokens")
    assert [block.type for block in last.content] == ["text"]


def test_structured_output(client: anthropic.Anthropic) -> None:
    message = create(client, output_config={"format": {"type": "json_schema", "schema": CITY}})
    assert set(json.loads(message.content[0].text)) == {"city"}  # type: ignore[union-attr]


def test_errors(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="Known models: smollm2-135m"):
        create(client, model="claude")
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > \d+ maximum"):
        create(client, messages=[{"role": "user", "content": "word " * 10_000}])
    with pytest.raises(anthropic.BadRequestError, match="Did you mean 'temperature'") as raised:
        create(client, extra_body={"temprature": 0})
    assert raised.value.type == "invalid_request_error"
    assert raised.value.request_id
    source = {"type": "url", "url": "https://example.com/a.png"}
    image = {"role": "user", "content": [{"type": "image", "source": source}]}
    with pytest.raises(anthropic.BadRequestError, match="a block of type 'image'"):
        create(client, messages=[image])


async def test_the_async_client(url: str) -> None:
    async with anthropic.AsyncAnthropic(base_url=url, api_key="any", max_retries=0) as client:
        fields: Any = {"model": MODEL, "max_tokens": 8, "messages": [QUESTION], "extra_body": {"temperature": 0}}
        async with client.messages.stream(**fields) as stream:
            kinds = [event.type async for event in stream]
    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")


def test_the_beta_client(client: anthropic.Anthropic) -> None:
    message = client.beta.messages.create(
        model=MODEL, max_tokens=8, messages=[QUESTION], betas=["context-management-2025-06-27"],
        context_management={"edits": [{"type": "clear_tool_uses_20250919"}]},
    )  # fmt: skip
    assert message.usage.output_tokens > 0
