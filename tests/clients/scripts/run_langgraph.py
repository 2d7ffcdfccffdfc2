"""LangGraph with LangChain's client, with chats and with responses: a graph of a model and tools, and its memory."""

from __future__ import annotations

from typing import Annotated, Any

import openai
from common import FRANCE, MODEL, OVERFLOW, TOWN, WEATHER, run, weather_of
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from pydantic import BaseModel, Field


class Town(BaseModel):
    """A town."""

    name: Annotated[str, Field(max_length=20)]
    people: Annotated[int, Field(ge=1, le=9999)]


def weather(city: Annotated[str, Field(max_length=20)]) -> str:
    """The weather now."""
    return weather_of(city)


def chats(url: str, model: str = MODEL, **fields: Any) -> list[ChatOpenAI]:
    """A model for each API."""
    given = {"model": model, "base_url": url + "/v1", "api_key": "none", "temperature": 0, "max_retries": 0, **fields}
    return [ChatOpenAI(max_tokens=60, use_responses_api=responses, **given) for responses in (False, True)]


def text_of(message: Any) -> str:
    return str(message.text)


def graph(chat: ChatOpenAI) -> Any:
    """The model may use the tool once."""

    def ask(state: MessagesState) -> dict[str, Any]:
        used = isinstance(state["messages"][-1], ToolMessage)
        model = chat.bind_tools([weather], tool_choice="none" if used else "weather", parallel_tool_calls=False)
        return {"messages": [model.invoke(state["messages"])]}

    built = StateGraph(MessagesState)
    built.add_node("ask", ask)
    built.add_node("tools", ToolNode([weather]))
    built.add_edge(START, "ask")
    built.add_conditional_edges("ask", tools_condition)
    built.add_edge("tools", "ask")
    return built.compile(checkpointer=InMemorySaver())


def quickstart(url: str) -> list[str]:
    answers = [text_of(chat.invoke(FRANCE)) for chat in chats(url)]
    assert all("Paris" in answer for answer in answers)
    return answers


def conversation(url: str) -> list[str]:
    answers = []
    for chat in chats(url):
        first = chat.invoke([HumanMessage(FRANCE)])
        answers.append(text_of(chat.invoke([HumanMessage(FRANCE), first, HumanMessage("And of Spain?")])))
    return answers


def stream(url: str) -> list[int]:
    counts = []
    for chat in chats(url):
        texts = [text_of(part) for part in chat.stream(FRANCE)]
        assert "".join(texts) == text_of(chat.invoke(FRANCE))
        counts.append(len(texts))
    return counts


def tool_loop(url: str) -> list[str]:
    answers = []
    for chat in chats(url):
        agent, thread = graph(chat), {"configurable": {"thread_id": "1"}}
        messages = agent.invoke({"messages": [HumanMessage(WEATHER)]}, thread)["messages"]
        assert [type(message) for message in messages] == [HumanMessage, AIMessage, ToolMessage, AIMessage]
        again = agent.invoke({"messages": [HumanMessage("And in Rome?")]}, thread)["messages"]
        assert len(again) == 8, "the second turn has the messages of the first one"
        answers.append(text_of(again[-1]))
    return answers


def typed_output(url: str) -> list[str]:
    towns = []
    for chat in chats(url):
        for method in ("json_schema", "function_calling"):
            town = chat.with_structured_output(Town, method=method).invoke(TOWN)
            assert isinstance(town, Town)
            towns.append(town.name)
    return towns


def errors(url: str) -> list[str]:
    names = []
    for chat in chats(url):
        try:
            chat.invoke(OVERFLOW)
        except ContextOverflowError as error:
            names.append(type(error).__name__)
    for chat in chats(url, "gpt-unknown"):
        try:
            chat.invoke(FRANCE)
        except openai.NotFoundError as error:
            names.append(type(error).__name__)
    assert len(names) == 4, names
    return names


run(quickstart, conversation, stream, tool_loop, typed_output, errors)
