"""Ray Serve's autoscaling policy for models: as many replicas as the work that waits needs.

The only module that uses Ray's interface for autoscaling policies, which is in alpha. The controller of Ray Serve runs
the policy. It need not be able to import this package: Ray pickles this module by value, and `autoscaling_config` does
so with the modules that the policy uses.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import wraps
from typing import Any

from ray import cloudpickle
from ray.serve._private import deployment_scheduler
from ray.serve.config import AutoscalingContext, AutoscalingPolicy

from serve_app.config import Autoscaling, Model
from serve_app.core import scaling
from serve_app.core.scaling import Demand, Objective, RecentHighest, ReplicaSpeed, typical, wanted_replicas
from serve_app.deployments import work_reports
from serve_app.deployments.work_reports import WorkReport, WorkReports

logger = logging.getLogger("ray.serve")

# The replicas that each ingress needs to answer requests without tokens, such as those for /metrics.
_INGRESS_TARGET = 32.0
# Time over which a calm moment does not count before replicas are stopped.
_SPAN_S = 60.0
_WORTH = "_serve_app_cache_worth"


class WorkPolicy:
    """Called by the controller at each pass of its loop, about twice a second.

    Without a fresh report of an ingress, and after an error, the number of replicas stays as it is.
    """

    def __init__(self, model: str, target_ttft_s: float, slots: int, min_idle: int, span_s: float) -> None:
        self._model = model
        self._objective = Objective(target_ttft_s, slots, min_idle)
        self._reports: WorkReports | None = None
        self._highest = RecentHighest(span_s)
        _stop_the_least_worth_first()

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        try:
            return self._decide(context), context.policy_state
        except Exception:
            logger.exception("the number of replicas of %s is not changed", self._model)
            return context.target_num_replicas, context.policy_state

    def _decide(self, context: AutoscalingContext) -> int:
        if self._reports is None:
            self._reports = WorkReports(context.app_name or "", self._model)
        reports = self._reports.read()
        if not reports:
            return int(context.target_num_replicas)
        demand, speeds = summed(reports)
        _note_worth(context.deployment_id, {replica: speed.cache_hits for replica, speed in speeds.items()})
        current = max(len(context.running_replicas), context.target_num_replicas)
        most = context.capacity_adjusted_max_replicas
        speed = typical(list(speeds.values()), current)
        wanted = wanted_replicas(demand, speed, self._objective, current, most)
        wanted = self._highest.limit(wanted, int(context.target_num_replicas), time.monotonic())
        if wanted != context.target_num_replicas:
            logger.info("%s needs %d replicas for %s at %s", self._model, wanted, demand, speed)
        return wanted


def summed(reports: Iterable[WorkReport]) -> tuple[Demand, dict[str, ReplicaSpeed]]:
    """The demand at all ingresses together, and the speeds of all replicas that one of them knows."""
    demand, speeds = Demand(), dict[str, ReplicaSpeed]()
    for report in reports:
        demand += report.demand
        speeds |= report.replicas
    return demand, speeds


def _note_worth(deployment: Any, worth: Mapping[str, float]) -> None:
    getattr(deployment_scheduler.DeploymentScheduler, _WORTH)[deployment] = worth


def _stop_the_least_worth_first() -> None:
    """Let Ray's scheduler stop, of the replicas on a node, the one whose prefix cache has saved the fewest tokens.

    Ray stops the newest one, and has no interface for another order. Its own rules about nodes apply before.
    """
    scheduler = deployment_scheduler.DeploymentScheduler
    if hasattr(scheduler, _WORTH) or not hasattr(scheduler, "_get_replicas_to_stop"):
        return
    setattr(scheduler, _WORTH, {})
    original = scheduler._get_replicas_to_stop

    @wraps(original)
    def ordered(self: Any, deployment_id: Any, *arguments: Any, **named: Any) -> Any:
        worth = getattr(scheduler, _WORTH).get(deployment_id, {})
        running = self._running_replicas[deployment_id]
        # Ray takes them from the last to the first. A replica that has shown nothing yet keeps its place at the end.
        for replica in sorted(running, key=lambda one: -worth.get(one.unique_id, 0.0)):
            running[replica] = running.pop(replica)
        return original(self, deployment_id, *arguments, **named)

    scheduler._get_replicas_to_stop = ordered


def model_autoscaling(model: Model, section: Autoscaling) -> dict[str, Any]:
    """Ray Serve's `autoscaling_config` of a model."""
    if not section.by_work:
        return ray_autoscaling(section)
    slots = min(model.engine.max_running, model.deployment.max_ongoing_requests)
    kwargs = {
        "model": model.name,
        "target_ttft_s": section.target_ttft_s,
        "slots": slots,
        "min_idle": section.min_idle,
        "span_s": min(_SPAN_S, section.downscale_delay_s),
    }
    with ExitStack() as stack:
        for module in (scaling, work_reports):
            cloudpickle.register_pickle_by_value(module)
            stack.callback(cloudpickle.unregister_pickle_by_value, module)
        policy = AutoscalingPolicy(policy_function=f"{__name__}:{WorkPolicy.__name__}", policy_kwargs=kwargs)
    return {**ray_autoscaling(section), "min_replicas": max(section.min_replicas, section.min_idle), "policy": policy}


def ray_autoscaling(section: Autoscaling) -> dict[str, Any]:
    """Ray Serve's `autoscaling_config` by the number of requests, for an ingress or a model."""
    options = section.model_dump(exclude={"target_ttft_s", "min_idle"})
    return {**options, "target_ongoing_requests": section.target_ongoing_requests or _INGRESS_TARGET}
