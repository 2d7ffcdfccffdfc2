"""Haystack: its generators for OpenAI's chats and responses, and its agent."""

from __future__ import annotations

from typing import Annotated, Any

import openai
from common import FRANCE, MODEL, OVERFLOW, TOWN, WEATHER, run, weather_of
from haystack.components.agents import Agent
from haystack.components.generators.chat import OpenAIChatGenerator, OpenAIResponsesChatGenerator
from haystack.dataclasses import ChatMessage, StreamingChunk
from haystack.tools import tool
from haystack.utils import Secret
from pydantic import BaseModel, Field


class Town(BaseModel):
    name: Annotated[str, Field(max_length=20)]
    people: Annotated[int, Field(ge=1, le=9999)]


@tool
def weather(city: Annotated[str, "The name of the city"]) -> str:
    """The weather now."""
    return weather_of(city)


def generators(url: str, model: str = MODEL, **fields: Any) -> list[Any]:
    """A generator for each API."""
    given = {"api_key": Secret.from_token("none"), "model": model, "api_base_url": url + "/v1", "max_retries": 0}
    common = {"temperature": 0, **fields}
    return [
        OpenAIChatGenerator(**given, generation_kwargs={"max_tokens": 100, **common}),
        OpenAIResponsesChatGenerator(**given, generation_kwargs={"max_output_tokens": 100, **common}),
    ]


def quickstart(url: str) -> list[str]:
    answers = [one.run([ChatMessage.from_user(FRANCE)])["replies"][0].text for one in generators(url)]
    assert all("Paris" in answer for answer in answers)
    return answers


def conversation(url: str) -> list[str]:
    """OpenAI's Responses API has no names of speakers."""
    answers = []
    for one, speaker in zip(generators(url), ("alice", None), strict=True):
        messages = [ChatMessage.from_system("Be brief."), ChatMessage.from_user(FRANCE, name=speaker)]
        messages += [one.run(messages)["replies"][0], ChatMessage.from_user("And of Spain?")]
        answers.append(one.run(messages)["replies"][0].text)
    return answers


def stream(url: str) -> list[int]:
    counts = []
    for one in generators(url):
        chunks: list[StreamingChunk] = []
        answer = one.run([ChatMessage.from_user(FRANCE)], streaming_callback=chunks.append)["replies"][0].text
        assert "".join(chunk.content for chunk in chunks) == answer
        counts.append(len(chunks))
    return counts


def tool_loop(url: str) -> list[str]:
    """The agent ends after the first result of the tool, which then is in the conversation."""
    outputs = []
    choices = {"type": "function", "function": {"name": "weather"}}, {"type": "function", "name": "weather"}
    for number, choice in enumerate(choices):
        one = generators(url, tool_choice=choice)[number]
        agent = Agent(chat_generator=one, tools=[weather], exit_conditions=["weather"])
        messages = agent.run(messages=[ChatMessage.from_user(WEATHER)])["messages"]
        assert messages[-1].tool_call_result is not None
        plain = generators(url)[number]
        outputs.append(plain.run([*messages, ChatMessage.from_user("Is it warm?")])["replies"][0].text)
    return outputs


def typed_output(url: str) -> str:
    chat = generators(url, response_format=Town)[0]
    text = chat.run([ChatMessage.from_user(TOWN)])["replies"][0].text
    return Town.model_validate_json(text).name


def errors(url: str) -> list[str]:
    codes = []
    for text, model, expected in (
        (OVERFLOW, MODEL, openai.BadRequestError),
        (FRANCE, "gpt-unknown", openai.NotFoundError),
    ):
        for one in generators(url, model):
            try:
                one.run([ChatMessage.from_user(text)])
            except expected as error:
                codes.append(error.code)
    assert codes == ["context_length_exceeded"] * 2 + ["model_not_found"] * 2
    return codes


run(quickstart, conversation, stream, tool_loop, typed_output, errors)
