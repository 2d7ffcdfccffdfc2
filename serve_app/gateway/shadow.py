"""Shadow traffic: requests that are mirrored to a variant, whose answers are dropped."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import aclosing

from serve_app.core.engine import Engine
from serve_app.core.events import CANCELLED
from serve_app.core.experiments import SKIPPED, YIELDED
from serve_app.core.queries import ModelState
from serve_app.core.requests import GenerationRequest
from serve_app.errors import InternalError, ServeAppError

log = logging.getLogger(__name__)

# Among waiting requests the lowest priority is last, and when memory runs out, it is preempted first.
LOWEST_PRIORITY = 2**31 - 1


class ShadowTraffic:
    """Runs mirrored requests beside those of clients, which never wait for them and never see their errors.

    A mirrored request starts only if its model is ready, no request waits for it and less than half of its places are
    taken. It ends as soon as a request waits. `ended` is called with its experiment, variant and outcome.
    """

    def __init__(self, inner: Engine, ended: Callable[[str, str, str], None]) -> None:
        self._inner = inner
        self._ended = ended
        self._running: dict[str, set[asyncio.Task[None]]] = {}

    def mirror(self, request: GenerationRequest, limit: int) -> None:
        """Start a mirrored request, which has an assignment, unless `limit` of its experiment run or it is busy."""
        assert request.assignment is not None
        experiment, variant = request.assignment.experiment, request.assignment.variant
        running = self._running.setdefault(experiment, set())
        if len(running) >= limit or not self._is_idle(request.model):
            self._ended(experiment, variant, SKIPPED)
            return
        task = asyncio.create_task(self._run(request, experiment, variant))
        running.add(task)
        task.add_done_callback(running.discard)

    def stop(self) -> None:
        for running in self._running.values():
            for task in running:
                task.cancel()

    async def _run(self, request: GenerationRequest, experiment: str, variant: str) -> None:
        outcome = CANCELLED
        try:
            outcome = await self._outcome(request)
        except ServeAppError as error:
            outcome = error.code
        except Exception:
            outcome = InternalError.code
            log.exception("the mirrored request %s failed", request.id)
        finally:
            self._ended(experiment, variant, outcome)

    async def _outcome(self, request: GenerationRequest) -> str:
        async with aclosing(self._inner.generate(request)) as chunks:
            async for chunk in chunks:
                if chunk.finished:
                    return chunk.outcome
                if self._inner.load(request.model).waiting:
                    return YIELDED
        return InternalError.code

    def _is_idle(self, model: str) -> bool:
        try:
            load = self._inner.load(model)
            ready = self._inner.health(model).state is ModelState.READY
        except ServeAppError:
            return False
        return ready and not load.waiting and 2 * load.running < load.capacity
