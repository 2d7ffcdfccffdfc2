"""The n likeliest of best_of answers to a completion."""

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

from .scripted import ScriptedGateway, frames, told

# Of each answer to a prompt, by number: the log probability of every token, and how many there are.
LIKELY = [(-0.6, 1), (-0.5, 4), (-0.9, 2), (-0.5, 2)]
RANKED = ["1111", "33", "0", "22"]


def by_number(request: GenerationRequest) -> Iterable[Chunk]:
    logprob, length = LIKELY[request.index]
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


async def completed(client: httpx.AsyncClient, gateway: ScriptedGateway, **fields: Any) -> dict[str, Any]:
    gateway.script = by_number
    answer = await client.post("/v1/completions", json={"prompt": "hi", **fields})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.parametrize("n", [1, 2, 3])
async def test_the_likeliest_by_the_token_are_told_and_all_are_counted(
    client: httpx.AsyncClient, gateway: ScriptedGateway, n: int
) -> None:
    answer = await completed(client, gateway, best_of=4, n=n, seed=5)
    assert [choice["text"] for choice in answer["choices"]] == RANKED[:n]
    assert [choice["index"] for choice in answer["choices"]] == list(range(n))
    assert [choice["logprobs"] for choice in answer["choices"]] == [None] * n
    assert answer["usage"]["completion_tokens"] == 1 + 4 + 2 + 2
    assert answer["usage"]["prompt_tokens"] == 3
    assert [request.index for request in gateway.requests] == [0, 1, 2, 3]
    assert len({request.group for request in gateway.requests}) == 1
    assert {request.params.logprobs for request in gateway.requests} == {0}


async def test_what_was_asked_of_logprobs_is_kept(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    (choice,) = (await completed(client, gateway, best_of=4, logprobs=2))["choices"]
    assert choice["logprobs"]["token_logprobs"] == [-0.5] * 4
    assert {request.params.logprobs for request in gateway.requests} == {2}


@pytest.mark.parametrize("fields", [{"best_of": 3, "n": 3}, {"best_of": 1}, {"n": 3}, {"best_of": None, "n": 2}])
async def test_where_there_is_nothing_to_choose_nothing_is_measured(
    client: httpx.AsyncClient, gateway: ScriptedGateway, fields: dict[str, Any]
) -> None:
    answer = await completed(client, gateway, **fields)
    assert [choice["text"] for choice in answer["choices"]] == ["0", "1111", "22"][: fields.get("n", 1)]
    assert {request.params.logprobs for request in gateway.requests} == {None}


async def test_each_prompt_has_its_own_best(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    answer = await completed(client, gateway, prompt=["a", "b"], best_of=4, n=2)
    assert [choice["text"] for choice in answer["choices"]] == RANKED[:2] * 2
    assert [request.prompt for request in gateway.requests] == [TextPrompt("a")] * 4 + [TextPrompt("b")] * 4
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (6, 18)


async def test_as_many_as_are_told_can_be_streamed(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    gateway.script = by_number
    body = {"prompt": "hi", "best_of": 2, "n": 2, "stream": True}
    *found, end = frames((await client.post("/v1/completions", json=body)).text)
    assert (len(found), end) == (1 + 4, "[DONE]")


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"best_of": 1, "n": 2}, "best_of", "below n 2; raise it"),
        ({"best_of": 2, "stream": True}, "best_of", "do not stream"),
        ({"best_of": 17}, "best_of", "less than or equal to 16"),
        ({"best_of": 0}, "best_of", "greater than or equal to 1"),
        ({"best_of": 16, "prompt": ["a"] * 4}, "prompt", "64 answers; ask for at most 50"),
    ],
)
async def test_what_cannot_be_is_refused_by_name(
    client: httpx.AsyncClient, gateway: ScriptedGateway, fields: dict[str, Any], param: str, says: str
) -> None:
    answer = await client.post("/v1/completions", json={"prompt": "hi", **fields})
    assert answer.status_code == 422
    assert (told(answer)["param"], says in told(answer)["message"]) == (param, True), told(answer)
    assert gateway.requests == []


async def test_a_chat_has_no_best_of(client: httpx.AsyncClient) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "best_of": 2}
    assert told(await client.post("/v1/chat/completions", json=body))["param"] == "best_of"


def tally(logprobs: Iterable[float]) -> CompletionState:
    made = CompletionState()
    for logprob in logprobs:
        made.count(TokenEvent(1, "x", 0.1, None, Logprobs(TokenLogprob(1, "x", logprob), ())))
    return made


@given(st.lists(st.lists(st.floats(-20, 0), min_size=1, max_size=5), min_size=1, max_size=8), st.integers(1, 8))
def test_nobody_left_out_is_likelier_than_one_who_is_told(answers: list[list[float]], count: int) -> None:
    kept = best([tally(logprobs) for logprobs in answers], count)
    means = [sum(logprobs) / len(logprobs) for logprobs in answers]
    assert len(set(kept)) == min(count, len(answers))
    assert [means[number] for number in kept] == sorted(means, reverse=True)[:count]


def test_an_impossible_token_does_not_hide_the_others() -> None:
    assert best([tally([float("-inf")]), tally([float("nan"), -1.0]), tally([-3.0])], 3) == [2, 1, 0]
