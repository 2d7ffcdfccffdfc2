from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import httpx2
import openai
import pytest
from openai.types.chat import ChatCompletionUserMessageParam

from serve_app.api.app import create_app
from serve_app.core.events import Chunk, FinishReason, TokenEvent
from serve_app.core.requests import ChatMessage, ChatPrompt, SamplingParams, TextPrompt, TokenPrompt
from serve_app.errors import DeadlineExceeded, NotReady, QueueFull

from .scripted import BEAT, ScriptedEngine, ScriptedTelemetry, app_config, chunk, events_of

USAGE = {"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 0}, "completion_tokens": 3, "total_tokens": 6}
HI: ChatCompletionUserMessageParam = {"role": "user", "content": "hi"}
COMPLETION: dict[str, object] = {"prompt": "a b c"}
CHAT: dict[str, object] = {"messages": [HI]}
both = pytest.mark.parametrize(
    ("path", "body"), [("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)], ids=["completion", "chat"]
)


async def whole(client: httpx.AsyncClient, path: str, body: dict[str, object]) -> dict[str, Any]:
    answer = await client.post(path, json=body)
    assert answer.status_code == 200
    found: dict[str, Any] = answer.json()
    return found


async def stream(client: httpx.AsyncClient, path: str, body: dict[str, object]) -> list[dict[str, Any]]:
    """Every event except the last one, which is [DONE]."""
    answer = await client.post(path, json=body | {"stream": True})
    assert answer.headers["content-type"] == "text/event-stream"
    *found, end = events_of(answer.text)
    assert end == "[DONE]"
    return found


def without_date(body: dict[str, Any]) -> dict[str, Any]:
    """The body without its date, which is checked to be the current time."""
    assert isinstance(body["created"], int)
    assert abs(time.time() - body["created"]) < 60
    return {name: value for name, value in body.items() if name != "created"}


def ended(reason: str | None) -> dict[str, None]:
    """The stop reason is present with the finish reason only."""
    return {} if reason is None else {"stop_reason": None}


async def test_a_whole_completion(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    body = await whole(client, "/v1/completions", COMPLETION)
    assert without_date(body) == {
        "id": f"cmpl-{engine.requests[0].id}",
        "object": "text_completion",
        "model": "small",
        "choices": [{"index": 0, "text": "abc", "logprobs": None, "finish_reason": "stop", "stop_reason": None}],
        "usage": USAGE,
    }
    assert engine.requests[0].prompt == TextPrompt("a b c")
    assert engine.requests[0].params == SamplingParams(max_tokens=16, temperature=0.2, top_p=0.9)


async def test_a_streamed_completion(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.plays(chunk(["a"], None), chunk(["b", ""], FinishReason.LENGTH, start=1))
    found = await stream(client, "/v1/completions", COMPLETION)
    assert [without_date(event) for event in found] == [
        {
            "id": f"cmpl-{engine.requests[0].id}",
            "object": "text_completion",
            "model": "small",
            "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": reason, **ended(reason)}],
        }
        for text, reason in [("a", None), ("b", None), ("", "length")]
    ]
    assert len({event["created"] for event in found}) == 1


async def test_a_whole_chat_completion(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.plays(chunk(["a", "b", "c"], FinishReason.LENGTH))
    body = await whole(client, "/v1/chat/completions", CHAT)
    message = {"role": "assistant", "content": "abc"}
    assert without_date(body) == {
        "id": f"chatcmpl-{engine.requests[0].id}",
        "object": "chat.completion",
        "model": "small",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length", "stop_reason": None}],
        "usage": USAGE,
    }
    assert engine.requests[0].prompt == ChatPrompt((ChatMessage("user", "hi"),))
    assert engine.requests[0].params == SamplingParams(max_tokens=None, temperature=0.2, top_p=0.9)


async def test_a_streamed_chat_completion_begins_with_the_role(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    engine.plays(chunk(["a"], None), chunk(["b"], start=1))
    found = await stream(client, "/v1/chat/completions", CHAT)
    opening = {"role": "assistant", "content": ""}
    deltas = [(opening, None), ({"content": "a"}, None), ({"content": "b"}, "stop")]
    assert [without_date(event) for event in found] == [
        {
            "id": f"chatcmpl-{engine.requests[0].id}",
            "object": "chat.completion.chunk",
            "model": "small",
            "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason, **ended(reason)}],
        }
        for delta, reason in deltas
    ]


@both
async def test_include_usage_adds_a_chunk_with_the_usage(
    client: httpx.AsyncClient, engine: ScriptedEngine, path: str, body: dict[str, object]
) -> None:
    engine.plays(chunk(["a", "b", "c"]))
    *found, last = await stream(client, path, body | {"stream_options": {"include_usage": True}})
    assert [event["usage"] for event in found] == [None] * len(found)
    assert (last["choices"], last["usage"]) == ([], USAGE)
    assert {name: last[name] for name in ("id", "object", "created", "model")}.items() <= found[0].items()


@both
@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}, {"include_usage": None}])
async def test_a_stream_has_no_usage_by_default(
    client: httpx.AsyncClient, path: str, body: dict[str, object], options: object
) -> None:
    found = await stream(client, path, body | {"stream_options": options})
    assert all("usage" not in event for event in found)
    assert found[-1]["choices"][0]["finish_reason"] == "stop"


@both
@pytest.mark.parametrize("streamed", [False, True])
async def test_every_field_reaches_the_engine(
    client: httpx.AsyncClient, engine: ScriptedEngine, path: str, body: dict[str, object], streamed: bool
) -> None:
    fields: dict[str, Any] = {
        "max_tokens": 5,
        "min_tokens": 2,
        "temperature": 0.7,
        "top_p": 0.5,
        "top_k": 4,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "presence_penalty": -2,
        "frequency_penalty": 2,
        "seed": 7,
        "ignore_eos": True,
    }
    others = {"model": "org/large", "user": "me", "n": 1, "stop": "x", "stop_token_ids": [7], "stream": streamed}
    answer = await client.post(path, json=body | fields | others)
    assert answer.status_code == 200
    assert engine.requests[0].model == "org/large"
    assert engine.requests[0].params == SamplingParams(**fields, stop=("x",), stop_token_ids=(7,))


@both
async def test_null_is_the_same_as_absent(
    client: httpx.AsyncClient, engine: ScriptedEngine, path: str, body: dict[str, object]
) -> None:
    names = ("model", "temperature", "top_p", "n", "stop", "stream", "stream_options", "seed", "user", "logprobs")
    await whole(client, path, body)
    await whole(client, path, body | dict.fromkeys(names))
    assert engine.requests[0].params == engine.requests[1].params


async def test_a_prompt_can_be_token_ids(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await whole(client, "/v1/completions", {"prompt": [5, 0, 2**31 - 1]})
    assert engine.requests[0].prompt == TokenPrompt((5, 0, 2**31 - 1))


async def test_content_can_be_a_list_of_parts(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "system", "content": "s"}, {"role": "assistant", "content": ""}]
    await whole(client, "/v1/chat/completions", {"messages": [*messages, {"role": "user", "content": parts}]})
    plain = (ChatMessage("system", "s"), ChatMessage("assistant", ""), ChatMessage("user", "ab"))
    assert engine.requests[0].prompt == ChatPrompt(plain)


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({"max_completion_tokens": 9}, 9),
        ({"max_tokens": 9}, 9),
        ({"max_tokens": 9, "max_completion_tokens": 9}, 9),
        ({"max_tokens": None, "max_completion_tokens": None}, None),
    ],
)
async def test_max_tokens_of_a_chat_has_two_names(
    client: httpx.AsyncClient, engine: ScriptedEngine, fields: dict[str, object], limit: int | None
) -> None:
    await whole(client, "/v1/chat/completions", CHAT | fields)
    assert engine.requests[0].params.max_tokens == limit


