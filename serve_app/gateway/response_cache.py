"""Answers deterministic requests from a cache, and computes the answer to equal requests once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from contextvars import Context
from dataclasses import dataclass
from typing import Protocol

from serve_app.config import CacheOptions, Model
from serve_app.core.cache_status import CacheStatus, current_report
from serve_app.core.engine import Engine
from serve_app.core.events import Chunk
from serve_app.core.queries import ModelState
from serve_app.core.requests import GenerationRequest
from serve_app.gateway.answers import AnswerStore, MemoryStore, replay
from serve_app.gateway.cache_key import CacheKeys, is_deterministic
from serve_app.gateway.flight import Flight
from serve_app.gateway.stage import Stage


class CacheMeter(Protocol):
    """Measures the response cache of one process."""

    def looked_up(self, model: str, status: CacheStatus) -> None:
        """Count a request."""
        ...

    def stored(self, size: int) -> None:
        """The answers in this process have `size` bytes now."""
        ...

    def failed(self) -> None:
        """Count an error of the server that keeps the answers."""
        ...


@dataclass(frozen=True, slots=True)
class SharedCache:
    """What the caches of all models of a process have in common."""

    options: CacheOptions
    store: AnswerStore
    meter: CacheMeter


def open_cache(options: CacheOptions, meter: CacheMeter) -> SharedCache:
    """The cache in this process's memory, or in the server at `options.url`."""
    if options.url is None:
        return SharedCache(options, MemoryStore(options.max_bytes, options.ttl_s, meter.stored), meter)
    from serve_app.gateway.redis_store import RedisStore  # its import takes time that only this needs

    return SharedCache(options, RedisStore(options, meter.failed), meter)


class ResponseCache(Stage):
    """Sends a stored answer again, or computes it and stores it. Equal requests that arrive meanwhile follow.

    Only requests with one possible answer are looked up. A hit needs nothing of the stages behind this one. A request
    follows another one only if both wait alike: with the same priority and, while the model is not ready, for the same
    time. Answers that failed are not stored.
    """

    def __init__(self, inner: Engine, model: Model, shared: SharedCache) -> None:
        super().__init__(inner)
        self._model = model.name
        self._options = shared.options
        self._store = shared.store
        self._meter = shared.meter
        self._keys = CacheKeys(model, shared.options.namespace)
        self._flights: dict[tuple[object, ...], Flight] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        if request.cache_control == "no-store" or not is_deterministic(request):
            self._note(CacheStatus.BYPASS)
            return self.inner.generate(request)
        return self._cached(request)

    def stop(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _cached(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        key = self._keys.key(request)
        chunks = await self._known(key, request) if request.cache_control != "no-cache" else None
        self._note(CacheStatus.MISS if chunks is None else CacheStatus.HIT)
        async with aclosing(self._begin(key, request) if chunks is None else chunks) as found:
            async for chunk in found:
                yield chunk

    async def _known(self, key: bytes, request: GenerationRequest) -> AsyncGenerator[Chunk, None] | None:
        """The answer of an equal request that runs, or the stored answer; None if there is neither."""
        if (running := self._running(key, request)) is not None:
            return running
        answer = await self._store.get(key)
        if answer is not None:
            return replay(answer, request)
        return self._running(key, request)  # another one may have begun meanwhile

    def _running(self, key: bytes, request: GenerationRequest) -> AsyncGenerator[Chunk, None] | None:
        flight = self._flights.get(self._place(key, request))
        return flight.follow(request) if flight is not None and flight.takes(request) else None

    def _begin(self, key: bytes, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        """Compute the answer, for this request and for those that will follow it."""
        place = self._place(key, request)
        flight = self._flights[place] = Flight(request, self._options.max_answer_bytes)
        # In a context of its own: Ray Serve cancels the calls that were made in the context of a request whose client
        # has left, but this computation can have other followers.
        task = asyncio.create_task(self._complete(flight, key, place), context=Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        flight.owned_by(task)
        return flight.follow(request)

    async def _complete(self, flight: Flight, key: bytes, place: tuple[object, ...]) -> None:
        """Run a flight to its end and store its answer. Until it is stored, equal requests follow the flight."""
        try:
            answer = await flight.compute(self.inner)
            if answer is not None:
                await self._store.put(key, answer)
        finally:
            if self._flights.get(place) is flight:
                del self._flights[place]

    def _note(self, status: CacheStatus) -> None:
        self._meter.looked_up(self._model, status)
        report = current_report.get()
        if report is not None:
            report.add(status)

    def _place(self, key: bytes, request: GenerationRequest) -> tuple[object, ...]:
        ready = self.inner.health(self._model).state is ModelState.READY
        return key, request.priority, None if ready else request.wake_wait_s
