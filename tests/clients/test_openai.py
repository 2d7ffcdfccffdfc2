"""OpenAI's client against the embedded model through the whole service."""

from __future__ import annotations

import base64
import json
import math
import struct
from collections.abc import AsyncIterator
from typing import Annotated, Any

import openai
import pytest
from pydantic import BaseModel, Field

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

MODEL = "smollm2-135m"
PROMPT = "The capital of France is"
FRANCE: Any = [{"role": "user", "content": "What is the capital of France?"}]


class Town(BaseModel):
    """A town and facts about it."""

    name: Annotated[str, Field(max_length=20)]
    people: Annotated[int, Field(ge=1, le=9999)]
    by_the_sea: bool


@pytest.fixture
async def client(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_a_completion_whole_and_streamed(client: openai.AsyncOpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "max_tokens": 12}
    whole = await client.completions.create(**asked)
    stream = await client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    assert "Paris" in whole.choices[0].text
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert (whole.choices[0].finish_reason, chunks[-2].choices[0].finish_reason) == ("length", "length")
    assert whole.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 12


async def test_a_completion_with_its_logprobs(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(
        model=MODEL, prompt=PROMPT, temperature=0, max_tokens=6, logprobs=2, echo=True
    )
    (choice,) = answer.choices
    reported = choice.logprobs
    assert reported is not None
    assert reported.tokens is not None
    assert reported.token_logprobs is not None
    assert reported.top_logprobs is not None
    assert reported.text_offset is not None
    assert "".join(reported.tokens) == choice.text
    assert choice.text.startswith(PROMPT)
    assert [
        choice.text[at : at + len(token)] for at, token in zip(reported.text_offset, reported.tokens, strict=True)
    ] == (reported.tokens)
    assert reported.token_logprobs[0] is None
    for logprob, top in zip(reported.token_logprobs[-6:], reported.top_logprobs[-6:], strict=True):
        assert logprob == max(top.values()), "a greedy choice is the likeliest"


async def test_a_chats_logprobs_are_the_same_whole_and_streamed(client: openai.AsyncOpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": FRANCE, "temperature": 0, "max_tokens": 6}
    asked |= {"logprobs": True, "top_logprobs": 3}
    whole = await client.chat.completions.create(**asked)
    stream = await client.chat.completions.create(**asked, stream=True)
    streamed = [choice async for chunk in stream for choice in chunk.choices]
    (choice,) = whole.choices
    assert choice.logprobs is not None
    reported = choice.logprobs.content or []
    again = [token for part in streamed if part.logprobs for token in part.logprobs.content or []]
    assert [token.token for token in again] == [token.token for token in reported]
    assert bytes(byte for token in reported for byte in token.bytes or []).decode() == choice.message.content
    for token in reported:
        best, *others = token.top_logprobs
        assert (best.token, best.logprob) == (token.token, token.logprob)
        assert len(others) == 2
        assert all(math.exp(other.logprob) <= math.exp(best.logprob) for other in others)


async def test_several_streamed_answers_equal_the_whole_ones(client: openai.AsyncOpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": FRANCE, "temperature": 1, "seed": 5, "n": 3, "max_tokens": 12}
    whole = await client.chat.completions.create(**asked)
    said = {choice.index: "" for choice in whole.choices}
    async for chunk in await client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            said[choice.index] += choice.delta.content or ""
    assert said == {choice.index: choice.message.content for choice in whole.choices}
    assert len(set(said.values())) == 3


async def test_an_answer_is_parsed_into_a_pydantic_model(client: openai.AsyncOpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": FRANCE, "temperature": 0, "max_tokens": 100}
    answer = await client.chat.completions.parse(**asked, response_format=Town)
    town = answer.choices[0].message.parsed
    assert isinstance(town, Town)
    async with client.chat.completions.stream(**asked, response_format=Town) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.parsed == town


async def test_embeddings_as_floats_and_as_base64(client: openai.AsyncOpenAI) -> None:
    """The client requests base64 unless `encoding_format` is given."""
    texts = ["A cat sleeps.", "A kitten naps.", "Tax law of 1923"]
    usual = await client.embeddings.create(model=MODEL, input=texts)
    floats = await client.embeddings.create(model=MODEL, input=texts, encoding_format="float")
    packed: Any = await client.embeddings.create(model=MODEL, input=texts[0], encoding_format="base64")
    vectors = [one.embedding for one in usual.data]
    for vector, same in zip(vectors, floats.data, strict=True):
        assert math.hypot(*vector) == pytest.approx(1, abs=1e-4)
        assert vector == pytest.approx(same.embedding, abs=1e-6)
    (one,) = packed.data
    binary = base64.b64decode(one.embedding)
    assert [*struct.unpack(f"<{len(binary) // 4}f", binary)] == pytest.approx(vectors[0], abs=0.01)
    cat, kitten, law = vectors
    assert alike(cat, kitten) > alike(cat, law)


def alike(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


WEATHER: Any = {"role": "user", "content": "What is the weather in Paris?"}
CITY: Any = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}},
    "required": ["city"],
    "additionalProperties": False,
}
CHAT_TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": CITY, "strict": True}}
RESPONSE_TOOL: Any = {"type": "function", "name": "weather", "parameters": CITY, "strict": True}
OVERFLOW = "word " * 10_000


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_chat_takes_the_objects_of_its_answers_back(client: openai.AsyncOpenAI, streamed: bool) -> None:
    """As objects, and as dictionaries with all fields that are null."""
    asked: Any = {"model": MODEL, "temperature": 0, "max_tokens": 60, "tools": [CHAT_TOOL]}
    asked["parallel_tool_calls"] = False
    if streamed:
        async with client.chat.completions.stream(messages=[WEATHER], tool_choice="required", **asked) as stream:
            first = (await stream.get_final_completion()).choices[0].message
    else:
        parsed = await client.chat.completions.parse(messages=[WEATHER], tool_choice="required", **asked)
        first = parsed.choices[0].message
    assert first.tool_calls is not None
    calls = first.tool_calls
    assert {call.function.name for call in calls} == {"weather"}
    results: Any = [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in calls]
    answers = []
    for message in (first, first.model_dump()):
        messages: Any = [WEATHER, message, *results]
        answers.append(await client.chat.completions.create(messages=messages, **asked | {"tool_choice": "none"}))
    one, other = (answer.choices[0].message.content for answer in answers)
    assert one
    assert one == other


async def test_a_response_whole_streamed_and_continued(client: openai.AsyncOpenAI) -> None:
    asked: Any = {"model": MODEL, "temperature": 0, "max_output_tokens": 20, "input": FRANCE[0]["content"]}
    whole = await client.responses.create(**asked)
    assert "Paris" in whole.output_text
    async with client.responses.stream(**asked) as stream:
        texts = [event.delta async for event in stream if event.type == "response.output_text.delta"]
        last = await stream.get_final_response()
    assert "".join(texts) == last.output_text == whole.output_text
    more: Any = asked | {"input": "And of Spain?"}
    stored = await client.responses.create(**more, previous_response_id=whole.id)
    replayed: Any = [*FRANCE, *whole.output, {"role": "user", "content": "And of Spain?"}]
    sent_back = await client.responses.create(**asked | {"input": replayed, "store": False})
    assert stored.output_text == sent_back.output_text
    await client.responses.delete(whole.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(whole.id)


async def test_a_response_calls_a_tool_and_takes_its_result(client: openai.AsyncOpenAI) -> None:
    asked: Any = {"model": MODEL, "temperature": 0, "max_output_tokens": 60, "tools": [RESPONSE_TOOL]}
    first = await client.responses.create(input=[WEATHER], tool_choice="required", parallel_tool_calls=False, **asked)
    (call,) = [item for item in first.output if item.type == "function_call"]
    assert set(json.loads(call.arguments)) == {"city"}
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    second = await client.responses.create(input=[WEATHER, *first.output, result], tool_choice="none", **asked)
    assert second.output_text


async def test_a_response_is_parsed_into_a_pydantic_model(client: openai.AsyncOpenAI) -> None:
    answer = await client.responses.parse(
        model=MODEL, input="Tell me of a town.", text_format=Town, temperature=0, max_output_tokens=100
    )
    assert isinstance(answer.output_parsed, Town)


async def test_errors_have_the_classes_of_the_client(client: openai.AsyncOpenAI) -> None:
    long: Any = [{"role": "user", "content": OVERFLOW}]
    with pytest.raises(openai.BadRequestError) as overflow:
        await client.chat.completions.create(model=MODEL, messages=long)
    with pytest.raises(openai.BadRequestError) as response_overflow:
        await client.responses.create(model=MODEL, input=OVERFLOW)
    assert overflow.value.code == response_overflow.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as unknown:
        await client.chat.completions.create(model="gpt-unknown", messages=FRANCE)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="Did you mean 'temperature'"):
        await client.chat.completions.create(model=MODEL, messages=FRANCE, extra_body={"temprature": 0})
    with pytest.raises(openai.NotFoundError):
        await client.images.generate(model=MODEL, prompt="a cat")
