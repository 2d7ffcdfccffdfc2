from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from serve_app.api.app import create_app
from serve_app.core.requests import GenerationRequest, SamplingParams, TextPrompt
from serve_app.errors import QueueFull

from .scripted import ScriptedGateway, Step, Wire, app_config, chunk, echo, told


async def batch(client: httpx.AsyncClient, **body: object) -> dict[str, Any]:
    answer = await client.post("/generate_batch", json=body)
    assert answer.status_code == 200
    found: dict[str, Any] = answer.json()
    return found


def prompt(request: GenerationRequest) -> str:
    assert isinstance(request.prompt, TextPrompt)
    return request.prompt.text


def errors(results: Sequence[dict[str, Any]]) -> list[str | None]:
    return [result["error"]["code"] if "error" in result else None for result in results]


async def test_prompts_share_their_fields(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    fields: dict[str, Any] = {"max_tokens": 4, "temperature": 0.5, "stop": "x", "seed": None}
    results = (await batch(client, prompts=["a", "b"], model="org/large", **fields))["results"]
    assert [result["text"] for result in results] == ["a", "b"]
    assert {request.model for request in gateway.requests} == {"org/large"}
    assert {request.params for request in gateway.requests} == {
        SamplingParams(max_tokens=4, temperature=0.5, stop=("x",))
    }


async def test_requests_bring_their_own_fields(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    items = [{"prompt": "a", "max_tokens": 1}, {"prompt": "b", "model": "org/large", "logprobs": 0}]
    results = (await batch(client, requests=items, prompts=None, temperature=None))["results"]
    assert [result["model"] for result in results] == ["small", "org/large"]
    assert [request.params.max_tokens for request in gateway.requests] == [1, 128]
    assert "logprobs" not in results[0]
    assert results[1]["logprobs"] == [
        {"token_id": 0, "token": "b", "logprob": -0.5, "top": [{"token_id": 99, "token": "é", "logprob": -9999.0}]}
    ]


async def test_an_outcome_is_the_answer_of_generate_with_its_index(
    client: httpx.AsyncClient, gateway: ScriptedGateway
) -> None:
    single = (await client.post("/generate", json={"prompt": "and bright"})).json()
    result = (await batch(client, prompts=["and bright"]))["results"][0]
    assert result == single | {"index": 0, "id": gateway.requests[1].id}


async def test_the_whole_call_has_usage_and_metrics(gateway: ScriptedGateway) -> None:
    instants = iter([10.0, 12.0])
    app = create_app(gateway, app_config(), clock=lambda: next(instants))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        body = await batch(client, prompts=["a b", "c", ""])
    assert body["usage"] == {
        "prompt_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens": 3,
        "total_tokens": 9,
    }
    assert body["metrics"] == {"elapsed_ms": 2000.0, "tokens_per_second": 1.5}


async def test_results_keep_the_order_of_the_items(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    def the_last_first(request: GenerationRequest) -> list[Step]:
        return [0.02 - 0.004 * int(prompt(request)), *echo(request)]

    gateway.script = the_last_first
    results = (await batch(client, prompts=["0", "1", "2", "3", "4"]))["results"]
    assert [(result["index"], result["text"]) for result in results] == [(i, str(i)) for i in range(5)]


async def test_a_bad_item_fails_alone(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    faults: dict[str, BaseException] = {
        "full": QueueFull("8 requests wait already; try again later", retry_after_s=1),
        "broken": RuntimeError("secret"),
        "cut": asyncio.CancelledError(),
    }

    def script(request: GenerationRequest) -> list[Step]:
        fault = faults.get(prompt(request))
        return echo(request) if fault is None else [chunk(["half"], None), fault]

    gateway.script = script
    odd = [3, None, {}, {"prompt": ""}, {"prompt": "a", "temprature": 1}, {"prompt": "a", "model": "huge"}]
    late = [{"prompt": "full"}, {"prompt": "broken"}, {"prompt": "cut"}]
    body = await batch(client, requests=[{"prompt": "a"}, *odd, *late, {"prompt": "b"}])
    invalid, ours = "invalid_request", "internal_error"
    refused = [invalid] * 5 + ["model_not_found", "queue_full", ours, ours]
    assert errors(body["results"]) == [None, *refused, None]
    assert [result["index"] for result in body["results"]] == list(range(11))
    assert body["usage"]["completion_tokens"] == 2
    assert sorted(error.code for error, _ in gateway.refusals) == sorted(refused)
    assert [model for _, model in gateway.refusals].count("small") == 3


async def test_a_bad_items_error_names_the_field_and_the_call(client: httpx.AsyncClient) -> None:
    answer = await client.post("/generate_batch", json={"prompts": [7]}, headers={"x-request-id": "mine"})
    message = "prompt should be a valid string"
    error = {"code": "invalid_request", "message": message, "param": "prompt", "request_id": "mine"}
    assert answer.json()["results"] == [{"index": 0, "error": error}]


async def test_one_call_does_not_fill_every_queue(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    gateway.plays(0.001, chunk(["a"]))
    results = (await batch(client, prompts=["hi"] * 50))["results"]
    assert gateway.most_running == 32
    assert gateway.completed == len(results) == 50
    assert len({result["id"] for result in results}) == 50


async def test_leaving_closes_every_generator_and_starts_no_other(gateway: ScriptedGateway) -> None:
    gateway.script = lambda request: echo(request) if prompt(request) == "quick" else [None]
    gateway.crowd = 32
    wire = Wire("/generate_batch", {"prompts": ["quick"] * 3 + ["slow"] * 40})
    served = asyncio.create_task(create_app(gateway, app_config())(wire.scope, wire.receive, wire.send))
    await gateway.crowded.wait()
    wire.leave.set()
    await served
    assert (gateway.running, gateway.completed, gateway.refusals) == (0, 3, [])
    assert len(gateway.closed) == len(gateway.requests) == 35
    assert wire.sent == []


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({}, "prompts", "exactly one of prompts and requests"),
        ({"prompts": None}, "prompts", "exactly one of prompts and requests"),
        ({"prompts": ["a"], "requests": [{"prompt": "a"}]}, "prompts", "exactly one of prompts and requests"),
        ({"prompts": []}, "prompts", "send 1 to 50 items"),
        ({"requests": []}, "requests", "send 1 to 50 items"),
        ({"prompts": ["a"] * 51}, "prompts", "51 items; send at most 50"),
        ({"prompts": "a"}, "prompts", "valid list"),
        ({"prompts": ["a"], "top_p": 2}, "top_p", "less than or equal to 1"),
        ({"prompts": ["a"], "max_tokens": 1, "min_tokens": 2}, "min_tokens", "above max_tokens 1"),
        ({"prompts": ["a"], "do_sample": True, "temperature": 0}, "do_sample", "temperature above 0"),
        ({"requests": [{"prompt": "a"}], "seed": 1}, "seed", "put it into each of the requests"),
        ({"prompts": ["a"], "prompt": "a"}, "prompt", "did you mean prompts?"),
    ],
)
async def test_what_the_items_share_is_judged_for_the_whole_call(
    client: httpx.AsyncClient, gateway: ScriptedGateway, body: dict[str, object], param: str, says: str
) -> None:
    answer = await client.post("/generate_batch", json=body)
    assert answer.status_code == 422
    assert told(answer)["param"] == param
    assert says in told(answer)["message"]
    assert gateway.requests == []
    assert len(gateway.refusals) == 1


async def test_a_shared_model_that_is_unknown_is_one_404(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    answer = await client.post("/generate_batch", json={"prompts": ["a", "b"], "model": "huge"})
    assert answer.status_code == 404
    assert told(answer)["code"] == "model_not_found"
    assert len(gateway.refusals) == 1
