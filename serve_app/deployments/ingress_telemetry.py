"""Measures the requests and HTTP calls of an ingress, and writes the metrics page of the whole service."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from prometheus_client.metrics_core import Metric

from serve_app.config import AppConfig
from serve_app.core.http import HttpCall
from serve_app.core.queries import ModelStatus
from serve_app.core.requests import GenerationRequest
from serve_app.deployments.registry import ReplicaRegistry
from serve_app.errors import ServeAppError
from serve_app.telemetry.experiment_metrics import ExperimentSeries
from serve_app.telemetry.exposition import exposition
from serve_app.telemetry.job_metrics import JobSeries
from serve_app.telemetry.meter import BackgroundMeter, IngressMetrics, Meter
from serve_app.telemetry.metrics import CacheSeries, QuotaSeries, ages, metrics_complete, states
from serve_app.telemetry.queue_metrics import ModelQueueMeter

if TYPE_CHECKING:
    from serve_app.deployments.heartbeats import Reporter


class IngressTelemetry:
    """Counts the requests and calls of the ingress `replica`. `reporter` is set before the first scrape."""

    reporter: Reporter

    def __init__(self, config: AppConfig, replica: str, registry: ReplicaRegistry) -> None:
        models = [model.name for model in config.models]
        self._metrics = IngressMetrics(replica, models, config.telemetry.opentelemetry_metrics)
        self._registry = registry
        self._models: dict[str, tuple[ModelStatus, int]] = {}

    def meter(self, request: GenerationRequest) -> Meter | BackgroundMeter:
        return self._metrics.meter(request)

    @property
    def experiments(self) -> ExperimentSeries:
        """The metrics of experiments."""
        return self._metrics.experiments

    @property
    def jobs(self) -> JobSeries:
        """The metrics of batches."""
        return self._metrics.jobs

    def key_used(self, outcome: str) -> None:
        self._metrics.jobs.key_used(outcome)

    def answers_kept(self, size: int) -> None:
        self._metrics.jobs.answers_kept(size)

    def woke(self, model: str, seconds: float) -> None:
        """Record how long a model that was scaled to zero took until it was ready."""
        self._metrics.woke(model, seconds)

    def resumed(self, model: str) -> None:
        """Count an answer that goes on at another replica."""
        self._metrics.resumed(model)

    def watch_queue(self, model: str, waiting: Callable[[], int]) -> None:
        """Show the number of waiting requests of a model."""
        self._metrics.queues.watch(model, waiting)

    def queue_meter(self, model: str) -> ModelQueueMeter:
        """Measures the queue of a model."""
        return self._metrics.queues.of_model(model)

    @property
    def cache(self) -> CacheSeries:
        """Measures the response cache."""
        return self._metrics.cache

    @property
    def quotas(self) -> QuotaSeries:
        """Measures the limits of keys and tenants, and their usage."""
        return self._metrics.quotas

    def set_status(self, status: ModelStatus, ready: int) -> None:
        """Keep the latest state of a model and the number of its ready replicas."""
        self._models[status.name] = (status, ready)

    def families(self) -> list[Metric]:
        return self._metrics.families(self.reporter.lag_s)

    def refused(self, error: ServeAppError, model: str | None) -> None:
        self._metrics.http.refused(error.code, model or "")

    def auth_refused(self, reason: str) -> None:
        self._metrics.http.auth_refused(reason)

    def watch_keys(self, age_s: Callable[[], float | None]) -> None:
        """Show the age of the API keys, None for keys that were never read."""
        self._metrics.http.keys_age.set_function(lambda: math.inf if (age := age_s()) is None else age)

    def call_began(self) -> None:
        self._metrics.http.open.inc()

    def call_ended(self, call: HttpCall) -> None:
        self._metrics.http.open.dec()
        self._metrics.http.ended(call)

    def responses_stored(self, count: int, size: int, removed: int) -> None:
        self._metrics.http.responses_stored(count, size, removed)

    async def exposition(self) -> bytes:
        """The metrics of all processes: the current ones of this process, the last reported ones of the others."""
        self._registry.take(*self.reporter.report())
        state, measured = self._registry.snapshot(), self._registry.measurements()
        current = states((name, status.state, ready) for name, (status, ready) in self._models.items())
        return exposition(measured.parts, [*ages(measured.ages), *current, metrics_complete(state.complete)])
