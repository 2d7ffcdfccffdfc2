"""OpenAI's Python client for responses, over a socket."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from serve_app.core.events import FinishReason, ReasoningDelta, TextDelta
from serve_app.core.requests import ChatMessage, ChatPrompt, Grammar
from serve_app.errors import NotReady

from .scripted import BEAT, ScriptedEngine, ScriptedTelemetry, chunk
from .server import served
from .test_responses import TOOLS
from .test_tools import CALLS, calls, chunks


@pytest.fixture
async def official(engine: ScriptedEngine, telemetry: ScriptedTelemetry) -> AsyncIterator[openai.AsyncOpenAI]:
    async with served(engine, telemetry, heartbeat_s=0.02) as url:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
            yield client


async def test_the_client_creates_reads_and_deletes(official: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
    engine.plays(chunk(["Par", "is"]))
    created = await official.responses.create(
        model="small",
        input="Where?",
        instructions="Be brief.",
        include=["message.output_text.logprobs"],
        top_logprobs=1,
        metadata={"run": "7"},
    )
    assert (created.output_text, created.status) == ("Paris", "completed")
    assert created.usage is not None
    assert created.usage.total_tokens == 5
    message: Any = created.output[0]
    assert [token.token for token in message.content[0].logprobs] == ["Par", "is"]
    assert await official.responses.retrieve(created.id) == created
    listed = [item async for item in official.responses.input_items.list(created.id)]
    assert [item.type for item in listed] == ["message"]
    with pytest.raises(openai.BadRequestError, match="synchronous"):
        await official.responses.cancel(created.id)
    await official.responses.delete(created.id)
    with pytest.raises(openai.NotFoundError):
        await official.responses.retrieve(created.id)


async def test_the_client_continues_a_response(official: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
    first = await official.responses.create(model="small", input="hi")
    await official.responses.create(model="small", input="Go on.", previous_response_id=first.id)
    prompt = engine.requests[1].prompt
    assert isinstance(prompt, ChatPrompt)
    assert prompt.messages == (
        ChatMessage("user", "hi"),
        ChatMessage("assistant", "some words"),
        ChatMessage("user", "Go on."),
    )
    with pytest.raises(openai.BadRequestError) as refused:
        await official.responses.create(model="small", input="Go on.", previous_response_id="resp_x")
    assert refused.value.code == "previous_response_not_found"


@pytest.mark.parametrize("stored", [False, True])
async def test_the_client_calls_and_sends_the_outputs(
    official: openai.AsyncOpenAI, engine: ScriptedEngine, stored: bool
) -> None:
    engine.plays(*chunks([[ReasoningDelta("Hm.")], *calls(*CALLS, text="Wait.")]))
    tools: Any = TOOLS
    first = await official.responses.create(model="small", input="hi", tools=tools)
    called: Any = [item for item in first.output if item.type == "function_call"]
    assert [(call.name, call.arguments) for call in called] == CALLS
    results: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "12"} for call in called]
    if stored:
        await official.responses.create(model="small", input=results, previous_response_id=first.id, tools=tools)
    else:
        everything: Any = [{"role": "user", "content": "hi"}, *first.output, *results]
        await official.responses.create(model="small", input=everything, tools=tools, store=False)
    before, after = engine.requests
    assert isinstance(before.prompt, ChatPrompt)
    assert isinstance(after.prompt, ChatPrompt)
    user, answer, *outputs = after.prompt.messages
    assert (user, answer.reasoning, answer.content) == (before.prompt.messages[0], "Hm.", "Wait.")
    assert [call.arguments for call in answer.tool_calls] == [arguments for _, arguments in CALLS]
    assert [one.name for one in outputs] == ["weather", "clock"]


async def test_the_client_joins_a_stream(official: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
    engine.plays(BEAT, *chunks([[ReasoningDelta("Hm.")], *calls(*CALLS, text="Well.")]))
    tools: Any = TOOLS
    async with official.responses.stream(model="small", input="hi", tools=tools) as stream:
        kinds = [event.type async for event in stream]
        last = await stream.get_final_response()
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
    assert last.output_text == "Well."
    assert [(one.name, one.arguments) for one in last.output if one.type == "function_call"] == CALLS
    assert [one.type for one in last.output] == ["reasoning", "message", "function_call", "function_call"]
    weather: Any = last.output[2]
    assert weather.parsed_arguments == json.loads(CALLS[0][1])
    # The objects of the client can be sent back with the fields that it has added.
    again: Any = [{"role": "user", "content": "hi"}, *last.output]
    results: Any = [
        {"type": "function_call_output", "call_id": one.call_id, "output": "12"}
        for one in last.output
        if one.type == "function_call"
    ]
    engine.plays(chunk(["Done."]))
    assert (await official.responses.create(model="small", input=[*again, *results])).output_text == "Done."


class Place(BaseModel):
    city: str


async def test_the_client_parses_a_format(official: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
    engine.plays(chunk(['{"city": ', '"Rome"}']))
    parsed = await official.responses.parse(model="small", input="Where?", text_format=Place)
    assert parsed.output_parsed == Place(city="Rome")
    (request,) = engine.requests
    assert isinstance(request.params.grammar, Grammar)
    assert request.params.grammar.kind == "json_schema"
    assert json.loads(request.params.grammar.text)["required"] == ["city"]
    back: Any = [{"role": "user", "content": "Where?"}, *parsed.output, {"role": "user", "content": "And now?"}]
    await official.responses.create(model="small", input=back)


async def test_the_client_gets_a_response_that_is_cut_off(official: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
    engine.plays(*chunks([[TextDelta("Pa")]], FinishReason.LENGTH))
    async with official.responses.stream(model="small", input="hi", max_output_tokens=1) as stream:
        *_, last = [event async for event in stream]
    assert last.type == "response.incomplete"
    assert last.response.incomplete_details is not None
    assert last.response.incomplete_details.reason == "max_output_tokens"
    assert last.response.output_text == "Pa"


@pytest.mark.parametrize("first", [BEAT, chunk(["Pa"], None)], ids=["before the first token", "after a token"])
async def test_the_client_raises_a_late_error(official: openai.AsyncOpenAI, engine: ScriptedEngine, first: Any) -> None:
    engine.plays(first, NotReady("The replica was lost.", retry_after_s=1))
    stream = await official.responses.create(model="small", input="hi", stream=True)
    with pytest.raises(openai.APIError, match="The replica was lost"):
        async for _ in stream:
            pass
