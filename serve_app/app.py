"""The whole graph on one screen: `import_path: serve_app.app:build` in serve_config.yaml."""

# No `from __future__ import annotations` here: Ray reads the annotation of `build` to validate the args,
# and would silently skip that for a string.
from typing import Any

from ray.serve import Application

from serve_app.config import AppConfig, Deployment, Model, Resources, deployment_name
from serve_app.deployments.ingress import Ingress
from serve_app.deployments.replica import ModelReplica
from serve_app.deployments.telemetry import check
from serve_app.gateway.admission import QUERIES_RUNNING

# A model that cannot be loaded fails the deployment after this many tries; Ray's default is 20.
_CONSTRUCTOR_TRIES = 3
# Places for requests whose end has not reached Ray yet while the next request already comes.
_SPARE = 32
_NO_ACCESS_LOG = {"enable_access_log": False}


def build(config: AppConfig) -> Application:
    """An ingress in front of one deployment a model."""
    assert isinstance(config, AppConfig), "Ray did not validate the args of serve_config.yaml"
    check(config.telemetry)
    models = [_model(model, config).bind(model, config.telemetry) for model in config.models]
    ingress = Ingress.options(  # type: ignore[attr-defined]
        **_serve_options(config.ingress.deployment),
        ray_actor_options={"num_cpus": config.ingress.num_cpus},
        # Ray's access log has text lines without our route or trace, and the status from before the stream.
        **({"logging_config": _NO_ACCESS_LOG} if config.telemetry.log_format == "json" else {}),
    )
    return ingress.bind(config, models)


def _model(model: Model, config: AppConfig) -> Any:
    """The gateway counts generations and queries exactly, so that Ray's own bounds must only never be in their way."""
    options = _serve_options(model.deployment)
    ingresses = _most_replicas(config.ingress.deployment)
    options["max_ongoing_requests"] += ingresses * QUERIES_RUNNING + _SPARE
    options["max_queued_requests"] += _most_replicas(model.deployment) * options["max_ongoing_requests"]
    return ModelReplica.options(  # type: ignore[attr-defined]
        name=deployment_name(model.name),
        max_constructor_retry_count=_CONSTRUCTOR_TRIES,
        ray_actor_options=_actor_options(model.resources),
        logging_config=_NO_ACCESS_LOG,  # the ingress has one, by HTTP call
        **options,
    )


def _most_replicas(deployment: Deployment) -> int:
    return deployment.autoscaling.max_replicas if deployment.autoscaling else deployment.num_replicas or 1


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
