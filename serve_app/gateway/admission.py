"""The one queue that decides which request of a model goes next."""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager

from serve_app.core.engine import Engine, EngineLoad
from serve_app.core.events import Chunk
from serve_app.core.queries import A, Query
from serve_app.core.requests import GenerationRequest
from serve_app.errors import QueueFull, deadline_exceeded
from serve_app.gateway.stage import Stage

# Queries (tokenize, detokenize) of one model that run, and that wait, at the same time. They hold no place of a
# generation, and generations hold none of theirs.
QUERIES_RUNNING = 8
QUERIES_WAITING = 64
# Weight of the newest answer in the mean time of an answer.
_SMOOTHING = 0.1


class Admission(Stage):
    """Lets `capacity()` requests of one model through at the same time, and queues up to `max_waiting` others.

    The waiting request with the lowest `priority` goes first, among equals the one that arrived first. A request that
    finds the queue full is refused with QueueFull, at once. A waiting request ends at its deadline.
    """

    def __init__(self, inner: Engine, model: str, capacity: Callable[[], int], max_waiting: int) -> None:
        super().__init__(inner)
        self._model = model
        self._capacity = capacity
        self._max_waiting = max_waiting
        self._running = 0
        self._arrivals = 0
        self._queue: list[tuple[int, int, asyncio.Future[None]]] = []
        self._mean_s = 1.0
        self._queries = asyncio.Semaphore(QUERIES_RUNNING)
        self._queries_waiting = 0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        async with self._permit(request):
            began, finished = time.monotonic(), False
            async with aclosing(self.inner.generate(request)) as chunks:
                async for chunk in chunks:
                    finished = chunk.finished
                    yield chunk
            if finished:
                self._mean_s += _SMOOTHING * (time.monotonic() - began - self._mean_s)

    async def query(self, model: str, query: Query[A], deadline: float) -> A:
        if self._queries_waiting >= QUERIES_WAITING:
            raise QueueFull(f"{model} has {QUERIES_WAITING} queries waiting. Try again later.", retry_after_s=1)
        self._queries_waiting += 1
        try:
            await self._queries.acquire()
        finally:
            self._queries_waiting -= 1
        try:
            return await self.inner.query(model, query, deadline)
        finally:
            self._queries.release()

    def load(self, model: str) -> EngineLoad:
        return EngineLoad(self._running, len(self._queue), self._capacity())

    def capacity_changed(self) -> None:
        """Let waiting requests through if there is room for them now."""
        while self._queue and self._running < self._capacity():
            self._running += 1
            heapq.heappop(self._queue)[-1].set_result(None)

    @asynccontextmanager
    async def _permit(self, request: GenerationRequest) -> AsyncIterator[None]:
        if self._queue or self._running >= self._capacity():
            await self._wait(request)
        else:
            self._running += 1
        try:
            yield
        finally:
            self._release()

    def _release(self) -> None:
        self._running -= 1
        self.capacity_changed()

    async def _wait(self, request: GenerationRequest) -> None:
        """Returns with a permit. Raises QueueFull, DeadlineExceeded."""
        if len(self._queue) >= self._max_waiting:
            raise self._full()
        place = (request.priority, self._arrivals, asyncio.get_running_loop().create_future())
        self._arrivals += 1
        heapq.heappush(self._queue, place)
        self.capacity_changed()
        try:
            async with asyncio.timeout(request.deadline - time.monotonic()):
                await asyncio.shield(place[-1])
        except TimeoutError:
            self._leave(place)
            raise deadline_exceeded(request.timeout_s) from None
        except asyncio.CancelledError:
            self._leave(place)
            raise

    def _leave(self, place: tuple[int, int, asyncio.Future[None]]) -> None:
        """Give the place in the queue back, or the permit if it came at the same moment."""
        if place[-1].done():
            self._release()
        else:
            self._queue.remove(place)
            heapq.heapify(self._queue)

    def _full(self) -> QueueFull:
        """The estimate is the time until all waiting requests have run, at the mean time of an answer."""
        waiting = len(self._queue)
        return QueueFull(
            f"{self._model} has {waiting} requests waiting, which is its limit. Try again later.",
            retry_after_s=max(1.0, self._mean_s * (waiting + 1) / max(1, self._capacity())),
        )
