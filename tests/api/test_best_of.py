"""The n best of `best_of` answers to a completion."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import httpx
import pytest
from hypothesis import given, strategies as st

from serve_app.api.choices import best
from serve_app.api.completion import CompletionState
from serve_app.core.events import Chunk, FinishReason, Logprobs, TokenEvent, TokenLogprob
from serve_app.core.requests import GenerationRequest, TextPrompt

from .scripted import ScriptedEngine, assert_invalid, error_of, events_of

# For each answer to a prompt: the log probability of every token, and the number of tokens.
ANSWERS = [(-0.6, 1), (-0.5, 4), (-0.9, 2), (-0.5, 2)]
RANKED = ["1111", "33", "0", "22"]


def by_number(request: GenerationRequest) -> Iterable[Chunk]:
    logprob, length = ANSWERS[request.index]
    events = tuple(
        TokenEvent(
            at,
            str(request.index),
            0.1,
            FinishReason.LENGTH if at == length - 1 else None,
            None if request.params.logprobs is None else Logprobs(TokenLogprob(at, "t", logprob), ()),
        )
        for at in range(length)
    )
    return [Chunk(events, prompt_tokens=3, queue_s=0.0)]


async def completed(client: httpx.AsyncClient, engine: ScriptedEngine, **fields: Any) -> dict[str, Any]:
    engine.script = by_number
    answer = await client.post("/v1/completions", json={"prompt": "hi", **fields})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.parametrize("n", [1, 2, 3])
async def test_the_most_likely_answers_are_returned_and_all_are_counted(
    client: httpx.AsyncClient, engine: ScriptedEngine, n: int
) -> None:
    answer = await completed(client, engine, best_of=4, n=n, seed=5)
    assert [choice["text"] for choice in answer["choices"]] == RANKED[:n]
    assert [choice["index"] for choice in answer["choices"]] == list(range(n))
    assert [choice["logprobs"] for choice in answer["choices"]] == [None] * n
    assert answer["usage"]["completion_tokens"] == 1 + 4 + 2 + 2
    assert answer["usage"]["prompt_tokens"] == 3
    assert [request.index for request in engine.requests] == [0, 1, 2, 3]
    assert len({request.group for request in engine.requests}) == 1
    assert {request.params.logprobs for request in engine.requests} == {0}


async def test_best_of_keeps_the_requested_logprobs(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    (choice,) = (await completed(client, engine, best_of=4, logprobs=2))["choices"]
    assert choice["logprobs"]["token_logprobs"] == [-0.5] * 4
    assert {request.params.logprobs for request in engine.requests} == {2}


@pytest.mark.parametrize("fields", [{"best_of": 3, "n": 3}, {"best_of": 1}, {"n": 3}, {"best_of": None, "n": 2}])
async def test_without_a_choice_no_logprobs_are_requested(
    client: httpx.AsyncClient, engine: ScriptedEngine, fields: dict[str, Any]
) -> None:
    answer = await completed(client, engine, **fields)
    assert [choice["text"] for choice in answer["choices"]] == ["0", "1111", "22"][: fields.get("n", 1)]
    assert {request.params.logprobs for request in engine.requests} == {None}


async def test_each_prompt_has_its_own_best_answers(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    answer = await completed(client, engine, prompt=["a", "b"], best_of=4, n=2)
    assert [choice["text"] for choice in answer["choices"]] == RANKED[:2] * 2
    assert [request.prompt for request in engine.requests] == [TextPrompt("a")] * 4 + [TextPrompt("b")] * 4
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (6, 18)


async def test_best_of_equal_to_n_can_be_streamed(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = by_number
    body = {"prompt": "hi", "best_of": 2, "n": 2, "stream": True}
    *found, end = events_of((await client.post("/v1/completions", json=body)).text)
    assert (len(found), end) == (1 + 4, "[DONE]")


@pytest.mark.parametrize(
    ("fields", "param", "expected"),
    [
        ({"best_of": 1, "n": 2}, "best_of", "below n 2. Raise it"),
        ({"best_of": 2, "stream": True}, "best_of", "Do not stream"),
        ({"best_of": 17}, "best_of", "less than or equal to 16"),
        ({"best_of": 0}, "best_of", "greater than or equal to 1"),
        ({"best_of": 16, "prompt": ["a"] * 4}, "prompt", "64 answers. Ask for at most 50"),
    ],
)
async def test_an_error_names_the_invalid_field(
    client: httpx.AsyncClient, engine: ScriptedEngine, fields: dict[str, Any], param: str, expected: str
) -> None:
    answer = await client.post("/v1/completions", json={"prompt": "hi", **fields})
    assert_invalid(answer)
    assert (error_of(answer)["param"], expected in error_of(answer)["message"]) == (param, True), error_of(answer)
    assert engine.requests == []


async def test_a_chat_refuses_best_of(client: httpx.AsyncClient) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "best_of": 2}
    assert error_of(await client.post("/v1/chat/completions", json=body))["param"] == "best_of"


def state(logprobs: Iterable[float]) -> CompletionState:
    made = CompletionState()
    for logprob in logprobs:
        made.add_event(TokenEvent(1, "x", 0.1, None, Logprobs(TokenLogprob(1, "x", logprob), ())))
    return made


@given(st.lists(st.lists(st.floats(-20, 0), min_size=1, max_size=5), min_size=1, max_size=8), st.integers(1, 8))
def test_no_other_answer_is_more_likely_than_a_best_one(answers: list[list[float]], count: int) -> None:
    kept = best([state(logprobs) for logprobs in answers], count)
    means = [sum(logprobs) / len(logprobs) for logprobs in answers]
    assert len(set(kept)) == min(count, len(answers))
    assert [means[number] for number in kept] == sorted(means, reverse=True)[:count]


def test_an_infinite_logprob_counts_as_the_lowest_value() -> None:
    assert best([state([float("-inf")]), state([float("nan"), -1.0]), state([-3.0])], 3) == [2, 1, 0]
