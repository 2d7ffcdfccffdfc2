"""smolagents: its model for OpenAI's API, agents that call tools, and agents that write code."""

from __future__ import annotations

from typing import Any, ClassVar

import openai
from common import FRANCE, MODEL, OVERFLOW, TOWN, WEATHER, run, weather_of
from smolagents import ChatMessage, CodeAgent, OpenAIModel, Tool, ToolCallingAgent
from smolagents.models import MessageRole

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}},
    "required": ["name"],
    "additionalProperties": False,
}


class Weather(Tool):
    name = "weather"
    description = "The weather now."
    inputs: ClassVar = {"city": {"type": "string", "description": "The name of the city"}}
    output_type = "string"

    def forward(self, city: str) -> str:
        return weather_of(city)


def model(url: str, name: str = MODEL, **fields: Any) -> OpenAIModel:
    return OpenAIModel(name, f"{url}/v1", api_key="none", temperature=0, max_tokens=60, retry=False, **fields)


def user(text: str) -> ChatMessage:
    return ChatMessage(role=MessageRole.USER, content=[{"type": "text", "text": text}])


def quickstart(url: str) -> str:
    answer = model(url)([user(FRANCE)]).content
    assert "Paris" in answer
    return answer


def conversation(url: str) -> str:
    first = model(url)([user(FRANCE)])
    return model(url)([user(FRANCE), first, user("And of Spain?")]).content


def stream(url: str) -> int:
    parts = [part.content or "" for part in model(url).generate_stream([user(FRANCE)])]
    assert "".join(parts) == quickstart(url)
    return len(parts)


def tool_loop(url: str) -> list[Any]:
    """A small model finds no end: the agents stop after two steps."""
    steps = []
    for kind in (ToolCallingAgent, CodeAgent):
        agent = kind(tools=[Weather()], model=model(url), max_steps=2, verbosity_level=0)
        agent.run(WEATHER)
        steps.append([kind.__name__, len(agent.memory.steps)])
    return steps


def typed_output(url: str) -> str:
    answer_format = {"type": "json_schema", "json_schema": {"name": "town", "schema": SCHEMA, "strict": True}}
    return model(url)([user(TOWN)], response_format=answer_format).content


def errors(url: str) -> list[str]:
    codes = []
    for text, name, expected in (
        (OVERFLOW, MODEL, openai.BadRequestError),
        (FRANCE, "gpt-unknown", openai.NotFoundError),
    ):
        try:
            model(url, name)([user(text)])
        except expected as error:
            codes.append(error.code)
    assert codes == ["context_length_exceeded", "model_not_found"]
    return codes


run(quickstart, conversation, stream, tool_loop, typed_output, errors)
