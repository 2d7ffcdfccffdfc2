"""Runs the requests of one call: in parallel within a bound, until the client leaves or the deadline passes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from serve_app.api.completion import CompletionState
from serve_app.core.engine import Engine
from serve_app.core.requests import GenerationRequest
from serve_app.errors import DeadlineExceeded, rounded_s

T = TypeVar("T")

# Requests of one call that run at the same time, so that one call cannot fill every queue.
MAX_IN_FLIGHT = 32


def begin(request: GenerationRequest, now: float) -> GenerationRequest:
    """The request, which arrives at the engine `now`. Raises DeadlineExceeded if its call has no time left."""
    if now >= request.deadline:
        raise DeadlineExceeded(
            f"The request was not finished after {rounded_s(request.timeout_s)} s. "
            "Send fewer prompts or ask for fewer tokens."
        )
    return replace(request, arrived=now)


async def collect(engine: Engine, request: GenerationRequest, clock: Callable[[], float]) -> CompletionState:
    """The whole answer to a request. Raises ServeAppError."""
    state = CompletionState()
    async with aclosing(engine.generate(begin(request, clock()))) as chunks:
        async for chunk in chunks:
            state.add(chunk)
    assert state.finish_reason or state.embedding, "an engine ends every answer"
    return state


async def run_in_parallel(works: Iterable[Callable[[], Coroutine[Any, Any, T]]]) -> list[T]:
    """The results in order. At most MAX_IN_FLIGHT works run at the same time.

    The first work that fails cancels the others, and its exception is raised as it is.
    """
    first, *others = works
    if not others:
        return [await first()]
    permits = asyncio.Semaphore(MAX_IN_FLIGHT)

    async def with_permit(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        async with permits:
            return await work()

    tasks: list[asyncio.Task[T]] = []
    try:
        async with asyncio.TaskGroup() as group:
            tasks += [group.create_task(with_permit(work)) for work in (first, *others)]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of the work, which is cancelled when the client leaves. Raises ClientDisconnect."""
    return await guarded(work, disconnect(receive))


async def disconnect(receive: Receive) -> None:
    """A guard that raises ClientDisconnect when the client leaves."""
    while (await receive())["type"] != "http.disconnect":
        pass
    raise ClientDisconnect


async def guarded(work: Coroutine[Any, Any, T], *guards: Coroutine[Any, Any, None]) -> T:
    """The result of the work. A guard that raises an exception cancels it, and the exception is raised."""
    task = asyncio.create_task(work)
    watching = [asyncio.create_task(guard) for guard in guards]
    pending: set[asyncio.Task[Any]] = {task, *watching}
    try:
        while not task.done():
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                for guard in done:
                    guard.result()
        return task.result()
    finally:
        await _stop(task, *watching)


async def _stop(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks, and return when all of them have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
