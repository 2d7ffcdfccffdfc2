"""OpenAI's client and LangChain against the embedded model through the whole service."""

from __future__ import annotations

import base64
import math
import struct
import sys
from collections.abc import AsyncIterator, Iterator
from functools import cache
from typing import Annotated, Any

import openai
import pytest
from langchain_core.messages import AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

from tests.system.conftest import ShippedService

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
async def client(service: ShippedService) -> AsyncIterator[openai.AsyncOpenAI]:
    async with service.openai_client() as client:
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


async def test_embeddings_as_floats_and_as_base64(tools_service: ShippedService) -> None:
    """The client requests base64 unless `encoding_format` is given."""
    texts = ["A cat sleeps.", "A kitten naps.", "Tax law of 1923"]
    async with openai.AsyncOpenAI(base_url=tools_service.url + "/v1", api_key="none", max_retries=0) as client:
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


# LangChain


@cache
def looked_up() -> set[str]:
    """The names of the hosts that this process looks up from the first call on. Python cannot remove an audit hook."""
    hosts = set[str]()

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.getaddrinfo":
            hosts.add(str(arguments[0]))

    sys.addaudithook(audit)
    return hosts


@pytest.fixture
def loopback_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails if the test looks up another host: LangChain would report to LangSmith if the environment enabled that."""
    monkeypatch.setenv("LANGSMITH_TRACING", "false")
    looked_up().clear()
    yield
    assert looked_up() <= {"127.0.0.1", "localhost"}


langchain = pytest.mark.usefixtures("loopback_only")


def chat(service: ShippedService, **fields: Any) -> ChatOpenAI:
    asked: dict[str, Any] = {"temperature": 0, "max_tokens": 30, "max_retries": 0, **fields}
    return ChatOpenAI(model=MODEL, base_url=service.url + "/v1", api_key="none", **asked)


@langchain
async def test_langchain_gets_the_same_answer_whole_and_streamed(service: ShippedService) -> None:
    messages = [SystemMessage("You are a helpful assistant."), HumanMessage("What is the capital of France?")]
    model = chat(service, stream_usage=True)
    whole = model.invoke(messages)
    assert "Paris" in str(whole.content)
    assert whole.response_metadata["finish_reason"] == "stop"
    assert whole.response_metadata["model_name"] == MODEL
    parts = list(model.stream(messages))
    together: Any = parts[0]
    for part in parts[1:]:
        together += part
    assert isinstance(together, AIMessageChunk)
    assert len(parts) > 3
    assert together.content == whole.content
    assert whole.usage_metadata is not None
    assert together.usage_metadata is not None
    assert together.usage_metadata["total_tokens"] == whole.usage_metadata["total_tokens"]
    assert (await model.ainvoke(messages)).content == whole.content
    assert "".join([str(part.content) async for part in model.astream(messages)]) == whole.content


@langchain
def test_langchain_logprobs_and_stop(service: ShippedService) -> None:
    model = chat(service, logprobs=True, top_logprobs=2, seed=1, stop=["Paris"])
    answer = model.invoke("What is the capital of France?")
    assert "Paris" not in str(answer.content)
    reported = answer.response_metadata["logprobs"]["content"]
    assert len(reported) > 2
    assert all(len(token["top_logprobs"]) == 2 for token in reported)


# LangChain serializes the message of the openai client, whose declared type does not include the value in `parsed`.
@pytest.mark.filterwarnings(r"ignore:Pydantic serializer warnings.\s+.*Expected .none.*field_name='parsed':UserWarning")
@langchain
@pytest.mark.parametrize("temperature", [0, 1])
def test_langchain_structured_output(service: ShippedService, temperature: float) -> None:
    model = chat(service, temperature=temperature, seed=3, max_tokens=100)
    shaped = model.with_structured_output(Town, method="json_schema")
    assert isinstance(shaped.invoke("Tell me of a town in Spain."), Town)
    *_, last = shaped.stream("Tell me of a town in Spain.")
    assert isinstance(last, Town)
    raw: Any = model.with_structured_output(Town, method="json_schema", include_raw=True).invoke("A town, please.")
    assert raw["parsing_error"] is None
    assert isinstance(raw["parsed"], Town)


def forecast(city: Annotated[str, "Where"], days: int) -> str:
    """Weather to come."""
    return f"Sunny in {city} for {days} days."


@langchain
def test_langchain_calls_a_tool_and_sends_its_result(tools_service: ShippedService) -> None:
    question = HumanMessage("What will the weather be in Paris for three days?")
    model = chat(tools_service, max_tokens=100)
    bound = model.bind_tools([forecast], tool_choice="forecast")
    said: Any = bound.invoke([question])
    (call,) = said.tool_calls
    assert call["name"] == "forecast"
    assert forecast(**call["args"]).startswith("Sunny in ")
    assert said.invalid_tool_calls == []

    together: Any = None
    for part in bound.stream([question]):
        together = part if together is None else together + part
    assert [(one["name"], one["args"]) for one in together.tool_calls] == [("forecast", call["args"])]

    result = ToolMessage(forecast(**call["args"]), tool_call_id=call["id"])
    after = model.bind_tools([forecast], tool_choice="none").invoke([question, said, result])
    assert after.content
    with pytest.raises(openai.BadRequestError) as refused:
        model.invoke([question, result])
    assert refused.value.param == "messages[1].tool_call_id"
