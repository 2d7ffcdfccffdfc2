"""The demand for a model: what waits, what runs, and the tokens that are still needed."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from serve_app.core.events import Chunk, FinishReason, TokenEvent
from serve_app.core.queries import GetModelInfo
from serve_app.core.requests import ChatMessage, ChatPrompt, SamplingParams, TextPrompt, TokenPrompt
from serve_app.core.routing import prompt_tokens
from serve_app.core.scaling import Demand
from serve_app.errors import QueueFull
from serve_app.gateway.workload import Workload
from tests.gateway.scripted import ScriptedEngine, chunk, request

USUAL = 128


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def prompted(prompt: str, max_tokens: int | None = None, embed: bool = False) -> Any:
    params = SamplingParams(max_tokens=max_tokens)
    return replace(request(), prompt=TextPrompt(prompt), params=params, embed=embed)


def demand_of(stage: Workload) -> Demand:
    """The demand without its rates."""
    return replace(stage.demand(), prompt_rate=0.0, answer_rate=0.0)


async def consume(stage: Workload, wanted: Any) -> None:
    async for _ in stage.generate(wanted):
        pass


async def test_a_request_waits_until_its_first_token_and_counts_until_its_end() -> None:
    begin, end = asyncio.Event(), asyncio.Event()
    engine = ScriptedEngine(lambda _: [begin, chunk(), end, chunk("z", FinishReason.STOP)])
    stage = Workload(engine, lambda: None)
    running = asyncio.create_task(consume(stage, prompted("x" * 400, max_tokens=10)))
    await settle()
    assert demand_of(stage) == Demand(waiting=1, prompt_tokens=100, answer_tokens=10)
    begin.set()
    await settle()
    assert demand_of(stage) == Demand(running=1, answer_tokens=9)
    end.set()
    await running
    assert demand_of(stage) == Demand()


@pytest.mark.parametrize(
    ("wanted", "tokens"),
    [(prompted("x"), USUAL), (prompted("x", 1000), USUAL), (prompted("x", 7), 7), (prompted("x", embed=True), 0)],
    ids=["no limit", "higher limit", "lower limit", "embedding"],
)
async def test_an_answer_is_expected_to_have_the_usual_length_or_its_limit(wanted: Any, tokens: float) -> None:
    stage = Workload(ScriptedEngine(lambda _: [asyncio.Event()]), lambda: None)
    waiting = asyncio.create_task(consume(stage, wanted))
    await settle()
    assert stage.demand().answer_tokens == tokens
    waiting.cancel()


async def test_the_usual_length_and_the_computed_share_of_prompts_are_learned() -> None:
    """Answers of 10 tokens, and prompts of which 80 of 100 estimated tokens are cached."""
    event = TokenEvent(1, "a", 0.1)
    last = replace(event, finish_reason=FinishReason.STOP)
    answer = Chunk((event,) * 9, 100, 0.0, cached_tokens=80), Chunk((last,), 100, 0.0, cached_tokens=80)
    engine = ScriptedEngine(lambda _: answer)
    stage = Workload(engine, lambda: None)
    for _ in range(200):
        await consume(stage, prompted("x" * 400))
    engine.script = lambda _: [asyncio.Event()]
    waiting = asyncio.create_task(consume(stage, prompted("x" * 400)))
    await settle()
    assert stage.demand().answer_tokens == pytest.approx(10, rel=0.01)
    assert stage.demand().prompt_tokens == pytest.approx(20, rel=0.01)
    waiting.cancel()


async def test_rates_are_those_of_arrivals() -> None:
    now = [0.0]
    stage = Workload(ScriptedEngine(), lambda: None, clock=lambda: now[0])
    for second in range(200):
        now[0] = float(second)
        await consume(stage, prompted("x" * 400, max_tokens=50))
    assert stage.demand().answer_rate == pytest.approx(2, rel=0.2), "the answers had two tokens, which was learned"
    assert stage.demand().prompt_rate == pytest.approx(1, rel=0.3), "the prompts had one token, which was learned"
    now[0] += 600
    assert demand_of(stage) == stage.demand() == Demand()


@pytest.mark.parametrize("end", [QueueFull("full", retry_after_s=1), RuntimeError("bug")])
async def test_a_request_that_fails_leaves_no_demand(end: Exception) -> None:
    stage = Workload(ScriptedEngine(lambda _: [end]), lambda: None)
    with pytest.raises(type(end)):
        await consume(stage, request())
    assert demand_of(stage) == Demand()


async def test_a_client_that_leaves_takes_its_demand_along() -> None:
    stage = Workload(ScriptedEngine(lambda _: [asyncio.Event()]), lambda: None)
    waiting = asyncio.create_task(consume(stage, request()))
    await settle()
    assert stage.demand().waiting == 1
    waiting.cancel()
    await settle()
    assert demand_of(stage) == Demand()


async def test_a_query_counts_as_a_waiting_request_and_every_arrival_is_reported() -> None:
    arrivals: list[Demand] = []
    engine = ScriptedEngine(query_gate=asyncio.Event())
    stage = Workload(engine, lambda: arrivals.append(demand_of(stage)))
    query = asyncio.create_task(stage.query("m", GetModelInfo(), 1e9))
    await settle()
    assert demand_of(stage) == Demand(waiting=1)
    await consume(stage, prompted("xxxx", max_tokens=1))
    assert engine.query_gate is not None
    engine.query_gate.set()
    await query
    assert arrivals == [Demand(waiting=1), Demand(waiting=2, prompt_tokens=1, answer_tokens=1)]
    assert demand_of(stage) == Demand()


def test_the_length_of_a_prompt_is_estimated_without_a_tokenizer() -> None:
    chat = ChatPrompt((ChatMessage("user", "x" * 40),), tools=("y" * 20,))
    assert prompt_tokens(replace(request(), prompt=chat)) == pytest.approx(15, abs=1)
    assert prompt_tokens(replace(request(), prompt=TokenPrompt((1, 2, 3)))) == 3
