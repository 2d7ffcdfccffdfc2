"""The one queue that decides which request of a model goes next."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace

from serve_app.core.engine import Engine, EngineLoad
from serve_app.core.events import Chunk
from serve_app.core.queries import A, Query
from serve_app.core.queue_meter import QueueMeter
from serve_app.core.requests import GenerationRequest
from serve_app.errors import QueueFull, deadline_exceeded, rounded_s
from serve_app.gateway.deadlines import begun_in_time
from serve_app.gateway.estimates import Estimates
from serve_app.gateway.fair_queue import FairQueue
from serve_app.gateway.fair_share import Ticket
from serve_app.gateway.room import Room
from serve_app.gateway.stage import Stage

# Queries (tokenize, detokenize) of one model that run, and that wait, at the same time. They hold no place of a
# generation, and generations hold none of theirs.
QUERIES_RUNNING = 8
QUERIES_WAITING = 64
# The cost of a generated token, in tokens of a prompt. Sheng et al., OSDI 2024, use the same number.
OUTPUT_COST = 2.0
# Weight of the newest answer in the mean speed of a place.
_SMOOTHING = 0.1
# A request waits if the expected wait is at most this share of its time, because the speed of a model varies.
_WAIT_SHARE = 0.75

_Place = Ticket[asyncio.Future[None]]


class Admission(Stage):
    """Lets as many requests of one model through as it has places, and queues others.

    FairQueue decides which waiting request goes next. `weight` is that of a tenant, by its name. The cost of a request
    is the tokens of its prompt that are computed, and OUTPUT_COST times those of its answer.

    A request that should not expect a place in time, by the speed that the places have shown, is refused with QueueFull
    at once, as is one that finds the queue full. If another tenant has more waiting requests for its weight,
    the last one of them is refused instead. A waiting request ends at its deadline.
    """

    def __init__(
        self,
        inner: Engine,
        model: str,
        room: Room,
        estimates: Estimates,
        weight: Callable[[str], float],
        meter: QueueMeter,
    ) -> None:
        super().__init__(inner)
        self._model = model
        self._room = room
        self._estimates = estimates
        self._meter = meter
        self._queue: FairQueue[asyncio.Future[None]] = FairQueue(weight)
        self._mean_s = self._mean_cost = 0.0  # of a finished request in its place; 0 before the first
        self._mean_first_s = 0.0  # from the place to the first token
        self._queries = asyncio.Semaphore(QUERIES_RUNNING)
        self._queries_waiting = 0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        place = await self._enter(request)
        began, generated, finished = time.monotonic(), 0, False
        cost = self._estimates.prompt(request)
        try:
            async with aclosing(begun_in_time(self.inner.generate(_among_others(request)), request)) as chunks:
                async for chunk in chunks:
                    if not generated:
                        self._mean_first_s += _SMOOTHING * (time.monotonic() - began - self._mean_first_s)
                    generated += len(chunk.events)
                    cost = chunk.prompt_tokens - chunk.cached_tokens + OUTPUT_COST * generated
                    self._queue.charge(place, cost)
                    finished = chunk.finished
                    yield chunk
        finally:
            now = time.monotonic()
            if finished:
                self._learn(now - began, cost)
            self._queue.end(place, cost, now)
            self._fill()

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
        return EngineLoad(self._queue.running, len(self._queue), self._room.places)

    def resize(self, room: Room) -> None:
        """Set what the model has now, and let waiting requests through if there are places for them."""
        self._room = room
        self._fill()

    async def _enter(self, request: GenerationRequest) -> _Place:
        """Returns with a place. Raises QueueFull, DeadlineExceeded."""
        now = time.monotonic()
        self._check_deadline(request, now)
        self._check_length(request, now)
        cost = self._estimates.prompt(request) + OUTPUT_COST * self._estimates.answer(request)
        future = asyncio.get_running_loop().create_future()
        place = self._queue.add(future, request.tenant, request.priority, cost, now)
        self._fill()
        if place.waits:
            await self._wait(place, request)
        self._meter.started(request.tenant, time.monotonic() - now)
        return place

    async def _wait(self, place: _Place, request: GenerationRequest) -> None:
        try:
            async with asyncio.timeout(request.starts_by - time.monotonic()):
                await asyncio.shield(place.item)
        except TimeoutError:
            self._leave(place)
            raise deadline_exceeded(request.starts_by - request.arrived, "waited for a place") from None
        except asyncio.CancelledError:
            self._leave(place)
            raise

    def _leave(self, place: _Place) -> None:
        """Give the place in the queue back, or the place at the replicas if it came at the same moment."""
        if place.waits:
            self._queue.remove(place, time.monotonic())
        elif place.item.exception() is None:  # otherwise it was dropped at the same moment
            self._queue.end(place, 0.0, time.monotonic())
            self._fill()

    def _fill(self) -> None:
        now = time.monotonic()
        while place := self._queue.start(self._room.slots, self._room.places, now):
            place.item.set_result(None)

    def _check_deadline(self, request: GenerationRequest, now: float) -> None:
        """Raises QueueFull if the request should not expect a place in time."""
        if not len(self._queue) and self._queue.running < self._room.slots:
            return
        remaining = request.starts_by - now
        wait_s = self._wait_s(request.tenant, now, request.priority) + self._mean_first_s
        if wait_s > _WAIT_SHARE * remaining:
            self._meter.refused("late")
            raise QueueFull(
                f"{self._model} is too busy: a request waits for about {rounded_s(wait_s)} s, and this one has only "
                f"{rounded_s(remaining)} s. Try again later.",
                retry_after_s=max(1.0, wait_s - _WAIT_SHARE * remaining),
            )

    def _check_length(self, request: GenerationRequest, now: float) -> None:
        """If the queue is full, refuse the request, or drop one of a tenant that has more. Raises QueueFull."""
        if self._queue.running + len(self._queue) < self._room.total or not len(self._queue):
            return
        dropped = self._queue.to_drop(request.tenant)
        self._meter.refused("full" if dropped is None else "dropped")
        if dropped is None:
            raise self._full(request.tenant, now)
        self._queue.remove(dropped, now)
        dropped.item.set_exception(self._full(dropped.tenant, now))

    def _full(self, tenant: str, now: float) -> QueueFull:
        return QueueFull(
            f"{self._model} has {len(self._queue)} requests waiting, which is its limit. Try again later.",
            retry_after_s=max(1.0, self._wait_s(tenant, now)),
        )

    def _wait_s(self, tenant: str, now: float, priority: int | None = None) -> float:
        """The expected time until a new request of the tenant has a place; 0 before a request has finished.

        Without a priority, the request is the last one of its tenant.
        """
        if not self._mean_cost:
            return 0.0
        cost = self._queue.ahead(tenant, now, priority) + self._mean_cost  # one more place must become free
        return cost * self._mean_s / (self._mean_cost * self._room.places)

    def _learn(self, seconds: float, cost: float) -> None:
        share = _SMOOTHING if self._mean_cost else 1.0
        self._mean_s += share * (seconds - self._mean_s)
        self._mean_cost += share * (cost - self._mean_cost)


def _among_others(request: GenerationRequest) -> GenerationRequest:
    """The request as an engine gets it, which knows no tenants: none can go before the requests of others there."""
    return replace(request, priority=0) if request.tenant and request.priority < 0 else request
