"""The graph in one piece: proxy, ingress, turnstile, engine and back, for everybody who is well."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from tests.graph.house import frames_of, idle, metrics, until

pytestmark = pytest.mark.ray

# The toy says its own prompt, a byte a token.
TEXT = "Grüße, 世界 🌍!"
SIZE = len(TEXT.encode())


async def test_a_stream_says_what_the_whole_answer_says(client: httpx.AsyncClient) -> None:
    body = {"model": "toy", "prompt": TEXT, "max_tokens": SIZE}
    whole = (await client.post("/generate", json=body)).json()
    async with client.stream("POST", "/generate_stream", json=body) as response:
        assert response.headers["content-type"] == "text/event-stream"
        frames = [frame async for frame in frames_of(response)]
    assert whole["text"] == frames[-1]["text"] == "".join(frame["token"] for frame in frames) == TEXT
    assert [frame["finished"] for frame in frames] == [False] * (SIZE - 1) + [True]
    assert frames[-1]["usage"] == whole["usage"]
    assert whole["usage"] == {
        "prompt_tokens": SIZE,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens": SIZE,
        "total_tokens": 2 * SIZE,
    }


async def test_the_first_token_comes_before_the_last_is_made(client: httpx.AsyncClient) -> None:
    body = {"model": "slow", "prompt": "abcdefgh", "max_tokens": 8}
    began = asyncio.get_running_loop().time()
    async with client.stream("POST", "/generate_stream", json=body) as response:
        times = [asyncio.get_running_loop().time() - began async for _ in frames_of(response)]
    assert len(times) == 8
    assert times[0] < times[-1] - 0.5, "eight steps of 100 ms lie between the first and the last"


async def test_many_at_once_get_their_own_answers(client: httpx.AsyncClient) -> None:
    async def ask(i: int) -> None:
        prompt = f"request {i} of many"
        tokens = len(prompt) * (1 + i % 3)
        answer = await client.post("/generate", json={"model": "toy", "prompt": prompt, "max_tokens": tokens})
        assert answer.json()["text"] == prompt * (1 + i % 3)

    await asyncio.gather(*(ask(i) for i in range(64)))


async def test_what_is_asked_of_a_prompt_comes_through(client: httpx.AsyncClient) -> None:
    """How it was told, and its embedding, which the metrics count."""
    asked = {"model": "toy", "prompt": "hello", "max_tokens": 2, "echo": True, "logprobs": 0, "user": "somebody"}
    (choice,) = (await client.post("/v1/completions", json=asked)).json()["choices"]
    assert choice["text"] == "hellohe"
    assert choice["logprobs"]["token_logprobs"] == [None, *[0.0] * 6]
    answer = (await client.post("/v1/embeddings", json={"model": "toy", "input": ["a" * 300, "b"]})).json()
    assert [one["embedding"] for one in answer["data"]] == [[0, 1, 0, 0], [0, 0, 1, 0]]
    assert answer["usage"] == {"prompt_tokens": 301, "total_tokens": 301}
    assert (await client.post("/v1/embeddings", json={"model": "slow", "input": "a"})).status_code == 404

    async def counted() -> bool:
        lines = (await client.get("/metrics")).text.splitlines()
        return any('outcome="embedded"' in line and float(line.rpartition(" ")[2]) > 0 for line in lines)

    await until(counted)
    await idle(client, "toy")


async def test_a_batch_has_one_outcome_for_each(client: httpx.AsyncClient) -> None:
    good = {"model": "toy", "prompt": "yes", "max_tokens": 3}
    requests = [good, {**good, "model": "nobody"}, {**good, "max_tokens": -1}, {**good, "prompt": "x" * 5000}, good]
    results = (await client.post("/generate_batch", json={"requests": requests})).json()["results"]
    assert [result.get("text") for result in results] == ["yes", None, None, None, "yes"]
    codes = [result["error"]["code"] for result in results[1:4]]
    assert codes == ["model_not_found", "invalid_request", "prompt_too_long"]


async def test_a_prompt_over_the_context_is_told_both_numbers(client: httpx.AsyncClient) -> None:
    for path in ("/generate", "/generate_stream"):
        answer = await client.post(path, json={"model": "toy", "prompt": "x" * 5000})
        assert answer.status_code == 422
        assert "5000 tokens" in answer.json()["error"]["message"]
        assert "2047" in answer.json()["error"]["message"]


async def test_counters_are_what_the_client_counts(client: httpx.AsyncClient) -> None:
    before = await idle(client, "toy")
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
        after = await metrics(client)
        return all(after[name, "toy"] - before.get((name, "toy"), 0) == number for name, number in expected.items())

    await until(counted, seconds=5)


async def test_errors_are_counted_by_kind(client: httpx.AsyncClient) -> None:
    before = (await metrics(client)).get(("errors_total", ""), 0)
    await client.post("/generate", json={"model": "nobody", "prompt": "x"})
    assert (await metrics(client))["errors_total", ""] == before + 1


async def test_many_enter_together(client: httpx.AsyncClient) -> None:
    """The mean number of rows of a step is what batching is for."""
    before = await idle(client, "slow")
    body = {"model": "slow", "prompt": "x", "max_tokens": 5}
    await asyncio.gather(*(client.post("/generate", json=body) for _ in range(32)))

    async def batched() -> bool:
        after = await metrics(client)
        steps = after["engine_steps_total", "slow"] - before["engine_steps_total", "slow"]
        return 5 <= steps <= 25 and after["running_sequences", "slow"] == 0

    await until(batched, seconds=5)
