"""The metrics of the queues of the models at one ingress."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Summary
from prometheus_client.metrics_core import Metric

from serve_app.core.queue_meter import RefusalReason

# Further tenants are counted together, so that the number of series has a bound.
MAX_TENANTS = 50
OTHER_TENANTS = "other"


class QueueSeries:
    """The queues of all models. The series of a tenant exist from its first request on; "" is that of all callers
    without keys.
    """

    def __init__(self, replica: str, models: Collection[str]) -> None:
        self._replica = replica
        self._registry = registry = CollectorRegistry()
        refusals = Counter(
            "serve_app_queue_refusals",
            "Requests that the queue of the model refused, by reason: 'full'; 'dropped' if the queue was full and "
            "another tenant had fewer requests in it; 'late' if the request could not expect a place in time.",
            ("model", "replica", "reason"),
            registry=registry,
        )
        reasons: tuple[RefusalReason, ...] = get_args(RefusalReason)
        self._refusals = {
            (model, reason): refusals.labels(model, replica, reason) for model in models for reason in reasons
        }
        self._waits = Summary(
            "serve_app_tenant_queue_seconds",
            f"Time that a request waited at the ingress for a place at a replica, by tenant; '{OTHER_TENANTS}' are the "
            f"tenants beyond the first {MAX_TENANTS} of the process.",
            ("model", "tenant", "replica"),
            registry=registry,
        )
        self._waiting = Gauge(
            "serve_app_waiting_requests",
            "Requests that wait at the ingress for a place at a replica.",
            ("model", "replica"),
            registry=registry,
        )
        for model in models:
            self._waiting.labels(model, replica)
        self._tenants: set[str] = set()

    def of_model(self, model: str) -> ModelQueueMeter:
        return ModelQueueMeter(self, model)

    def watch(self, model: str, waiting: Callable[[], int]) -> None:
        """Show the number of waiting requests of a model."""
        self._waiting.labels(model, self._replica).set_function(waiting)

    def families(self) -> list[Metric]:
        return list(self._registry.collect())

    def started(self, model: str, tenant: str, seconds: float) -> None:
        if tenant not in self._tenants:
            if len(self._tenants) >= MAX_TENANTS:
                tenant = OTHER_TENANTS
            else:
                self._tenants.add(tenant)
        self._waits.labels(model, tenant, self._replica).observe(seconds)

    def refused(self, model: str, reason: RefusalReason) -> None:
        self._refusals[model, reason].inc()


class ModelQueueMeter:
    """The QueueMeter of one model."""

    def __init__(self, series: QueueSeries, model: str) -> None:
        self._series = series
        self._model = model

    def started(self, tenant: str, seconds: float) -> None:
        self._series.started(self._model, tenant, seconds)

    def refused(self, reason: RefusalReason) -> None:
        self._series.refused(self._model, reason)
