from __future__ import annotations

from typing import Any

import httpx
import pytest

from serve_app.errors import PromptTooLong, QueueFull
from serve_app.types import Chunk, FinishReason, SamplingParams, TextPrompt, TokenEvent

from .scripted import ScriptedGateway, chunk


async def test_generate_answers_text_usage_and_metrics(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    answer = await client.post("/generate", json={"prompt": "and bright and"})
    assert answer.status_code == 200
    body = answer.json()
    assert body == {
        "id": gateway.requests[0].id,
        "model": "small",
        "text": "andbrightand",
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6},
        "metrics": {
            "ttft_ms": 50.0,
            "tpot_ms": 10.0,
            "queue_ms": 2.0,
            "tokens_generated": 3,
            "tokens_per_second": 42.86,
            "elapsed_ms": 70.0,
        },
    }
    assert gateway.completed == 1
    assert gateway.refusals == []


async def test_what_is_absent_comes_from_the_model(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    await client.post("/generate", json={"prompt": "hi", "top_k": None})
    request = gateway.requests[0]
    assert request.prompt == TextPrompt("hi")
    assert request.params == SamplingParams(max_tokens=128, temperature=0.2, top_p=0.9)
    assert request.timeout_s == 600


async def test_every_field_arrives(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    fields: dict[str, Any] = {
        "max_tokens": 5,
        "min_tokens": 2,
        "temperature": 1,
        "top_p": 0.5,
        "top_k": 4,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "presence_penalty": -2,
        "frequency_penalty": 2,
        "seed": 2**63 - 1,
        "ignore_eos": True,
        "logprobs": 0,
    }
    lists = {"stop": ["a", "b"], "stop_token_ids": [7]}
    body = {"prompt": "hi", "model": "org/large", "do_sample": True, **fields, **lists}
    assert (await client.post("/generate", json=body)).status_code == 200
    assert gateway.requests[0].model == "org/large"
    assert gateway.requests[0].params == SamplingParams(**fields, stop=("a", "b"), stop_token_ids=(7,))


async def test_one_stop_string_needs_no_list(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    await client.post("/generate", json={"prompt": "hi", "stop": "\n"})
    assert gateway.requests[0].params.stop == ("\n",)


async def test_do_sample_false_is_greedy(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    await client.post("/generate", json={"prompt": "hi", "do_sample": False, "temperature": 1.5})
    assert gateway.requests[0].params.temperature == 0


async def test_logprobs_when_asked(client: httpx.AsyncClient) -> None:
    body = (await client.post("/generate", json={"prompt": "hi", "logprobs": 1})).json()
    top = {"token_id": 99, "token": "é", "logprob": -9999.0}
    assert body["logprobs"] == [{"token_id": 0, "token": "hi", "logprob": -0.5, "top": [top]}]


async def test_a_token_at_time_zero_has_no_rate(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    gateway.plays(Chunk((TokenEvent(1, "x", 0.0, FinishReason.LENGTH),), 1, 0.0))
    body = (await client.post("/generate", json={"prompt": "hi", "logprobs": 0})).json()
    assert body["metrics"]["tokens_per_second"] == 0
    assert body["metrics"]["tpot_ms"] is None
    assert body["finish_reason"] == "length"
    assert body["logprobs"] == []


async def test_an_empty_chunk_says_nothing(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    gateway.plays(Chunk((), 3, 0.0), chunk(["a"]))
    assert (await client.post("/generate", json={"prompt": "hi"})).json()["text"] == "a"


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"prompt": ""}, "prompt", "at least 1 character"),
        ({"prompt": None}, "prompt", "valid string"),
        ({"prompt": 3}, "prompt", "valid string"),
        ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({"temperature": "1"}, "temperature", "valid number"),
        ({"temperature": True}, "temperature", "valid number"),
        ({"temperature": 10**400}, "temperature", "number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_k": -1}, "top_k", "greater than or equal to 0"),
        ({"top_k": 1.0}, "top_k", "valid integer"),
        ({"min_p": 2}, "min_p", "less than or equal to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
        ({"presence_penalty": 3}, "presence_penalty", "less than or equal to 2"),
        ({"frequency_penalty": -3}, "frequency_penalty", "greater than or equal to -2"),
        ({"seed": 2**63}, "seed", "less than or equal"),
        ({"seed": -1}, "seed", "greater than or equal"),
        ({"stop": {}}, "stop", "a string or a list of strings"),
        ({"stop": [""]}, "stop[0]", "at least 1 character"),
        ({"stop": ["x" * 257]}, "stop[0]", "at most 256"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"stop_token_ids": [1] * 65}, "stop_token_ids", "at most 64"),
        ({"stop_token_ids": ["1"]}, "stop_token_ids[0]", "valid integer"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens", "above max_tokens 3"),
        ({"do_sample": True, "temperature": 0}, "do_sample", "temperature above 0"),
        ({"do_sample": True, "model": "org/large"}, "do_sample", "temperature above 0"),
        ({"do_sample": 1}, "do_sample", "valid boolean"),
        ({"temprature": 1}, "temprature", "did you mean temperature?"),
        ({"xyzzy": 1}, "xyzzy", "the fields are temperature, top_p"),
        ({"include_text": True}, "include_text", "not a field here"),
        ({"top_p": 2, "top_k": -1}, "top_p", "(and 1 more fault)"),
        ({"top_p": 2, "top_k": -1, "a": 1}, "top_p", "(and 2 more faults)"),
    ],
)
async def test_a_wrong_field_is_named(
    client: httpx.AsyncClient, gateway: ScriptedGateway, fields: dict[str, object], param: str, says: str
) -> None:
    answer = await client.post("/generate", json={"prompt": "hi", **fields})
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert error["code"] == "invalid_request"
    assert error["param"] == param
    assert says in error["message"]
    assert error["message"].startswith(param.split("[")[0])
    assert error["request_id"] == answer.headers["x-request-id"]
    assert len(gateway.refusals) == 1
    assert gateway.requests == []


async def test_a_missing_prompt(client: httpx.AsyncClient) -> None:
    error = (await client.post("/generate", json={})).json()["error"]
    assert (error["param"], error["message"]) == ("prompt", "prompt is required")


async def test_an_unknown_model_lists_the_known_ones(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    answer = await client.post("/generate", json={"prompt": "hi", "model": "huge"})
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "small, org/large" in error["message"]
    assert [model for _, model in gateway.refusals] == [None]


@pytest.mark.parametrize(("retry_s", "header"), [(None, None), (0.2, "1"), (2.1, "3")])
@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/v1/completions"])
async def test_the_gateways_refusal_keeps_its_status(
    client: httpx.AsyncClient, gateway: ScriptedGateway, path: str, retry_s: float | None, header: str | None
) -> None:
    error = QueueFull("8 requests wait already; try again later", retry_after_s=retry_s)
    gateway.plays(error)
    answer = await client.post(path, json={"prompt": "hi"} | ({"stream": True} if "v1" in path else {}))
    assert answer.status_code == 429
    assert answer.headers.get("retry-after") == header
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["error"]["code"] == "queue_full"
    assert gateway.refusals == [(error, "small")]


async def test_a_late_error_is_still_a_status_without_streaming(
    client: httpx.AsyncClient, gateway: ScriptedGateway
) -> None:
    gateway.plays(chunk(["a"], None), PromptTooLong("no", param="prompt"))
    answer = await client.post("/generate", json={"prompt": "hi"})
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == "prompt"
