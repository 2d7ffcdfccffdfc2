from __future__ import annotations

from typing import Any

import httpx
import pytest

from serve_app.core.events import Chunk, FinishReason, Logprobs, TokenEvent, TokenLogprob
from serve_app.core.requests import SamplingParams, TextPrompt

from .scripted import ScriptedEngine, ScriptedTelemetry, chunk, events_of


async def test_generate_answers_text_usage_and_metrics(
    client: httpx.AsyncClient, engine: ScriptedEngine, telemetry: ScriptedTelemetry
) -> None:
    answer = await client.post("/generate", json={"prompt": "and bright and"})
    assert answer.status_code == 200
    body = answer.json()
    assert body == {
        "id": engine.requests[0].id,
        "model": "small",
        "text": "andbrightand",
        "finish_reason": "stop",
        "usage": {
            "prompt_tokens": 3,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens": 3,
            "total_tokens": 6,
        },
        "metrics": {
            "ttft_ms": 50.0,
            "tpot_ms": 10.0,
            "queue_ms": 2.0,
            "tokens_generated": 3,
            "tokens_per_second": 42.86,
            "elapsed_ms": 70.0,
        },
    }
    assert engine.completed == 1
    assert telemetry.errors == []


async def test_an_absent_field_has_the_default_of_the_model(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await client.post("/generate", json={"prompt": "hi", "top_k": None})
    request = engine.requests[0]
    assert request.prompt == TextPrompt("hi")
    assert request.params == SamplingParams(max_tokens=128, temperature=0.2, top_p=0.9)
    assert request.timeout_s == pytest.approx(600, abs=1)


async def test_every_field_reaches_the_engine(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
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
    assert engine.requests[0].model == "org/large"
    assert engine.requests[0].params == SamplingParams(**fields, stop=("a", "b"), stop_token_ids=(7,))


async def test_stop_can_be_one_string(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await client.post("/generate", json={"prompt": "hi", "stop": "\n"})
    assert engine.requests[0].params.stop == ("\n",)


async def test_do_sample_false_is_greedy(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await client.post("/generate", json={"prompt": "hi", "do_sample": False, "temperature": 1.5})
    assert engine.requests[0].params.temperature == 0


async def test_logprobs_of_an_answer(client: httpx.AsyncClient) -> None:
    body = (await client.post("/generate", json={"prompt": "hi", "logprobs": 1})).json()
    top = {"token_id": 99, "token": "é", "logprob": -9999.0}
    assert body["logprobs"] == [{"token_id": 0, "token": "hi", "logprob": -0.5, "top": [top]}]


async def test_a_token_at_time_zero_has_no_rate(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.plays(Chunk((TokenEvent(1, "x", 0.0, FinishReason.LENGTH),), 1, 0.0))
    body = (await client.post("/generate", json={"prompt": "hi", "logprobs": 0})).json()
    assert body["metrics"]["tokens_per_second"] == 0
    assert body["metrics"]["tpot_ms"] is None
    assert body["finish_reason"] == "length"
    assert body["logprobs"] == []


async def test_a_chunk_without_tokens_is_ignored(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.plays(Chunk((), 3, 0.0), chunk(["a"]))
    assert (await client.post("/generate", json={"prompt": "hi"})).json()["text"] == "a"


async def test_an_infinite_logprob_is_sent_as_the_lowest_value(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    lost = Logprobs(TokenLogprob(1, "x", float("nan")), ())
    engine.plays(Chunk((TokenEvent(1, "x", 0.1, FinishReason.STOP, lost),), 1, 0.0))
    body = (await client.post("/generate", json={"prompt": "hi", "logprobs": 0})).json()
    assert body["logprobs"][0]["logprob"] == -9999.0


async def test_an_event_without_logprobs_has_null(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.plays(Chunk((TokenEvent(1, "x", 0.1, FinishReason.STOP),), 1, 0.0))
    text = (await client.post("/generate_stream", json={"prompt": "hi", "logprobs": 0})).text
    assert events_of(text)[0]["logprobs"] is None


async def test_a_whole_answer_waits_for_a_sleeping_model_for_warm_wait_s(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    await client.post("/generate", json={"prompt": "hi"})
    await client.post("/generate_batch", json={"prompts": ["hi"]})
    await client.post("/v1/completions", json={"prompt": "hi"})
    await client.post("/v1/chat/completions", json=chat)
    assert [request.wake_wait_s for request in engine.requests] == [30.0] * 4
