"""The whole graph on one screen: `import_path: serve_app.app:build` in serve_config.yaml."""

# No `from __future__ import annotations` here: Ray reads the annotation of `build` to validate the args,
# and would silently skip that for a string.
from typing import Any

from ray.serve import Application

from serve_app.config import AppConfig, Deployment, Model, Resources, deployment_name
from serve_app.deployments.hub import Hub
from serve_app.deployments.ingress import Ingress
from serve_app.deployments.replica import FusedReplica, Replica
from serve_app.deployments.telemetry import check

# A model that cannot be loaded fails the deployment after this many tries, rather than Ray's 20.
_CONSTRUCTOR_TRIES = 3
# What a fused replica lets in besides those its model takes: refusals, operators' questions, batch calls' frames.
_CALLERS = 1024


def build(config: AppConfig) -> Application:
    """Ingress -> one deployment a model, or one that is both; all of them report to the hub."""
    assert isinstance(config, AppConfig), "Ray did not validate the args of serve_config.yaml"
    check(config.telemetry)
    hub = Hub.options(  # type: ignore[attr-defined]
        num_replicas=1,
        max_ongoing_requests=100,
        max_queued_requests=1000,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=2,
        logging_config={"enable_access_log": False},
    ).bind()
    if config.ingress.fused:
        (model,) = config.models
        options = _callers(model.deployment) | _access_log(config)
        return _model(FusedReplica, model, options).bind(config, hub)
    assert config.ingress.deployment is not None, "an ingress that is not fused has a deployment"
    models = [
        _model(Replica, model, _called(model.deployment)).bind(model, hub, config.telemetry) for model in config.models
    ]
    ingress = Ingress.options(  # type: ignore[attr-defined]
        **_serve_options(config.ingress.deployment),
        **_access_log(config),
        ray_actor_options={"num_cpus": config.ingress.num_cpus},
    )
    return ingress.bind(config, models, hub)


def _model(kind: Any, model: Model, options: dict[str, Any]) -> Any:
    return kind.options(
        name=deployment_name(model.name),
        max_constructor_retry_count=_CONSTRUCTOR_TRIES,
        ray_actor_options=_actor_options(model.resources),
        **(_serve_options(model.deployment) | options),
    )


def _called(deployment: Deployment) -> dict[str, Any]:
    """Let Ray's queue hold also those who are only on their way to a replica.

    Ray counts them as waiting until it has asked the replica, so that after a pause it would refuse whom the gateway,
    which counts exactly, has let in. The ingress has an access log, by request.
    """
    scale = deployment.autoscaling
    replicas = scale.max_replicas if scale is not None else deployment.num_replicas or 1
    queue = deployment.max_queued_requests + replicas * deployment.max_ongoing_requests
    return {"max_queued_requests": queue, "logging_config": {"enable_access_log": False}}


def _callers(deployment: Deployment) -> dict[str, Any]:
    """Let Ray hold nobody back before the gateway, which counts: it knows a generation from a health check."""
    admitted = deployment.max_ongoing_requests + deployment.max_queued_requests
    return {"max_ongoing_requests": admitted + _CALLERS, "max_queued_requests": _CALLERS}


def _access_log(config: AppConfig) -> dict[str, Any]:
    """Ray's has text lines with no route of ours, no trace, and the status as it was before the stream."""
    return {"logging_config": {"enable_access_log": False}} if config.telemetry.log_format == "json" else {}


def _serve_options(deployment: Deployment) -> dict[str, Any]:
    options = deployment.model_dump(exclude={"autoscaling", "num_replicas"})
    if deployment.autoscaling is None:
        return {**options, "num_replicas": deployment.num_replicas}
    return {**options, "autoscaling_config": deployment.autoscaling.model_dump()}


def _actor_options(resources: Resources) -> dict[str, Any]:
    options: dict[str, Any] = {"num_cpus": resources.num_cpus, "num_gpus": resources.num_gpus}
    if resources.accelerator_type is not None:
        options["accelerator_type"] = resources.accelerator_type
    return options
