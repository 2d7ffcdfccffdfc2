"""Reserves what a request can use at most of the limits of its key and its tenant, and gives back what it has not."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from uuid import uuid4

from serve_app.config import Model
from serve_app.core.engine import Engine
from serve_app.core.events import Chunk
from serve_app.core.queries import GetModelInfo
from serve_app.core.quotas import CallQuota, current_call
from serve_app.core.requests import GenerationRequest
from serve_app.core.tenants import Limits
from serve_app.errors import NotReady, PromptTooLong
from serve_app.gateway.counters import DOLLARS, TOKENS, Counter, CountersUnavailable, Kind, Reservation
from serve_app.gateway.quota_refusal import exceeded, note_rates
from serve_app.gateway.shared_quotas import SharedQuotas
from serve_app.gateway.spending import Spending, amount_of, counters_of
from serve_app.gateway.stage import Stage
from serve_app.gateway.worst_case import (
    LEAST_ANSWER,
    PromptEstimate,
    WorstCase,
    affordable,
    most_at_once,
    worst_case,
)

_NO_LIMITS = Limits()
# The limits for which the length of a request must be known.
_OF_LENGTH = TOKENS | DOLLARS


class Quota(Stage):
    """Lets a request through if all limits of its key and its tenant allow the most that it can use.

    Everything is reserved at once, or nothing, and the request is refused. At its end, however it ends, what it has not
    used is given back. A request without an identity is passed on. A request whose prompt has more tokens than
    expected is refused by the engine, and sent again with the right number.
    """

    def __init__(self, inner: Engine, model: Model, shared: SharedQuotas) -> None:
        super().__init__(inner)
        self._model = model
        self._shared = shared
        self._estimate = PromptEstimate()
        self._context: int | None = None

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        if not request.tenant and not request.key:
            return self.inner.generate(request)
        return self._counted(request)

    async def _counted(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        subjects = self._subjects(request)
        call = current_call.get() or CallQuota()
        prompt = self._estimate.tokens(request)
        call.open += 1
        try:
            while True:
                spending = Spending(self._model.price)
                admitted, reservation = await self._admit(request, prompt, subjects, call, spending)
                complete = True
                try:
                    async with aclosing(self.inner.generate(admitted)) as chunks:
                        async for chunk in chunks:
                            spending.add(chunk)
                            yield chunk
                    return
                except PromptTooLong as error:
                    if not error.over_reservation:
                        raise
                    prompt, complete = max(prompt + 1, error.tokens or 0), False
                    self._estimate.learn(request, prompt)
                finally:
                    self._settle(reservation, spending, call, complete)
                    if complete:
                        self._end(request, spending)
        finally:
            call.open -= 1
            if not call.open:
                call.concurrent = False
                for settle in call.at_end:
                    settle()
                call.at_end.clear()

    async def _admit(
        self,
        request: GenerationRequest,
        prompt: int,
        subjects: list[tuple[str, Limits]],
        call: CallQuota,
        spending: Spending,
    ) -> tuple[GenerationRequest, Reservation | None]:
        """The request with the bounds that are reserved. Raises RateLimitExceeded, InsufficientQuota, NotReady."""
        counters = counters_of(subjects, not call.counted, not call.concurrent)
        if not counters:
            return request, None
        call.counted = call.concurrent = True
        try:
            return await self._reserve(request, prompt, counters, call, spending)
        except BaseException:
            kinds = {counter.kind for counter in counters}
            call.counted &= Kind.REQUESTS_PER_MINUTE not in kinds
            call.concurrent &= Kind.CONCURRENT_REQUESTS not in kinds
            raise

    async def _reserve(
        self,
        request: GenerationRequest,
        prompt: int,
        counters: tuple[Counter, ...],
        call: CallQuota,
        spending: Spending,
    ) -> tuple[GenerationRequest, Reservation]:
        worst, context = WorstCase(request, 0, 0), 0
        answer = request.params.max_tokens
        if any(counter.kind in _OF_LENGTH for counter in counters):
            context = await self._context_of(request)
            if answer is None:
                answer = _least(self._shared.options.default_max_tokens, most_at_once(prompt, counters, context))
            worst = worst_case(request, prompt, answer, context, self._model.price)
        granted, values, reservation = await self._try(worst, counters, spending)
        if not granted and context and request.params.max_tokens is None and not request.embed:
            answer = _least(answer, affordable(prompt, counters, values, self._model.price))
            if answer is not None and answer >= LEAST_ANSWER:
                worst = worst_case(request, prompt, answer, context, self._model.price)
                granted, values, reservation = await self._try(worst, counters, spending)
        note_rates(call, counters, values)
        self._shared.near.note(counters, values)
        if not granted:
            counter, error = exceeded(counters, values, reservation.amounts)
            self._shared.meter.refused(counter.subject.partition(":")[0], counter.kind)
            raise error
        return worst.request, reservation

    async def _try(
        self, worst: WorstCase, counters: tuple[Counter, ...], spending: Spending
    ) -> tuple[bool, Sequence[int], Reservation]:
        amounts = tuple([amount_of(counter.kind, worst.tokens, worst.nanodollars) for counter in counters])
        reservation = Reservation(uuid4().hex, counters, amounts, partial(spending.amounts, counters))
        try:
            granted, values = await self._shared.counters.reserve(reservation)
        except CountersUnavailable:
            self._shared.meter.refused("store", "unavailable")
            raise NotReady("The limits of the key cannot be checked now. Try again later.", retry_after_s=1) from None
        return granted, values, reservation

    async def _context_of(self, request: GenerationRequest) -> int:
        """The context of the model, which is queried once. A sleeping model wakes, and the request waits for it."""
        if self._context is None:
            wait_s = request.timeout_s if request.wake_wait_s is None else request.wake_wait_s
            deadline = min(request.deadline, time.monotonic() + wait_s)
            self._context = (await self.inner.query(request.model, GetModelInfo(), deadline)).context
        return self._context

    def _settle(self, reservation: Reservation | None, spending: Spending, call: CallQuota, complete: bool) -> None:
        """Give back what was not used; if the call's other requests still run, at the end of the call."""
        if reservation is None:
            return
        counters = reservation.counters
        settle = partial(self._shared.counters.settle, reservation, spending.amounts(counters))
        is_concurrent = any(counter.kind is Kind.CONCURRENT_REQUESTS for counter in counters)
        if is_concurrent and complete and call.open > 1:
            call.at_end.append(settle)
            return
        if is_concurrent:
            call.concurrent = False
        settle()

    def _end(self, request: GenerationRequest, spending: Spending) -> None:
        if spending.prompt_tokens:
            self._estimate.learn(request, spending.prompt_tokens)
        self._shared.usage.record(spending.usage(request))

    def _subjects(self, request: GenerationRequest) -> list[tuple[str, Limits]]:
        """The key and the tenant of a request that have limits."""
        tenants = self._shared.tenants
        both = [
            (f"key:{request.key}", tenants.key_limits(request.key) if request.key else _NO_LIMITS),
            (f"tenant:{request.tenant}", tenants.tenant(request.tenant).limits if request.tenant else _NO_LIMITS),
        ]
        return [(subject, limits) for subject, limits in both if limits != _NO_LIMITS]


def _least(*answers: int | None) -> int | None:
    """The lowest of the limits; None is no limit."""
    return min((one for one in answers if one is not None), default=None)
