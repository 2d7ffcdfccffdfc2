"""LiteLLM: its providers for OpenAI's, Anthropic's and TGI's APIs."""

from __future__ import annotations

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # LiteLLM would load prices from the network

from typing import Annotated, Any

import litellm
from common import FRANCE, MODEL, OVERFLOW, TOWN, WEATHER, WEATHER_TOOLS, run, weather_of
from pydantic import BaseModel, Field

USER = {"role": "user", "content": FRANCE}


class Town(BaseModel):
    name: Annotated[str, Field(max_length=20)]
    people: Annotated[int, Field(ge=1, le=9999)]


def complete(url: str, messages: list[Any], provider: str = "openai", **fields: Any) -> Any:
    """An answer of the service. Providers differ in the part of the address that they add themselves."""
    base = url + "/v1" if provider in ("openai", "hosted_vllm") else url
    given = {"temperature": 0, "max_tokens": 60, "api_key": "none", "num_retries": 0, **fields}
    return litellm.completion(f"{provider}/{given.pop('model', MODEL)}", messages, base_url=base, **given)


def quickstart(url: str) -> dict[str, str]:
    answers = {}
    for provider in ("openai", "hosted_vllm", "anthropic"):
        answers[provider] = complete(url, [USER], provider).choices[0].message.content
    given = {"api_base": url + "/v1", "api_key": "none", "temperature": 0, "max_output_tokens": 60}
    answers["responses"] = litellm.responses(model=f"openai/{MODEL}", input=FRANCE, **given).output_text
    text = litellm.text_completion(
        model=f"text-completion-openai/{MODEL}", prompt="The capital of France is", api_base=url + "/v1",
        api_key="none", max_tokens=8, temperature=0,
    )  # fmt: skip
    answers["text"] = text.choices[0].text
    assert all("Paris" in answer for answer in answers.values()), answers
    return answers


def conversation(url: str) -> list[str]:
    """The second turn replays the message of the first one, as an object and as a dictionary."""
    answers = []
    for replay in (lambda message: message, lambda message: message.model_dump()):
        first = complete(url, [USER]).choices[0].message
        messages = [USER, replay(first), {"role": "user", "content": "And of Spain?"}]
        answers.append(complete(url, messages).choices[0].message.content)
    assert answers[0] == answers[1]
    return answers


def stream(url: str) -> dict[str, int]:
    counts = {}
    for provider in ("openai", "anthropic"):
        chunks = list(complete(url, [USER], provider, stream=True, stream_options={"include_usage": True}))
        whole = litellm.stream_chunk_builder(chunks)
        assert whole.choices[0].message.content == complete(url, [USER], provider).choices[0].message.content
        assert whole.usage.completion_tokens > 0
        counts[provider] = len(chunks)
    return counts


def tool_loop(url: str) -> list[str]:
    messages: list[Any] = [{"role": "user", "content": WEATHER}]
    first = complete(url, messages, tools=WEATHER_TOOLS, tool_choice="required", parallel_tool_calls=False).choices[0]
    assert first.finish_reason == "tool_calls"
    (call,) = first.message.tool_calls
    assert call.function.name == "weather"
    result = {"role": "tool", "tool_call_id": call.id, "content": weather_of("Paris")}
    second = complete(url, [*messages, first.message, result], tools=WEATHER_TOOLS, tool_choice="none").choices[0]
    assert second.message.content
    return [call.function.arguments, second.message.content]


def typed_output(url: str) -> str:
    answer = complete(url, [{"role": "user", "content": TOWN}], response_format=Town, max_tokens=100)
    return Town.model_validate_json(answer.choices[0].message.content).name


def errors(url: str) -> list[str]:
    names = []
    for provider in ("openai", "hosted_vllm", "anthropic"):
        for fields, expected in (
            ({"messages": [{"role": "user", "content": OVERFLOW}]}, litellm.ContextWindowExceededError),
            ({"messages": [USER], "model": "gpt-unknown"}, litellm.NotFoundError),
        ):
            try:
                complete(url, provider=provider, **fields)
            except expected as error:
                names.append(type(error).__name__)
    assert len(names) == 6, names
    return names


run(quickstart, conversation, stream, tool_loop, typed_output, errors)
