"""Keeps the reports of all processes of the service, their heartbeats and metrics, in an ingress. Needs no Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TypeVar

from serve_app.config import Model
from serve_app.core.adapters import AdapterChange
from serve_app.core.queries import ModelState, ModelStatus
from serve_app.core.routing import ReplicaLoad
from serve_app.telemetry.exposition import MetricsSnapshot

K = TypeVar("K")
V = TypeVar("V")

# A process whose last heartbeat is older is lost.
HEARTBEAT_TIMEOUT_S = 5.0
# The counters of a process that has ended are exported for two more scrapes of 15 s, so that its last requests are
# counted.
KEEP_COUNTERS_S = 30.0
# The reason why a model could not be loaded is kept for this time while Ray tries again.
KEEP_FAILURE_S = 60.0


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The state of one process. `model` is "" for an ingress; `stage` is the current step of a start, "" when ready.

    `leaving` marks the last report of a process that shuts down. `failed` marks the report of a replica whose model
    could not be loaded, with the reason in `stage`. An ingress reports the `adapters` that were changed at run time; a
    replica whose model is loaded reports its `load`.
    """

    replica: str
    model: str
    stage: str
    failed: bool = False
    leaving: bool = False
    adapters: tuple[AdapterChange, ...] = ()
    load: ReplicaLoad | None = None


@dataclass(frozen=True, slots=True)
class Measurements:
    """The metrics of all processes, as `parts` of a page, and the `ages` of reports: model, replica, seconds."""

    parts: list[bytes]
    ages: list[tuple[str, str, float]]


@dataclass(frozen=True, slots=True)
class RegistrySnapshot:
    """The heartbeats of all live processes, and recent failures to load by model.

    `age_s` is the time since the registry began to collect. `lost` are replicas that reported before and do not now.
    """

    age_s: float
    heartbeats: list[Heartbeat]
    failures: dict[str, str]
    lost: frozenset[str] = frozenset()

    @property
    def complete(self) -> bool:
        """Whether every live process has had time to report."""
        return self.age_s >= HEARTBEAT_TIMEOUT_S

    @property
    def ingresses(self) -> int:
        return sum(not heartbeat.model for heartbeat in self.heartbeats)

    def ready(self, model: str, routed: Collection[str] | None = None) -> int:
        """The number of replicas of the model that can serve.

        `routed` are the replicas to which Ray routes requests, if known: replicas that are loaded and do not drain. The
        first report of a new one can come after Ray has begun to route to it.
        """
        if routed is not None:
            return len(set(routed) - self.lost)
        return sum(heartbeat.model == model and not heartbeat.stage for heartbeat in self.heartbeats)

    def slots(self, model: str) -> int | None:
        """The number of sequences that each replica of the model can run; None before one has reported it."""
        loads = (heartbeat.load for heartbeat in self.heartbeats if heartbeat.model == model)
        return min((load.slots for load in loads if load is not None and load.slots), default=None)

    def status(self, model: Model, routed: Collection[str] | None = None) -> ModelStatus | None:
        """The model's state; None while the registry cannot know it. `routed`: see `ready`."""
        if self.ready(model.name, routed):
            return ModelStatus(model.name, ModelState.READY)
        stages = [heartbeat.stage for heartbeat in self.heartbeats if heartbeat.model == model.name]
        failure = self.failures.get(model.name)
        loading = [stage or "registering with Ray Serve" for stage in stages]
        if loading and not (model.deployment.scales_to_zero and not any(stages)):
            detail = loading[0] if failure is None else f"{failure} (Ray tries again: {loading[0]})"
            return ModelStatus(model.name, ModelState.LOADING, detail)
        if failure is not None:
            return ModelStatus(model.name, ModelState.FAILED, failure)
        if not self.complete:
            return None
        if model.deployment.scales_to_zero:
            return ModelStatus(model.name, ModelState.ASLEEP, "scaled to zero; the next request wakes it")
        return ModelStatus(model.name, ModelState.LOADING, "no replica is running; Ray is starting one")


class ReplicaRegistry:
    """Keeps the latest heartbeat and metrics of every process. A new registry is complete after one report of each."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._heartbeats: dict[str, tuple[float, Heartbeat]] = {}
        self._metrics: dict[str, tuple[float, MetricsSnapshot]] = {}
        self._failures: dict[str, tuple[float, str]] = {}
        self._ended: dict[str, tuple[float, None]] = {}

    def take(self, heartbeat: Heartbeat, metrics: MetricsSnapshot) -> None:
        """Store a report. A late report of a replica that has shut down or failed is ignored."""
        now, replica = self._clock(), heartbeat.replica
        if replica in self._ended:
            return
        self._metrics[replica] = (now, metrics)
        if heartbeat.failed:
            self._failures[heartbeat.model] = (now, heartbeat.stage)
        if heartbeat.failed or heartbeat.leaving:
            self._heartbeats.pop(replica, None)
            self._ended[replica] = (now, None)
            return
        self._heartbeats[replica] = (now, heartbeat)
        if not heartbeat.stage:
            self._failures.pop(heartbeat.model, None)

    def snapshot(self) -> RegistrySnapshot:
        now = self._forget()
        return RegistrySnapshot(
            now - self._began,
            [heartbeat for _, heartbeat in self._heartbeats.values()],
            {model: reason for model, (_, reason) in self._failures.items()},
            frozenset(self._metrics.keys() - self._heartbeats.keys()),
        )

    def measurements(self) -> Measurements:
        """The counters of all processes, and the gauges of the processes that still run."""
        now = self._forget()
        parts = [metrics.counters for _, metrics in self._metrics.values()]
        parts += [metrics.gauges for replica, (_, metrics) in self._metrics.items() if replica in self._heartbeats]
        ages = [(heartbeat.model, replica, now - at) for replica, (at, heartbeat) in self._heartbeats.items()]
        return Measurements(parts, ages)

    def _forget(self) -> float:
        """Remove entries that are too old. Returns the current time of the clock."""
        now = self._clock()
        self._heartbeats = _newer(self._heartbeats, now - HEARTBEAT_TIMEOUT_S)
        self._metrics = _newer(self._metrics, now - HEARTBEAT_TIMEOUT_S - KEEP_COUNTERS_S)
        self._ended = _newer(self._ended, now - HEARTBEAT_TIMEOUT_S - KEEP_COUNTERS_S)
        self._failures = _newer(self._failures, now - KEEP_FAILURE_S)
        return now


def _newer(entries: dict[K, tuple[float, V]], since: float) -> dict[K, tuple[float, V]]:
    return {key: entry for key, entry in entries.items() if entry[0] > since}
