"""LangChain's client for TGI: text generation with its defaults, chats, tools and typed outputs."""

from __future__ import annotations

from typing import Annotated, Any

from common import FRANCE, MODEL, OVERFLOW, TOWN, WEATHER, run, weather_of
from huggingface_hub.errors import HfHubHTTPError, ValidationError
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_huggingface import ChatHuggingFace, HuggingFaceEndpoint
from pydantic import BaseModel, Field


class Town(BaseModel):
    """A town."""

    name: Annotated[str, Field(max_length=20)]
    people: Annotated[int, Field(ge=1, le=9999)]


def weather(city: Annotated[str, Field(max_length=20)]) -> str:
    """The weather now."""
    return weather_of(city)


def endpoint(url: str, **fields: Any) -> HuggingFaceEndpoint:
    return HuggingFaceEndpoint(endpoint_url=url, max_new_tokens=60, huggingfacehub_api_token="none", **fields)


def chat(url: str, **fields: Any) -> ChatHuggingFace:
    """`model_id`: without it, LangChain asks the hub for the name of the model."""
    return ChatHuggingFace(llm=endpoint(url), model_id=MODEL, temperature=0, max_tokens=60, **fields)


def quickstart(url: str) -> str:
    text = endpoint(url).invoke("The capital of France is")
    assert "Paris" in text
    return text


def conversation(url: str) -> str:
    first = chat(url).invoke(FRANCE)
    return str(chat(url).invoke([HumanMessage(FRANCE), first, HumanMessage("And of Spain?")]).content)


def stream(url: str) -> list[int]:
    texts = list(endpoint(url, streaming=True).stream("The capital of France is"))
    parts = list(chat(url).stream(FRANCE))
    assert texts
    assert "Paris" in "".join(str(part.content) for part in parts)
    return [len(texts), len(parts)]


def tool_loop(url: str) -> str:
    question = HumanMessage(WEATHER)
    said = chat(url).bind_tools([weather], tool_choice="weather").invoke([question])
    (call,) = said.tool_calls
    result = ToolMessage(weather(**call["args"]), tool_call_id=call["id"])
    return str(chat(url).invoke([question, said, result]).content)


def typed_output(url: str) -> Any:
    town = chat(url).with_structured_output(Town.model_json_schema(), method="json_schema").invoke(TOWN)
    return Town.model_validate(town).name


def errors(url: str) -> list[Any]:
    codes = []
    try:
        chat(url).invoke(OVERFLOW)
    except HfHubHTTPError as error:
        codes.append(error.response.status_code)
    try:
        endpoint(url).invoke(OVERFLOW)
    except ValidationError:
        codes.append("ValidationError")
    assert codes == [400, "ValidationError"]
    return codes


run(quickstart, conversation, stream, tool_loop, typed_output, errors)
