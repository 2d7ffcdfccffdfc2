"""DSPy: its language model for chats and for responses, signatures and tools."""

from __future__ import annotations

import json
import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # LiteLLM would load prices from the network

from typing import Any

import dspy
import litellm
from common import FRANCE, MODEL, OVERFLOW, TOWN, WEATHER, run, weather_of

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "people": {"type": "integer", "maximum": 9999}},
    "required": ["name", "people"],
    "additionalProperties": False,
}


def language_model(url: str, model: str = MODEL, **fields: Any) -> dspy.LM:
    given = {"temperature": 0, "max_tokens": 100, "cache": False, "num_retries": 0, **fields}
    return dspy.LM(f"openai/{model}", api_base=url + "/v1", api_key="none", **given)


def quickstart(url: str) -> list[str]:
    answers = [language_model(url, model_type=kind)(FRANCE)[0] for kind in ("chat", "responses")]
    texts = [answer if isinstance(answer, str) else answer["text"] for answer in answers]
    assert all("Paris" in text for text in texts)
    return texts


def conversation(url: str) -> str:
    messages = [{"role": "user", "content": FRANCE}]
    first = language_model(url)(messages=messages)[0]
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "And of Spain?"}]
    return str(language_model(url)(messages=messages)[0])


def tool_loop(url: str) -> str:
    def weather(city: str) -> str:
        """The weather now."""
        return weather_of(city)

    tool = dspy.Tool(weather)
    tools = [tool.format_as_litellm_function_call()]
    answer = language_model(url)(WEATHER, tools=tools, tool_choice="required", parallel_tool_calls=False)[0]
    (call,) = answer["tool_calls"]
    return str(call["function"]["arguments"])


class Town(dspy.Signature):
    """Name the town and the number of its people."""

    text: str = dspy.InputField()
    name: str = dspy.OutputField()
    people: int = dspy.OutputField()


def town_context(url: str) -> Any:
    """With a JSON schema for the fields of the signature, which DSPy sends by itself to models that it knows."""
    answer_format = {"type": "json_schema", "json_schema": {"name": "town", "schema": SCHEMA}}
    lm = language_model(url, response_format=answer_format)
    return dspy.context(lm=lm, adapter=dspy.JSONAdapter())


def typed_output(url: str) -> list[Any]:
    with town_context(url):
        town = dspy.Predict(Town)(text=TOWN)
    assert isinstance(town.people, int)
    return [town.name, town.people]


async def stream(url: str) -> int:
    """The chunks of the answer as they arrive, and at the end the fields of the signature."""
    with town_context(url):
        items = [item async for item in dspy.streamify(dspy.Predict(Town))(text=TOWN)]
    *chunks, town = items
    text = "".join(chunk["choices"][0]["delta"]["content"] or "" for chunk in chunks)
    assert json.loads(text) == {"name": town.name, "people": town.people}
    assert len(chunks) > 8
    return len(chunks)


def errors(url: str) -> list[str]:
    names = []
    for text, model, expected in (
        (OVERFLOW, MODEL, (dspy.ContextWindowExceededError, litellm.ContextWindowExceededError)),
        (FRANCE, "gpt-unknown", Exception),
    ):
        try:
            language_model(url, model)(text)
        except expected as error:
            names.append(type(error).__name__)
    assert len(names) == 2
    return names


run(quickstart, conversation, stream, tool_loop, typed_output, errors)
