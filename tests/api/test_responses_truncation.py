"""`truncation: auto` leaves out the oldest turns of a conversation that is too long for the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import httpx
import pytest

from serve_app.core.events import TextToken
from serve_app.core.queries import A, GetModelInfo, ModelInfo, Query, Tokenize
from serve_app.core.requests import ChatPrompt

from .scripted import ScriptedEngine
from .toy import toy

PATH = "/v1/responses"
CONTEXT = 100


@dataclass
class CountingEngine(ScriptedEngine):
    """A token is a character of a message."""

    async def query(self, model: str, query: Query[A], deadline: float) -> A:
        self.queries.append((model, query))
        if isinstance(query, Tokenize):
            assert isinstance(query.prompt, ChatPrompt)
            return cast(A, (TextToken(0, "x", 0, 1),) * len("".join(one.content for one in query.prompt.messages)))
        assert isinstance(query, GetModelInfo)
        return cast(A, ModelInfo(CONTEXT, 300, frozenset()))


@pytest.fixture
def engine() -> CountingEngine:
    return CountingEngine()


def turn(name: str, size: int = 10) -> list[dict[str, Any]]:
    """A question and its answer, `size` characters each."""
    return [{"role": "user", "content": name * size}, {"role": "assistant", "content": name.upper() * size}]


async def read(client: httpx.AsyncClient, engine: CountingEngine, **fields: Any) -> list[str]:
    """The first character of each message that the model reads."""
    answer = await client.post(PATH, json={"truncation": "auto"} | fields)
    assert answer.status_code == 200, answer.text
    prompt = engine.requests[-1].prompt
    assert isinstance(prompt, ChatPrompt)
    return [one.content[0] for one in prompt.messages]


SIX_TURNS = [item for name in "abcdef" for item in turn(name)]
LAST = {"role": "user", "content": "z" * 10}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        # 75 tokens are for the prompt, a quarter of the context for the answer.
        ({"input": [*turn("a"), LAST]}, "aAz"),
        ({"input": [*turn("a"), *turn("b"), *turn("c"), LAST]}, "aAbBcCz"),
        ({"input": [*SIX_TURNS, LAST]}, "dDeEfFz"),
        # The answer gets what it may have, but at most half of the context.
        ({"input": [*SIX_TURNS, LAST], "max_output_tokens": 45}, "eEfFz"),
        ({"input": [*SIX_TURNS, LAST], "max_output_tokens": 99}, "eEfFz"),
        ({"input": [*SIX_TURNS, LAST], "max_output_tokens": 5}, "cCdDeEfFz"),
        # System messages and the last turn are kept.
        ({"input": [*SIX_TURNS, LAST], "instructions": "i" * 20}, "ieEfFz"),
        ({"input": [{"role": "developer", "content": "i" * 20}, *SIX_TURNS, LAST]}, "ieEfFz"),
        ({"input": [*SIX_TURNS, {"role": "user", "content": "y" * 200}]}, "y"),
        ({"input": "y" * 200}, "y"),
        ({"input": [*SIX_TURNS, LAST], "truncation": "disabled"}, "aAbBcCdDeEfFz"),
    ],
)
async def test_the_oldest_turns_are_left_out(
    client: httpx.AsyncClient, engine: CountingEngine, fields: dict[str, Any], expected: str
) -> None:
    assert await read(client, engine, **fields) == list(expected)


async def test_a_call_goes_with_its_output(client: httpx.AsyncClient, engine: CountingEngine) -> None:
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "c", "output": "r" * 60}
    question = {"role": "user", "content": "q" * 10}
    assert await read(client, engine, input=[question, call, result, *turn("a"), LAST]) == ["a", "A", "z"]


async def test_the_whole_conversation_is_stored(client: httpx.AsyncClient, engine: CountingEngine) -> None:
    answer = (await client.post(PATH, json={"truncation": "auto", "input": [*SIX_TURNS, LAST]})).json()
    assert answer["truncation"] == "auto"
    listed = (await client.get(f"{PATH}/{answer['id']}/input_items?limit=100")).json()["data"]
    assert len(listed) == 13


async def test_a_conversation_that_fits_costs_one_query(client: httpx.AsyncClient, engine: CountingEngine) -> None:
    for _ in range(2):
        await read(client, engine, input="a")
    assert [type(query) for _, query in engine.queries] == [GetModelInfo, Tokenize, Tokenize]


async def test_a_stream_reads_the_same(client: httpx.AsyncClient, engine: CountingEngine) -> None:
    assert await read(client, engine, input=[*SIX_TURNS, LAST], stream=True) == list("dDeEfFz")


async def test_a_long_conversation_fits_the_toy_model() -> None:
    """Its context is 64 tokens. A token is a byte of the roles and the texts: 39 for a turn, and 7 for the last one."""
    async with toy() as (client, engine):
        body = {"input": [*SIX_TURNS, {"role": "user", "content": "z"}], "max_output_tokens": 2}
        refused = await client.post(PATH, json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
        answer = await client.post(PATH, json=body | {"truncation": "auto"})
        assert (answer.status_code, answer.json()["usage"]["input_tokens"]) == (200, 46)
        prompt = engine.requests[-1].prompt
        assert isinstance(prompt, ChatPrompt)
        assert [one.content[0] for one in prompt.messages] == ["f", "F", "z"]
