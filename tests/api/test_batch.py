from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from serve_app.api.app import create_app
from serve_app.core.requests import GenerationRequest, SamplingParams, TextPrompt
from serve_app.errors import QueueFull

from .scripted import (
    Clock,
    Connection,
    ScriptedEngine,
    ScriptedTelemetry,
    Step,
    app_config,
    chunk,
    echo,
    error_of,
    serve,
)


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


async def test_prompts_have_the_common_fields(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    fields: dict[str, Any] = {"max_tokens": 4, "temperature": 0.5, "stop": "x", "seed": None}
    results = (await batch(client, prompts=["a", "b"], model="org/large", **fields))["results"]
    assert [result["text"] for result in results] == ["a", "b"]
    assert {request.model for request in engine.requests} == {"org/large"}
    assert {request.params for request in engine.requests} == {
        SamplingParams(max_tokens=4, temperature=0.5, stop=("x",))
    }


async def test_requests_have_fields_of_their_own(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    items = [{"prompt": "a", "max_tokens": 1}, {"prompt": "b", "model": "org/large", "logprobs": 0}]
    results = (await batch(client, requests=items, prompts=None, temperature=None))["results"]
    assert [result["model"] for result in results] == ["small", "org/large"]
    assert [request.params.max_tokens for request in engine.requests] == [1, 128]
    assert "logprobs" not in results[0]
    assert results[1]["logprobs"] == [
        {"token_id": 0, "token": "b", "logprob": -0.5, "top": [{"token_id": 99, "token": "é", "logprob": -9999.0}]}
    ]


async def test_a_result_is_the_answer_of_generate_with_an_index(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    single = (await client.post("/generate", json={"prompt": "and bright"})).json()
    result = (await batch(client, prompts=["and bright"]))["results"][0]
    assert result == single | {"index": 0, "id": engine.requests[1].id}


async def test_a_batch_has_usage_and_metrics(engine: ScriptedEngine, telemetry: ScriptedTelemetry) -> None:
    clock = Clock()

    def script(request: GenerationRequest) -> list[Step]:
        clock.now += 1
        return echo(request)

    engine.script = script
    app = create_app(engine, telemetry, app_config(), clock=clock)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        body = await batch(client, prompts=["a b", "c", ""])
    assert body["usage"] == {
        "prompt_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens": 3,
        "total_tokens": 9,
    }
    assert body["metrics"] == {"elapsed_ms": 2000.0, "tokens_per_second": 1.5}


async def test_results_are_in_the_order_of_the_items(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    def last_first(request: GenerationRequest) -> list[Step]:
        return [0.02 - 0.004 * int(prompt(request)), *echo(request)]

    engine.script = last_first
    results = (await batch(client, prompts=["0", "1", "2", "3", "4"]))["results"]
    assert [(result["index"], result["text"]) for result in results] == [(i, str(i)) for i in range(5)]


async def test_a_failing_item_does_not_affect_other_items(
    client: httpx.AsyncClient, engine: ScriptedEngine, telemetry: ScriptedTelemetry
) -> None:
    errors_of: dict[str, BaseException] = {
        "full": QueueFull("8 requests wait.", retry_after_s=1),
        "broken": RuntimeError("secret"),
    }

    def script(request: GenerationRequest) -> list[Step]:
        error = errors_of.get(prompt(request))
        return echo(request) if error is None else [chunk(["half"], None), error]

    engine.script = script
    wrong = [3, None, {}, {"prompt": ""}, {"prompt": "a", "temprature": 1}, {"prompt": "a", "model": "huge"}]
    late = [{"prompt": "full"}, {"prompt": "broken"}]
    body = await batch(client, requests=[{"prompt": "a"}, *wrong, *late, {"prompt": "b"}])
    refused = ["invalid_request"] * 5 + ["model_not_found", "queue_full", "internal_error"]
    assert errors(body["results"]) == [None, *refused, None]
    assert [result["index"] for result in body["results"]] == list(range(10))
    assert body["usage"]["completion_tokens"] == 2
    assert sorted(error.code for error, _ in telemetry.errors) == sorted(refused)
    assert [model for _, model in telemetry.errors].count("small") == 2


async def test_the_error_of_an_item_has_the_field_and_the_request_id(client: httpx.AsyncClient) -> None:
    answer = await client.post("/generate_batch", json={"prompts": [7]}, headers={"x-request-id": "mine"})
    message = "Field 'prompt' should be a valid string."
    error = {"code": "invalid_request", "message": message, "param": "prompt", "request_id": "mine"}
    assert answer.json()["results"] == [{"index": 0, "error": error}]


async def test_at_most_32_items_of_a_call_run_at_the_same_time(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    engine.plays(0.001, chunk(["a"]))
    results = (await batch(client, prompts=["hi"] * 50))["results"]
    assert engine.max_running == 32
    assert engine.completed == len(results) == 50
    assert len({result["id"] for result in results}) == 50


async def test_a_disconnect_cancels_running_items_and_starts_no_other(
    engine: ScriptedEngine, telemetry: ScriptedTelemetry
) -> None:
    engine.script = lambda request: echo(request) if prompt(request) == "quick" else [None]
    engine.awaited = 32
    connection = Connection("/generate_batch", {"prompts": ["quick"] * 3 + ["slow"] * 40})
    call = serve(engine, telemetry, connection)
    await engine.reached.wait()
    connection.disconnect.set()
    await call
    assert (engine.running, engine.completed, telemetry.errors) == (0, 3, [])
    assert len(engine.closed) == len(engine.requests) == 35
    assert connection.sent == []


@pytest.mark.parametrize(
    ("body", "param", "expected"),
    [
        ({}, "prompts", "Send either 'prompts' or 'requests'."),
        ({"prompts": None}, "prompts", "Send either 'prompts' or 'requests'."),
        ({"prompts": ["a"], "requests": [{"prompt": "a"}]}, "prompts", "Send either 'prompts' or 'requests'."),
        ({"prompts": []}, "prompts", "Send 1 to 50 items."),
        ({"requests": []}, "requests", "Send 1 to 50 items."),
        ({"prompts": ["a"] * 51}, "prompts", "51 items. Send at most 50"),
        ({"prompts": "a"}, "prompts", "valid list"),
        ({"prompts": ["a"], "top_p": 2}, "top_p", "less than or equal to 1"),
        ({"prompts": ["a"], "max_tokens": 1, "min_tokens": 2}, "min_tokens", "above max_tokens 1"),
        ({"prompts": ["a"], "do_sample": True, "temperature": 0}, "do_sample", "a temperature above 0"),
        ({"requests": [{"prompt": "a"}], "seed": 1}, "seed", "Put it into each of the requests."),
        ({"prompts": ["a"], "prompt": "a"}, "prompt", "Did you mean 'prompts'?"),
    ],
)
async def test_a_wrong_common_field_fails_the_whole_call(
    client: httpx.AsyncClient,
    engine: ScriptedEngine,
    telemetry: ScriptedTelemetry,
    body: dict[str, object],
    param: str,
    expected: str,
) -> None:
    answer = await client.post("/generate_batch", json=body)
    assert answer.status_code == 422
    assert error_of(answer)["param"] == param
    assert expected in error_of(answer)["message"]
    assert engine.requests == []
    assert len(telemetry.errors) == 1


async def test_an_unknown_common_model_is_one_404(
    client: httpx.AsyncClient, engine: ScriptedEngine, telemetry: ScriptedTelemetry
) -> None:
    answer = await client.post("/generate_batch", json={"prompts": ["a", "b"], "model": "huge"})
    assert answer.status_code == 404
    assert error_of(answer)["code"] == "model_not_found"
    assert len(telemetry.errors) == 1
