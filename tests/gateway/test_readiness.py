"""A sleeping model is woken once and waited for; a model that cannot serve refuses requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from serve_app.core.queries import GetModelInfo, ModelState, ModelStatus
from serve_app.errors import DeadlineExceeded, NotReady, QueueFull
from serve_app.gateway.readiness import Readiness
from tests.gateway.scripted import ScriptedEngine, model, request


class Sleeper:
    """A model in some state, and the seconds of its wake-ups."""

    def __init__(self, min_replicas: int = 0, held: int = 3, target: float | None = None) -> None:
        self.engine = ScriptedEngine(query_gate=asyncio.Event())
        self.wakes: list[float] = []
        self.stage = Readiness(self.engine, model(min_replicas, target=target), held, self.wakes.append)

    def is_now(self, state: ModelState, detail: str = "") -> None:
        self.stage.update(ModelStatus("m", state, detail))

    async def answer(self, **fields: Any) -> list[str]:
        return [event.text async for one in self.stage.generate(request(**fields)) for event in one.events]


@asynccontextmanager
async def sleeper(min_replicas: int = 0, held: int = 3, target: float | None = None) -> AsyncIterator[Sleeper]:
    made = Sleeper(min_replicas, held, target)
    yield made
    made.stage.stop()


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_ready_model_answers() -> None:
    async with sleeper() as m:
        m.is_now(ModelState.READY)
        assert await m.answer() == ["a", "z"]
        assert m.engine.queries == []


async def test_requests_wait_for_the_replicas_that_the_work_needs_and_no_query_is_sent() -> None:
    """A query would wait at Ray Serve, which then starts one replica whatever the work is."""
    async with sleeper() as m:
        m.is_now(ModelState.ASLEEP)
        waiting = [asyncio.create_task(m.answer()) for _ in range(3)]
        await settle()
        m.is_now(ModelState.ASLEEP)
        assert m.stage.holds
        m.is_now(ModelState.LOADING, "loading weights")
        await settle()
        assert (m.engine.queries, m.engine.requests) == ([], [])
        m.is_now(ModelState.READY)
        assert await asyncio.gather(*waiting) == [["a", "z"]] * 3
        assert not m.stage.holds
        assert len(m.wakes) == 1


async def test_a_model_that_was_asked_for_is_woken_although_the_request_has_left() -> None:
    """Otherwise a model whose start takes longer than its clients wait would never be started."""
    async with sleeper() as m:
        m.is_now(ModelState.ASLEEP)
        waiting = asyncio.create_task(m.answer())
        await settle()
        waiting.cancel()
        await settle()
        m.is_now(ModelState.ASLEEP)
        assert (m.stage.holds, m.stage.wakes) == (False, True)
        m.is_now(ModelState.READY)
        assert not m.stage.wakes
        assert len(m.wakes) == 1


async def test_requests_for_a_sleeping_model_that_ray_scales_wake_it_with_one_query_and_are_answered() -> None:
    async with sleeper(target=1) as m:
        m.is_now(ModelState.ASLEEP)
        waiting = [asyncio.create_task(m.answer()) for _ in range(3)]
        await settle()
        assert [type(query) for query in m.engine.queries] == [GetModelInfo]
        assert m.engine.requests == []
        m.is_now(ModelState.LOADING, "loading weights")
        await settle()
        assert m.stage.health("m").detail == "loading weights"
        assert m.engine.query_gate is not None
        m.engine.query_gate.set()
        assert await asyncio.gather(*waiting) == [["a", "z"]] * 3
        assert m.stage.health("m").state is ModelState.READY
        assert len(m.wakes) == 1


async def test_the_registry_may_know_first_that_the_model_is_ready() -> None:
    async with sleeper() as m:
        m.is_now(ModelState.ASLEEP)
        waiting = asyncio.create_task(m.answer())
        await settle()
        m.is_now(ModelState.READY)
        assert await waiting == ["a", "z"]


async def test_no_more_requests_are_held_than_the_model_takes() -> None:
    async with sleeper(held=1) as m:
        m.is_now(ModelState.ASLEEP)
        first = asyncio.create_task(m.answer())
        await settle()
        with pytest.raises(QueueFull, match="wait already"):
            await m.answer()
        m.is_now(ModelState.READY)
        assert await first == ["a", "z"]


@pytest.mark.parametrize("state", [ModelState.LOADING, ModelState.FAILED])
async def test_a_model_that_should_be_up_refuses_until_it_is(state: ModelState) -> None:
    async with sleeper(min_replicas=1) as m:
        m.is_now(state, "loading weights")
        with pytest.raises(NotReady) as refused:
            await m.answer()
        assert (refused.value.retry_after_s or 0) >= 1


async def test_a_sleeper_that_fails_to_load_refuses_those_that_wait() -> None:
    async with sleeper() as m:
        m.is_now(ModelState.ASLEEP)
        waiting = asyncio.create_task(m.answer())
        await settle()
        m.is_now(ModelState.FAILED, "no such file")
        with pytest.raises(NotReady, match="cannot be loaded"):
            await waiting


async def test_a_whole_call_waits_for_its_wake_time_and_is_told_how_long_the_rest_takes() -> None:
    async with sleeper() as m:
        m.is_now(ModelState.ASLEEP)
        began = time.monotonic()
        with pytest.raises(NotReady) as refused:
            await m.answer(wake_wait_s=0.05)
        assert 0.04 < time.monotonic() - began < 1
        assert 25 < (refused.value.retry_after_s or 0) <= 30, "the usual start takes 30 s until one was measured"


@pytest.mark.slow
async def test_a_whole_call_goes_on_waiting_when_the_start_is_nearly_over() -> None:
    async with sleeper() as m:
        m.stage._usual_start_s = 0.1
        m.is_now(ModelState.ASLEEP)
        waiting = asyncio.create_task(m.answer(wake_wait_s=1.2))
        await asyncio.sleep(1.4)
        assert not waiting.done()
        m.is_now(ModelState.READY)
        assert await waiting == ["a", "z"]


@pytest.mark.slow
async def test_a_whole_call_waits_at_most_twice_its_wake_time() -> None:
    """Also if the start takes longer than the last one."""
    async with sleeper() as m:
        m.stage._usual_start_s = 0.1
        m.is_now(ModelState.ASLEEP)
        began = time.monotonic()
        with pytest.raises(NotReady):
            await m.answer(wake_wait_s=1.05)
        assert 2 < time.monotonic() - began < 3


async def test_a_stream_waits_until_its_deadline() -> None:
    async with sleeper() as m:
        m.is_now(ModelState.ASLEEP)
        with pytest.raises(DeadlineExceeded):
            await m.answer(timeout_s=0.05)


async def test_the_estimate_counts_from_the_wake_up_to_the_first_answer() -> None:
    async with sleeper() as m:
        m.is_now(ModelState.ASLEEP)
        waiting = asyncio.create_task(m.answer())
        await asyncio.sleep(0.15)
        m.is_now(ModelState.LOADING, "x")
        await asyncio.sleep(0.05)
        m.is_now(ModelState.READY)
        await waiting
        assert 0.19 < m.stage._usual_start_s < 1
        assert m.wakes[0] == pytest.approx(m.stage._usual_start_s, abs=0.01)


async def test_requests_are_held_until_the_first_state_is_known() -> None:
    """A new ingress does not refuse requests for a model that may be ready."""
    async with sleeper(min_replicas=1) as m:
        waiting = asyncio.create_task(m.answer())
        await settle()
        assert not waiting.done()
        m.is_now(ModelState.READY)
        assert await waiting == ["a", "z"]
