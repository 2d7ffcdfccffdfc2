"""Every request has one outcome: a finished chunk, an error of ours, or its caller's cancellation."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

import pytest

from serve_app.core.events import Chunk
from serve_app.core.queries import GetModelInfo
from serve_app.errors import DeadlineExceeded, InternalError, QueueFull, ServeAppError
from serve_app.gateway.outcome import Outcome
from tests.gateway.scripted import LAST, KeptMeter, ScriptedEngine, Step, chunk, request


async def run(steps: Iterable[Step], timeout_s: float = 30.0) -> tuple[list[Chunk], ServeAppError | None, KeptMeter]:
    meter, chunks, raised = KeptMeter(), list[Chunk](), None
    stage = Outcome(ScriptedEngine(lambda _: steps), lambda _: meter)
    try:
        async for one in stage.generate(request("r7", timeout_s=timeout_s)):
            chunks.append(one)
    except ServeAppError as error:
        raised = error
    assert meter.ends == 1
    return chunks, raised, meter


async def test_chunks_pass_and_are_measured() -> None:
    chunks, raised, meter = await run([chunk("a"), LAST])
    assert (chunks, raised) == ([chunk("a"), LAST], None)
    assert (meter.chunks, meter.errors) == (chunks, [])


async def test_an_empty_chunk_is_dropped() -> None:
    chunks, _, _ = await run([Chunk((), 1, 0.0), LAST])
    assert chunks == [LAST]


async def test_nothing_follows_the_finished_chunk() -> None:
    chunks, raised, meter = await run([LAST, chunk("late"), LAST])
    assert (chunks, raised, meter.chunks) == ([LAST], None, [LAST])


async def test_our_errors_keep_their_type() -> None:
    _, raised, meter = await run([QueueFull("full", retry_after_s=3)])
    assert isinstance(raised, QueueFull)
    assert meter.errors == [raised]


@pytest.mark.parametrize("fault", [ValueError("secret"), asyncio.CancelledError("not the caller's")])
async def test_any_other_exception_is_an_internal_error_that_quotes_the_request(fault: BaseException) -> None:
    _, raised, meter = await run([chunk(), fault])
    assert isinstance(raised, InternalError)
    assert "r7" in raised.message
    assert "secret" not in raised.message
    assert meter.errors == [raised]


async def test_an_engine_that_ends_without_a_finish_reason_is_an_internal_error() -> None:
    chunks, raised, _ = await run([chunk()])
    assert len(chunks) == 1
    assert isinstance(raised, InternalError)


async def test_an_error_after_the_finished_chunk_does_not_reach_the_caller() -> None:
    chunks, raised, meter = await run([LAST, ValueError("x")])
    assert (chunks, raised, meter.errors) == ([LAST], None, [])


async def test_a_request_whose_time_is_over_does_not_reach_the_engine() -> None:
    chunks, raised, meter = await run([LAST], timeout_s=0)
    assert chunks == []
    assert isinstance(raised, DeadlineExceeded)
    assert meter.errors == [raised]


async def test_a_caller_that_leaves_closes_the_engines_generator_and_is_no_error() -> None:
    meter, engine = KeptMeter(), ScriptedEngine(lambda _: [chunk(), asyncio.Event()])
    stage = Outcome(engine, lambda _: meter)

    async def read() -> None:
        async for _ in stage.generate(request("r")):
            pass

    task = asyncio.create_task(read())
    await asyncio.sleep(0.01)
    assert len(meter.chunks) == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (engine.closed, meter.errors, meter.ends) == (["r"], [], 1)


async def test_a_query_ends_at_its_deadline() -> None:
    stage = Outcome(ScriptedEngine(query_gate=asyncio.Event()), lambda _: KeptMeter())
    with pytest.raises(DeadlineExceeded):
        await stage.query("m", GetModelInfo(), time.monotonic() + 0.02)


async def test_a_query_that_fails_raises_our_errors_only() -> None:
    stage = Outcome(ScriptedEngine(answer=ValueError("x")), lambda _: KeptMeter())
    with pytest.raises(InternalError):
        await stage.query("m", GetModelInfo(), time.monotonic() + 5)
