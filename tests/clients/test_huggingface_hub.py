"""Hugging Face's client, which is made for TGI, against the embedded model through the whole service."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import BadRequestError, HfHubHTTPError, ValidationError

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

FRANCE: Any = {"role": "user", "content": "What is the capital of France?"}
WEATHER: Any = {"role": "user", "content": "What is the weather in Paris?"}
CITY: Any = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}
TOOLS: Any = [{"type": "function", "function": {"name": "weather", "description": "It.", "parameters": CITY}}]
OVERFLOW = "word " * 10_000


@pytest.fixture
def client(url: str) -> Iterator[InferenceClient]:
    with InferenceClient(url, timeout=60) as client:
        yield client


def test_text_whole_and_streamed(client: InferenceClient) -> None:
    asked: Any = {"prompt": "The capital of France is", "max_new_tokens": 8}
    whole = client.text_generation(**asked, details=True)
    assert "Paris" in whole.generated_text
    assert whole.details is not None
    assert whole.details.generated_tokens == 8
    assert "".join(client.text_generation(**asked, stream=True)) == whole.generated_text


def test_a_chat_and_its_next_turn(client: InferenceClient) -> None:
    """The client sends the model `dummy`."""
    first = client.chat_completion([FRANCE], max_tokens=20, temperature=0).choices[0].message
    assert "Paris" in (first.content or "")
    turn: Any = {"role": "assistant", "content": first.content}
    second = client.chat_completion([FRANCE, turn, {"role": "user", "content": "And of Spain?"}], max_tokens=20)
    assert second.choices[0].message.content
    streamed = client.chat_completion([FRANCE], max_tokens=20, temperature=0, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in streamed if part.choices) == first.content


def test_a_tool_loop(client: InferenceClient) -> None:
    first = client.chat_completion([WEATHER], tools=TOOLS, tool_choice="required", max_tokens=60, temperature=0)
    message = first.choices[0].message
    assert message.tool_calls
    results: Any = [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in message.tool_calls]
    assert {call.function.name for call in message.tool_calls} == {"weather"}
    second = client.chat_completion([WEATHER, message, *results], tools=TOOLS, max_tokens=20)
    assert second.choices[0].finish_reason


def test_a_typed_output(client: InferenceClient) -> None:
    answer_format: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
    answer = client.chat_completion([FRANCE], response_format=answer_format, max_tokens=60, temperature=0)
    assert set(json.loads(answer.choices[0].message.content or "")) == {"city"}


def test_errors(client: InferenceClient) -> None:
    with pytest.raises(ValidationError, match="maximum context length"):
        client.text_generation(OVERFLOW)
    with pytest.raises(BadRequestError, match="maximum context length"):
        client.chat_completion([{"role": "user", "content": OVERFLOW}])
    with pytest.raises(HfHubHTTPError) as unknown:
        client.chat_completion([FRANCE], model="gpt-unknown")
    assert unknown.value.response.status_code == 404
