"""The service's notice board: what every process measures, and how far loading models have come."""

from __future__ import annotations

import time
from dataclasses import dataclass

from prometheus_client.metrics_core import Metric
from ray import serve

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


@serve.deployment
class Hub:
    """Keeps the latest notice of every process, for as long as it keeps coming. Holds nothing that cannot be lost."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._notices: dict[str, tuple[float, Notice]] = {}
        self._failures: dict[str, tuple[float, str]] = {}

    async def push(self, notice: Notice) -> None:
        now = time.monotonic()
        if notice.failed:
            self._failures[notice.model] = (now, notice.stage)
            self._notices.pop(notice.replica, None)
        else:
            self._notices[notice.replica] = (now, notice)
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
