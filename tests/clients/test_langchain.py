"""LangChain's client for OpenAI's API against the embedded model through the whole service."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any

import openai
import pytest
from langchain_core.messages import AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI

from .test_openai import MODEL, Town

pytestmark = [pytest.mark.system, pytest.mark.long, pytest.mark.timeout(300), pytest.mark.usefixtures("loopback_only")]


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


def chat(url: str, **fields: Any) -> ChatOpenAI:
    asked: dict[str, Any] = {"temperature": 0, "max_tokens": 30, "max_retries": 0, **fields}
    return ChatOpenAI(model=MODEL, base_url=url + "/v1", api_key="none", **asked)


async def test_langchain_gets_the_same_answer_whole_and_streamed(url: str) -> None:
    messages = [SystemMessage("You are a helpful assistant."), HumanMessage("What is the capital of France?")]
    model = chat(url, stream_usage=True)
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


def test_langchain_logprobs_and_stop(url: str) -> None:
    model = chat(url, logprobs=True, top_logprobs=2, seed=1, stop=["Paris"])
    answer = model.invoke("What is the capital of France?")
    assert "Paris" not in str(answer.content)
    reported = answer.response_metadata["logprobs"]["content"]
    assert len(reported) > 2
    assert all(len(token["top_logprobs"]) == 2 for token in reported)


# LangChain serializes the message of the openai client, whose declared type does not include the value in `parsed`.
@pytest.mark.filterwarnings(r"ignore:Pydantic serializer warnings.\s+.*Expected .none.*field_name='parsed':UserWarning")
@pytest.mark.parametrize("temperature", [0, 1])
def test_langchain_structured_output(url: str, temperature: float) -> None:
    model = chat(url, temperature=temperature, seed=3, max_tokens=100)
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


def test_langchain_calls_a_tool_and_sends_its_result(url: str) -> None:
    question = HumanMessage("What will the weather be in Paris for three days?")
    model = chat(url, max_tokens=100)
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
