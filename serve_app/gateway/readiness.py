"""Knows the state of one model, wakes it when it is scaled to zero, and refuses requests that it cannot serve."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from serve_app.config import Model
from serve_app.core.engine import Engine
from serve_app.core.events import Chunk
from serve_app.core.queries import A, GetModelInfo, ModelState, ModelStatus, Query
from serve_app.core.requests import GenerationRequest
from serve_app.errors import DeadlineExceeded, NotReady, QueueFull, ServeAppError
from serve_app.gateway.stage import Stage

log = logging.getLogger(__name__)

# The estimate of a model's start before one was measured.
_USUAL_START_S = 30.0
# A model that was asked for is being woken for this time.
_WAKE_CALL_S = 600.0


class Readiness(Stage):
    """Holds requests while the model wakes; the deployment reports the model's state through `update`.

    A model that is scaled to zero is woken by the work that waits for it, or, if Ray Serve counts requests, by one
    query, whatever the number of requests that wait. At most `max_held` requests wait; further ones are refused with
    QueueFull. A model that is loading although it should be up (first start, lost replicas) and a model that failed
    refuse requests with NotReady. `Retry-After` is the usual time of a start, from the wake-up to the first ready
    replica, less the time since this start began. Until the first `update` requests wait: a new ingress does not know
    yet that the model is ready.
    """

    def __init__(self, inner: Engine, model: Model, max_held: int, woke: Callable[[float], None]) -> None:
        super().__init__(inner)
        self._name = model.name
        self._scales_to_zero = model.deployment.scales_to_zero
        scaling = model.deployment.autoscaling
        self._wakes_by_query = scaling is not None and not scaling.by_work
        self._max_held = max_held
        self._woke = woke
        self._status = ModelStatus(model.name, ModelState.LOADING, "starting")
        self._known = False
        self._changed = asyncio.Event()
        self._held = 0
        self._waking: asyncio.Task[None] | None = None
        self._wake_began: float | None = None
        self._start_began: float | None = None
        self._usual_start_s = _USUAL_START_S

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        await self._await_ready(request.starts_by, request.wake_wait_s)
        async with aclosing(self.inner.generate(request)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def query(self, model: str, query: Query[A], deadline: float) -> A:
        await self._await_ready(deadline, None)
        return await self.inner.query(model, query, deadline)

    def health(self, model: str) -> ModelStatus:
        return self._status

    def update(self, status: ModelStatus) -> None:
        """Take in the model's state, and learn from its changes how long a start takes."""
        now = time.monotonic()
        self._known = True
        if status.state is ModelState.READY:
            self._started(now)
        elif status.state is ModelState.LOADING:
            self._start_began = self._start_began or now
        elif status.state is ModelState.ASLEEP and not self._holds_or_wakes(now):
            self._start_began = self._wake_began = None
        if status != self._status:
            self._status = status
            self._changed.set()
            self._changed = asyncio.Event()

    @property
    def wakes(self) -> bool:
        """Whether requests have asked for a model without replicas, also if they have left meanwhile.

        Otherwise a model whose start takes longer than its clients wait would never be started.
        """
        return self._wake_began is not None and not self._wakes_by_query

    @property
    def holds(self) -> bool:
        """Whether requests wait until the model is ready."""
        return self._held > 0

    def stop(self) -> None:
        if self._waking is not None:
            self._waking.cancel()

    def _holds_or_wakes(self, now: float) -> bool:
        return self.holds or (self._wake_began is not None and now - self._wake_began < _WAKE_CALL_S)

    async def _await_ready(self, deadline: float, wake_wait_s: float | None) -> None:
        """Raises NotReady, QueueFull, DeadlineExceeded."""
        if self._status.state is ModelState.READY:
            return
        if self._held >= self._max_held:
            raise QueueFull(
                f"{self._held} requests wait already until {self._name} is loaded. Try again later.",
                retry_after_s=self._remaining_s(),
            )
        self._held += 1
        try:
            await self._hold(deadline, wake_wait_s)
        finally:
            self._held -= 1

    async def _hold(self, deadline: float, wake_wait_s: float | None) -> None:
        """Wait for `wake_wait_s`, and once more for this time if the start is expected to be over by then."""
        wait_s = deadline - time.monotonic() if wake_wait_s is None else wake_wait_s
        limit = last = time.monotonic() + wait_s
        if wake_wait_s is not None:
            last += wait_s
        while self._status.state is not ModelState.READY:
            self._refuse_unless_waking()
            now = time.monotonic()
            if now >= deadline:
                raise DeadlineExceeded(f"{self._name} was not loaded within the request's time.")
            if now >= limit:
                if now >= last or self._remaining_s() > wait_s:
                    raise self._loading()
                limit = last
            await self._change(min(limit, deadline) - now)

    async def _change(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(min(timeout_s, 1.0)):
                await self._changed.wait()
        except TimeoutError:
            pass

    def _refuse_unless_waking(self) -> None:
        if not self._known:
            return
        state = self._status.state
        if state is ModelState.FAILED:
            raise NotReady(f"{self._name} cannot be loaded. The service's log has the reason.", retry_after_s=60)
        if state is ModelState.LOADING and not self._scales_to_zero:
            raise self._loading()
        if state is ModelState.ASLEEP and self._wake_began is None:
            self._wake_began = self._start_began = time.monotonic()
        if state is ModelState.ASLEEP and self._wakes_by_query and self._waking is None:
            self._waking = asyncio.create_task(self._wake())

    async def _wake(self) -> None:
        """One query that Ray Serve queues until it has started a replica for it."""
        try:
            await self.inner.query(self._name, GetModelInfo(), time.monotonic() + _WAKE_CALL_S)
        except ServeAppError as error:
            log.warning("the call that wakes %s failed: %s", self._name, error)
        else:
            self.update(ModelStatus(self._name, ModelState.READY))  # an answer is newer than any report
        finally:
            self._waking = None

    def _started(self, now: float) -> None:
        if self._start_began is not None:
            self._usual_start_s = now - self._start_began
        if self._wake_began is not None:
            self._woke(now - self._wake_began)
        self._start_began = self._wake_began = None

    def _remaining_s(self) -> float:
        ran = 0.0 if self._start_began is None else time.monotonic() - self._start_began
        return max(1.0, self._usual_start_s - ran)

    def _loading(self) -> NotReady:
        detail = f" ({self._status.detail})" if self._status.detail else ""
        return NotReady(
            f"{self._name} is being loaded{detail}. Send the request again later.", retry_after_s=self._remaining_s()
        )
