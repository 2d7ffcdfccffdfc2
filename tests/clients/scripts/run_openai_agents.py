"""OpenAI's Agents SDK with its default, the Responses API, and with its model for chats."""

from __future__ import annotations

from typing import Annotated

import openai
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    SQLiteSession,
    function_tool,
    set_tracing_disabled,
)
from common import FRANCE, MODEL, OVERFLOW, TOWN, WEATHER, run, weather_of
from pydantic import BaseModel, Field

set_tracing_disabled(True)
SETTINGS = ModelSettings(temperature=0, max_tokens=60)
KINDS = {"responses": OpenAIResponsesModel, "chats": OpenAIChatCompletionsModel}


class Town(BaseModel):
    name: Annotated[str, Field(max_length=20)]
    people: Annotated[int, Field(ge=1, le=9999)]


@function_tool
def weather(city: Annotated[str, Field(max_length=20)]) -> str:
    """The weather now."""
    return weather_of(city)


def agents(url: str, settings: ModelSettings = SETTINGS, model: str = MODEL, **fields: object) -> dict[str, Agent]:
    """An agent for each API."""
    client = openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
    given = {"name": "Helper", "instructions": "Be brief.", "model_settings": settings, **fields}
    return {name: Agent(model=kind(model, client), **given) for name, kind in KINDS.items()}


async def quickstart(url: str) -> dict[str, str]:
    answers = {name: (await Runner.run(agent, FRANCE)).final_output for name, agent in agents(url).items()}
    assert all("Paris" in answer for answer in answers.values())
    return answers


async def conversation(url: str) -> list[str]:
    """The second turn replays the items of the first one; a session does the same by itself."""
    answers = []
    for name, agent in agents(url).items():
        first = await Runner.run(agent, FRANCE)
        items = [*first.to_input_list(), {"role": "user", "content": "And of Spain?"}]
        second = await Runner.run(agent, items)
        session = SQLiteSession(name)
        await Runner.run(agent, FRANCE, session=session)
        again = await Runner.run(agent, "And of Spain?", session=session)
        assert again.final_output == second.final_output
        answers.append(second.final_output)
    return answers


async def stream(url: str) -> list[int]:
    counts = []
    for agent in agents(url).values():
        result = Runner.run_streamed(agent, FRANCE)
        texts = [
            event.data.delta
            async for event in result.stream_events()
            if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
        ]
        assert "".join(texts) == result.final_output
        counts.append(len(texts))
    return counts


async def tool_loop(url: str) -> list[str]:
    """The choice of a tool is reset after the first call, so that the second answer is a text or further calls."""
    settings = ModelSettings(temperature=0, max_tokens=60, tool_choice="weather", parallel_tool_calls=False)
    outputs = []
    for agent in agents(url, settings, tools=[weather]).values():
        result = await Runner.run(agent, WEATHER)
        kinds = [item.type for item in result.new_items]
        assert kinds[:2] == ["tool_call_item", "tool_call_output_item"], kinds
        outputs.append(result.final_output)
    return outputs


async def typed_output(url: str) -> list[str]:
    """With and without tools: an agent with an output type sends both."""
    towns = []
    for tools in ([], [weather]):
        settings = ModelSettings(temperature=0, max_tokens=100, tool_choice="none" if tools else None)
        for agent in agents(url, settings, output_type=Town, tools=tools).values():
            result = await Runner.run(agent, TOWN)
            assert isinstance(result.final_output, Town)
            towns.append(result.final_output.name)
    return towns


async def errors(url: str) -> list[str]:
    codes = []
    for agent in agents(url).values():
        try:
            await Runner.run(agent, OVERFLOW)
        except openai.BadRequestError as error:
            codes.append(error.code)
    for agent in agents(url, model="gpt-unknown").values():
        try:
            await Runner.run(agent, FRANCE)
        except openai.NotFoundError as error:
            codes.append(error.code)
    assert codes == ["context_length_exceeded"] * 2 + ["model_not_found"] * 2
    return codes


run(quickstart, conversation, stream, tool_loop, typed_output, errors)
