"""Instructor: typed outputs by tools, by JSON schemas and by responses, whole, partial and as a list."""

from __future__ import annotations

from typing import Annotated, Any

import instructor
import openai
from common import FRANCE, MODEL, OVERFLOW, TOWN, WEATHER, run
from instructor.core import InstructorRetryException
from pydantic import BaseModel, Field

MODES = instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA


class Town(BaseModel):
    """A town."""

    name: Annotated[str, Field(max_length=20)]
    people: Annotated[int, Field(ge=1, le=9999)]


class Weather(BaseModel):
    """Asks for the weather of a city."""

    city: Annotated[str, Field(max_length=20)]


def client(url: str, mode: instructor.Mode = instructor.Mode.TOOLS) -> Any:
    return instructor.from_openai(openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0), mode=mode)


def ask(url: str, text: str, kind: Any, mode: instructor.Mode = instructor.Mode.TOOLS, **fields: Any) -> Any:
    given = {"model": MODEL, "temperature": 0, "max_tokens": 100, "max_retries": 0, **fields}
    messages = given.pop("messages", [{"role": "user", "content": text}])
    return client(url, mode).chat.completions.create(messages=messages, response_model=kind, **given)


def quickstart(url: str) -> list[str]:
    towns = [ask(url, TOWN, Town, mode) for mode in MODES]
    assert all(isinstance(town, Town) for town in towns)
    return [town.name for town in towns]


def conversation(url: str) -> str:
    """The answer without a type is sent back."""
    first = ask(url, FRANCE, None).choices[0].message.model_dump()
    messages = [{"role": "user", "content": FRANCE}, first, {"role": "user", "content": TOWN}]
    town = ask(url, "", Town, messages=messages)
    assert isinstance(town, Town)
    return str(town.name)


def stream(url: str) -> int:
    partial = client(url).chat.completions.create_partial(
        model=MODEL, messages=[{"role": "user", "content": TOWN}], response_model=Town, temperature=0, max_tokens=100,
    )  # fmt: skip
    parts = list(partial)
    assert parts[-1].name
    assert parts[-1].people
    return len(parts)


def tool_loop(url: str) -> str:
    weather, completion = client(url).chat.completions.create_with_completion(
        model=MODEL, messages=[{"role": "user", "content": WEATHER}], response_model=Weather, temperature=0,
        max_tokens=60,
    )  # fmt: skip
    (call,) = completion.choices[0].message.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": f"sunny in {weather.city}"}
    messages = [{"role": "user", "content": WEATHER}, completion.choices[0].message.model_dump(), result]
    return str(ask(url, "", None, messages=messages).choices[0].message.content)


def typed_output(url: str) -> list[str]:
    """A list of objects, and an object with an optional and a nested field."""

    class Pair(BaseModel):
        first: Town
        second: Town | None = None

    pair = ask(url, TOWN, Pair, instructor.Mode.JSON_SCHEMA, max_tokens=200)
    return [pair.first.name]


def errors(url: str) -> list[str]:
    causes = []
    for text, fields, cause in (
        (OVERFLOW, {}, openai.BadRequestError),
        (FRANCE, {"model": "gpt-unknown"}, openai.NotFoundError),
    ):
        try:
            ask(url, text, Town, **fields)
        except (InstructorRetryException, openai.APIStatusError) as error:
            found = error if isinstance(error, openai.APIStatusError) else error.__cause__
            assert cause.__name__ in f"{type(found).__name__} {found!r}", repr(found)
            causes.append(cause.__name__)
    assert len(causes) == 2
    return causes


run(quickstart, conversation, stream, tool_loop, typed_output, errors)
