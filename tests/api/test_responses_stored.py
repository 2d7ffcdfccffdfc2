"""Stored responses: they are continued, read, listed and deleted, and the store has bounds."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from openai.types.responses import ResponseItem
from pydantic import TypeAdapter

from serve_app.api.app import create_app
from serve_app.config import StoredResponses
from serve_app.core.events import ReasoningDelta
from serve_app.core.requests import ChatMessage, ChatPrompt

from .scripted import Clock, Connection, ScriptedEngine, ScriptedTelemetry, app_config, chunk, error_of, serve
from .test_responses import CALL, NOON, TOOLS
from .test_tools import CALLS, calls, chunks

PATH = "/v1/responses"
HI = {"role": "user", "content": "hi"}


@asynccontextmanager
async def connected(
    engine: ScriptedEngine, telemetry: ScriptedTelemetry, clock: Clock | None = None, **limits: Any
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application whose store has these limits."""
    config = app_config(request_timeout_s=10**6).model_copy(update={"responses": StoredResponses(**limits)})
    app = create_app(engine, telemetry, config, clock or Clock())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client


async def create(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    answer = await client.post(PATH, json={"input": "hi"} | fields)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def is_stored(client: httpx.AsyncClient, response: dict[str, Any]) -> bool:
    answer = await client.get(f"{PATH}/{response['id']}")
    assert answer.status_code in (200, 404)
    return answer.status_code == 200


def messages(engine: ScriptedEngine) -> list[ChatMessage]:
    """The messages of the last request that reached the engine."""
    prompt = engine.requests[-1].prompt
    assert isinstance(prompt, ChatPrompt)
    return list(prompt.messages)


# Conversations


async def test_a_response_continues_an_earlier_one(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    """The instructions of the earlier response do not apply."""
    engine.plays(*chunks([[ReasoningDelta("Hm.")], *calls(*CALLS, text="Wait.")]))
    first = await create(client, instructions="Be brief.", tools=TOOLS)
    engine.plays(chunk(["Sunny."]))
    results = [
        {"type": "function_call_output", "call_id": item["call_id"], "output": "12"}
        for item in first["output"]
        if item["type"] == "function_call"
    ]
    second = await create(client, previous_response_id=first["id"], input=results)
    assert second["previous_response_id"] == first["id"]
    user, answer, *tools = messages(engine)
    assert user == ChatMessage("user", "hi")
    assert (answer.content, answer.reasoning, len(answer.tool_calls)) == ("Wait.", "Hm.", 2)
    assert [(one.name, one.content) for one in tools] == [(name, "12") for name, _ in CALLS]
    await create(client, previous_response_id=second["id"], input="Thanks.", instructions="Be polite.")
    assert messages(engine) == [
        ChatMessage("system", "Be polite."),
        user,
        answer,
        *tools,
        ChatMessage("assistant", "Sunny."),
        ChatMessage("user", "Thanks."),
    ]


async def test_one_response_can_be_continued_twice(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    first = await create(client)
    for text in ("a", "b"):
        await create(client, previous_response_id=first["id"], input=text)
        assert [one.content for one in messages(engine)] == ["hi", "some words", text]


async def test_a_deleted_response_remains_in_the_conversations_that_continue_it(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    first = await create(client)
    second = await create(client, previous_response_id=first["id"], input="a")
    await client.delete(f"{PATH}/{first['id']}")
    await create(client, previous_response_id=second["id"], input="b")
    assert [one.content for one in messages(engine)] == ["hi", "some words", "a", "some words", "b"]


async def test_an_unknown_previous_response_is_a_400(
    client: httpx.AsyncClient, engine: ScriptedEngine, telemetry: ScriptedTelemetry
) -> None:
    """With the code by which clients know that they must send the whole conversation."""
    for stream in (False, True):
        body = {"input": "hi", "previous_response_id": "resp_x", "stream": stream}
        answer = await client.post(PATH, json=body)
        assert answer.status_code == 400
        error = error_of(answer)
        assert (error["code"], error["param"]) == ("previous_response_not_found", "previous_response_id")
        assert error["message"].startswith("Previous response with id 'resp_x' not found.")
    assert engine.requests == []
    assert [model for _, model in telemetry.errors] == ["small", "small"]


async def test_an_item_can_be_referred_to(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    first = await create(client, input=[HI | {"id": "msg_mine"}])
    answer = {"type": "item_reference", "id": first["output"][0]["id"]}
    second = await create(client, input=[{"id": "msg_mine"}, answer, {"role": "user", "content": "Go on."}])
    assert [(one.role, one.content) for one in messages(engine)] == [
        ("user", "hi"),
        ("assistant", "some words"),
        ("user", "Go on."),
    ]
    for one in (first, second):
        await client.delete(f"{PATH}/{one['id']}")
    refused = await client.post(PATH, json={"input": [HI, answer]})
    assert refused.status_code == 404
    assert error_of(refused)["param"] == "input[1].id"
    assert "Items are not persisted when `store` is set to false" in error_of(refused)["message"]


# Reading and deleting


@pytest.mark.parametrize("fields", [{"store": False}, {"store": True}, {}])
async def test_a_response_is_stored_unless_the_request_forbids_it(
    client: httpx.AsyncClient, telemetry: ScriptedTelemetry, fields: dict[str, Any]
) -> None:
    response = await create(client, **fields)
    assert response["store"] == fields.get("store", True)
    assert await is_stored(client, response) == response["store"]
    assert telemetry.stored[0] == response["store"]


async def test_a_stored_response_is_the_same(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.plays(chunk(["Ł\u2028ódź"]))
    response = await create(client)
    answer = await client.get(f"{PATH}/{response['id']}")
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == response


async def test_a_deleted_response_is_gone(client: httpx.AsyncClient, telemetry: ScriptedTelemetry) -> None:
    response = await create(client)
    answer = await client.delete(f"{PATH}/{response['id']}")
    assert (answer.status_code, answer.json()) == (200, {"id": response["id"], "object": "response", "deleted": True})
    assert not await is_stored(client, response)
    assert (telemetry.stored, telemetry.removed) == ((0, 0), 0)


@pytest.mark.parametrize(
    ("method", "path"), [("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")]
)
async def test_an_unknown_response_is_a_404(client: httpx.AsyncClient, method: str, path: str) -> None:
    answer = await client.request(method, f"{PATH}/resp_x{path}")
    assert answer.status_code == 404
    assert error_of(answer)["message"].startswith("Response with id 'resp_x' not found.")


async def test_a_response_cannot_be_cancelled(client: httpx.AsyncClient) -> None:
    answer = await client.post(f"{PATH}/{(await create(client))['id']}/cancel")
    assert answer.status_code == 400
    assert error_of(answer)["message"].startswith("Cannot cancel a synchronous response.")


async def test_a_stored_response_cannot_be_streamed(client: httpx.AsyncClient) -> None:
    response = await create(client)
    answer = await client.get(f"{PATH}/{response['id']}?stream=true")
    assert (answer.status_code, error_of(answer)["param"]) == (400, "stream")
    assert (await client.get(f"{PATH}/{response['id']}?stream=false")).status_code == 200


async def test_a_wrong_method_is_a_405_with_the_allowed_methods(client: httpx.AsyncClient) -> None:
    answer = await client.put(f"{PATH}/resp_x")
    assert answer.status_code == 405
    assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD", "DELETE"}


async def test_the_input_items_are_listed(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    """Those that the model read: also the items of the response that this one continues."""
    first = await create(client, input=[{"role": "developer", "content": "Be brief."}, HI, CALL, NOON])
    second = await create(client, previous_response_id=first["id"], input="Thanks.")
    page = (await client.get(f"{PATH}/{second['id']}/input_items?order=asc")).json()
    TypeAdapter(list[ResponseItem]).validate_python(page["data"])
    assert [(item["type"], item.get("role")) for item in page["data"]] == [
        ("message", "developer"),
        ("message", "user"),
        ("function_call", None),
        ("function_call_output", None),
        ("message", "assistant"),
        ("message", "user"),
    ]
    assert page["data"][1]["content"] == [{"type": "input_text", "text": "hi"}]
    assert page["data"][3]["output"] == "noon"
    assert page["data"][4] == first["output"][0]
    ids = [item["id"] for item in page["data"]]
    assert len(set(ids)) == 6
    assert (page["first_id"], page["last_id"], page["has_more"]) == (ids[0], ids[-1], False)


async def test_input_items_come_in_pages(client: httpx.AsyncClient) -> None:
    """The newest item is the first by default, and a page has 20 items."""
    items = [HI | {"id": f"msg_{number}"} for number in range(25)]
    path = f"{PATH}/{(await create(client, input=items))['id']}/input_items"

    async def page(query: str) -> tuple[list[str], bool]:
        found = (await client.get(path + query)).json()
        ids = [item["id"] for item in found["data"]]
        assert (found["object"], found["first_id"], found["last_id"]) == (
            "list",
            ids[0] if ids else None,
            ids[-1] if ids else None,
        )
        return ids, found["has_more"]

    newest = [f"msg_{number}" for number in reversed(range(25))]
    assert await page("") == (newest[:20], True)
    assert await page("?after=msg_5") == (newest[20:], False)
    assert await page("?limit=2&order=asc") == (["msg_0", "msg_1"], True)
    assert await page("?limit=100&order=desc") == (newest, False)
    assert await page("?after=msg_0") == ([], False)


@pytest.mark.parametrize(
    ("query", "param"),
    [("limit=0", "limit"), ("limit=101", "limit"), ("limit=x", "limit"), ("order=up", "order"), ("after=x", "after")],
)
async def test_a_wrong_parameter_of_the_list_is_named(client: httpx.AsyncClient, query: str, param: str) -> None:
    answer = await client.get(f"{PATH}/{(await create(client))['id']}/input_items?{query}")
    assert (answer.status_code, error_of(answer)["param"]) == (400, param)


# Bounds


async def test_the_least_recently_used_response_goes_first(
    engine: ScriptedEngine, telemetry: ScriptedTelemetry
) -> None:
    async with connected(engine, telemetry, max_stored=2) as client:
        first, second = await create(client), await create(client)
        assert await is_stored(client, first)
        third = await create(client)
        assert [await is_stored(client, one) for one in (first, second, third)] == [True, False, True]
        assert (telemetry.stored[0], telemetry.removed) == (2, 1)


async def test_the_size_of_the_store_is_bounded(engine: ScriptedEngine, telemetry: ScriptedTelemetry) -> None:
    limit = 200_000
    async with connected(engine, telemetry, max_stored_bytes=limit) as client:
        stored = [await create(client, input="x" * 20_000) for _ in range(10)]
        count, size = telemetry.stored
        assert 4 <= count <= 5
        assert limit - 50_000 < size <= limit
        assert telemetry.removed == 10 - count
        assert [await is_stored(client, one) for one in stored] == [False] * (10 - count) + [True] * count
        assert not await is_stored(client, await create(client, input="x" * 100_000))
        assert telemetry.stored == (count, size), "a response that is too large removes no others"


async def test_the_items_of_earlier_responses_count(engine: ScriptedEngine, telemetry: ScriptedTelemetry) -> None:
    """They stay in memory as long as the response that continues them."""
    async with connected(engine, telemetry) as client:
        first = await create(client, input="x" * 20_000)
        _, alone = telemetry.stored
        second = await create(client, previous_response_id=first["id"])
        assert telemetry.stored[1] > 2 * alone
        for one in (first, second):
            await client.delete(f"{PATH}/{one['id']}")
        assert telemetry.stored == (0, 0)


async def test_a_response_expires_after_its_last_use(engine: ScriptedEngine, telemetry: ScriptedTelemetry) -> None:
    clock = Clock()
    async with connected(engine, telemetry, clock, ttl_s=60) as client:
        first, second = await create(client), await create(client)
        clock.now += 50
        assert await is_stored(client, first)
        clock.now += 50
        assert await is_stored(client, first)
        assert not await is_stored(client, second)
        assert (telemetry.stored[0], telemetry.removed) == (1, 1)
        clock.now += 61
        answer = await client.post(PATH, json={"input": "hi", "previous_response_id": first["id"]})
        assert error_of(answer)["code"] == "previous_response_not_found"
        assert (telemetry.stored, telemetry.removed) == ((0, 0), 2)


async def test_a_store_for_no_responses_stores_none(engine: ScriptedEngine, telemetry: ScriptedTelemetry) -> None:
    async with connected(engine, telemetry, max_stored=0) as client:
        response = await create(client)
        assert response["store"] is False
        assert not await is_stored(client, response)


async def test_a_response_whose_client_leaves_is_not_stored(
    engine: ScriptedEngine, telemetry: ScriptedTelemetry
) -> None:
    engine.plays(chunk(["a"], None), None)
    connection = Connection(PATH, {"input": "hi"})
    call = serve(engine, telemetry, connection)
    await engine.reached.wait()
    connection.disconnect.set()
    await call
    assert (telemetry.stored, telemetry.errors) == ((0, 0), [])
