"""Pydantic AI with its models for OpenAI's chats and responses, and typed outputs by a tool and by a JSON schema."""

from __future__ import annotations

from typing import Annotated, Any

from common import FRANCE, MODEL, OVERFLOW, TOWN, WEATHER, run, weather_of
from openai import AsyncOpenAI
from pydantic import BaseModel, Field
from pydantic_ai import Agent, ModelHTTPError, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


class Town(BaseModel):
    name: Annotated[str, Field(max_length=20)]
    people: Annotated[int, Field(ge=1, le=9999)]


def weather(city: Annotated[str, Field(max_length=20)]) -> str:
    """The weather now."""
    return weather_of(city)


def agents(url: str, model: str = MODEL, max_tokens: int = 60, **fields: Any) -> list[Agent[None, Any]]:
    """An agent for each API."""
    provider = OpenAIProvider(openai_client=AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0))
    settings = {"temperature": 0, "max_tokens": max_tokens, **fields.pop("settings", {})}
    models = OpenAIChatModel(model, provider=provider), OpenAIResponsesModel(model, provider=provider)
    return [Agent(one, model_settings=settings, **fields) for one in models]


async def quickstart(url: str) -> list[str]:
    answers = [(await agent.run(FRANCE)).output for agent in agents(url)]
    assert all("Paris" in answer for answer in answers)
    return answers


async def conversation(url: str) -> list[str]:
    answers = []
    for agent in agents(url):
        first = await agent.run(FRANCE)
        second = await agent.run("And of Spain?", message_history=first.all_messages())
        answers.append(second.output)
    return answers


async def stream(url: str) -> list[int]:
    counts = []
    for agent in agents(url):
        async with agent.run_stream(FRANCE) as result:
            texts = [text async for text in result.stream_text(delta=True, debounce_by=None)]
            assert "".join(texts) == await result.get_output()
        counts.append(len(texts))
    return counts


async def tool_loop(url: str) -> list[str]:
    """The agent requires a call, which ends its run with the result of the tool, and then continues with a text."""
    outputs = []
    for agent in agents(url, output_type=weather, settings={"parallel_tool_calls": False}):
        result = await agent.run(WEATHER)
        assert result.output.startswith("sunny")
        outputs.append(result.output)
    for agent, asked in zip(agents(url), agents(url, output_type=weather), strict=True):
        history = (await asked.run(WEATHER)).all_messages()
        outputs.append((await agent.run("Is it warm?", message_history=history)).output)
    return outputs


async def typed_output(url: str) -> list[str]:
    towns = []
    for kind in (ToolOutput, NativeOutput):
        given = agents(url, max_tokens=100, output_type=kind(Town))
        towns += [(await agent.run(TOWN)).output.name for agent in given]
    return towns


async def errors(url: str) -> list[str]:
    codes = []
    for prompt, model in ((OVERFLOW, MODEL), (FRANCE, "gpt-unknown")):
        for agent in agents(url, model):
            try:
                await agent.run(prompt)
            except ModelHTTPError as error:
                codes.append([error.status_code, error.body["code"]])
    assert codes == [[400, "context_length_exceeded"]] * 2 + [[404, "model_not_found"]] * 2
    return codes


run(quickstart, conversation, stream, tool_loop, typed_output, errors)
