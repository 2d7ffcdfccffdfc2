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
from serve_app.core.routing import prompt_tokens
from serve_app.core.scaling import Demand, RecentRate
from serve_app.gateway.stage import Stage

# Tokens of an answer before one has ended.
_USUAL_ANSWER = 128.0
# Weight of the newest request in the means.
_SMOOTHING = 0.05


@dataclass(slots=True)
class _Open:
    """A request that has not ended: the tokens that it still needs, as far as they are known."""

    prompt: float
    answer: float
    running: bool = False
    generated: int = 0


class Workload(Stage):
    """Knows the open requests of one model. `arrived` is called when one arrives, for a model that sleeps.

    The length of an answer is not known before it ends: a request is expected to generate as many tokens as the mean
    answer, and at most its `max_tokens`. A prompt is expected to be found in the prefix cache to the share that earlier
    prompts were.
    """

    def __init__(self, inner: Engine, arrived: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(inner)
        self._arrived = arrived
        self._clock = clock
        self._requests: dict[int, _Open] = {}
        self._queries = 0
        self._count = 0
        self._answer = _USUAL_ANSWER
        self._per_estimate = 1.0  # computed tokens of a prompt, as a share of the estimate
        self._prompts, self._answers = RecentRate(), RecentRate()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        number, estimate = self._count, prompt_tokens(request)
        self._count += 1
        wanted = self._expected(request)
        one = self._requests[number] = _Open(estimate * self._per_estimate, wanted)
        now = self._clock()
        self._prompts.add(one.prompt, now)
        self._answers.add(wanted, now)
        self._arrived()
        try:
            async with aclosing(self.inner.generate(request)) as chunks:
                async for chunk in chunks:
                    self._note(one, chunk, estimate)
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

    def _expected(self, request: GenerationRequest) -> float:
        if request.embed:
            return 0.0
        limit = request.params.max_tokens
        return self._answer if limit is None else min(self._answer, limit)

    def _note(self, one: _Open, chunk: Chunk, estimate: float) -> None:
        if not one.running:
            one.running = True
            computed = (chunk.prompt_tokens - chunk.cached_tokens) / max(1.0, estimate)
            self._per_estimate += _SMOOTHING * (computed - self._per_estimate)
        one.generated += len(chunk.events)
        if chunk.finished and chunk.events:
            self._answer += _SMOOTHING * (one.generated - self._answer)
