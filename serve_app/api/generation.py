"""One request's life at the front door: its tokens, the client who may leave, and a generator that is always closed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from serve_app.api.completion import CompletionState
from serve_app.api.error_handlers import opaque
from serve_app.api.gateway import Gateway
from serve_app.core.events import Chunk
from serve_app.core.requests import GenerationRequest
from serve_app.errors import ServeAppError

log = logging.getLogger(__name__)

T = TypeVar("T")

# One call may not fill every queue behind the door by itself.
MOST_IN_FLIGHT = 32


async def answer(
    gateway: Gateway, request: GenerationRequest, warm_wait_s: float | None = None
) -> AsyncGenerator[Chunk, None]:
    """The gateway's stream held to its contract: it ends in one finish reason or embedding, or raises ServeAppError."""
    finished = False
    try:
        async with aclosing(gateway.stream(request, warm_wait_s)) as chunks:
            async for chunk in chunks:
                if not finished and (chunk.events or chunk.finished):
                    finished = chunk.finished
                    yield chunk
        if not finished:
            raise RuntimeError("the model's stream ended without a finish reason")
    except (Exception, asyncio.CancelledError) as error:
        if _is_ours(error):
            raise
        if finished:  # the caller has the whole answer
            log.warning("request %s failed after its end", request.id, exc_info=error)
        elif isinstance(error, ServeAppError):
            raise
        else:
            raise opaque(error, request.id) from error


def _is_ours(error: BaseException) -> bool:
    """Whether we are being stopped. A cancellation that nobody here asked for is a failure behind the door."""
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling() > 0


async def collect(gateway: Gateway, request: GenerationRequest, warm_wait_s: float) -> CompletionState:
    """The whole answer. Raises ServeAppError."""
    tally = CompletionState()
    async with aclosing(answer(gateway, request, warm_wait_s)) as chunks:
        async for chunk in chunks:
            tally.arrived(chunk)
            for event in chunk.events:
                tally.count(event)
    return tally


async def side_by_side(works: Iterable[Callable[[], Coroutine[Any, Any, T]]]) -> list[T]:
    """Their results in order, MOST_IN_FLIGHT at a time.

    The first that fails stops the others, and its error is raised as it is.
    """
    first, *others = works
    if not others:
        return [await first()]
    room = asyncio.Semaphore(MOST_IN_FLIGHT)

    async def in_turn(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        async with room:
            return await work()

    tasks: list[asyncio.Task[T]] = []
    try:
        async with asyncio.TaskGroup() as group:
            tasks += [group.create_task(in_turn(work)) for work in (first, *others)]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do the work, or stop it when the client leaves. Raises ClientDisconnect."""
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        await stop(task, watch)


async def stop(*tasks: asyncio.Task[Any]) -> None:
    """Cancel, and wait until every task has really ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
