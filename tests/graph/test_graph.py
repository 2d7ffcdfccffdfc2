"""Requests through proxy, ingress, model replica and back when nothing fails."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from tests.graph.service import metric_totals, stream_events, wait_until, wait_until_idle

pytestmark = pytest.mark.ray

# The toy model repeats its prompt, one byte per token.
TEXT = "Grüße, 世界 🌍!"
SIZE = len(TEXT.encode())


async def test_a_stream_has_the_text_of_the_whole_answer(client: httpx.AsyncClient) -> None:
    body = {"model": "toy", "prompt": TEXT, "max_tokens": SIZE}
    whole = (await client.post("/generate", json=body)).json()
    async with client.stream("POST", "/generate_stream", json=body) as response:
        assert response.headers["content-type"] == "text/event-stream"
        events = [event async for event in stream_events(response)]
    assert whole["text"] == events[-1]["text"] == "".join(event["token"] for event in events) == TEXT
    assert [event["finished"] for event in events] == [False] * (SIZE - 1) + [True]
    assert events[-1]["usage"] == whole["usage"]
    assert whole["usage"] == {
        "prompt_tokens": SIZE,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens": SIZE,
        "total_tokens": 2 * SIZE,
    }


async def test_the_first_token_arrives_before_the_last_is_computed(client: httpx.AsyncClient) -> None:
    body = {"model": "slow", "prompt": "abcdefgh", "max_tokens": 8}
    began = asyncio.get_running_loop().time()
    async with client.stream("POST", "/generate_stream", json=body) as response:
        times = [asyncio.get_running_loop().time() - began async for _ in stream_events(response)]
    assert len(times) == 8
    assert times[0] < times[-1] - 0.5, "eight steps of 100 ms lie between the first and the last"


async def test_64_concurrent_requests_get_their_own_answers(client: httpx.AsyncClient) -> None:
    async def send(i: int) -> None:
        prompt = f"request {i} of many"
        tokens = len(prompt) * (1 + i % 3)
        answer = await client.post("/generate", json={"model": "toy", "prompt": prompt, "max_tokens": tokens})
        assert answer.json()["text"] == prompt * (1 + i % 3)

    await asyncio.gather(*(send(i) for i in range(64)))


async def test_only_a_request_beside_others_waits_for_a_batch(client: httpx.AsyncClient) -> None:
    """The model `victim` has a `batch_wait_timeout_s` of 0.5 s."""

    async def queue_ms(tokens: int, after_s: float = 0) -> float:
        await asyncio.sleep(after_s)
        answer = await client.post("/generate", json={"model": "victim", "prompt": "abc", "max_tokens": tokens})
        return float(answer.json()["metrics"]["queue_ms"])

    assert await queue_ms(1) < 400
    first, *others = await asyncio.gather(queue_ms(40), *(queue_ms(1, after_s=0.3) for _ in range(3)))
    assert first < 400
    assert all(wait >= 490 for wait in others), others


async def test_prompt_logprobs_and_embeddings_arrive_and_are_counted(client: httpx.AsyncClient) -> None:
    body = {"model": "toy", "prompt": "hello", "max_tokens": 2, "echo": True, "logprobs": 0, "user": "somebody"}
    (choice,) = (await client.post("/v1/completions", json=body)).json()["choices"]
    assert choice["text"] == "hellohe"
    assert choice["logprobs"]["token_logprobs"] == [None, *[0.0] * 6]
    answer = (await client.post("/v1/embeddings", json={"model": "toy", "input": ["a" * 300, "b"]})).json()
    assert [one["embedding"] for one in answer["data"]] == [[0, 1, 0, 0], [0, 0, 1, 0]]
    assert answer["usage"] == {"prompt_tokens": 301, "total_tokens": 301}
    assert (await client.post("/v1/embeddings", json={"model": "slow", "input": "a"})).status_code == 404

    async def counted() -> bool:
        lines = (await client.get("/metrics")).text.splitlines()
        return any('outcome="embedded"' in line and float(line.rpartition(" ")[2]) > 0 for line in lines)

    await wait_until(counted)


async def test_a_batch_has_one_outcome_per_item(client: httpx.AsyncClient) -> None:
    good = {"model": "toy", "prompt": "yes", "max_tokens": 3}
    requests = [good, {**good, "model": "unknown"}, {**good, "max_tokens": -1}, {**good, "prompt": "x" * 5000}, good]
    results = (await client.post("/generate_batch", json={"requests": requests})).json()["results"]
    assert [result.get("text") for result in results] == ["yes", None, None, None, "yes"]
    codes = [result["error"]["code"] for result in results[1:4]]
    assert codes == ["model_not_found", "invalid_request", "prompt_too_long"]


async def test_the_error_of_a_long_prompt_states_its_length_and_the_limit(client: httpx.AsyncClient) -> None:
    for path in ("/generate", "/generate_stream"):
        answer = await client.post(path, json={"model": "toy", "prompt": "x" * 5000})
        assert answer.status_code == 422
        assert "5000 tokens" in answer.json()["error"]["message"]
        assert "4095" in answer.json()["error"]["message"]


async def test_counters_match_the_clients_count(client: httpx.AsyncClient) -> None:
    before = await wait_until_idle(client, "toy")
    requests, tokens = 10, 7
    body = {"model": "toy", "prompt": "count", "max_tokens": tokens}
    await asyncio.gather(*(client.post("/generate", json=body) for _ in range(requests)))
    expected = {
        "requests_total": requests,
        "generated_tokens_total": requests * tokens,
        "prompt_tokens_total": requests * len("count"),
        "engine_generated_tokens_total": requests * tokens,
        "time_to_first_token_seconds_count": requests,
        "time_per_output_token_seconds_count": requests,
        "queue_seconds_count": requests,
        "request_seconds_count": requests,
        "active_requests": 0,
        "running_sequences": 0,
        "queue_depth": 0,
    }

    async def counted() -> bool:
        after = await metric_totals(client)
        return all(after[name, "toy"] - before.get((name, "toy"), 0) == number for name, number in expected.items())

    await wait_until(counted, seconds=5)


async def test_errors_are_counted_by_code(client: httpx.AsyncClient) -> None:
    before = (await metric_totals(client)).get(("errors_total", ""), 0)
    await client.post("/generate", json={"model": "unknown", "prompt": "x"})
    assert (await metric_totals(client))["errors_total", ""] == before + 1


async def test_32_concurrent_requests_share_the_steps_of_the_engine(client: httpx.AsyncClient) -> None:
    before = await wait_until_idle(client, "slow")
    body = {"model": "slow", "prompt": "x", "max_tokens": 5}
    await asyncio.gather(*(client.post("/generate", json=body) for _ in range(32)))

    async def batched() -> bool:
        after = await metric_totals(client)
        steps = after["engine_steps_total", "slow"] - before["engine_steps_total", "slow"]
        return 5 <= steps <= 25 and after["running_sequences", "slow"] == 0

    await wait_until(batched, seconds=5)
