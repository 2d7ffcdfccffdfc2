"""Details of the prompt, and the stop reason, in OpenAI's answers."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from serve_app.core.events import Chunk, FinishReason, Logprobs, PromptDetails, TextToken, TokenEvent, TokenLogprob
from serve_app.core.requests import GenerationRequest

from .scripted import ScriptedEngine, assert_invalid, chunk, error_of, events_of
from .test_openai import both
from .toy import ToyEngine, toy

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
Native = tuple[httpx.AsyncClient, ToyEngine]

# Three tokens: the second one is as likely as another token, the third one has rank 4.
PROMPT = PromptDetails(
    (TextToken(1, "<s>", 0, 0), TextToken(20, "He", 0, 2), TextToken(30, "y", 2, 3)),
    "Hey",
    (
        Logprobs(TokenLogprob(20, "He", -0.7), (TokenLogprob(4, "She", -0.7), TokenLogprob(20, "He", -0.7)), 1),
        Logprobs(TokenLogprob(30, "y", -4.0), (TokenLogprob(5, "a", -0.1), TokenLogprob(6, "b", -3.0)), 4),
    ),
)


def with_details(request: GenerationRequest) -> list[Chunk]:
    """The details of the prompt that the request asks for."""
    params, prompt = request.params, PROMPT if request.prompt_details else PromptDetails()
    prompt = replace(prompt, logprobs=() if params.prompt_logprobs is None else PROMPT.logprobs)
    requested = request.prompt_details or params.prompt_logprobs is not None
    first = replace(chunk(["a"], None), prompt=prompt if requested else None)
    return [first, chunk(["b", "c"], start=1)]


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine(script=with_details)


@pytest.fixture
async def native() -> AsyncIterator[Native]:
    async with toy() as client_and_engine:
        yield client_and_engine


async def whole(client: httpx.AsyncClient, path: str, **fields: object) -> dict[str, Any]:
    given = {"prompt": "x"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "x"}]}
    answer = await client.post(path, json=given | fields)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def streamed(client: httpx.AsyncClient, path: str, **fields: object) -> list[dict[str, Any]]:
    given = {"prompt": "x"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "x"}]}
    *found, end = events_of((await client.post(path, json=given | fields | {"stream": True})).text)
    assert end == "[DONE]"
    return found


RANKED = [
    None,
    {
        "4": {"logprob": -0.7, "rank": 1, "decoded_token": "She"},
        "20": {"logprob": -0.7, "rank": 1, "decoded_token": "He"},
    },
    {
        "5": {"logprob": -0.1, "rank": 1, "decoded_token": "a"},
        "6": {"logprob": -3.0, "rank": 2, "decoded_token": "b"},
        "30": {"logprob": -4.0, "rank": 4, "decoded_token": "y"},
    },
]


async def test_prompt_logprobs_have_ids_and_ranks(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    """As in vLLM, a completion has them in the choice, a chat beside the choices."""
    (choice,) = (await whole(client, COMPLETIONS, prompt_logprobs=2))["choices"]
    assert choice["prompt_logprobs"] == RANKED
    body = await whole(client, CHAT, prompt_logprobs=2)
    assert body["prompt_logprobs"] == RANKED
    assert all(request.params.prompt_logprobs == 2 for request in engine.requests)
    assert not any(request.prompt_details for request in engine.requests)
    assert "prompt_token_ids" not in choice.keys() | body.keys()


async def test_prompt_logprobs_are_in_the_first_chunk_of_a_stream(client: httpx.AsyncClient) -> None:
    first, *others = await streamed(client, COMPLETIONS, prompt_logprobs=2)
    assert first["choices"][0]["prompt_logprobs"] == RANKED
    assert all("prompt_logprobs" not in event["choices"][0] for event in others)
    first, *others = await streamed(client, CHAT, prompt_logprobs=2)
    assert first["prompt_logprobs"] == RANKED
    assert all("prompt_logprobs" not in event for event in others)


@both
async def test_no_details_of_the_prompt_by_default(
    client: httpx.AsyncClient, engine: ScriptedEngine, path: str, body: dict[str, object]
) -> None:
    answer = await whole(client, path, echo=False) if path == COMPLETIONS else await whole(client, path)
    names = {"prompt_logprobs", "prompt_token_ids", "token_ids"}
    assert not names & (answer.keys() | answer["choices"][0].keys())
    assert engine.requests[0].params.prompt_logprobs is None
    assert not engine.requests[0].prompt_details


async def test_token_ids_of_prompt_and_answer(client: httpx.AsyncClient) -> None:
    (choice,) = (await whole(client, COMPLETIONS, return_token_ids=True))["choices"]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([1, 20, 30], [0, 1, 2])
    body = await whole(client, CHAT, return_token_ids=True)
    assert (body["prompt_token_ids"], body["choices"][0]["token_ids"]) == ([1, 20, 30], [0, 1, 2])


async def test_token_ids_of_a_stream(client: httpx.AsyncClient) -> None:
    found = await streamed(client, COMPLETIONS, return_token_ids=True, n=2)
    for number in range(2):
        first, *others = [event["choices"][0] for event in found if event["choices"][0]["index"] == number]
        assert first["prompt_token_ids"] == [1, 20, 30]
        assert [part["token_ids"] for part in (first, *others)] == [[0], [1], [2]]
        assert all("prompt_token_ids" not in part for part in others)
    first, *others = await streamed(client, CHAT, return_token_ids=True)
    assert first["prompt_token_ids"] == [1, 20, 30]
    assert [event["choices"][0]["token_ids"] for event in others] == [[0], [1], [2]]


async def test_an_echo_precedes_the_answer(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    (choice,) = (await whole(client, COMPLETIONS, echo=True))["choices"]
    assert (choice["text"], choice["logprobs"]) == ("Heyabc", None)
    assert engine.requests[0].prompt_details
    assert engine.requests[0].params.prompt_logprobs is None
    texts = [event["choices"][0]["text"] for event in await streamed(client, COMPLETIONS, echo=True)]
    assert texts == ["Heya", "b", "c"]


async def test_logprobs_of_an_echo(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    """The prompt has as many alternatives as the answer, whatever prompt_logprobs is."""
    (choice,) = (await whole(client, COMPLETIONS, echo=True, logprobs=1, prompt_logprobs=2))["choices"]
    assert engine.requests[0].params.prompt_logprobs == 2
    assert choice["prompt_logprobs"] == RANKED
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["<s>", "He", "y", "a", "b", "c"]
    assert logprobs["token_logprobs"] == [None, -0.7, -4.0, -0.5, -0.5, -0.5]
    assert logprobs["top_logprobs"][:3] == [None, {"She": -0.7, "He": -0.7}, {"a": -0.1, "y": -4.0}]
    assert logprobs["text_offset"] == [0, 0, 2, 3, 4, 5]
    first, *others = await streamed(client, COMPLETIONS, echo=True, logprobs=1)
    assert first["choices"][0]["logprobs"]["text_offset"] == [0, 0, 2, 3]
    assert [event["choices"][0]["logprobs"]["text_offset"] for event in others] == [[4], [5]]


async def test_several_answers_request_prompt_details_once(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    fields: dict[str, object] = {"n": 2, "echo": True, "logprobs": 0, "return_token_ids": True}
    body = await whole(client, COMPLETIONS, prompt=["x", "y"], **fields)
    assert [choice["text"] for choice in body["choices"]] == ["Heyabc"] * 4
    assert [choice["logprobs"]["token_logprobs"][:3] for choice in body["choices"]] == [[None, -0.7, -4.0]] * 4
    assert [choice["prompt_token_ids"] for choice in body["choices"]] == [[1, 20, 30]] * 4
    assert [request.params.prompt_logprobs for request in engine.requests] == [0, None, 0, None]


@both
@pytest.mark.parametrize("by", [None, "END", 7])
async def test_the_stop_reason_comes_with_the_end(
    client: httpx.AsyncClient, engine: ScriptedEngine, path: str, body: dict[str, object], by: str | int | None
) -> None:
    end = TokenEvent(2, "", 0.1, FinishReason.STOP, stopped_by=by)
    engine.plays(chunk(["a"], None), Chunk((end,), 3, 0.0))
    assert (await whole(client, path))["choices"][0]["stop_reason"] == by
    *others, last = [event["choices"][0] for event in await streamed(client, path)]
    assert last["stop_reason"] == by
    assert all("stop_reason" not in choice for choice in others)


@both
async def test_the_user_of_a_call_is_logged(
    client: httpx.AsyncClient,
    engine: ScriptedEngine,
    path: str,
    body: dict[str, object],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "serve_app"):
        await whole(client, path, user="me\n", n=2)
        await whole(client, path)
    lines = [record.getMessage() for record in caplog.records if record.name == "serve_app.api.openai.routes"]
    assert lines == [f"Request {engine.requests[0].group} to small is for user 'me\\n'."]


@both
@pytest.mark.parametrize(
    ("fields", "param", "expected"),
    [
        ({"user": "u" * 129}, "user", "at most 128"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "less than or equal to 20"),
        ({"prompt_logprobs": -1}, "prompt_logprobs", "greater than or equal to 0"),
        ({"return_token_ids": 1}, "return_token_ids", "boolean"),
        ({"echo": "yes"}, "echo", "echo"),
    ],
)
async def test_an_error_names_the_invalid_field(
    client: httpx.AsyncClient, path: str, body: dict[str, object], fields: dict[str, Any], param: str, expected: str
) -> None:
    answer = await client.post(path, json=body | fields)
    assert_invalid(answer)
    assert error_of(answer)["param"] == param
    assert expected in error_of(answer)["message"]


# With the native engine.


async def test_the_native_engine_echoes_text_and_token_ids(native: Native) -> None:
    client, _ = native
    for prompt in ("hello, you there", list(b"hello, you there")):
        body = await whole(client, COMPLETIONS, prompt=prompt, echo=True, logprobs=1, max_tokens=2)
        (choice,) = body["choices"]
        assert choice["text"] == "hello, you therehe"
        assert choice["logprobs"] == {
            "tokens": [*"hello, you therehe"],
            "token_logprobs": [None, *[0.0] * 17],
            "top_logprobs": [None, *({letter: 0.0} for letter in "ello, you therehe")],
            "text_offset": list(range(18)),
        }
        assert body["usage"]["completion_tokens"] == 2


async def test_a_score_as_evaluation_harnesses_compute_it(native: Native) -> None:
    """The log probability of a continuation: the sum over its tokens, without the one generated token."""
    client, _ = native
    context, continuation = list(b"Paris is in"), list(b" France")
    fields: dict[str, object] = {"echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    body = await whole(client, COMPLETIONS, prompt=[context + continuation] * 2, **fields)
    for choice in body["choices"]:
        scores = choice["logprobs"]["token_logprobs"][len(context) : -1]
        assert scores == [0.0] * len(continuation)
        assert all(score == max(top.values()) for score, top in zip(scores, tops(choice, context), strict=True))


def tops(choice: dict[str, Any], context: list[int]) -> list[dict[str, float]]:
    found: list[dict[str, float]] = choice["logprobs"]["top_logprobs"][len(context) : -1]
    return found


async def test_a_truncated_prompt_is_echoed_truncated(native: Native) -> None:
    client, _ = native
    fields: dict[str, object] = {"echo": True, "logprobs": 0, "truncate_prompt_tokens": 3, "return_token_ids": True}
    for prompt in ("abcdef", list(b"abcdef")):
        (choice,) = (await whole(client, COMPLETIONS, prompt=prompt, max_tokens=1, **fields))["choices"]
        assert choice["text"] == "defd"
        assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3]
        assert (choice["prompt_token_ids"], choice["token_ids"]) == (list(b"def"), list(b"d"))


@pytest.mark.parametrize("stream", [False, True])
async def test_several_answers_to_an_echoed_prompt(native: Native, stream: bool) -> None:
    """In a stream, each choice has the details of the prompt in its first chunk."""
    client, engine = native
    fields: dict[str, object] = {"prompt": "a" * 40, "n": 3, "echo": True, "logprobs": 0, "max_tokens": 2}
    choices = (
        [event["choices"][0] for event in await streamed(client, COMPLETIONS, **fields)]
        if stream
        else (await whole(client, COMPLETIONS, **fields))["choices"]
    )
    for number in range(3):
        parts = [choice for choice in choices if choice["index"] == number]
        assert "".join(part["text"] for part in parts) == "a" * 42
        assert [score for part in parts for score in part["logprobs"]["token_logprobs"]] == [None, *[0.0] * 41]
        assert [offset for part in parts for offset in part["logprobs"]["text_offset"]] == list(range(42))
    assert engine.native is not None
    assert engine.native.stats().cached_tokens == (0 if stream else 2 * 32)


async def test_prompt_details_of_a_chat_cover_the_template(native: Native) -> None:
    client, _ = native
    body = await whole(client, CHAT, prompt_logprobs=0, return_token_ids=True, max_tokens=1)
    ids = list(b"user: x")
    assert body["prompt_token_ids"] == ids
    assert body["prompt_logprobs"] == [
        None,
        *({str(token): {"logprob": 0.0, "rank": 1, "decoded_token": chr(token)}} for token in ids[1:]),
    ]


async def test_a_prompt_of_one_token_has_no_logprobs(native: Native) -> None:
    client, _ = native
    (choice,) = (await whole(client, COMPLETIONS, prompt="a", prompt_logprobs=3, max_tokens=1))["choices"]
    assert choice["prompt_logprobs"] == [None]
