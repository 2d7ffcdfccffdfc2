"""AutoGen: its client for OpenAI's chats, which sends the speaker as `name`, and an agent with a tool."""

from __future__ import annotations

import json
from typing import Annotated, Any

import openai
from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.messages import StructuredMessage
from autogen_core import CancellationToken
from autogen_core.models import (
    AssistantMessage,
    CreateResult,
    FunctionExecutionResult,
    FunctionExecutionResultMessage,
    ModelFamily,
    ModelInfo,
    UserMessage,
)
from autogen_core.tools import FunctionTool
from autogen_ext.models.openai import OpenAIChatCompletionClient
from common import FRANCE, MODEL, OVERFLOW, TOWN, WEATHER, run, weather_of
from pydantic import BaseModel, Field

INFO = ModelInfo(
    vision=False, function_calling=True, json_output=True, family=ModelFamily.UNKNOWN, structured_output=True
)


class Town(BaseModel):
    name: Annotated[str, Field(max_length=20)]
    people: Annotated[int, Field(ge=1, le=9999)]


async def weather(city: str) -> str:
    """The weather now."""
    return weather_of(city)


def client(url: str, model: str = MODEL, **fields: Any) -> OpenAIChatCompletionClient:
    given = {"temperature": 0, "max_tokens": 60, "max_retries": 0, **fields}
    return OpenAIChatCompletionClient(model=model, base_url=url + "/v1", api_key="none", model_info=INFO, **given)


async def quickstart(url: str) -> str:
    answer = await client(url).create([UserMessage(content=FRANCE, source="alice")])
    assert "Paris" in answer.content
    return str(answer.content)


async def conversation(url: str) -> str:
    agent = AssistantAgent("helper", client(url))
    await agent.run(task=FRANCE)
    result = await agent.run(task="And of Spain?")
    return str(result.messages[-1].content)


async def stream(url: str) -> int:
    parts = [part async for part in client(url).create_stream([UserMessage(content=FRANCE, source="alice")])]
    *texts, last = parts
    assert isinstance(last, CreateResult)
    assert "".join(texts) == last.content
    return len(texts)


async def tool_loop(url: str) -> str:
    tool = FunctionTool(weather, description="The weather now.")
    messages: list[Any] = [UserMessage(content=WEATHER, source="alice")]
    first = await client(url).create(messages, tools=[tool], tool_choice=tool)
    (call,) = first.content
    result = await tool.run_json(json.loads(call.arguments), CancellationToken())
    messages += [
        AssistantMessage(content=first.content, source="helper"),
        FunctionExecutionResultMessage(
            content=[FunctionExecutionResult(content=result, name=call.name, call_id=call.id, is_error=False)]
        ),
    ]
    second = await client(url).create(messages, tools=[tool], tool_choice="none")
    return str(second.content)


async def typed_output(url: str) -> str:
    agent = AssistantAgent("helper", client(url, max_tokens=100), output_content_type=Town)
    message = (await agent.run(task=TOWN)).messages[-1]
    assert isinstance(message, StructuredMessage)
    return str(message.content.name)


async def errors(url: str) -> list[str]:
    names = []
    for text, model, expected in (
        (OVERFLOW, MODEL, openai.BadRequestError),
        (FRANCE, "gpt-unknown", openai.NotFoundError),
    ):
        try:
            await client(url, model).create([UserMessage(content=text, source="alice")])
        except expected as error:
            names.append(error.code)
    assert names == ["context_length_exceeded", "model_not_found"]
    return names


run(quickstart, conversation, stream, tool_loop, typed_output, errors)
