"""LlamaIndex: its client for services like OpenAI's, and its agent."""

from __future__ import annotations

from typing import Annotated, Any

import openai
from common import FRANCE, MODEL, OVERFLOW, TOWN, WEATHER, run, weather_of
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field


class Town(BaseModel):
    """A town."""

    name: Annotated[str, Field(max_length=20)]
    people: Annotated[int, Field(ge=1, le=9999)]


def weather(city: str) -> str:
    """The weather now."""
    return weather_of(city)


def model(url: str, name: str = MODEL, **fields: Any) -> OpenAILike:
    given = {"is_chat_model": True, "is_function_calling_model": True, "context_window": 8192, **fields}
    return OpenAILike(
        model=name, api_base=url + "/v1", api_key="none", temperature=0, max_tokens=100, max_retries=0, **given
    )


def user(text: str) -> ChatMessage:
    return ChatMessage(role=MessageRole.USER, content=text)


def quickstart(url: str) -> list[str]:
    """A chat, and a completion, which is the default of this client."""
    chat = model(url).chat([user(FRANCE)]).message.content
    text = model(url, is_chat_model=False).complete("The capital of France is").text
    assert "Paris" in chat
    assert "Paris" in text
    return [chat, text[:20]]


def conversation(url: str) -> str:
    first = model(url).chat([user(FRANCE)]).message
    return str(model(url).chat([user(FRANCE), first, user("And of Spain?")]).message.content)


async def stream(url: str) -> int:
    parts = [part.delta or "" async for part in await model(url).astream_chat([user(FRANCE)])]
    assert "".join(parts) == model(url).chat([user(FRANCE)]).message.content
    return len(parts)


def tool_loop(url: str) -> list[str]:
    tool = FunctionTool.from_defaults(weather)
    chat = model(url, additional_kwargs={"parallel_tool_calls": False})
    first = chat.chat_with_tools([tool], user_msg=WEATHER, tool_required=True)
    (call,) = chat.get_tool_calls_from_response(first)
    result = tool(**call.tool_kwargs)
    said = ChatMessage(role=MessageRole.TOOL, content=str(result), additional_kwargs={"tool_call_id": call.tool_id})
    second = model(url).chat([user(WEATHER), first.message, said])
    return [str(result), str(second.message.content)]


def typed_output(url: str) -> list[str]:
    """By a tool, and by a JSON schema."""
    towns = []
    for by_schema in (False, True):
        chat = model(url, should_use_structured_outputs=by_schema)
        town = chat.as_structured_llm(Town).complete(TOWN).raw
        assert isinstance(town, Town)
        towns.append(town.name)
    return towns


def errors(url: str) -> list[str]:
    codes = []
    for text, name, expected in (
        (OVERFLOW, MODEL, openai.BadRequestError),
        (FRANCE, "gpt-unknown", openai.NotFoundError),
    ):
        try:
            model(url, name).chat([user(text)])
        except expected as error:
            codes.append(error.code)
    assert codes == ["context_length_exceeded", "model_not_found"]
    return codes


run(quickstart, conversation, stream, tool_loop, typed_output, errors)
