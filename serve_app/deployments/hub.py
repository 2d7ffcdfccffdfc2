"""The service's notice board: what every process measures, and how far loading models have come."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client.metrics_core import Metric
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve_app.config import Model
from serve_app.types import ModelState, ModelStatus

logger = logging.getLogger("ray.serve")

PUSH_INTERVAL_S = 1.0
# A process that has not pushed for this long is gone.
FORGET_AFTER_S = 5.0
# Why a model could not be loaded stays readable for this long, while Ray tries again.
FAILURE_S = 60.0


@dataclass(frozen=True, slots=True)
class Notice:
    """One process's push. `model` is "" for an ingress; `stage` is what a replica that cannot answer yet does."""

    replica: str
    model: str
    stage: str
    families: list[Metric]
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Board:
    """All live processes' notices, and recent failures to load by model. `age_s`: how long it has been collecting."""

    age_s: float
    notices: list[Notice]
    failures: dict[str, str]

    @property
    def complete(self) -> bool:
        """Whether every live process has had time to push."""
        return self.age_s >= FORGET_AFTER_S

    def ready(self, model: str) -> int:
        """Number of the model's replicas that can answer."""
        return sum(notice.model == model and not notice.stage for notice in self.notices)

    def status(self, model: Model) -> ModelStatus | None:
        """A model's state by its replicas' notices; None while the board cannot know."""
        stages = [notice.stage for notice in self.notices if notice.model == model.name]
        if "" in stages:
            return ModelStatus(model.name, ModelState.READY)
        failure = self.failures.get(model.name)
        if stages:
            detail = stages[0] if failure is None else f"{failure} (trying again: {stages[0]})"
            return ModelStatus(model.name, ModelState.LOADING, detail)
        if failure is not None:
            return ModelStatus(model.name, ModelState.FAILED, failure)
        if not self.complete:
            return None
        if model.deployment.scales_to_zero:
            return ModelStatus(model.name, ModelState.ASLEEP, "scaled to zero; the next request wakes it")
        return ModelStatus(model.name, ModelState.LOADING, "no replica is up; Ray is starting one")


@serve.deployment
class Hub:
    """Keeps the latest notice of every process, for as long as it keeps coming. Holds nothing that cannot be lost."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        # By replica and model: a fused replica is an ingress too, and pushes as both.
        self._notices: dict[tuple[str, str], tuple[float, Notice]] = {}
        self._failures: dict[str, tuple[float, str]] = {}

    async def push(self, notice: Notice) -> None:
        now = time.monotonic()
        if notice.failed:
            self._failures[notice.model] = (now, notice.stage)
            self._notices.pop((notice.replica, notice.model), None)
        else:
            self._notices[notice.replica, notice.model] = (now, notice)
            if not notice.stage:
                self._failures.pop(notice.model, None)

    async def board(self) -> Board:
        now = time.monotonic()
        self._notices = {key: entry for key, entry in self._notices.items() if now - entry[0] < FORGET_AFTER_S}
        self._failures = {key: entry for key, entry in self._failures.items() if now - entry[0] < FAILURE_S}
        return Board(
            now - self._began,
            [notice for _, notice in self._notices.values()],
            {model: reason for model, (_, reason) in self._failures.items()},
        )


class Pusher:
    """Pushes what a process has to say, every second until it is stopped. On an event loop only."""

    def __init__(self, hub: DeploymentHandle, notice: Callable[[], Notice]) -> None:
        self._hub = hub
        self._notice = notice
        self._task = asyncio.create_task(self._push_for_ever())

    def stop(self) -> None:
        self._task.cancel()

    async def push(self, notice: Notice) -> None:
        try:
            await self._hub.push.remote(notice)
        except Exception:
            # The hub may be starting or moving; the next push says everything again.
            logger.debug("push failed", exc_info=True)

    async def _push_for_ever(self) -> None:
        while True:
            await self.push(self._notice())
            await asyncio.sleep(PUSH_INTERVAL_S)
