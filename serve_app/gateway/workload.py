"""Measures what callers want of a model: the requests that wait and run, and the tokens that they still need."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass

from serve_app.core.engine import Engine
from serve_app.core.events import Chunk
from serve_app.core.queries import A, Query
from serve_app.core.requests import GenerationRequest
from serve_app.core.scaling import Demand, RecentRate
from serve_app.gateway.estimates import Estimates
from serve_app.gateway.stage import Stage


@dataclass(slots=True)
class _Open:
    """A request that has not ended: the tokens that it still needs, as far as they are known."""

    prompt: float
    answer: float
    running: bool = False
    generated: int = 0


class Workload(Stage):
    """Knows the open requests of one model. `arrived` is called when one arrives, for a model that sleeps.

    It keeps the `estimates` up to date, which other stages of the model read.
    """

    def __init__(
        self,
        inner: Engine,
        arrived: Callable[[], None],
        estimates: Estimates | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(inner)
        self._arrived = arrived
        self._estimates = estimates or Estimates()
        self._clock = clock
        self._requests: dict[int, _Open] = {}
        self._queries = 0
        self._count = 0
        self._prompts, self._answers = RecentRate(), RecentRate()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        number, wanted = self._count, self._estimates.answer(request)
        self._count += 1
        one = self._requests[number] = _Open(self._estimates.prompt(request), wanted)
        now = self._clock()
        self._prompts.add(one.prompt, now)
        self._answers.add(wanted, now)
        self._arrived()
        try:
            async with aclosing(self.inner.generate(request)) as chunks:
                async for chunk in chunks:
                    self._note(one, chunk, request)
                    yield chunk
        finally:
            del self._requests[number]

    async def query(self, model: str, query: Query[A], deadline: float) -> A:
        self._queries += 1
        self._arrived()
        try:
            return await self.inner.query(model, query, deadline)
        finally:
            self._queries -= 1

    def demand(self) -> Demand:
        """The demand at this moment. A query counts as a waiting request without tokens."""
        running = [one for one in self._requests.values() if one.running]
        waiting = [one for one in self._requests.values() if not one.running]
        now = self._clock()
        return Demand(
            len(running),
            len(waiting) + self._queries,
            sum(one.prompt for one in waiting),
            sum(max(1.0, one.answer - one.generated) for one in (*running, *waiting) if one.answer),
            round(self._prompts.value(now), 2),
            round(self._answers.value(now), 2),
        )

    def _note(self, one: _Open, chunk: Chunk, request: GenerationRequest) -> None:
        if not one.running:
            one.running = True
            self._estimates.learn_prompt(request, chunk)
        one.generated += len(chunk.events)
        if chunk.finished and chunk.events:
            self._estimates.learn_answer(one.generated)