async def test_logprobs_of_a_completion(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.plays(chunk(["Hello"], None), chunk(["", " you"], start=1))
    body = await whole(client, "/v1/completions", COMPLETION | {"logprobs": 5})
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["Hello", "", " you"],
        "token_logprobs": [-0.5, -0.5, -0.5],
        "top_logprobs": [{"é": -9999.0, token: -0.5} for token in ("Hello", "", " you")],
        "text_offset": [0, 5, 5],
    }
    assert engine.requests[0].params.logprobs == 5


async def test_text_offsets_of_a_streamed_completion_continue(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    engine.plays(chunk(["Hello"], None), chunk([" you", "!"], start=1))
    found = await stream(client, "/v1/completions", COMPLETION | {"logprobs": 0})
    logprobs = [event["choices"][0]["logprobs"] for event in found]
    assert [one["tokens"] for one in logprobs] == [["Hello"], [" you"], ["!"]]
    assert [one["text_offset"] for one in logprobs] == [[0], [5], [9]]


def chat_token(token: str, logprob: float) -> dict[str, object]:
    return {"token": token, "bytes": list(token.encode()), "logprob": logprob}


async def test_logprobs_of_a_chat(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.plays(chunk(["é", "b"]))
    body = await whole(client, "/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 20})
    top = [chat_token("é", -9999.0)]
    content = [chat_token(token, -0.5) | {"top_logprobs": top} for token in ("é", "b")]
    assert body["choices"][0]["logprobs"] == {"content": content}
    assert engine.requests[0].params.logprobs == 20


async def test_logprobs_of_a_streamed_chat(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.plays(chunk(["a", "b"]))
    opening, *found = await stream(client, "/v1/chat/completions", CHAT | {"logprobs": True})
    assert opening["choices"][0]["logprobs"] is None
    assert [event["choices"][0]["logprobs"]["content"][0]["token"] for event in found] == ["a", "b"]
    assert engine.requests[0].params.logprobs == 0


@both
async def test_an_event_without_logprobs_is_skipped(
    client: httpx.AsyncClient, engine: ScriptedEngine, path: str, body: dict[str, object]
) -> None:
    engine.plays(Chunk((TokenEvent(1, "x", 0.1, FinishReason.STOP),), 1, 0.0))
    found = await stream(client, path, body | {"logprobs": True if "chat" in path else 1})
    logprobs = found[-1]["choices"][0]["logprobs"]
    assert logprobs.get("content", logprobs.get("tokens")) == []


async def test_the_list_of_models(client: httpx.AsyncClient) -> None:
    body = (await client.get("/v1/models")).json()
    assert body["object"] == "list"
    assert [without_date(card) for card in body["data"]] == [
        {"id": name, "object": "model", "owned_by": "serve_app", "root": root, "parent": parent}
        for name, root, parent in (
            ("small", "small", None),
            ("org/large", "org/large", None),
            ("support", "/adapters/support", "small"),
        )
    ]


@pytest.mark.parametrize(
    ("path", "name"), [("small", "small"), ("org/large", "org/large"), ("org%2Flarge", "org/large")]
)
async def test_one_model_by_its_name(client: httpx.AsyncClient, path: str, name: str) -> None:
    answer = await client.get(f"/v1/models/{path}")
    assert answer.status_code == 200
    card = {"id": name, "object": "model", "owned_by": "serve_app", "root": name, "parent": None}
    assert without_date(answer.json()) == card


# The official client, over the same ASGI application.


@pytest.fixture
async def official(engine: ScriptedEngine, telemetry: ScriptedTelemetry) -> AsyncIterator[openai.AsyncOpenAI]:
    http = httpx2.AsyncClient(
        transport=httpx2.ASGITransport(create_app(engine, telemetry, app_config(heartbeat_s=0.01)))
    )
    async with openai.AsyncOpenAI(base_url="http://test/v1", api_key="any", max_retries=0, http_client=http) as client:
        yield client


async def test_the_openai_client_chats(official: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
    engine.plays(chunk(["Par", "is"]))
    answer = await official.chat.completions.create(model="small", messages=[HI], logprobs=True, temperature=0)
    assert answer.choices[0].message.content == "Paris"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 5
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert [token.token for token in logprobs.content or []] == ["Par", "is"]
    assert engine.requests[0].params.temperature == 0


async def test_the_openai_client_sends_an_answer_back(official: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
    """A conversation continues with the message object that the client got."""
    first = await official.chat.completions.create(model="small", messages=[HI])
    answer = first.choices[0].message.model_dump(exclude_unset=True)
    await official.chat.completions.create(model="small", messages=[HI, answer, HI])  # type: ignore[list-item]
    roles = ("user", "assistant", "user")
    assert isinstance(engine.requests[1].prompt, ChatPrompt)
    assert tuple(message.role for message in engine.requests[1].prompt.messages) == roles


async def test_the_openai_client_gets_several_answers(official: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
    answer = await official.chat.completions.create(
        model="small", messages=[HI], n=2, response_format={"type": "json_object"}, logit_bias={"7": 1}
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert [choice.message.content for choice in answer.choices] == ["some words"] * 2


async def test_the_openai_client_streams_a_chat(official: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
    engine.plays(BEAT, chunk(["Par"], None), chunk(["is"], start=1))
    stream = await official.chat.completions.create(
        model="small", messages=[HI], stream=True, stream_options={"include_usage": True}
    )
    found = [event async for event in stream]
    *spoken, last = found
    assert "".join(event.choices[0].delta.content or "" for event in spoken) == "Paris"
    assert spoken[0].choices[0].delta.role == "assistant"
    assert spoken[-1].choices[0].finish_reason == "stop"
    assert last.usage is not None
    assert last.usage.completion_tokens == 2


async def test_the_openai_client_completes(official: openai.AsyncOpenAI) -> None:
    answer = await official.completions.create(model="small", prompt="a b c", logprobs=1)
    assert answer.choices[0].text == "abc"
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.text_offset == [0, 1, 2]
    stream = await official.completions.create(model="small", prompt=[1, 2], stream=True)
    assert "".join([event.choices[0].text async for event in stream]) == "some words"


async def test_the_openai_client_lists_models(official: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in official.models.list()] == ["small", "org/large", "support"]
    assert (await official.models.retrieve("org/large")).id == "org/large"


async def test_the_openai_client_raises_its_own_errors(official: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
    with pytest.raises(openai.NotFoundError, match="Known models: small, org/large") as lost:
        await official.chat.completions.create(model="huge", messages=[HI])
    assert (lost.value.code, lost.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        await official.models.retrieve("org/huge")
    with pytest.raises(openai.BadRequestError, match="Field 'temperature' should be") as wrong:
        await official.chat.completions.create(model="small", messages=[HI], temperature=3, stream=True)
    assert (wrong.value.param, wrong.value.type) == ("temperature", "invalid_request_error")
    engine.plays(QueueFull("8 requests wait.", retry_after_s=1.5))
    with pytest.raises(openai.RateLimitError, match="8 requests wait") as full:
        await official.completions.create(model="small", prompt="hi")
    assert full.value.response.headers["retry-after"] == "2"
    assert full.value.response.headers["retry-after-ms"] == "1500"
    assert full.value.request_id == full.value.response.headers["x-request-id"]
    engine.plays(NotReady("Model small is being loaded."))
    with pytest.raises(openai.InternalServerError, match="Model small is being loaded"):
        await official.completions.create(model="small", prompt="hi")


async def test_the_openai_client_raises_an_error_event(official: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
    engine.plays(chunk(["a"], None), DeadlineExceeded("The request was not finished after 600 s."))
    stream = await official.chat.completions.create(model="small", messages=[HI], stream=True)
    spoken = [(await anext(stream)).choices[0].delta.content for _ in range(2)]
    assert spoken == ["", "a"]
    with pytest.raises(openai.APIError, match="not finished after 600 s") as late:
        await anext(stream)
    assert late.value.code == "deadline_exceeded"
