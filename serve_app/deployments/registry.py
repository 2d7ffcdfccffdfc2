"""The service's notice board: what every process measures, and how far loading models have come."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from serve_app.config import Model
from serve_app.core.queries import ModelState, ModelStatus
from serve_app.telemetry.exposition import MetricsSnapshot

K = TypeVar("K")
V = TypeVar("V")

# A process that has not pushed for this long is gone.
FORGET_AFTER_S = 5.0
# What it counted is shown for two of Prometheus' usual scrapes more, so that its last requests are not lost.
KEEP_COUNTS_S = 30.0
# Why a model could not be loaded stays readable for this long, while Ray tries again.
FAILURE_S = 60.0


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """One process's push. `model` is "" for an ingress; `stage` is what a replica that cannot answer yet does.

    `leaving` is the last one, of a process that ends in an orderly way; `failed`, of one that could not load.
    """

    replica: str
    model: str
    stage: str
    failed: bool = False
    leaving: bool = False


@dataclass(frozen=True, slots=True)
class Measured:
    """What all processes measure: parts of pages. `ages` of those alive: model, replica, seconds since its push."""

    parts: list[bytes]
    ages: list[tuple[str, str, float]]


@dataclass(frozen=True, slots=True)
class RegistrySnapshot:
    """All live processes' notices, and recent failures to load by model. `age_s`: how long it has been collecting."""

    age_s: float
    notices: list[Heartbeat]
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


class ReplicaRegistry:
    """Keeps the latest notice of every process, for as long as it keeps coming. Holds nothing that cannot be lost."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        # By replica and model: a fused replica is an ingress too, and pushes as both.
        self._notices: dict[tuple[str, str], tuple[float, Heartbeat]] = {}
        self._pages: dict[tuple[str, str], tuple[float, MetricsSnapshot]] = {}
        self._failures: dict[str, tuple[float, str]] = {}

    def take(self, notice: Heartbeat, page: MetricsSnapshot) -> None:
        now, key = self._clock(), (notice.replica, notice.model)
        self._pages[key] = (now, page)
        if notice.failed:
            self._failures[notice.model] = (now, notice.stage)
        if notice.failed or notice.leaving:
            self._notices.pop(key, None)
            return
        self._notices[key] = (now, notice)
        if not notice.stage:
            self._failures.pop(notice.model, None)

    def board(self) -> RegistrySnapshot:
        now = self._forget()
        return RegistrySnapshot(
            now - self._began,
            [notice for _, notice in self._notices.values()],
            {model: reason for model, (_, reason) in self._failures.items()},
        )

    def measured(self) -> Measured:
        """Of processes that are gone what they counted only: what they held is held no more."""
        now = self._forget()
        parts = [page.counted for _, page in self._pages.values()]
        parts += [page.held for key, (_, page) in self._pages.items() if key in self._notices]
        ages = [(model, replica, now - at) for (replica, model), (at, _) in self._notices.items()]
        return Measured(parts, ages)

    def _forget(self) -> float:
        """Let go of what is too old; the time of now."""
        now = self._clock()
        self._notices = _younger(self._notices, now - FORGET_AFTER_S)
        self._pages = _younger(self._pages, now - FORGET_AFTER_S - KEEP_COUNTS_S)
        self._failures = _younger(self._failures, now - FAILURE_S)
        return now


def _younger(entries: dict[K, tuple[float, V]], since: float) -> dict[K, tuple[float, V]]:
    return {key: entry for key, entry in entries.items() if entry[0] > since}
