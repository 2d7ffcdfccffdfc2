"""Guarantees that every request ends in exactly one outcome, counted once; makes every exception a ServeAppError."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Protocol

from serve_app.core.engine import Engine
from serve_app.core.events import Chunk
from serve_app.core.queries import A, Query
from serve_app.core.requests import GenerationRequest
from serve_app.errors import DeadlineExceeded, ServeAppError, deadline_exceeded, internal_error
from serve_app.gateway.stage import Stage

log = logging.getLogger(__name__)


class RequestMeter(Protocol):
    """Measures one request from its arrival on. A request without `failed` and without a last chunk was cancelled."""

    def chunk(self, chunk: Chunk) -> None:
        """A chunk is about to be sent."""
        ...

    def failed(self, error: ServeAppError) -> None:
        """The request ends with this error."""
        ...

    def ended(self) -> None:
        """Nothing follows. Called exactly once."""
        ...


class Outcome(Stage):
    """Holds the engine that it wraps to its contract, and reports each request to a meter.

    The chunks end with one finished chunk, or a ServeAppError is raised, or the caller's own cancellation. Any other
    exception, also a cancellation that did not come from the caller, becomes an InternalError that names the request;
    the log has the exception. An error after the finished chunk is logged only: the caller has the whole answer.
    """

    def __init__(self, inner: Engine, meter: Callable[[GenerationRequest], RequestMeter]) -> None:
        super().__init__(inner)
        self._meter = meter

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        meter, finished = self._meter(request), False
        try:
            if time.monotonic() >= request.deadline:
                raise deadline_exceeded(request.timeout_s)
            async with aclosing(self.inner.generate(request)) as chunks:
                async for chunk in chunks:
                    if finished or not (chunk.events or chunk.finished):
                        continue
                    finished = chunk.finished
                    meter.chunk(chunk)
                    yield chunk
            if not finished:
                raise RuntimeError("the engine ended the request without a finish reason")
        except (Exception, asyncio.CancelledError) as error:
            if _is_callers_cancellation(error):
                raise
            if finished:
                log.warning("request %s failed after its last token", request.id, exc_info=error)
                return
            mapped = map_error(error, request.id)
            meter.failed(mapped)
            raise mapped from error
        finally:
            meter.ended()

    async def query(self, model: str, query: Query[A], deadline: float) -> A:
        try:
            async with asyncio.timeout_at(_loop_time(deadline)) as clock:
                return await self.inner.query(model, query, deadline)
        except (Exception, asyncio.CancelledError) as error:
            if _is_callers_cancellation(error):
                raise
            if clock.expired():
                raise DeadlineExceeded(f"The model did not answer a {type(query).__name__} query in time.") from None
            raise map_error(error, type(query).__name__) from error


def map_error(error: BaseException, id: str) -> ServeAppError:
    """The error itself if it is ours, else an InternalError that quotes `id`; the log has the exception."""
    return error if isinstance(error, ServeAppError) else internal_error(error, id)


def _is_callers_cancellation(error: BaseException) -> bool:
    """A cancellation of the current task. Another one is a failure of something that the request waited for."""
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling() > 0


def _loop_time(instant: float) -> float:
    return asyncio.get_running_loop().time() + instant - time.monotonic()
