"""The stages of one model, in their order."""

from __future__ import annotations

from collections.abc import Callable

from serve_app.config import Model
from serve_app.core.engine import Engine
from serve_app.core.queries import ModelStatus
from serve_app.core.queue_meter import QueueMeter, Unmeasured
from serve_app.core.requests import GenerationRequest
from serve_app.core.scaling import Demand
from serve_app.core.tenants import NoTenants, Tenants
from serve_app.gateway.admission import Admission
from serve_app.gateway.estimates import Estimates
from serve_app.gateway.failover import Failover
from serve_app.gateway.outcome import Outcome, RequestMeter
from serve_app.gateway.quota import Quota
from serve_app.gateway.readiness import Readiness
from serve_app.gateway.response_cache import ResponseCache, SharedCache
from serve_app.gateway.room import room_of
from serve_app.gateway.shared_quotas import SharedQuotas
from serve_app.gateway.workload import Workload


class ModelChain:
    """`engine` is the outermost stage around `innermost`, which reaches the model's replicas.

    `meter` measures a request; `woke` receives the seconds that a model took to wake; `resumed` is called when the
    answer of a lost replica goes on at another one; `arrived` is called when a request arrives that must be computed.
    Without `cache` every answer is computed, and without `quotas` there are no limits. `tenants` knows the weights of
    tenants; without it all have the same. `queue_meter` measures the queue.
    """

    def __init__(
        self,
        model: Model,
        innermost: Engine,
        meter: Callable[[GenerationRequest], RequestMeter],
        woke: Callable[[float], None],
        resumed: Callable[[], None],
        arrived: Callable[[], None] = lambda: None,
        cache: SharedCache | None = None,
        quotas: SharedQuotas | None = None,
        tenants: Tenants | None = None,
        queue_meter: QueueMeter | None = None,
    ) -> None:
        self._deployment = deployment = model.deployment
        failover = Failover(innermost, resumed, draws_seeds=not model.may_use_vllm)
        estimates = Estimates()
        room, known = room_of(deployment, None, 1, 1), tenants or NoTenants()
        self._admission = Admission(
            failover,
            model.name,
            room,
            estimates,
            lambda name: known.tenant(name).weight,
            queue_meter or Unmeasured(),
        )
        held = deployment.max_ongoing_requests + deployment.max_queued_requests
        self._readiness = Readiness(self._admission, model, held, woke)
        self._workload = Workload(self._readiness, arrived, estimates)
        self._cache = None if cache is None else ResponseCache(self._workload, model, cache)
        computed = self._cache or self._workload
        self.engine: Engine = Outcome(computed if quotas is None else Quota(computed, model, quotas), meter)

    def update(self, status: ModelStatus, ready: int, ingresses: int, slots: int | None = None) -> None:
        """Take in the model's state, its ready replicas with their `slots`, and the number of ingresses."""
        self._readiness.update(status)
        self._admission.resize(room_of(self._deployment, slots, ready, ingresses))

    def demand(self) -> Demand:
        """What callers of this ingress want of the model; at least a request until a model that they woke is ready."""
        demand = self._workload.demand()
        return demand if demand.requests or not self._readiness.wakes else demand + Demand(waiting=1)

    @property
    def holds(self) -> bool:
        """Whether requests wait until the model is ready."""
        return self._readiness.holds

    def stop(self) -> None:
        self._readiness.stop()
        if self._cache is not None:
            self._cache.stop()
